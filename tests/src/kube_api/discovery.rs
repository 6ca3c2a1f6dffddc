//! What the API says about itself: the documents by which kubectl finds out what it may ask for.

use serde_json::{Value, json};

use super::store::Resource;

/// Groups other than the core's; each has one version, v1.
const GROUPS: [&str; 5] =
    ["apps", "discovery.k8s.io", "events.k8s.io", "networking.k8s.io", "rbac.authorization.k8s.io"];
const VERBS: [&str; 7] = ["create", "delete", "get", "list", "patch", "update", "watch"];

/// The document of a path; `None` for a path of another sort.
pub(super) fn document(path: &str) -> Option<Value> {
    let group = |name: &str| {
        let version = json!({"groupVersion": format!("{name}/v1"), "version": "v1"});
        json!({"name": name, "versions": [version], "preferredVersion": version})
    };
    let groups = GROUPS.map(group);
    Some(match path.trim_end_matches('/') {
        "/api" => json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}),
        "/apis" => json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}),
        "/api/v1" => resources("v1"),
        "/version" => json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0", "gitCommit": "",
            "gitTreeState": "clean", "buildDate": "2025-01-01T00:00:00Z", "goVersion": "", "compiler": "",
            "platform": "linux/amd64"}),
        path => {
            let version = path.strip_prefix("/apis/")?;
            let group = version.strip_suffix("/v1")?;
            GROUPS.contains(&group).then(|| resources(version))?
        }
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
