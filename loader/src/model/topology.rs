//! Which ready endpoints the cluster set prefers: those hinted at this node, else at its zone, else all.

use super::objects::SliceEndpoint;
use super::text::Text;

/// Where this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Topology {
    /// This node's name.
    pub(super) node_name: String,
    /// Its zone, if its Node has the label.
    pub(super) zone: Option<String>,
}

/// What the hints of a service port's ready endpoints select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Preference {
    Node,
    Zone,
    All,
}

impl Topology {
    /// Whether an endpoint runs on this node.
    pub(super) fn is_local(&self, endpoint: &SliceEndpoint) -> bool {
        endpoint.node_name.as_deref() == Some(self.node_name.as_str())
    }

    /// Keeps those of the ready endpoints that hints select. One endpoint without a hint switches hints off, so that a
    /// half-written slice never hides endpoints.
    pub(super) fn prefer<T>(&self, ready: &mut Vec<T>, endpoint: impl Fn(&T) -> &SliceEndpoint) {
        let preference = self.preference(|| ready.iter().map(&endpoint));
        ready.retain(|item| match preference {
            Preference::Node => self.names_node(endpoint(item)),
            Preference::Zone => self.names_zone(endpoint(item)),
            Preference::All => true,
        });
    }

    fn preference<'a, I: Iterator<Item = &'a SliceEndpoint>>(&self, ready: impl Fn() -> I) -> Preference {
        if ready().all(|endpoint| !for_nodes(endpoint).is_empty()) && ready().any(|e| self.names_node(e)) {
            Preference::Node
        } else if ready().all(|endpoint| !for_zones(endpoint).is_empty()) && ready().any(|e| self.names_zone(e)) {
            Preference::Zone
        } else {
            Preference::All
        }
    }

    fn names_node(&self, endpoint: &SliceEndpoint) -> bool {
        for_nodes(endpoint).iter().any(|name| **name == *self.node_name)
    }

    fn names_zone(&self, endpoint: &SliceEndpoint) -> bool {
        self.zone.as_ref().is_some_and(|zone| for_zones(endpoint).iter().any(|name| **name == **zone))
    }
}

fn for_nodes(endpoint: &SliceEndpoint) -> &[Text] {
    endpoint.hints.as_ref().map_or(&[], |hints| &hints.for_nodes)
}

fn for_zones(endpoint: &SliceEndpoint) -> &[Text] {
    endpoint.hints.as_ref().map_or(&[], |hints| &hints.for_zones)
}
