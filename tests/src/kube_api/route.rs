//! From a request's path to what it is about.

use super::store::Resource;

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) resource: Resource,
    /// Absent in lists over all namespaces, and for what lives in none.
    pub(super) namespace: Option<String>,
    /// Absent for a whole collection.
    pub(super) name: Option<String>,
}

impl Route {
    /// `/api/v1/namespaces/default/services/web` and its like. A subresource `status` is the object itself here.
    pub(super) fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').skip(1).filter(|part| !part.is_empty()).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", "v1", rest @ ..] => ("v1".to_owned(), rest),
            ["apis", group, "v1", rest @ ..] => (format!("{group}/v1"), rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() && rest != ["status"] => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (plural, name) = match rest {
            [plural] => (*plural, None),
            [plural, name] | [plural, name, "status"] => (*plural, Some(*name)),
            _ => return None,
        };
        let resource = Resource::ALL.into_iter().find(|resource| resource.plural() == plural)?;
        let is_sound = resource.api_version() == group && (resource.is_namespaced() || namespace.is_none());
        let is_complete = name.is_none() || namespace.is_some() || !resource.is_namespaced();
        let owned = |part: Option<&str>| part.map(str::to_owned);
        (is_sound && is_complete).then(|| Self { resource, namespace: owned(namespace), name: owned(name) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_collections_and_objects() {
        let parse = |path: &str| Route::parse(path).map(|route| (route.resource, route.namespace, route.name));
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(parse("/api/v1/services"), Some((Resource::Services, None, None)));
        assert_eq!(parse("/api/v1/namespaces/a/services"), Some((Resource::Services, some("a"), None)));
        let slice = "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices/b";
        assert_eq!(parse(slice), Some((Resource::EndpointSlices, some("a"), some("b"))));
        let cidr = "/apis/networking.k8s.io/v1/servicecidrs/b";
        assert_eq!(parse(cidr), Some((Resource::ServiceCidrs, None, some("b"))));
        assert_eq!(parse("/api/v1/nodes/b/status"), Some((Resource::Nodes, None, some("b"))));
        assert_eq!(parse("/api/v1/namespaces/a"), Some((Resource::Namespaces, None, some("a"))));
        for path in
            ["/api/v1", "/api/v1/endpointslices", "/api/v1/pods", "/api/v1/services/b", "/apis/apps/v1/services"]
        {
            assert_eq!(parse(path), None, "{path}");
        }
    }
}
