//! Counts the connections of backends again (`backend_loads`), for services that choose by them.
//!
//! The programs count what they see begin and end. Some ends go unseen: datagram flows just fall idle, LRU maps evict,
//! processes close sockets that were pointed at a backend. So a thread of its own counts flows and sockets now and then, and
//! sets right what differs. It is the only one but the programs that writes this map, and it writes no other. While no
//! backend has an element there, because no service asks for it, it does nothing.
//!
//! Sockets are those of the daemon's network namespace: the kernel does not show others. Those of pods (`--connect tcp` and
//! `all`) therefore count only until the next time.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use aya::Pod;
use sheave_common::backend::flags::COUNTED;
use sheave_common::config::Timeouts;
use sheave_common::flow::{Flow, FlowKey, closing, flags};
use sheave_common::load::Load;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use tracing::{debug, warn};

use super::error::MapError;
use super::map::Map;
use super::maps::{FamilyMaps, Maps};
use super::sockets::diagnosis::Diagnosis;
use super::syscall::monotonic_seconds;
use super::worker::{Call, Calls, Worker};

/// How often connections are counted.
const INTERVAL: Duration = Duration::from_secs(5);
/// Counting takes this part of one CPU's time at most, however many flows there are.
const PART: u32 = 50;

/// Connections by backend id.
type Counts = BTreeMap<u32, i64>;

/// Starts the thread, for the calling thread's network namespace and the maps pinned in a directory.
pub(super) fn start(directory: &Path) -> Result<Worker, MapError> {
    let connections = Connections::open(directory)?;
    Ok(Worker::start(move |calls| work(calls, &connections)))
}

fn work(calls: &Calls, connections: &Connections) {
    let mut wait = INTERVAL;
    while calls.wait(wait) != Call::End {
        let started = Instant::now();
        match connections.settle() {
            Ok(0) => {}
            Ok(corrected) => debug!(corrected, "counted the connections of backends again"),
            Err(error) => warn!(%error, "cannot count the connections of backends"),
        }
        wait = INTERVAL.max(started.elapsed() * PART);
    }
}

/// Where connections are found.
struct Connections {
    maps: Maps,
    reverse4: Map<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>>,
    reverse6: Map<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>>,
    /// Without it, sockets count only until the next time.
    diagnosis: Option<Diagnosis>,
}

impl Connections {
    fn open(directory: &Path) -> Result<Self, MapError> {
        Ok(Self {
            maps: Maps::open(directory, false)?,
            reverse4: Map::open(directory, names::SOCK_REVERSE4, true)?,
            reverse6: Map::open(directory, names::SOCK_REVERSE6, true)?,
            diagnosis: Diagnosis::open().inspect_err(|error| warn!(%error, "cannot count sockets")).ok(),
        })
    }

    /// Counts, and corrects what differs; returns how many backends that were.
    fn settle(&self) -> Result<usize, MapError> {
        let before: Counts =
            self.maps.backend_loads.dump()?.into_iter().map(|(id, load)| (id, load.connections)).collect();
        if before.is_empty() {
            return Ok(0);
        }
        let mut counts: Counts = before.keys().map(|id| (*id, 0)).collect();
        self.count(&mut counts)?;
        let mut corrected = 0;
        for (id, before) in before {
            let Some(Load { connections: after }) = self.maps.backend_loads.get(&id)? else { continue };
            let counted = counts.get(&id).copied().unwrap_or(0);
            if counted == 0 && !self.is_counted(id)? {
                self.maps.backend_loads.delete(&id)?;
            } else if let Some(connections) = correction(before, after, counted) {
                self.maps.backend_loads.put(&id, &Load { connections })?;
                corrected += 1;
            }
        }
        Ok(corrected)
    }

    /// Whether a backend is there and its service chooses by connections.
    fn is_counted(&self, id: u32) -> Result<bool, MapError> {
        let flags = match self.maps.v4.backends.get(&id)? {
            Some(backend) => Some(backend.flags),
            None => self.maps.v6.backends.get(&id)?.map(|backend| backend.flags),
        };
        Ok(flags.is_some_and(|flags| flags & COUNTED != 0))
    }

