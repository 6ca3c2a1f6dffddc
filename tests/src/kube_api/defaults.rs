//! What an API server fills in when it takes an object: defaults, cluster IPs and node ports.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::store::Resource;
use super::write::Refusal;

/// The families of this cluster, the primary one first.
const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];
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
        Resource::Namespaces => {
            default(&mut object["status"], "phase", json!("Active"));
            Ok(())
        }
        _ => Ok(()),
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

/// Cluster IPs that are given out unasked: the upper halves of 10.96.0.0/16 and fd00:10:96::/112, so that those who ask for
/// one of the lower halves get it.
fn candidates(family: &str) -> Box<dyn Iterator<Item = String>> {
    if family == "IPv6" {
        return Box::new((0x8001..=0xfffe_u16).map(|host| format!("fd00:10:96::{host:x}")));
    }
    Box::new((128..=255).flat_map(|high| (1..=254).map(move |low| format!("10.96.{high}.{low}"))))
}

fn family(address: &str) -> Result<&'static str, Refusal> {
    match address.parse() {
        Ok(IpAddr::V4(_)) => Ok("IPv4"),
        Ok(IpAddr::V6(_)) => Ok("IPv6"),
        Err(_) => Err(Refusal::invalid(&format!("spec.clusterIPs: Invalid value: {address:?}: not a valid IP"))),
    }
}

/// The families that a Service asks for, whether by name, by address or by policy; of an update, those that it had.
fn families(spec: &Value, old: Option<&Value>) -> Result<Vec<&'static str>, Refusal> {
    let named = |families: &Value| -> Vec<&'static str> {
        elements(families).filter_map(|one| FAMILIES.into_iter().find(|family| one == *family)).collect()
    };
    let mut wanted = named(&spec["ipFamilies"]);
    for (index, address) in elements(&spec["clusterIPs"]).filter_map(Value::as_str).enumerate() {
        let family = family(address)?;
        match wanted.get(index) {
            Some(named) if *named != family => {
                return Err(Refusal::invalid(&format!(
                    "spec.clusterIPs[{index}]: Invalid value: {address:?}: expected an {named} value as indicated by \
                     `ipFamilies[{index}]`"
                )));
            }
            Some(_) => {}
            None => wanted.push(family),
        }
    }
    if wanted.is_empty() {
        wanted = old.map(|old| named(&old["spec"]["ipFamilies"])).unwrap_or_default();
    }
    if wanted.is_empty() {
        wanted.push(FAMILIES[0]);
    }
    match spec["ipFamilyPolicy"].as_str() {
        Some("SingleStack") if wanted.len() > 1 && old.is_none() => {
            return Err(Refusal::invalid(
                "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be RequireDualStack or PreferDualStack when \
                 multiple 'ipFamilies' are specified",
            ));
        }
        Some("SingleStack") => wanted.truncate(1),
        Some("PreferDualStack" | "RequireDualStack") => {
            let missing: Vec<_> = FAMILIES.into_iter().filter(|family| !wanted.contains(family)).collect();
            wanted.extend(missing);
        }
        _ => {}
    }
    Ok(wanted)
}

