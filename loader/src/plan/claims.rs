//! Which service ports claim a frontend, and which addresses are ClusterIPs.
//!
//! Several may claim one (a shared external IP): the first by name has it, so that every node and every restart agree,
//! and the next one gets it when that one leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use sheave_common::frontend::flags::CLUSTER_IP;

use super::write::FrontendAddress;
use crate::model::desired::{ServicePort, ServicePortName};

/// All claims.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    claimants: BTreeMap<FrontendAddress, BTreeSet<ServicePortName>>,
    /// Address → number of frontends on it that are a ClusterIP's.
    cluster_addresses: BTreeMap<IpAddr, usize>,
}

/// Frontends and marks whose value may have changed.
#[derive(Debug, Default)]
pub(super) struct Touched {
    pub(super) frontends: BTreeSet<FrontendAddress>,
    pub(super) addresses: BTreeSet<IpAddr>,
}

impl Claims {
    pub(super) fn claim(&mut self, name: &ServicePortName, port: &ServicePort, touched: &mut Touched) {
        for (key, cluster_ip) in frontends(name, port) {
            self.claimants.entry(key).or_default().insert(name.clone());
            touched.frontends.insert(key);
            if cluster_ip {
                *self.cluster_addresses.entry(key.address).or_default() += 1;
                touched.addresses.insert(key.address);
            }
        }
    }

    pub(super) fn release(&mut self, name: &ServicePortName, port: &ServicePort, touched: &mut Touched) {
        for (key, cluster_ip) in frontends(name, port) {
            if let Some(claimants) = self.claimants.get_mut(&key) {
                claimants.remove(name);
                if claimants.is_empty() {
                    self.claimants.remove(&key);
                }
            }
            touched.frontends.insert(key);
            if cluster_ip && let Some(count) = self.cluster_addresses.get_mut(&key.address) {
                *count -= 1;
                if *count == 0 {
                    self.cluster_addresses.remove(&key.address);
                }
                touched.addresses.insert(key.address);
            }
        }
    }

    /// Who has this frontend.
    pub(super) fn owner(&self, frontend: &FrontendAddress) -> Option<&ServicePortName> {
        self.claimants.get(frontend)?.first()
    }

    /// A service port that has a frontend on this address.
    pub(super) fn on_address(&self, address: &IpAddr) -> Option<&ServicePortName> {
        let (key, claimants) = self.claimants.range(FrontendAddress::mark(*address)..).next()?;
        claimants.first().filter(|_| key.address == *address)
    }

    /// Whether all ports of this address belong to Services.
    pub(super) fn is_cluster_ip(&self, address: &IpAddr) -> bool {
        self.cluster_addresses.contains_key(address)
    }
}

fn frontends<'a>(
    name: &'a ServicePortName,
    port: &'a ServicePort,
) -> impl Iterator<Item = (FrontendAddress, bool)> + 'a {
    let key = |address: &SocketAddr| FrontendAddress::new(*address, name.protocol.number());
    port.frontends.iter().map(move |(address, flags)| (key(address), flags & CLUSTER_IP != 0))
}
