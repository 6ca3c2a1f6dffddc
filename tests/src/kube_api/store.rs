//! Objects, and the history that watches read.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::selector::Selector;

/// A kind that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// v1 Service
    Services,
    /// discovery.k8s.io/v1 EndpointSlice
    EndpointSlices,
    /// v1 Node
    Nodes,
    /// v1 Namespace
    Namespaces,
    /// events.k8s.io/v1 Event
    Events,
    /// networking.k8s.io/v1 ServiceCIDR
    ServiceCidrs,
    /// v1 ServiceAccount
    ServiceAccounts,
    /// v1 ConfigMap
    ConfigMaps,
    /// apps/v1 DaemonSet
    DaemonSets,
    /// rbac.authorization.k8s.io/v1 ClusterRole
    ClusterRoles,
    /// rbac.authorization.k8s.io/v1 ClusterRoleBinding
    ClusterRoleBindings,
}

impl Resource {
    pub(super) const ALL: [Self; 11] = [
        Self::Services,
        Self::EndpointSlices,
        Self::Nodes,
        Self::Namespaces,
        Self::Events,
        Self::ServiceCidrs,
        Self::ServiceAccounts,
        Self::ConfigMaps,
        Self::DaemonSets,
        Self::ClusterRoles,
        Self::ClusterRoleBindings,
    ];

    pub(super) const fn kind(self) -> &'static str {
        match self {
            Self::Services => "Service",
            Self::EndpointSlices => "EndpointSlice",
            Self::Nodes => "Node",
            Self::Namespaces => "Namespace",
            Self::Events => "Event",
            Self::ServiceCidrs => "ServiceCIDR",
            Self::ServiceAccounts => "ServiceAccount",
            Self::ConfigMaps => "ConfigMap",
            Self::DaemonSets => "DaemonSet",
            Self::ClusterRoles => "ClusterRole",
            Self::ClusterRoleBindings => "ClusterRoleBinding",
        }
    }

    /// As in paths and RBAC rules.
    #[must_use]
    pub const fn plural(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
            Self::Events => "events",
            Self::ServiceCidrs => "servicecidrs",
            Self::ServiceAccounts => "serviceaccounts",
            Self::ConfigMaps => "configmaps",
            Self::DaemonSets => "daemonsets",
            Self::ClusterRoles => "clusterroles",
            Self::ClusterRoleBindings => "clusterrolebindings",
        }
    }

    pub(super) const fn short_names(self) -> &'static [&'static str] {
        match self {
            Self::Services => &["svc"],
            Self::EndpointSlices | Self::ServiceCidrs | Self::ClusterRoles | Self::ClusterRoleBindings => &[],
            Self::ServiceAccounts => &["sa"],
            Self::ConfigMaps => &["cm"],
            Self::DaemonSets => &["ds"],
            Self::Nodes => &["no"],
            Self::Namespaces => &["ns"],
            Self::Events => &["ev"],
        }
    }

    /// Group and version.
    #[must_use]
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::Services | Self::Nodes | Self::Namespaces | Self::ServiceAccounts | Self::ConfigMaps => "v1",
            Self::EndpointSlices => "discovery.k8s.io/v1",
            Self::Events => "events.k8s.io/v1",
            Self::ServiceCidrs => "networking.k8s.io/v1",
            Self::DaemonSets => "apps/v1",
            Self::ClusterRoles | Self::ClusterRoleBindings => "rbac.authorization.k8s.io/v1",
        }
    }

    pub(super) const fn is_namespaced(self) -> bool {
        match self {
            Self::Services
            | Self::EndpointSlices
            | Self::Events
            | Self::ServiceAccounts
            | Self::ConfigMaps
            | Self::DaemonSets => true,
            Self::Nodes | Self::Namespaces | Self::ServiceCidrs | Self::ClusterRoles | Self::ClusterRoleBindings => {
                false
            }
        }
    }

    fn of_kind(kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|resource| resource.kind() == kind)
    }
}

/// What a request selects.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub(super) resource: Resource,
    /// Everywhere if absent.
    pub(super) namespace: Option<String>,
    pub(super) labels: Selector,
    /// fieldSelector metadata.name
    pub(super) name: Option<String>,
}

impl Filter {
    fn matches(&self, object: &Value) -> bool {
        let is = |field: &str, wanted: &Option<String>| {
            wanted.as_ref().is_none_or(|wanted| object["metadata"][field] == wanted.as_str())
        };
        self.labels.matches(object) && is("namespace", &self.namespace) && is("name", &self.name)
    }
}

/// An event of a watch.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) change: &'static str,
    pub(super) object: Value,
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) items: Vec<Value>,
    pub(super) version: u64,
    /// Where the next page begins.
    pub(super) next: Option<String>,
    pub(super) remaining: usize,
}

/// Who asked for history that has been compacted, or for the future.
#[derive(Debug)]
pub(super) struct Expired;

/// Namespace and name.
pub(super) type Name = (String, String);

#[derive(Debug)]
struct Entry {
    version: u64,
    resource: Resource,
    old: Option<Value>,
    new: Option<Value>,
}

