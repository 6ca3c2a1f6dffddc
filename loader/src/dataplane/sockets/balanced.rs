//! What connect-time balancing did for sockets, and whether it still holds.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::Pod;
use sheave_common::backend::{Backend, flags::SERVING};
use sheave_common::frontend::{Frontend, FrontendKey};
use sheave_common::socket::{SocketKey, SocketPeer};
use sheave_common::{Address, Ipv4Address, Ipv6Address, PROTOCOL_UDP, names};

use crate::dataplane::error::MapError;
use crate::dataplane::map::Map;

/// How often an element is read until two reads agree.
const ATTEMPTS: u32 = 8;

/// Balanced UDP sockets of both families.
pub(super) struct Balanced {
    v4: Family<Ipv4Address>,
    v6: Family<Ipv6Address>,
}

/// Of one family.
struct Family<A: Address> {
    reverse: Map<SocketKey<A>, SocketPeer<A>>,
    backends: Map<u32, Backend<A>>,
    frontends: Map<FrontendKey<A>, Frontend>,
    /// Connected sockets that were in `sock_reverse` at some look. A socket that lives for weeks is the first that an LRU
    /// map forgets.
    known: HashMap<SocketKey<A>, SocketPeer<A>>,
}

impl Balanced {
    pub(super) fn open(directory: &Path) -> Result<Self, MapError> {
        Ok(Self {
            v4: Family::open(directory, names::SOCK_REVERSE4, names::BACKENDS4, names::FRONTENDS4)?,
            v6: Family::open(directory, names::SOCK_REVERSE6, names::BACKENDS6, names::FRONTENDS6)?,
        })
    }

    /// Takes in which of the connected sockets (cookie, peer) were balanced, and forgets those that are not listed.
    pub(super) fn learn(&mut self, connected: &[(u64, SocketAddr)]) -> Result<(), MapError> {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (cookie, peer) in connected {
            match peer.ip() {
                IpAddr::V4(address) => v4.push(key(*cookie, address.into(), peer.port())),
                IpAddr::V6(address) => v6.push(key(*cookie, address.into(), peer.port())),
            }
        }
        self.v4.learn(&v4)?;
        self.v6.learn(&v6)
    }

    /// Whether a connected socket was balanced to a backend that is gone, or by a frontend that is gone or another service's.
    pub(super) fn is_stale(&self, cookie: u64, peer: SocketAddr) -> Result<bool, MapError> {
        match peer.ip() {
            IpAddr::V4(address) => self.v4.is_stale(&key(cookie, address.into(), peer.port())),
            IpAddr::V6(address) => self.v6.is_stale(&key(cookie, address.into(), peer.port())),
        }
    }
}

fn key<A: Address>(cookie: u64, address: A, port: u16) -> SocketKey<A> {
    SocketKey::new(cookie, address, port.to_be(), PROTOCOL_UDP)
}

impl<A: Address + std::hash::Hash> Family<A>
where
    SocketKey<A>: Pod,
    SocketPeer<A>: Pod,
    Backend<A>: Pod,
    FrontendKey<A>: Pod,
{
    fn open(
        directory: &Path,
        reverse: &'static str,
        backends: &'static str,
        frontends: &'static str,
    ) -> Result<Self, MapError> {
        Ok(Self {
            reverse: Map::open(directory, reverse, true)?,
            backends: Map::open(directory, backends, true)?,
            frontends: Map::open(directory, frontends, true)?,
            known: HashMap::new(),
        })
    }

    fn learn(&mut self, connected: &[SocketKey<A>]) -> Result<(), MapError> {
        let mut known = HashMap::new();
        for key in connected {
            let peer = steady(|| self.reverse.get(key))?.or_else(|| self.known.get(key).copied());
            // Backend 0: the socket went on to connect without a Service.
            if let Some(peer) = peer.filter(|peer| peer.backend_id != 0) {
                known.insert(*key, peer);
            }
        }
        self.known = known;
        Ok(())
    }

    fn is_stale(&self, key: &SocketKey<A>) -> Result<bool, MapError> {
        let Some(peer) = self.known.get(key) else { return Ok(false) };
        let backend = steady(|| self.backends.get(&peer.backend_id))?;
        if backend.is_none_or(|backend| backend.flags & SERVING == 0) {
            return Ok(true);
        }
        let frontend = FrontendKey::new(peer.address, peer.port_be, PROTOCOL_UDP);
        let frontend = steady(|| self.frontends.get(&frontend))?;
        Ok(frontend.is_none_or(|frontend| frontend.service_id != peer.service_id))
    }
}

/// An element as two reads in a row find it: the kernel may recycle a replaced element while it is copied, so that one read
/// alone may mix two.
fn steady<V: PartialEq>(read: impl Fn() -> Result<Option<V>, MapError>) -> Result<Option<V>, MapError> {
    let mut last = read()?;
    for _ in 0..ATTEMPTS {
        let next = read()?;
        if next == last {
            return Ok(next);
        }
        last = next;
    }
    Ok(last)
}
