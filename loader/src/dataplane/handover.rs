//! What has to be known while one proxy takes over from another: what is a frontend here, and what is still open.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::Pod;
use sheave_common::config::Timeouts;
use sheave_common::flow::{Flow, FlowKey, flags};
use sheave_common::frontend::FrontendKey;
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_TCP, PROTOCOL_UDP, names};
use tracing::warn;

use super::error::MapError;
use super::loads;
use super::map::Map;
use super::maps::{FamilyMaps, Maps};
use super::sockets::diagnosis::{Connected, Diagnosis};
use super::syscall::monotonic_seconds;

/// Read-only access to what is pinned, for another thread than the one that writes.
pub struct Handover {
    maps: Maps,
    reverse4: Map<SocketKey<Ipv4Address>, SocketPeer<Ipv4Address>>,
    reverse6: Map<SocketKey<Ipv6Address>, SocketPeer<Ipv6Address>>,
}

/// What would notice if the dataplane went away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Open {
    /// Flows that are neither over nor idle for too long.
    pub flows: usize,
    /// Connected sockets of this network namespace's processes that were pointed at a backend: they would see its address. `None` if
    /// the kernel does not tell.
    pub sockets: Option<usize>,
}

impl Handover {
    /// Opens the maps pinned in a directory.
    ///
    /// # Errors
    ///
    /// If a pin is missing, may not be read, or was made by another version.
    pub fn open(directory: &Path) -> Result<Self, MapError> {
        Ok(Self {
            maps: Maps::open(directory, true)?,
            reverse4: Map::open(directory, names::SOCK_REVERSE4, true)?,
            reverse6: Map::open(directory, names::SOCK_REVERSE6, true)?,
        })
    }

    /// Whether an address and port are a frontend's.
    ///
    /// # Errors
    ///
    /// If the map can't be read.
    pub fn is_frontend(&self, at: SocketAddr, protocol: u8) -> Result<bool, MapError> {
        let port_be = at.port().to_be();
        let found = match at.ip() {
            IpAddr::V4(address) => self.maps.v4.frontends.get(&FrontendKey::new(address.into(), port_be, protocol))?,
            IpAddr::V6(address) => self.maps.v6.frontends.get(&FrontendKey::new(address.into(), port_be, protocol))?,
        };
        Ok(found.is_some())
    }

    /// What is still open.
    ///
    /// # Errors
    ///
    /// If a map can't be read.
    pub fn remaining(&self) -> Result<Open, MapError> {
        let timeouts = self.maps.config.get(&0)?.map_or(Timeouts::DEFAULT, |config| config.timeouts);
        let flows = flows(&self.maps.v4, &timeouts)? + flows(&self.maps.v6, &timeouts)?;
        let mut sockets = Some(0);
        let diagnosis = Diagnosis::open();
        for protocol in [PROTOCOL_TCP, PROTOCOL_UDP] {
            match diagnosis.as_ref().map_or_else(|error| Err(error.kind().into()), |them| them.connected(protocol)) {
                Ok(connected) => {
                    for socket in connected {
                        let balanced = usize::from(self.is_balanced(&socket, protocol)?);
                        sockets = sockets.map(|sockets| sockets + balanced);
                    }
                }
                Err(error) => {
                    warn!(%error, protocol, "cannot count sockets");
                    sockets = None;
                }
            }
        }
        Ok(Open { flows, sockets })
    }

    fn is_balanced(&self, socket: &Connected, protocol: u8) -> Result<bool, MapError> {
        let (cookie, peer) = (socket.cookie(), socket.peer());
        let port_be = peer.port().to_be();
        // Backend 0: the socket went on to connect without a Service.
        Ok(match peer.ip() {
            IpAddr::V4(address) => {
                let key = SocketKey::new(cookie, address.into(), port_be, protocol);
                self.reverse4.get(&key)?.is_some_and(|peer| peer.backend_id != 0)
            }
            IpAddr::V6(address) => {
                let key = SocketKey::new(cookie, address.into(), port_be, protocol);
                self.reverse6.get(&key)?.is_some_and(|peer| peer.backend_id != 0)
            }
        })
    }
}

impl Open {
    /// Whether nothing would notice.
    #[must_use]
    pub const fn is_nothing(self) -> bool {
        self.flows == 0 && matches!(self.sockets, Some(0))
    }
}

/// Open flows of a family: the half that translates the client's packets, of which each has one.
fn flows<A: Address>(maps: &FamilyMaps<A>, timeouts: &Timeouts) -> Result<usize, MapError>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut open = 0;
    for map in [&maps.conntrack, &maps.half_open] {
        let now = monotonic_seconds();
        let is_counted = |key: &FlowKey<A>, flow: &Flow<A>| {
            flow.flags & flags::REPLY == 0 && loads::is_open(key, flow, timeouts, now)
        };
        open += map.dump_as(|key, flow| is_counted(key, flow).then_some(()))?.len();
    }
    Ok(open)
}
