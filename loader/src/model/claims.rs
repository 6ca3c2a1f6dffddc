//! Who has a frontend that several Services ask for: the older one, then the one whose namespace/name sorts first.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;

use super::desired::{Protocol, ServiceKey};

/// A frontend that can have one owner.
pub(super) type Claim = (SocketAddr, Protocol);

/// A Service that asks for a frontend; the smallest one has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claimant {
    /// Creation in seconds since the epoch.
    pub(super) created: Option<i64>,
    /// The Service.
    pub(super) service: ServiceKey,
}

/// All claims of all Services.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Sorted; never empty.
    claimants: HashMap<Claim, Vec<Claimant>>,
}

impl Claims {
    /// Whether a Service has the frontend that it asked for.
    pub(super) fn is_owner(&self, claim: &Claim, service: &ServiceKey) -> bool {
        self.owner(claim).is_some_and(|owner| owner.service == *service)
    }

    /// Who has the frontend.
    pub(super) fn owner(&self, claim: &Claim) -> Option<&Claimant> {
        self.claimants.get(claim).and_then(|claimants| claimants.first())
    }

    /// Adds a claim. A Service that loses the frontend by this is added to `dirty`. A Service that doesn't have what
    /// it asks for is logged, now that it begins.
    pub(super) fn add(&mut self, claim: Claim, claimant: &Claimant, dirty: &mut BTreeSet<ServiceKey>) {
        let claimants = self.claimants.entry(claim).or_insert_with(|| Vec::with_capacity(1));
        let Err(position) = claimants.binary_search(claimant) else { return };
        claimants.insert(position, claimant.clone());
        if let (0, Some(displaced)) = (position, claimants.get(1)) {
            dirty.insert(displaced.service.clone());
            log_loss(claim, &displaced.service, &claimant.service);
        } else if position > 0 {
            log_loss(claim, &claimant.service, &claimants[0].service);
        }
    }

    /// Removes a claim. A Service that gets the frontend by this is added to `dirty`.
    pub(super) fn remove(&mut self, claim: Claim, claimant: &Claimant, dirty: &mut BTreeSet<ServiceKey>) {
        let Some(claimants) = self.claimants.get_mut(&claim) else { return };
        let Ok(position) = claimants.binary_search(claimant) else { return };
        claimants.remove(position);
        match (position, claimants.first()) {
            (_, None) => {
                self.claimants.remove(&claim);
            }
            (0, Some(heir)) => {
                tracing::info!(service = %heir.service, frontend = %claim.0, protocol = %claim.1,
                    "a contested frontend is free: this Service has it now");
                dirty.insert(heir.service.clone());
            }
            _ => {}
        }
    }
}

fn log_loss((frontend, protocol): Claim, loser: &ServiceKey, owner: &ServiceKey) {
    tracing::warn!(service = %loser, %frontend, %protocol, %owner,
        "another Service has this frontend: the older one keeps it, change one of the two");
}
