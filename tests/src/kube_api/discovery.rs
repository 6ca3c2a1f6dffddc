//! What the API says about itself: the documents by which kubectl finds out what it may ask for.

use serde_json::{Value, json};

use super::store::Resource;

const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];

/// The document of a path; `None` for a path of another sort.
pub(super) fn document(path: &str) -> Option<Value> {
    let group = |name: &str| {
        let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
        json!({"name": name, "versions": [version], "preferredVersion": version})
    };
    let groups = [group("discovery.k8s.io"), group("events.k8s.io"), group("networking.k8s.io")];
    Some(match path.trim_end_matches('/') {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}),
        "/api/v1" => resources("v1"),
        "/apis/discovery.k8s.io/v1" => resources("discovery.k8s.io/v1"),
        "/apis/events.k8s.io/v1" => resources("events.k8s.io/v1"),
        "/apis/networking.k8s.io/v1" => resources("networking.k8s.io/v1"),
        "/version" => json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0", "gitCommit": "",
            "gitTreeState": "clean", "buildDate": "2025-01-01T00:00:00Z", "goVersion": "", "compiler": "",
            "platform": "linux/amd64"}),
        _ => return None,
    })
}

fn resources(api_version: &str) -> Value {
    let served = Resource::ALL.into_iter().filter(|resource| resource.api_version() == api_version);
    let served: Vec<Value> = served
        .map(|resource| {
            json!({"name": resource.plural(), "singularName": resource.kind().to_lowercase(), "kind": resource.kind(),
                "namespaced": resource.is_namespaced(), "verbs": VERBS, "shortNames": resource.short_names()})
        })
        .collect();
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": served})
}