    fn count(&self, counts: &mut Counts) -> Result<(), MapError> {
        let timeouts = self.maps.config.get(&0)?.map_or(Timeouts::DEFAULT, |config| config.timeouts);
        flows(&self.maps.v4, &timeouts, counts)?;
        flows(&self.maps.v6, &timeouts, counts)?;
        let mut sockets = HashMap::new();
        balanced::<_, Ipv4Addr>(&self.reverse4, counts, &mut sockets)?;
        balanced::<_, Ipv6Addr>(&self.reverse6, counts, &mut sockets)?;
        let Some(diagnosis) = self.diagnosis.as_ref().filter(|_| !sockets.is_empty()) else { return Ok(()) };
        for protocol in [PROTOCOL_TCP, PROTOCOL_UDP] {
            match diagnosis.connected(protocol) {
                Ok(connected) => {
                    let backends = connected.iter().map(|socket| (socket.cookie(), socket.peer(), protocol));
                    backends.filter_map(|socket| sockets.get(&socket)).for_each(|id| add(counts, *id));
                }
                Err(error) => warn!(%error, protocol, "cannot count sockets"),
            }
        }
        Ok(())
    }
}

/// Whether a flow's connection is neither over nor idle for too long.
pub(super) fn is_open<A: Address>(key: &FlowKey<A>, flow: &Flow<A>, timeouts: &Timeouts, now: u32) -> bool {
    let idle = now.saturating_sub(flow.last_seen);
    !closing::is_over(flow.closing) && idle <= timeouts.of(key.protocol, flow.state, flow.closing)
}

/// Counts a family's flows that are open: the half that translates the client's packets, of which each has one.
fn flows<A: Address>(maps: &FamilyMaps<A>, timeouts: &Timeouts, counts: &mut Counts) -> Result<(), MapError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    for map in [&maps.conntrack, &maps.half_open] {
        let now = monotonic_seconds();
        let backends = map.dump_as(|key, flow| {
            let counted = flow.flags & (flags::COUNTED | flags::REPLY) == flags::COUNTED;
            (counted && is_open(key, flow, timeouts, now)).then_some(flow.backend_id)
        })?;
        backends.into_iter().for_each(|backend_id| add(counts, backend_id));
    }
    Ok(())
}

/// Adds the sockets (cookie, peer, protocol) of a family that were pointed at one of these backends.
fn balanced<A: Address, I: From<A> + Into<IpAddr>>(
    reverse: &Map<SocketKey<A>, SocketPeer<A>>,
    counts: &Counts,
    sockets: &mut HashMap<(u64, SocketAddr, u8), u32>,
) -> Result<(), MapError>
where
    SocketKey<A>: Pod,
    SocketPeer<A>: Pod,
{
    let of_interest = |(_, peer): &(_, SocketPeer<A>)| counts.contains_key(&peer.backend_id);
    sockets.extend(reverse.dump()?.into_iter().filter(of_interest).map(|(key, peer)| {
        let address = SocketAddr::new(I::from(key.address).into(), u16::from_be(key.port_be));
        ((key.cookie, address, key.protocol), peer.backend_id)
    }));
    Ok(())
}

fn add(counts: &mut Counts, id: u32) {
    if let Some(count) = counts.get_mut(&id) {
        *count += 1;
    }
}

/// What to write instead of a count that the programs had at `before` and `after` when something between was counted, if they
/// can't all be right: what came and went meanwhile stays in it.
fn correction(before: i64, after: i64, counted: i64) -> Option<i64> {
    let nearest = counted.clamp(before.min(after), before.max(after));
    (counted != nearest).then_some(after + counted - nearest)
}

#[cfg(test)]
mod tests {
    use super::correction;

    #[test]
    fn what_comes_and_goes_while_connections_are_counted_is_not_taken_for_an_error() {
        assert_eq!(correction(5, 5, 5), None);
        assert_eq!(correction(5, 8, 6), None);
        assert_eq!(correction(8, 5, 6), None);
        assert_eq!(correction(5, 5, 2), Some(2), "three ends went unseen");
        assert_eq!(correction(5, 8, 2), Some(5), "the same, and three connections came");
        assert_eq!(correction(-2, -3, 0), Some(-1), "two were taken away twice, and one ended");
    }
}