fn cluster_ip(spec: &mut Value, old: Option<&Value>, others: &[&Value]) -> Result<(), Refusal> {
    if let Some(first) = spec["clusterIPs"].get(0).cloned() {
        default(spec, "clusterIP", first);
    }
    let kept: Vec<Value> = old.map(|old| elements(&old["spec"]["clusterIPs"]).cloned().collect()).unwrap_or_default();
    default(spec, "clusterIP", kept.first().cloned().unwrap_or_default());
    if spec["clusterIP"] == "None" {
        default(spec, "ipFamilies", json!([FAMILIES[0]]));
        default(spec, "ipFamilyPolicy", json!("SingleStack"));
        default(spec, "clusterIPs", json!(["None"]));
        return Ok(());
    }
    if !spec["clusterIP"].is_null() && spec["clusterIPs"].is_null() {
        spec["clusterIPs"] = json!([spec["clusterIP"]]);
    }
    default(spec, "ipFamilyPolicy", old.map(|old| old["spec"]["ipFamilyPolicy"].clone()).unwrap_or_default());
    let families = families(spec, old)?;
    let taken: BTreeSet<&str> =
        others.iter().flat_map(|other| elements(&other["spec"]["clusterIPs"])).filter_map(Value::as_str).collect();
    let mut addresses = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let (asked, kept) = (spec["clusterIPs"].get(index).and_then(Value::as_str), kept.get(index));
        let address = match (asked, kept.and_then(Value::as_str)) {
            (Some(asked), _) if taken.contains(asked) => {
                return Err(Refusal::invalid(&format!(
                    "spec.clusterIPs: Invalid value: [{asked:?}]: failed to allocate IP {asked}: provided IP is already \
                     allocated"
                )));
            }
            (Some(asked), Some(kept)) if asked != kept => {
                return Err(Refusal::invalid(&format!("spec.clusterIPs[{index}]: Invalid value: field is immutable")));
            }
            (Some(address), _) | (None, Some(address)) => address.to_owned(),
            (None, None) => {
                let free = candidates(family).find(|address| !taken.contains(address.as_str()));
                free.ok_or_else(|| Refusal::invalid("range is full"))?
            }
        };
        addresses.push(address);
    }
    spec["clusterIP"] = json!(addresses[0]);
    spec["clusterIPs"] = json!(addresses);
    default(spec, "ipFamilyPolicy", json!(if families.len() > 1 { "RequireDualStack" } else { "SingleStack" }));
    spec["ipFamilies"] = json!(families);
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
    fn addresses_of_both_families_are_given_kept_and_refused() {
        let spec = json!({"ipFamilyPolicy": "PreferDualStack", "ports": [{"port": 80}]});
        let made = filled(spec.clone(), None, &[]).expect("a sound Service");
        assert_eq!(made["spec"]["clusterIPs"], json!(["10.96.128.1", "fd00:10:96::8001"]));
        assert_eq!(made["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
        let other = filled(spec.clone(), None, &[&made]).expect("a sound Service");
        assert_eq!(other["spec"]["clusterIPs"], json!(["10.96.128.2", "fd00:10:96::8002"]));
        let again = filled(json!({"ports": [{"port": 81}]}), Some(&made), &[]).expect("a sound Service");
        assert_eq!(again["spec"]["clusterIPs"], made["spec"]["clusterIPs"]);
        let single = filled(json!({"ipFamilyPolicy": "SingleStack"}), Some(&made), &[]).expect("a sound Service");
        assert_eq!(single["spec"]["clusterIPs"], json!(["10.96.128.1"]));

        let turned = json!({"ipFamilies": ["IPv6", "IPv4"], "ipFamilyPolicy": "RequireDualStack"});
        let turned = filled(turned, None, &[]).expect("a sound Service");
        assert_eq!(turned["spec"]["clusterIP"], "fd00:10:96::8001");
        let asked = filled(json!({"clusterIPs": ["fd00:10:96::a", "10.96.0.10"]}), None, &[]).expect("a sound Service");
        assert_eq!(asked["spec"]["ipFamilies"], json!(["IPv6", "IPv4"]));
        assert_eq!(asked["spec"]["ipFamilyPolicy"], "RequireDualStack");
        let alone = filled(json!({"ipFamilies": ["IPv6"]}), None, &[]).expect("a sound Service");
        assert_eq!(
            (&alone["spec"]["clusterIPs"], &alone["spec"]["ipFamilyPolicy"]),
            (&json!(["fd00:10:96::8001"]), &json!("SingleStack"))
        );
        for spec in [
            json!({"clusterIPs": ["10.96.0.11", "fd00:10:96::a"]}),
            json!({"ipFamilies": ["IPv4"], "clusterIPs": ["fd00:10:96::b"]}),
            json!({"ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "SingleStack"}),
        ] {
            assert!(filled(spec.clone(), None, &[&asked]).is_err(), "{spec}");
        }
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
