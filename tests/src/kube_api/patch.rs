//! Patches, as kubectl sends them: JSON merge patches, and strategic ones, which know the lists of Services and slices.

use serde_json::Value;

/// Applies an RFC 7386 merge patch.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    for (name, value) in fields {
        change(target, name, value, merge);
    }
}

/// Applies a strategic merge patch. `spec.ports` of a Service is merged by `port`; other lists of ours are replaced, and
/// directives about order have nothing to say where order means nothing.
pub(super) fn strategic(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if fields.get("$patch").is_some_and(|directive| directive == "replace") {
        *target = Value::Object(fields.iter().filter(|(name, _)| *name != "$patch").map(clone).collect());
        return;
    }
    for (name, value) in fields.iter().filter(|(name, _)| !name.starts_with('$')) {
        match value.as_array() {
            // The ports of slices have no merge key: they come here as whole lists, without `port` being one's identity.
            Some(elements) if name == "ports" && target.get("clusterIP").is_some() => {
                merge_list(&mut target[name.as_str()], elements, "port");
            }
            _ => change(target, name, value, strategic),
        }
    }
}

fn clone((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}

/// A null removes a field.
fn change(target: &mut Value, name: &str, value: &Value, merge: fn(&mut Value, &Value)) {
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    if value.is_null() {
        target.as_object_mut().map(|fields| fields.remove(name));
    } else {
        merge(&mut target[name], value);
    }
}

fn merge_list(target: &mut Value, elements: &[Value], key: &str) {
    let mut list = target.as_array().cloned().unwrap_or_default();
    for element in elements {
        let position = list.iter().position(|old| old[key] == element[key]);
        match position {
            Some(position) if element["$patch"] == "delete" => {
                list.remove(position);
            }
            Some(position) => strategic(&mut list[position], element),
            None => list.push(element.clone()),
        }
    }
    *target = list.into();
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_strategic_patch_merges_a_services_ports_by_their_number() {
        let mut service = json!({"spec": {"clusterIP": "10.96.0.1", "type": "NodePort", "sessionAffinity": "ClientIP",
            "ports": [{"port": 80, "nodePort": 30_080}, {"port": 81}]}});
        let patch = json!({"spec": {"$setElementOrder/ports": [{"port": 80}, {"port": 82}], "sessionAffinity": null,
            "ports": [{"port": 80, "targetPort": 8080}, {"port": 81, "$patch": "delete"}, {"port": 82}]}});
        strategic(&mut service, &patch);
        assert_eq!(
            service,
            json!({"spec": {"clusterIP": "10.96.0.1", "type": "NodePort",
                "ports": [{"port": 80, "nodePort": 30_080, "targetPort": 8080}, {"port": 82}]}})
        );
    }

    #[test]
    fn a_merge_patch_replaces_lists_and_removes_nulls() {
        let mut object = json!({"a": [1, 2], "b": {"c": 1, "d": 2}});
        merge(&mut object, &json!({"a": [3], "b": {"c": null}}));
        assert_eq!(object, json!({"a": [3], "b": {"d": 2}}));
    }
}
