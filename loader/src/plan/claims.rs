//! Which service ports claim a frontend, and which addresses carry a mark.
//!
//! Several may claim one (a shared external IP): the first by name has it, so that every node and every restart agree,
//! and the next one gets it when that one leaves.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use sheave_common::frontend::flags::{
    CLUSTER_IP, EXTERNAL_IP, HAS_ENDPOINT, LOAD_BALANCER, SERVICE_ADDRESS, WHOLE_ADDRESS,
};

use super::wanted::Wanted;
use super::write::FrontendAddress;
use crate::model::desired::ServicePortName;

/// All claims.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    /// Sorted; never empty.
    claimants: BTreeMap<FrontendAddress, Vec<ServicePortName>>,
    /// Addresses that carry a mark.
    marked: BTreeMap<IpAddr, Marked>,
}

/// How many frontends on an address ask for a mark.
#[derive(Clone, Copy, Debug, Default)]
struct Marked {
    /// Those of a ClusterIP.
    cluster: usize,
    /// Those of a load-balancer or external IP.
    service: usize,
    /// Those of either kind that have an endpoint.
    with_endpoint: usize,
}

/// What a frontend has to say about the mark on its address.
#[derive(Clone, Copy, Debug)]
struct Asked {
    /// As [`mark_of`].
    mark: u32,
    /// Its cluster set is not empty.
    has_endpoint: bool,
}

impl Marked {
    fn add(&mut self, asked: Asked) {
        *self.count(asked.mark) += 1;
        self.with_endpoint += usize::from(asked.has_endpoint);
    }

    fn remove(&mut self, asked: Asked) {
        *self.count(asked.mark) -= 1;
        self.with_endpoint -= usize::from(asked.has_endpoint);
    }

    const fn count(&mut self, mark: u32) -> &mut usize {
        if mark == WHOLE_ADDRESS { &mut self.cluster } else { &mut self.service }
    }
}

/// Frontends and marks whose value may have changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) frontends: Vec<FrontendAddress>,
    pub(super) addresses: Vec<IpAddr>,
}

impl Touched {
    /// Each once, in order.
    pub(super) fn sort(&mut self) {
        self.frontends.sort_unstable();
        self.frontends.dedup();
        self.addresses.sort_unstable();
        self.addresses.dedup();
    }
}

impl Claims {
    pub(super) fn claim(&mut self, name: &ServicePortName, port: &Wanted, touched: &mut Touched) {
        for (key, asked) in frontends(name, port) {
            let claimants = self.claimants.entry(key).or_insert_with(|| Vec::with_capacity(1));
            if let Err(place) = claimants.binary_search(name) {
                claimants.insert(place, name.clone());
            }
            touched.frontends.push(key);
            if let Some(asked) = asked {
                self.marked.entry(key.address).or_default().add(asked);
                touched.addresses.push(key.address);
            }
        }
    }

    pub(super) fn release(&mut self, name: &ServicePortName, port: &Wanted, touched: &mut Touched) {
        for (key, asked) in frontends(name, port) {
            if let Some(claimants) = self.claimants.get_mut(&key) {
                claimants.retain(|claimant| claimant != name);
                if claimants.is_empty() {
                    self.claimants.remove(&key);
                }
            }
            touched.frontends.push(key);
            if let Some(asked) = asked
                && let Some(marked) = self.marked.get_mut(&key.address)
            {
                marked.remove(asked);
                if marked.cluster + marked.service == 0 {
                    self.marked.remove(&key.address);
                }
                touched.addresses.push(key.address);
            }
        }
    }

    /// Who has this frontend.
    pub(super) fn owner(&self, frontend: &FrontendAddress) -> Option<&ServicePortName> {
        self.claimants.get(frontend)?.first()
    }

    /// The service ports that have the frontends on this address.
    pub(super) fn on_address(&self, address: IpAddr) -> impl Iterator<Item = &ServicePortName> {
        let frontends = self.claimants.range(FrontendAddress::mark(address)..);
        let here = frontends.take_while(move |(key, _)| key.address == address);
        here.filter_map(|(_, claimants)| claimants.first())
    }

    /// The mark that this address should carry.
    pub(super) fn mark(&self, address: &IpAddr) -> Option<u32> {
        let marked = self.marked.get(address)?;
        let mark = if marked.cluster > 0 { WHOLE_ADDRESS } else { SERVICE_ADDRESS };
        Some(if marked.with_endpoint > 0 { mark | HAS_ENDPOINT } else { mark })
    }
}

/// The mark that a frontend asks for. A node's own address has none: the node's other traffic goes there as well.
pub(super) const fn mark_of(flags: u32) -> Option<u32> {
    if flags & CLUSTER_IP != 0 {
        Some(WHOLE_ADDRESS)
    } else if flags & (LOAD_BALANCER | EXTERNAL_IP) != 0 {
        Some(SERVICE_ADDRESS)
    } else {
        None
    }
}

fn frontends<'a>(
    name: &'a ServicePortName,
    port: &'a Wanted,
) -> impl Iterator<Item = (FrontendAddress, Option<Asked>)> + 'a {
    let key = |address: &SocketAddr| FrontendAddress::new(*address, name.protocol.number());
    let has_endpoint = |address: &SocketAddr| {
        let endpoints = if address.is_ipv4() { &port.endpoints4 } else { &port.endpoints6 };
        !endpoints.cluster.is_empty()
    };
    port.frontends.iter().map(move |(address, flags)| {
        let asked = mark_of(*flags).map(|mark| Asked { mark, has_endpoint: has_endpoint(address) });
        (key(address), asked)
    })
}
