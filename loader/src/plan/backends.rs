//! The backends in the kernel, by service port and endpoint.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use super::write::Backend;

/// One backend, without its service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    address: IpAddr,
    port: u16,
    weight: u16,
    /// Bits that don't fit are no bits of ours; all are set then, which no backend wants.
    flags: u16,
    pub(super) id: u32,
}

impl Held {
    fn new(id: u32, backend: &Backend) -> Self {
        let flags = u16::try_from(backend.flags).unwrap_or(u16::MAX);
        Self { address: backend.address, port: backend.port, weight: backend.weight, flags, id }
    }

    pub(super) const fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    pub(super) fn backend(&self, service_id: u32) -> Backend {
        let flags = self.flags.into();
        Backend { service_id, address: self.address, port: self.port, weight: self.weight, flags }
    }
}

/// All of them: most of what a large cluster is, so there is one copy, and it is compact.
#[derive(Clone, Debug, Default)]
pub(super) struct Backends {
    /// Service id → its backends by endpoint, then id. Several of one endpoint are what a crash or somebody else left; the
    /// first whose id is not 0 is the endpoint's.
    of: HashMap<u32, Vec<Held>>,
    /// Of IPv4, of IPv6.
    counts: [usize; 2],
}

impl Backends {
    pub(super) fn restore(mut backends: Vec<(u32, Backend)>) -> Self {
        backends.sort_unstable_by_key(|(id, backend)| (backend.service_id, backend.address, backend.port, *id));
        let services = backends.chunk_by(|(_, one), (_, next)| one.service_id == next.service_id);
        let held = |(id, backend): &(u32, Backend)| Held::new(*id, backend);
        let of = services.map(|backends| (backends[0].1.service_id, backends.iter().map(held).collect()));
        let of = of.collect();
        let mut counts = [0; 2];
        for (_, backend) in &backends {
            counts[family(backend.address)] += 1;
        }
        Self { of, counts }
    }

    /// A service port's.
    pub(super) fn of(&self, service_id: u32) -> &[Held] {
        self.of.get(&service_id).map_or(&[], Vec::as_slice)
    }

    /// An endpoint's. The id 0 is no backend's: in the table it says that there is none.
    pub(super) fn get(&self, service_id: u32, endpoint: SocketAddr) -> Option<&Held> {
        let of = self.of(service_id);
        let first = of.partition_point(|held| (held.endpoint(), held.id) < (endpoint, 1));
        of.get(first).filter(|held| held.endpoint() == endpoint)
    }

    /// Whether this backend is there.
    pub(super) fn contains(&self, service_id: u32, endpoint: SocketAddr, id: u32) -> bool {
        position(self.of(service_id), endpoint, id).is_ok()
    }

    /// All of them, with their service ids.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Held)> {
        self.of.iter().flat_map(|(service_id, of)| of.iter().map(|held| (*service_id, held)))
    }

    /// Ids of the service ports that have some.
    pub(super) fn services(&self) -> impl Iterator<Item = u32> {
        self.of.keys().copied()
    }

    /// How many there are of IPv4 and of IPv6.
    pub(super) const fn counts(&self) -> [usize; 2] {
        self.counts
    }

    /// So many of a service port are about to be put.
    pub(super) fn expect(&mut self, service_id: u32, number: usize) {
        if number > 0 {
            self.of.entry(service_id).or_default().reserve_exact(number);
        }
    }

    pub(super) fn put(&mut self, id: u32, backend: &Backend) {
        let of = self.of.entry(backend.service_id).or_default();
        let held = Held::new(id, backend);
        match position(of, held.endpoint(), id) {
            Ok(known) => of[known] = held,
            Err(place) => {
                of.insert(place, held);
                self.counts[family(held.address)] += 1;
            }
        }
    }

    pub(super) fn delete(&mut self, service_id: u32, endpoint: SocketAddr, id: u32) {
        let Some(of) = self.of.get_mut(&service_id) else { return };
        if let Ok(known) = position(of, endpoint, id) {
            of.remove(known);
            self.counts[family(endpoint.ip())] -= 1;
        }
        if of.is_empty() {
            self.of.remove(&service_id);
        }
    }
}

/// Index of an address's family where IPv4 and IPv6 are counted apart.
pub(super) fn family(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

fn position(of: &[Held], endpoint: SocketAddr, id: u32) -> Result<usize, usize> {
    of.binary_search_by_key(&(endpoint, id), |held| (held.endpoint(), held.id))
}
