//! What an API server fills in when it takes an object: defaults, cluster IPs and node ports.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::store::Resource;
use super::write::Refusal;

/// Where cluster IPs are given out from: the upper half of 10.96.0.0/16, so that those who ask for one of the lower half
/// get it.
const CLUSTER_IPS: &str = "10.96";
const NODE_PORTS: std::ops::RangeInclusive<u64> = 30_000..=32_767;
/// Node ports that are given out unasked.
const FREE_NODE_PORTS: std::ops::RangeInclusive<u64> = 31_000..=32_767;

/// Fills an object in. `old` is what it replaces, `others` are all other objects of its kind.
pub(super) fn fill(
    resource: Resource,
    object: &mut Value,
    old: Option<&Value>,
    others: &[&Value],
) -> Result<(), Refusal> {
    match resource {
        Resource::Services => service(object, old, others),
        Resource::EndpointSlices => slice(object),
        Resource::Nodes => Ok(()),
        Resource::Namespaces => {
            default(&mut object["status"], "phase", json!("Active"));
            Ok(())
        }
    }
}

fn default(object: &mut Value, field: &str, value: Value) {
    if object[field].is_null() || object[field] == "" {
        object[field] = value;
    }
}

fn elements(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn slice(object: &mut Value) -> Result<(), Refusal> {
    if !["IPv4", "IPv6", "FQDN"].iter().any(|family| object["addressType"] == *family) {
        return Err(Refusal::invalid("addressType: Required value"));
    }
    default(object, "endpoints", json!([]));
    for port in object["ports"].as_array_mut().into_iter().flatten() {
        default(port, "name", json!(""));
        default(port, "protocol", json!("TCP"));
    }
    Ok(())
}

fn service(object: &mut Value, old: Option<&Value>, others: &[&Value]) -> Result<(), Refusal> {
    let spec = &mut object["spec"];
    default(spec, "type", json!("ClusterIP"));
    default(spec, "sessionAffinity", json!("None"));
    if spec["sessionAffinity"] == "ClientIP" {
        default(&mut spec["sessionAffinityConfig"]["clientIP"], "timeoutSeconds", json!(10_800));
    }
    for port in spec["ports"].as_array_mut().into_iter().flatten() {
        default(port, "protocol", json!("TCP"));
        if port["targetPort"].is_null() || port["targetPort"] == 0 {
            port["targetPort"] = port["port"].clone();
        }
    }
    if spec["type"] != "ExternalName" {
        default(spec, "internalTrafficPolicy", json!("Cluster"));
        cluster_ip(spec, old, others)?;
    }
    let outside = spec["type"] == "NodePort" || spec["type"] == "LoadBalancer";
    if outside || elements(&spec["externalIPs"]).next().is_some() {
        default(spec, "externalTrafficPolicy", json!("Cluster"));
    }
    if spec["type"] == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", json!(true));
    }
    node_ports(spec, old, others)?;
    default(&mut object["status"], "loadBalancer", json!({}));
    Ok(())
}

fn cluster_ip(spec: &mut Value, old: Option<&Value>, others: &[&Value]) -> Result<(), Refusal> {
    if let Some(first) = spec["clusterIPs"].get(0).cloned() {
        default(spec, "clusterIP", first);
    }
    let kept = old.map(|old| old["spec"]["clusterIP"].clone()).unwrap_or_default();
    default(spec, "clusterIP", kept.clone());
    let taken: BTreeSet<&str> = others.iter().filter_map(|other| other["spec"]["clusterIP"].as_str()).collect();
    match spec["clusterIP"].as_str() {
        Some("None") => {}
        Some(address) if taken.contains(address) => {
            return Err(Refusal::invalid(&format!(
                "spec.clusterIPs: Invalid value: [{address:?}]: failed to allocate IP {address}: provided IP is already \
                 allocated"
            )));
        }
        Some(address) if kept.is_string() && kept != address => {
            return Err(Refusal::invalid("spec.clusterIPs[0]: Invalid value: field is immutable"));
        }
        Some(_) => {}
        None => {
            let candidates =
                (128..=255).flat_map(|high| (1..=254).map(move |low| format!("{CLUSTER_IPS}.{high}.{low}")));
            let free = candidates.into_iter().find(|address| !taken.contains(address.as_str()));
            spec["clusterIP"] = free.ok_or_else(|| Refusal::invalid("range is full"))?.into();
        }
    }
    let address = spec["clusterIP"].clone();
    default(spec, "ipFamilies", json!(["IPv4"]));
    default(spec, "ipFamilyPolicy", json!("SingleStack"));
    default(spec, "clusterIPs", json!([address]));
    Ok(())
}

