//! Says towards which backend the source ports of SNAT have run out. The programs only count that.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sheave_common::DropReason;
use sheave_common::flow::{Flow, FlowKey, flags};
use tracing::warn;

use super::{ControllerError, chain};
use crate::dataplane::{MapError, PinnedMaps};

/// How often the counter is looked at.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks at the counter until the daemon ends. One line for each time that they run out, until nothing more is dropped.
pub(super) async fn watch(pins: PathBuf, range: (u16, u16)) -> Result<(), ControllerError> {
    let mut known = None;
    let mut said = false;
    loop {
        let directory = pins.clone();
        match tokio::task::spawn_blocking(move || look(&directory, known, range, said)).await? {
            Ok((dropped, crowded)) => {
                said = known.is_some_and(|known| dropped > known);
                known = Some(dropped);
                if let Some((backend, ports)) = crowded {
                    warn!(
                        %backend,
                        ports,
                        "connections are dropped: no source port of --snat-ports is free towards this backend; a larger range \
                         helps, or more endpoints"
                    );
                }
            }
            Err(error) => warn!(error = chain(&error), "cannot find out whether source ports have run out"),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Packets that were dropped so far because no port was free, and the backend towards which most are taken, with their number, if
/// more were dropped than is known, and it was not said yet.
fn look(
    pins: &Path,
    known: Option<u64>,
    range: (u16, u16),
    said: bool,
) -> Result<(u64, Option<(SocketAddr, usize)>), MapError> {
    let maps = PinnedMaps::open(pins)?;
    let reasons = maps.drop_counters()?;
    let dropped = reasons
        .into_iter()
        .filter(|(reason, _)| *reason == DropReason::SnatPortsExhausted)
        .map(|(_, count)| count)
        .sum();
    if said || known.is_none_or(|known| dropped == known) {
        return Ok((dropped, None));
    }
    let mut taken = Taken::new();
    add::<_, Ipv4Addr>(maps.conntrack4()?, range, &mut taken);
    add::<_, Ipv4Addr>(maps.half_open4()?, range, &mut taken);
    add::<_, Ipv6Addr>(maps.conntrack6()?, range, &mut taken);
    add::<_, Ipv6Addr>(maps.half_open6()?, range, &mut taken);
    let counts = taken.into_iter().map(|((backend, _), ports)| (backend, ports.len()));
    Ok((dropped, counts.max_by_key(|(_, ports)| *ports)))
}

/// Source ports by backend and protocol.
type Taken = HashMap<(SocketAddr, u8), HashSet<u16>>;

/// Adds those of the range that flows have.
fn add<A: Copy, I: From<A> + Into<IpAddr>>(
    flows: Vec<(FlowKey<A>, Flow<A>)>,
    (first, last): (u16, u16),
    taken: &mut Taken,
) {
    for (key, flow) in flows {
        let rewrite = flow.rewrite;
        let port = u16::from_be(rewrite.source_port_be);
        if flow.flags & flags::REPLY == 0 && (first..=last).contains(&port) {
            let backend =
                SocketAddr::new(I::from(rewrite.destination).into(), u16::from_be(rewrite.destination_port_be));
            taken.entry((backend, key.protocol)).or_default().insert(port);
        }
    }
}
