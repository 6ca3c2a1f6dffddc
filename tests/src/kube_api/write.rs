//! Requests that create, change and delete, as an API server answers them.

use http::StatusCode;
use serde_json::{Value, json};

use super::route::Route;
use super::store::{Resource, Store};
use super::{defaults, patch};

/// Why a request is refused: what its Status object says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn invalid(message: &str) -> Self {
        Self { status: StatusCode::UNPROCESSABLE_ENTITY, reason: "Invalid", message: message.to_owned() }
    }

    fn bad(message: impl ToString) -> Self {
        Self { status: StatusCode::BAD_REQUEST, reason: "BadRequest", message: message.to_string() }
    }

    pub(super) fn not_found(plural: &str, name: &str) -> Self {
        let message = format!("{plural} {name:?} not found");
        Self { status: StatusCode::NOT_FOUND, reason: "NotFound", message }
    }

    fn conflict(reason: &'static str, message: String) -> Self {
        Self { status: StatusCode::CONFLICT, reason, message }
    }
}

type Answer = Result<(StatusCode, Value), Refusal>;

/// One object.
pub(super) fn get(store: &Store, route: &Route) -> Answer {
    Ok((StatusCode::OK, existing(store, route)?.clone()))
}

/// POST of an object.
pub(super) fn create(store: &mut Store, route: &Route, body: &[u8]) -> Answer {
    let mut object = parse(route, body)?;
    if object["metadata"]["name"].is_null() {
        let Some(prefix) = object["metadata"]["generateName"].as_str() else {
            return Err(Refusal::invalid("metadata.name: Required value: name or generateName is required"));
        };
        object["metadata"]["name"] = format!("{prefix}{:05}", store.version()).into();
    }
    let namespace = route.namespace.as_deref().unwrap_or_default();
    if route.resource.is_namespaced()
        && namespace != "default"
        && store.get(Resource::Namespaces, "", namespace).is_none()
    {
        return Err(Refusal::not_found("namespaces", namespace));
    }
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    if store.get(route.resource, namespace, name).is_some() {
        return Err(Refusal::conflict("AlreadyExists", format!("{} {name:?} already exists", route.resource.plural())));
    }
    object["metadata"].as_object_mut().map(|metadata| metadata.remove("resourceVersion"));
    Ok((StatusCode::CREATED, put(store, route.resource, object, None)?))
}

/// PUT of an object that is there.
pub(super) fn replace(store: &mut Store, route: &Route, body: &[u8]) -> Answer {
    let object = parse(route, body)?;
    let old = existing(store, route)?.clone();
    let version = &object["metadata"]["resourceVersion"];
    if version.is_string() && *version != "" && *version != old["metadata"]["resourceVersion"] {
        let message = format!("{} {}: the object has been modified", route.resource.plural(), old["metadata"]["name"]);
        return Err(Refusal::conflict("Conflict", message));
    }
    Ok((StatusCode::OK, put(store, route.resource, object, Some(&old))?))
}

/// PATCH of an object that is there.
pub(super) fn patch(store: &mut Store, route: &Route, content_type: &str, body: &[u8]) -> Answer {
    let changes: Value = serde_json::from_slice(body).map_err(Refusal::bad)?;
    let old = existing(store, route)?.clone();
    let mut object = old.clone();
    match content_type {
        "application/merge-patch+json" => patch::merge(&mut object, &changes),
        "application/strategic-merge-patch+json" => patch::strategic(&mut object, &changes),
        other => {
            let message = format!("{other} is not a kind of patch that is served here");
            return Err(Refusal {
                status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
                reason: "UnsupportedMediaType",
                message,
            });
        }
    }
    Ok((StatusCode::OK, put(store, route.resource, object, Some(&old))?))
}

/// DELETE of an object; of a Namespace with everything in it.
pub(super) fn delete(store: &mut Store, route: &Route) -> Answer {
    let old = existing(store, route)?.clone();
    let name = route.name.as_deref().unwrap_or_default();
    if route.resource == Resource::Namespaces {
        store.empty_namespace(name);
    }
    store.delete(route.resource, route.namespace.as_deref().unwrap_or_default(), name);
    let details = json!({"name": name, "kind": route.resource.plural(), "uid": old["metadata"]["uid"]});
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
    Ok((StatusCode::OK, status))
}

fn existing<'a>(store: &'a Store, route: &Route) -> Result<&'a Value, Refusal> {
    let name = route.name.as_deref().unwrap_or_default();
    let found = store.get(route.resource, route.namespace.as_deref().unwrap_or_default(), name);
    found.ok_or_else(|| Refusal::not_found(route.resource.plural(), name))
}

/// An object of the kind and namespace that the path names.
fn parse(route: &Route, body: &[u8]) -> Result<Value, Refusal> {
    let mut object: Value = serde_json::from_slice(body).map_err(Refusal::bad)?;
    if object["kind"] != route.resource.kind() || object["apiVersion"] != route.resource.api_version() {
        return Err(Refusal::bad(format!("{} {} in this place", object["apiVersion"], object["kind"])));
    }
    if let Some(namespace) = &route.namespace {
        if object["metadata"]["namespace"].as_str().is_some_and(|own| own != namespace) {
            return Err(Refusal::bad("the namespace of the object does not match the namespace of the request"));
        }
        object["metadata"]["namespace"] = namespace.as_str().into();
    }
    Ok(object)
}

fn put(store: &mut Store, resource: Resource, mut object: Value, old: Option<&Value>) -> Result<Value, Refusal> {
    if let Some(old) = old {
        for field in ["uid", "creationTimestamp"] {
            object["metadata"][field] = old["metadata"][field].clone();
        }
    }
    let name = Store::name_of(resource, &object);
    let others: Vec<&Value> =
        store.objects(resource).filter(|(other, _)| **other != name).map(|(_, other)| other).collect();
    defaults::fill(resource, &mut object, old, &others)?;
    if old.is_none_or(|old| *old != object) {
        store.apply(object);
    }
    Ok(store.get(resource, &name.0, &name.1).cloned().unwrap_or_default())
}
