//! Objects as an API server might hand them over, through convert, model and plan.
//!
//! What comes from one namespace, however wrong, changes nothing for the Services of another that share no address with it; and
//! what the plan has written once, it never writes again.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};
use sheave::config::{ExternalIps, NodePortAddresses};
use sheave::model::desired::{Algorithm, ServicePort, ServicePortName};
use sheave::model::{Change, Model, ModelOptions};
use sheave::plan::PlanError;

use super::kernel_maps::Maps;
pub use super::kernel_maps::Room;

/// Service ids: more than the ports of all Services that an input has bytes for.
const SERVICES: u32 = 512;
/// Where the sound objects are.
const SOUND: &str = "sound";

/// Runs one input.
///
/// # Panics
/// If an object that is wrong has disturbed another.
pub fn run(input: &[u8]) {
    let sound = sound_beside(input.last().copied().unwrap_or_default());
    let mut changes = sound.changes.clone();
    let mut input = Unstructured::new(input);
    while let Ok(change) = wrong(&mut input) {
        changes.extend(change);
    }
    check(&changes, &sound.alone, room(&changes));
}

/// What objects of one input take.
pub(super) fn room(changes: &[Change]) -> Room {
    let is_maglev =
        |change: &Change| matches!(change, Change::Service(service) if service.algorithm == Some(Algorithm::Maglev));
    Room::new(SERVICES, changes.iter().any(is_maglev))
}

/// Objects with which nothing is wrong.
pub(super) struct Sound {
    pub(super) changes: Vec<Change>,
    /// What they come to by themselves.
    pub(super) alone: BTreeMap<ServicePortName, ServicePort>,
}

/// [`sound`] beside the objects of one input in four: they take longer than most inputs.
pub(super) fn sound_beside(choice: u8) -> &'static Sound {
    static NONE: Sound = Sound { changes: Vec::new(), alone: BTreeMap::new() };
    static SOUND: OnceLock<Sound> = OnceLock::new();
    if !choice.is_multiple_of(4) {
        return &NONE;
    }
    SOUND.get_or_init(|| {
        let changes = sound();
        let alone = desired(&changes);
        Sound { changes, alone }
    })
}

/// Brings a node, whose maps have this room, to what objects say; those of [`SOUND`] are as they are `alone`.
/// Returns the service ports, and those of which the plan says why they can't be.
///
/// # Panics
/// If it can't be brought there.
pub fn check(
    changes: &[Change],
    alone: &BTreeMap<ServicePortName, ServicePort>,
    room: Room,
) -> (BTreeMap<ServicePortName, ServicePort>, BTreeMap<ServicePortName, PlanError>) {
    let all = desired(changes);
    let of_sound = all.iter().filter(|(name, _)| &*name.service.namespace == SOUND);
    let of_sound: BTreeMap<_, _> = of_sound.map(|(name, port)| (name.clone(), port.clone())).collect();
    assert_eq!(of_sound, *alone, "objects of another namespace changed what these come to");
    let mut maps = Maps::new(room);
    let refused = maps.reach(&all);
    for (name, error) in &refused {
        assert_ne!(&*name.service.namespace, SOUND, "{error}");
        let named = matches!(error, PlanError::NameTooLong | PlanError::NameAmbiguous);
        assert!(named || matches!(error, PlanError::TableFull { .. }), "{name}: {error}");
    }
    maps.assert_settled(&all);
    let planned = all.into_iter().filter(|(name, _)| !refused.contains_key(name)).collect();
    (planned, refused)
}

fn model() -> Model {
    Model::new(ModelOptions {
        node_name: "here".to_owned(),
        external_ips: ExternalIps::All,
        nodeport_addresses: NodePortAddresses::Primary,
        algorithm: Algorithm::Random,
    })
}

/// What changes come to. It is the same if all Services are asked, and if only those that each change touches are.
/// # Panics
/// If it isn't.
#[must_use]
pub fn desired(changes: &[Change]) -> BTreeMap<ServicePortName, ServicePort> {
    let (mut model, mut followed) = (model(), BTreeMap::new());
    for change in changes {
        for service in model.apply(change.clone()) {
            followed.retain(|name: &ServicePortName, _| name.service != service);
            followed.extend(model.desired(&service));
        }
    }
    let all: BTreeMap<_, _> = model.services().flat_map(|service| model.desired(service)).collect();
    assert_eq!(followed, all, "a change touched a Service that was not reported");
    all
}

