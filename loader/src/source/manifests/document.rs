//! From a file's text to objects: several documents a file, lists unpacked, other kinds passed over.

use std::ffi::OsStr;
use std::fmt::{self, Display};
use std::path::Path;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_saphyr::Spanned;

use super::super::convert;
use crate::model::desired::ServiceKey;
use crate::model::objects::{EndpointSlice, Node, Service, ServiceCidr, SliceKey};

/// apiVersion of ServiceCIDRs.
const NETWORKING: &str = "networking.k8s.io/v1";

/// How a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

impl Format {
    /// By the file's name; `None` for a file that is no manifest.
    pub(super) fn of(name: &OsStr) -> Option<Self> {
        if name.as_encoded_bytes().starts_with(b".") {
            return None;
        }
        match Path::new(name).extension()?.to_str()? {
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// An object of a kind that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Object {
    Service(Service),
    Slice(EndpointSlice),
    Node(Node),
    ServiceCidr(ServiceCidr),
}

/// What makes an object the same object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Service(ServiceKey),
    Slice(SliceKey),
    Node(String),
    ServiceCidr(String),
}

impl Object {
    pub(super) fn key(&self) -> Key {
        match self {
            Self::Service(service) => Key::Service(service.key.clone()),
            Self::Slice(slice) => Key::Slice(slice.key.clone()),
            Self::Node(node) => Key::Node(node.name.clone()),
            Self::ServiceCidr(cidr) => Key::ServiceCidr(cidr.name.clone()),
        }
    }
}

impl Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "Service {key}"),
            Self::Slice(key) => write!(f, "EndpointSlice {key}"),
            Self::Node(name) => write!(f, "Node {name}"),
            Self::ServiceCidr(name) => write!(f, "ServiceCIDR {name}"),
        }
    }
}

/// What is wrong with a file, and where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken {
    /// Line in the file, from 1; 0 if it isn't known.
    pub(super) line: u64,
    pub(super) message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
}

#[derive(Deserialize)]
struct YamlList {
    items: Vec<Spanned<serde_json::Value>>,
}

#[derive(Deserialize)]
struct JsonList {
    items: Vec<serde_json::Value>,
}

/// All objects of a file, or the first thing that is wrong with it.
pub(super) fn read(format: Format, text: &str) -> Result<Vec<Object>, Broken> {
    let mut objects = Vec::new();
    match format {
        Format::Json => read_document(&Document { format, text, line: 0 }, &mut objects)?,
        Format::Yaml => {
            for (line, text) in split(text) {
                read_document(&Document { format, text, line }, &mut objects)?;
            }
        }
    }
    Ok(objects)
}

/// The documents of a YAML file, each with the number of lines before it. Every line that begins with `---` starts one:
/// inside a document such a line can't be.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line, mut position) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            documents.push((start_line, &text[start..position]));
            (start, start_line) = (position, number);
        }
        position += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents.retain(|(_, text)| !is_empty(text));
    documents
}

/// Nothing but comments, blank lines and markers.
fn is_empty(text: &str) -> bool {
    text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#') || line == "---" || line == "...")
}

/// One document, and the number of lines of the file before it.
struct Document<'a> {
    format: Format,
    text: &'a str,
    line: usize,
}

impl Document<'_> {
    fn parse<T: DeserializeOwned>(&self) -> Result<T, Broken> {
        match self.format {
            Format::Json => serde_json::from_str(self.text)
                .map_err(|error| Broken { line: error.line() as u64, message: error.to_string() }),
            Format::Yaml => serde_saphyr::from_str(self.text).map_err(|error| {
                let line = error.location().map_or(0, |location| location.line() + self.line as u64);
                // The first line says what is wrong; the rest is an excerpt.
                let message = error.without_snippet().to_string();
                Broken { line, message: message.lines().next().unwrap_or_default().to_owned() }
            }),
        }
    }
}

fn read_document(document: &Document<'_>, objects: &mut Vec<Object>) -> Result<(), Broken> {
    let header: Header = document.parse()?;
    let first_line = || document.line as u64 + 1;
    match (header.api_version.as_str(), header.kind.as_str()) {
        ("v1", "Service") => objects.push(service(&document.parse()?, first_line())?),
        ("v1", "Node") => objects.push(node(&document.parse()?, first_line())?),
        ("discovery.k8s.io/v1", "EndpointSlice") => objects.push(slice(document.parse()?, first_line())?),
        (NETWORKING, "ServiceCIDR") => objects.push(service_cidr(&document.parse()?, first_line())?),
        ("v1", "List" | "ServiceList" | "NodeList")
        | ("discovery.k8s.io/v1", "EndpointSliceList")
        | (NETWORKING, "ServiceCIDRList") => {
            read_list(document, &header, objects)?;
        }
        (_, "") => return Err(Broken { line: first_line(), message: "a document without a kind".to_owned() }),
        (api_version, kind) => tracing::debug!(api_version, kind, "a manifest of another kind"),
    }
    Ok(())
}

