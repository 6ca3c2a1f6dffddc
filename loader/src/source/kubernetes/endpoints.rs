//! The API servers' own addresses: the endpoints of the Service `default/kubernetes`, which each of them keeps up to date
//! with itself and removes when it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use crate::model::Change;
use crate::model::objects::{EndpointSlice, SliceKey};

/// Their Service.
const NAMESPACE: &str = "default";
const NAME: &str = "kubernetes";
const PORT: &str = "https";
/// Its port, as service ports are named in the kernel's maps.
pub const SERVICE_PORT: &str = "default/kubernetes:https";

/// What the slices of that Service say.
#[derive(Debug, Default)]
pub(super) struct Endpoints(BTreeMap<SliceKey, BTreeSet<SocketAddr>>);

impl Endpoints {
    /// Takes a change in. Returns all the endpoints if they are other ones now; never none, because an API server that says
    /// that there is none is there itself.
    pub(super) fn take(&mut self, change: &Change) -> Option<BTreeSet<SocketAddr>> {
        let before = self.all();
        match change {
            Change::SlicesReplaced(slices) => self.0 = slices.iter().filter_map(own).collect(),
            Change::Slice(slice) => match own(slice) {
                Some((key, addresses)) => drop(self.0.insert(key, addresses)),
                None => drop(self.0.remove(&slice.key)),
            },
            Change::SliceGone(key) => drop(self.0.remove(key)),
            _ => return None,
        }
        let now = self.all();
        (now != before && !now.is_empty()).then_some(now)
    }

    fn all(&self) -> BTreeSet<SocketAddr> {
        self.0.values().flatten().copied().collect()
    }
}

/// The endpoints of a slice of that Service.
fn own(slice: &EndpointSlice) -> Option<(SliceKey, BTreeSet<SocketAddr>)> {
    let service = slice.service.as_ref()?;
    if (&*service.namespace, &*service.name) != (NAMESPACE, NAME) {
        return None;
    }
    let port = slice.ports.iter().find(|port| &*port.name == PORT)?.port;
    let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
    Some((slice.key.clone(), ready.map(|endpoint| SocketAddr::new(endpoint.address, port)).collect()))
}