/// Objects with which nothing is wrong.
///
/// # Panics
/// Never: they are sound.
#[must_use]
pub fn sound() -> Vec<Change> {
    let service: core::Service = serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": SOUND, "creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {
            "type": "LoadBalancer",
            "clusterIPs": ["10.96.200.1", "fd00:96::c8:1"],
            "ports": [{"name": "http", "port": 80, "nodePort": 32000}, {"name": "dns", "port": 53, "protocol": "UDP"}],
            "loadBalancerSourceRanges": ["198.51.100.0/24"]
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.200"}]}}
    }))
    .expect("a Service");
    let slice: discovery::EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "web-1", "namespace": SOUND, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}],
        "endpoints": [{"addresses": ["10.244.200.1"], "nodeName": "here"}, {"addresses": ["10.244.200.2"]}]
    }))
    .expect("an EndpointSlice");
    let node: core::Node = serde_json::from_value(json!({
        "metadata": {"name": "here", "labels": {"topology.kubernetes.io/zone": "a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}
    }))
    .expect("a Node");
    vec![Change::Node((&node).into()), Change::Service((&service).into()), Change::Slice((&slice).into())]
}

/// One more object, or one that goes. Most are JSON, as an API server would send them; what isn't even of the types is none.
fn wrong(input: &mut Unstructured<'_>) -> Result<Option<Change>> {
    if input.is_empty() {
        return Err(arbitrary::Error::NotEnoughData);
    }
    let kind: u8 = input.arbitrary()?;
    let metadata = metadata(input)?;
    Ok(match kind % 8 {
        0..=3 => {
            let object = json!({"metadata": metadata, "spec": service_spec(input)?, "status": service_status(input)?});
            serde_json::from_value::<core::Service>(object).ok().map(|service| Change::Service((&service).into()))
        }
        4..=6 => {
            let object = slice(input, metadata)?;
            serde_json::from_value::<discovery::EndpointSlice>(object).ok().map(|slice| Change::Slice((&slice).into()))
        }
        _ => {
            let object = serde_json::from_value::<core::Service>(json!({"metadata": metadata})).ok();
            object.map(|service| Change::ServiceGone(sheave::source::convert::service_key(&service)))
        }
    })
}

const ADDRESSES: [&str; 16] = [
    "10.96.0.1",
    "10.96.0.2",
    "fd00:96::1",
    "fd00:96::2",
    "192.0.2.7",
    "203.0.113.1",
    "10.244.0.1",
    "10.244.0.2",
    "fd00:244::1",
    "None",
    "",
    "0.0.0.0",
    "::",
    "::ffff:10.96.0.1",
    "010.096.000.001",
    "256.1.1.1",
];
const WORDS: [&str; 24] = [
    "",
    "TCP",
    "UDP",
    "SCTP",
    "tcp",
    "FOO",
    "Local",
    "Cluster",
    "Bar",
    "ClientIP",
    "None",
    "NodePort",
    "LoadBalancer",
    "ExternalName",
    "ClusterIP",
    "IPv4",
    "IPv6",
    "FQDN",
    "VIP",
    "Proxy",
    "maglev",
    "round-robin",
    "http",
    "a:b/c",
];
const NUMBERS: [i64; 16] =
    [0, 1, 80, 443, 8_080, 30_000, 30_001, 65_535, 65_536, -1, 86_400, 86_401, 53, i32::MAX as i64, i32::MIN as i64, 9];
const NETWORKS: [&str; 8] = [
    "0.0.0.0/0",
    "::/0",
    "10.0.0.0/8",
    "10.1.2.3/8",
    "fd00::/129",
    "192.0.2.1",
    "::ffff:10.0.0.0/104",
    " 198.51.100.0/24 ",
];

fn pick<'a>(input: &mut Unstructured<'_>, of: &[&'a str]) -> Result<&'a str> {
    Ok(of[usize::from(input.arbitrary::<u8>()?) % of.len()])
}

fn number(input: &mut Unstructured<'_>) -> Result<i64> {
    let which: u8 = input.arbitrary()?;
    // Odd, so that it is never the sound Service's nodePort.
    Ok(if which >= 0xf0 {
        i64::from(input.arbitrary::<i32>()? | 1)
    } else {
        NUMBERS[usize::from(which) % NUMBERS.len()]
    })
}

/// Up to seven of something.
fn some(input: &mut Unstructured<'_>, mut one: impl FnMut(&mut Unstructured<'_>) -> Result<Value>) -> Result<Value> {
    (0..input.arbitrary::<u8>()? % 8).map(|_| one(input)).collect()
}

fn name(input: &mut Unstructured<'_>) -> Result<String> {
    let which: u8 = input.arbitrary()?;
    Ok(match which {
        0xff => "x".repeat(usize::from(input.arbitrary::<u8>()?)),
        0xf8..=0xfe => pick(input, &WORDS)?.to_owned(),
        _ => format!("name-{}", which % 5),
    })
}

fn metadata(input: &mut Unstructured<'_>) -> Result<Value> {
    let what: u8 = input.arbitrary()?;
    let mut labels = json!({"kubernetes.io/service-name": name(input)?});
    let mut annotations = json!({});
    match what & 0x0f {
        1 => labels["service.kubernetes.io/headless"] = "".into(),
        2 => labels["service.kubernetes.io/service-proxy-name"] = "other".into(),
        3 => annotations["sheave.dev/algorithm"] = pick(input, &WORDS)?.into(),
        4 => {
            annotations["sheave.dev/weights"] =
                format!("{},{}={}", number(input)?, pick(input, &ADDRESSES)?, number(input)?).into();
        }
        5 => annotations["endpoints.kubernetes.io/last-change-trigger-time"] = pick(input, &WORDS)?.into(),
        _ => {}
    }
    let namespace = if what & 0x10 == 0 { "default" } else { "other" };
    Ok(
        json!({"name": name(input)?, "namespace": namespace, "labels": labels, "annotations": annotations, "unknown": what}),
    )
}

fn service_spec(input: &mut Unstructured<'_>) -> Result<Value> {
    let what: u8 = input.arbitrary()?;
    let address = |input: &mut Unstructured<'_>| Ok(pick(input, &ADDRESSES)?.into());
    let mut spec = json!({
        "type": pick(input, &WORDS)?,
        "clusterIPs": some(input, address)?,
        "ports": some(input, |input| {
            let number = [number(input)?, number(input)?];
            Ok(json!({"name": name(input)?, "port": number[0], "nodePort": number[1], "protocol": pick(input, &WORDS)?}))
        })?,
        "unknownField": {"of": what},
    });
    if what & 1 != 0 {
        spec["externalIPs"] = some(input, address)?;
    }
    if what & 2 != 0 {
        spec["loadBalancerSourceRanges"] = some(input, |input| Ok(pick(input, &NETWORKS)?.into()))?;
    }
    if what & 4 != 0 {
        spec["sessionAffinity"] = pick(input, &WORDS)?.into();
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": number(input)?}});
    }
    if what & 8 != 0 {
        spec["internalTrafficPolicy"] = pick(input, &WORDS)?.into();
        spec["externalTrafficPolicy"] = pick(input, &WORDS)?.into();
        spec["healthCheckNodePort"] = number(input)?.into();
    }
    Ok(spec)
}

fn service_status(input: &mut Unstructured<'_>) -> Result<Value> {
    let ingress = some(input, |input| Ok(json!({"ip": pick(input, &ADDRESSES)?, "ipMode": pick(input, &WORDS)?})))?;
    Ok(json!({"loadBalancer": {"ingress": ingress}}))
}

fn slice(input: &mut Unstructured<'_>, metadata: Value) -> Result<Value> {
    let what: u8 = input.arbitrary()?;
    let family = if what & 1 == 0 { ["IPv4", "IPv6"][usize::from(what >> 1 & 1)] } else { pick(input, &WORDS)? };
    Ok(json!({
        "metadata": metadata,
        "addressType": family,
        "ports": some(input, |input| {
            Ok(json!({"name": name(input)?, "port": number(input)?, "protocol": pick(input, &WORDS)?}))
        })?,
        "endpoints": some(input, |input| {
            let conditions: u8 = input.arbitrary()?;
            Ok(json!({
                "addresses": some(input, |input| Ok(pick(input, &ADDRESSES)?.into()))?,
                "nodeName": if conditions & 1 == 0 { "here" } else { "there" },
                "conditions": {"ready": conditions & 2 == 0, "serving": conditions & 4 == 0, "terminating": conditions & 8 != 0},
                "hints": {"forZones": [{"name": if conditions & 16 == 0 { "a" } else { "b" }}]},
            }))
        })?,
    }))
}