/// All objects and their history.
#[derive(Debug, Default)]
pub(super) struct Store {
    version: u64,
    compacted: u64,
    objects: BTreeMap<(Resource, Name), Value>,
    history: Vec<Entry>,
}

impl Store {
    /// Resource version of the newest change.
    pub(super) const fn version(&self) -> u64 {
        self.version
    }

    /// Namespace ("" for what lives in none) and name of an object.
    pub(super) fn name_of(resource: Resource, object: &Value) -> Name {
        let part = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        (if resource.is_namespaced() { part("namespace") } else { String::new() }, part("name"))
    }

    pub(super) fn get(&self, resource: Resource, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&(resource, (namespace.to_owned(), name.to_owned())))
    }

    /// All objects of a kind.
    pub(super) fn objects(&self, resource: Resource) -> impl Iterator<Item = (&Name, &Value)> {
        let objects = self.objects.iter().filter(move |((kind, _), _)| *kind == resource);
        objects.map(|((_, name), object)| (name, object))
    }

    /// Deletes what is in a namespace.
    pub(super) fn empty_namespace(&mut self, namespace: &str) {
        let inside: Vec<(Resource, Name)> =
            self.objects.keys().filter(|(_, (inside, _))| inside == namespace).cloned().collect();
        for (resource, (_, name)) in inside {
            self.delete(resource, namespace, &name);
        }
    }

    pub(super) fn apply(&mut self, mut object: Value) -> u64 {
        let kind = object["kind"].as_str().expect("an object has a kind");
        let resource = Resource::of_kind(kind).expect("a kind that is served");
        self.version += 1;
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = self.version.to_string().into();
        if resource.is_namespaced() && metadata["namespace"].is_null() {
            metadata["namespace"] = "default".into();
        }
        if metadata["creationTimestamp"].is_null() {
            metadata["creationTimestamp"] = "2025-01-01T00:00:00Z".into();
        }
        if metadata["uid"].is_null() {
            metadata["uid"] = format!("00000000-0000-4000-8000-{:012x}", self.version).into();
        }
        assert!(metadata["name"].is_string(), "an object has a name");
        object["apiVersion"] = resource.api_version().into();
        let old = self.objects.insert((resource, Self::name_of(resource, &object)), object.clone());
        self.history.push(Entry { version: self.version, resource, old, new: Some(object) });
        self.version
    }

    pub(super) fn delete(&mut self, resource: Resource, namespace: &str, name: &str) {
        let key = (resource, (namespace.to_owned(), name.to_owned()));
        if let Some(old) = self.objects.remove(&key) {
            self.version += 1;
            self.history.push(Entry { version: self.version, resource, old: Some(old), new: None });
        }
    }

    pub(super) fn compact(&mut self) {
        self.compacted = self.version;
        self.history.clear();
    }

    /// A page of what a filter selects. A token is `version/namespace/name` of the last object of the page before, and
    /// expires with the history it was made in.
    pub(super) fn list(&self, filter: &Filter, limit: usize, token: Option<&str>) -> Result<Page, Expired> {
        let (version, after) = match token {
            None => (self.version, None),
            Some(token) => {
                let mut parts = token.splitn(3, '/');
                let version = parts.next().and_then(|version| version.parse().ok()).ok_or(Expired)?;
                let mut part = || parts.next().map(str::to_owned).ok_or(Expired);
                (version, Some((part()?, part()?)))
            }
        };
        if version < self.compacted {
            return Err(Expired);
        }
        let selected = self.objects.iter().filter(|((resource, _), _)| *resource == filter.resource);
        let mut selected = selected
            .filter(|((_, name), object)| after.as_ref().is_none_or(|after| name > after) && filter.matches(object));
        let mut items = Vec::new();
        let mut last = None;
        for ((_, name), object) in selected.by_ref().take(limit) {
            items.push(object.clone());
            last = Some(name);
        }
        let remaining = selected.count();
        let next = last.filter(|_| remaining > 0).map(|(namespace, name)| format!("{version}/{namespace}/{name}"));
        Ok(Page { items, version, next, remaining })
    }

    /// What a watch that has seen everything up to `version` has to be told.
    pub(super) fn events_after(&self, version: u64, filter: &Filter) -> Result<Vec<Event>, Expired> {
        if version < self.compacted || version > self.version {
            return Err(Expired);
        }
        let seen = self.history.partition_point(|entry| entry.version <= version);
        let entries = self.history[seen..].iter().filter(|entry| entry.resource == filter.resource);
        Ok(entries.filter_map(|entry| entry.event(filter)).collect())
    }
}

impl Entry {
    /// An object that stops being selected is deleted for who selects.
    fn event(&self, filter: &Filter) -> Option<Event> {
        let selected = |object: &Option<Value>| object.clone().filter(|object| filter.matches(object));
        let (change, mut object) = match (selected(&self.old), selected(&self.new)) {
            (None, None) => return None,
            (None, Some(new)) => ("ADDED", new),
            (Some(_), Some(new)) => ("MODIFIED", new),
            (Some(old), None) => ("DELETED", old),
        };
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        Some(Event { change, object })
    }
}