fn node_ports(spec: &mut Value, old: Option<&Value>, others: &[&Value]) -> Result<(), Refusal> {
    let has_them = spec["type"] == "NodePort"
        || spec["type"] == "LoadBalancer" && spec["allocateLoadBalancerNodePorts"] != json!(false);
    let identity = |port: &Value| (port["nodePort"].as_u64().unwrap_or(0), port["protocol"].clone());
    let mut taken: Vec<(u64, Value)> =
        others.iter().flat_map(|other| elements(&other["spec"]["ports"])).map(identity).collect();
    let mut ports = spec["ports"].as_array().cloned().unwrap_or_default();
    for port in &mut ports {
        if port["nodePort"].is_null() || port["nodePort"] == 0 {
            let same = |former: &&Value| former["port"] == port["port"] && former["protocol"] == port["protocol"];
            let former = old.and_then(|old| elements(&old["spec"]["ports"]).find(same));
            let number = former.map(|former| former["nodePort"].clone()).unwrap_or_default();
            if has_them && number.is_u64() {
                port["nodePort"] = number;
            }
        }
        if !has_them && old.is_some() {
            port.as_object_mut().map(|port| port.remove("nodePort"));
        }
        match port["nodePort"].as_u64().unwrap_or(0) {
            0 => {}
            _ if spec["type"] == "ClusterIP" => {
                return Err(Refusal::invalid(
                    "spec.ports[].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
                ));
            }
            number if !NODE_PORTS.contains(&number) => {
                return Err(Refusal::invalid(&format!(
                    "spec.ports[].nodePort: Invalid value: {number}: provided port is not in the valid range. The range of \
                     valid ports is 30000-32767"
                )));
            }
            number if taken.contains(&identity(port)) => {
                return Err(Refusal::invalid(&format!(
                    "spec.ports[].nodePort: Invalid value: {number}: provided port is already allocated"
                )));
            }
            _ => taken.push(identity(port)),
        }
    }
    if has_them {
        for port in ports.iter_mut().filter(|port| port["nodePort"].is_null() || port["nodePort"] == 0) {
            let free = FREE_NODE_PORTS.into_iter().find(|number| taken.iter().all(|(other, _)| other != number));
            port["nodePort"] = free.ok_or_else(|| Refusal::invalid("range is full"))?.into();
            taken.push(identity(port));
        }
    }
    if !ports.is_empty() {
        spec["ports"] = ports.into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(spec: Value, old: Option<&Value>, others: &[&Value]) -> Result<Value, String> {
        let mut object = json!({"kind": "Service", "metadata": {"name": "web"}, "spec": spec});
        fill(Resource::Services, &mut object, old, others).map_err(|refusal| refusal.message)?;
        Ok(object)
    }

    #[test]
    fn a_bare_service_is_filled_in_as_by_an_api_server() {
        let made = filled(json!({"ports": [{"port": 80}]}), None, &[]).expect("a sound Service");
        assert_eq!(
            made["spec"],
            json!({"type": "ClusterIP", "clusterIP": "10.96.128.1", "clusterIPs": ["10.96.128.1"], "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]})
        );
        let headless = filled(json!({"clusterIP": "None"}), None, &[&made]).expect("a sound Service");
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    }

    #[test]
    fn node_ports_are_given_kept_and_refused() {
        let spec = json!({"type": "NodePort", "ports": [{"port": 80}, {"port": 81, "nodePort": 30_081}]});
        let made = filled(spec.clone(), None, &[]).expect("a sound Service");
        assert_eq!(made["spec"]["ports"][0]["nodePort"], 31_000);
        assert_eq!(made["spec"]["externalTrafficPolicy"], "Cluster");
        let again = filled(spec.clone(), Some(&made), &[]).expect("a sound Service");
        assert_eq!(again["spec"], made["spec"]);
        let inward = filled(json!({"ports": [{"port": 80, "nodePort": 31_000}]}), Some(&made), &[]);
        assert_eq!(inward.expect("a sound Service")["spec"]["ports"][0]["nodePort"], Value::Null);
        for (spec, others) in [
            (spec, vec![&made]),
            (json!({"type": "NodePort", "ports": [{"port": 80, "nodePort": 8080}]}), vec![]),
            (json!({"ports": [{"port": 80, "nodePort": 30_080}]}), vec![]),
            (json!({"clusterIP": made["spec"]["clusterIP"]}), vec![&made]),
        ] {
            assert!(filled(spec.clone(), None, &others).is_err(), "{spec}");
        }
    }
}