fn read_list(document: &Document<'_>, list: &Header, objects: &mut Vec<Object>) -> Result<(), Broken> {
    let items: Vec<(u64, serde_json::Value)> = match document.format {
        Format::Json => document.parse::<JsonList>()?.items.into_iter().map(|item| (0, item)).collect(),
        Format::Yaml => {
            let items = document.parse::<YamlList>()?.items.into_iter();
            items.map(|item| (item.referenced.line() + document.line as u64, item.value)).collect()
        }
    };
    for (line, item) in items {
        let broken = |error: serde_json::Error| Broken { line, message: error.to_string() };
        let header: Header = serde_json::from_value(item.clone()).map_err(broken)?;
        // Items of a typed list need not repeat what they are.
        let kind = if header.kind.is_empty() { list.kind.trim_end_matches("List") } else { &header.kind };
        let api_version = if header.api_version.is_empty() { &list.api_version } else { &header.api_version };
        let mut item = item;
        item["kind"] = kind.into();
        item["apiVersion"] = api_version.as_str().into();
        match (api_version.as_str(), kind) {
            ("v1", "Service") => objects.push(service(&serde_json::from_value(item).map_err(broken)?, line)?),
            ("v1", "Node") => objects.push(node(&serde_json::from_value(item).map_err(broken)?, line)?),
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                objects.push(slice(serde_json::from_value(item).map_err(broken)?, line)?);
            }
            (NETWORKING, "ServiceCIDR") => {
                objects.push(service_cidr(&serde_json::from_value(item).map_err(broken)?, line)?);
            }
            (_, "") => return Err(Broken { line, message: "an item without a kind".to_owned() }),
            (api_version, kind) => tracing::debug!(api_version, kind, "a manifest of another kind"),
        }
    }
    Ok(())
}

fn named(name: Option<&str>, line: u64) -> Result<(), Broken> {
    match name {
        Some(name) if !name.is_empty() => Ok(()),
        _ => Err(Broken { line, message: "metadata.name is missing".to_owned() }),
    }
}

fn service(object: &core::Service, line: u64) -> Result<Object, Broken> {
    named(object.metadata.name.as_deref(), line)?;
    Ok(Object::Service(object.into()))
}

fn slice(mut object: discovery::EndpointSlice, line: u64) -> Result<Object, Broken> {
    named(Some(&convert::slice_key(&object).name), line)?;
    default_port_names(&mut object);
    Ok(Object::Slice((&object).into()))
}

/// What an API server fills in when it takes an EndpointSlice: a port without a name has the name "". The other absent
/// fields mean the same filled in or not.
fn default_port_names(slice: &mut discovery::EndpointSlice) {
    for port in slice.ports.iter_mut().flatten() {
        port.name.get_or_insert_default();
    }
}

fn node(object: &core::Node, line: u64) -> Result<Object, Broken> {
    named(object.metadata.name.as_deref(), line)?;
    Ok(Object::Node(object.into()))
}

fn service_cidr(object: &networking::ServiceCIDR, line: u64) -> Result<Object, Broken> {
    named(object.metadata.name.as_deref(), line)?;
    Ok(Object::ServiceCidr(object.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::desired::Protocol;

    fn names(format: Format, text: &str) -> Vec<String> {
        read(format, text).expect("a sound file").iter().map(|object| object.key().to_string()).collect()
    }

    fn broken(text: &str) -> Broken {
        read(Format::Yaml, text).expect_err("a broken file")
    }

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  clusterIP: None\n";
    const NODE: &str = "apiVersion: v1\nkind: Node\nmetadata: {name: here}\n";

    #[test]
    fn a_file_may_hold_several_documents_of_which_some_are_empty_or_of_other_kinds() {
        let text =
            format!("---\n# a comment\n---\n{SERVICE}---\nkind: Deployment\napiVersion: apps/v1\n--- \n{NODE}...\n");
        assert_eq!(names(Format::Yaml, &text), ["Service default/web", "Node here"]);
        assert!(names(Format::Yaml, "").is_empty());
        assert!(names(Format::Yaml, "# nothing here\n").is_empty());
    }

    #[test]
    fn service_cidrs_are_read_alone_and_in_a_list() {
        let cidr = "metadata: {name: extra}\nspec: {cidrs: [10.97.0.1/16, 'fd00:97::/112', 10.96.0.0]}\n";
        let alone = format!("apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\n{cidr}");
        let list = format!("apiVersion: networking.k8s.io/v1\nkind: ServiceCIDRList\nitems:\n- {}", indented(cidr));
        for text in [alone, list] {
            let objects = read(Format::Yaml, &text).expect("a sound file");
            let [Object::ServiceCidr(cidr)] = &objects[..] else { panic!("one ServiceCIDR in {text}") };
            let networks: Vec<String> = cidr.networks.iter().map(ToString::to_string).collect();
            assert_eq!(
                (cidr.name.as_str(), networks),
                ("extra", vec!["10.97.0.0/16".to_owned(), "fd00:97::/112".to_owned()])
            );
            let problems: Vec<&str> = cidr.problems.iter().map(|problem| problem.field.as_str()).collect();
            assert_eq!(problems, ["spec.cidrs[2]"]);
        }
        assert_eq!(broken("apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\n").message, "metadata.name is missing");
    }

    fn indented(item: &str) -> String {
        item.trim().replace('\n', "\n  ")
    }

    #[test]
    fn a_namespace_is_kept_and_a_service_of_another_group_is_not_ours() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n---\n\
            apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: function}\n";
        assert_eq!(names(Format::Yaml, text), ["Service shop/web"]);
    }

    #[test]
    fn lists_are_unpacked_typed_or_not() {
        let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}}\n\
            - {apiVersion: v1, kind: Secret, metadata: {name: b}}\n";
        assert_eq!(names(Format::Yaml, list), ["Service default/a"]);
        let list = "{\"apiVersion\": \"discovery.k8s.io/v1\", \"kind\": \"EndpointSliceList\", \"items\": [\n\
            {\"metadata\": {\"name\": \"a\"}, \"addressType\": \"IPv4\", \"endpoints\": []}]}";
        assert_eq!(names(Format::Json, list), ["EndpointSlice default/a"]);
    }

    #[test]
    fn a_hand_written_port_without_a_name_is_the_services_port_without_a_name() {
        let slice = "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-1}, addressType: IPv4, \
            ports: [{port: 8080}, {name: admin, port: 81, protocol: UDP}], endpoints: []}";
        let list = format!("apiVersion: v1\nkind: List\nitems:\n- {slice}\n");
        for text in [slice, &list] {
            let objects = read(Format::Yaml, text).expect("a sound file");
            let [Object::Slice(read)] = &objects[..] else { panic!("one EndpointSlice in {text}") };
            let ports: Vec<_> = read.ports.iter().map(|port| (&*port.name, port.protocol, port.port)).collect();
            assert_eq!(ports, [("", Protocol::Tcp, 8080), ("admin", Protocol::Udp, 81)]);
            assert!(read.problems.is_empty(), "{:?}", read.problems);
        }
    }

    #[test]
    fn what_kubectl_prints_is_read_alone_and_in_a_list() {
        let service = "apiVersion: v1
kind: Service
metadata:
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {\"apiVersion\":\"v1\",\"kind\":\"Service\"}
  creationTimestamp: \"2025-01-01T00:00:00Z\"
  labels:
    enabled: \"yes\"
    empty: \"\"
  name: web
  namespace: shop
  resourceVersion: \"123\"
  uid: 2e2b6a3c-0000-4b7b-9d3a-6d1f0d9b2a11
spec:
  clusterIP: None
  clusterIPs:
  - None
  internalTrafficPolicy: Cluster
  ipFamilies:
  - IPv4
  ports:
  - name: http
    port: 80
    protocol: TCP
    targetPort: http
  - name: admin
    port: 81
    targetPort: 8081
  sessionAffinity: None
status:
  loadBalancer: {}
";
        let read_one = |text: &str| match read(Format::Yaml, text).as_deref() {
            Ok([Object::Service(service)]) => service.clone(),
            other => panic!("one Service, not {other:?}"),
        };
        let alone = read_one(service);
        assert_eq!((alone.ports.len(), alone.cluster_ips.len(), alone.problems.len()), (2, 0, 0));
        assert_eq!(alone.created, Some(1_735_689_600));
        let item = service.trim().replace('\n', "\n  ");
        let list = format!("apiVersion: v1\nitems:\n- {item}\nkind: List\nmetadata:\n  resourceVersion: \"\"\n");
        assert_eq!(read_one(&list), alone);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line_in_the_file() {
        let text = format!("{SERVICE}---\n{}", SERVICE.replace("clusterIP: None", "ports: 80"));
        let error = broken(&text);
        assert_eq!(error.line, 13, "{error:?}");
        let error = broken(&format!("{SERVICE}---\nkind: Service\n  apiVersion: [v1\n"));
        assert!((8..=10).contains(&error.line), "{error:?}");
        assert_eq!(broken(&format!("{SERVICE}---\nmetadata: {{name: x}}\n")).line, 7);
        assert_eq!(broken("apiVersion: v1\nkind: Service\n").message, "metadata.name is missing");
        let list = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}}\n\
            - {apiVersion: v1, kind: Service, metadata: {name: a}, spec: 3}\n";
        assert_eq!(broken(list).line, 5);
        let error = read(Format::Json, "{\n\"kind\": 1}").expect_err("a broken file");
        assert_eq!(error.line, 2);
    }
}
