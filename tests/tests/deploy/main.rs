//! What `deploy/` installs: the kustomize base and the Helm chart make the same objects, which are sound, and every option of
//! `sheave run` is in both.

mod docs;
mod helm;
mod options;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sheave_tests::kube_api::{KubeApi, Resource};
use sheave_tests::kubectl::kustomize;
use sheave_tests::leftovers::unique_name;

const API_SERVER: &str = "https://192.168.50.1:6443";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The objects by kind and name.
fn by_name(objects: Vec<Value>) -> Result<BTreeMap<String, Value>> {
    let count = objects.len();
    let name = |object: &Value| format!("{} {}", object["kind"], object["metadata"]["name"]).replace('"', "");
    let named: BTreeMap<_, _> = objects.into_iter().map(|object| (name(&object), object)).collect();
    ensure!(named.len() == count, "two objects of one name: {:?}", named.keys());
    Ok(named)
}

/// Without that by which a changed option replaces the pods: kustomize puts a hash into the ConfigMap's name, the chart one
/// into an annotation of the pods.
fn without_hashes(objects: &[Value]) -> Result<BTreeMap<String, Value>> {
    let options = objects.iter().find(|object| object["data"]["SHEAVE_CONNECT"].is_string());
    let name = options.context("no ConfigMap with the options")?["metadata"]["name"].to_string();
    let text = serde_json::to_string(objects)?.replace(&name, "\"sheave\"");
    let mut objects = by_name(serde_json::from_str(&text)?)?;
    let daemon_set = objects.get_mut("DaemonSet sheave").context("no DaemonSet")?;
    let metadata = daemon_set["spec"]["template"]["metadata"].as_object_mut().context("pods without metadata")?;
    if let Some(Value::Object(mut annotations)) = metadata.remove("annotations") {
        annotations.remove("sheave.dev/config");
        ensure!(annotations.is_empty(), "{annotations:?}");
    }
    Ok(objects)
}

/// Who moves from one to the other, or follows documentation of the other, would get something else.
#[test]
fn the_chart_and_the_base_make_the_same_objects() -> Result<()> {
    let mut base = kustomize(&folder().join("kustomize"))?;
    base.extend(kustomize(&folder().join("kustomize/monitoring"))?);
    // The one option without which the chart refuses.
    for object in base.iter_mut().filter(|object| object["data"]["SHEAVE_CONNECT"].is_string()) {
        object["data"]["SHEAVE_API_SERVER"] = API_SERVER.into();
    }
    let values = json!({
        "config": {"SHEAVE_API_SERVER": API_SERVER},
        "serviceMonitor": {"enabled": true}, "dashboard": {"enabled": true},
    });
    let chart = helm::render(&folder().join("helm/sheave"), &values)?;
    let (base, chart) = (without_hashes(&base)?, without_hashes(&chart)?);
    ensure!(base.keys().eq(chart.keys()), "{:?}\n{:?}", base.keys(), chart.keys());
    for (name, object) in &base {
        let (base, chart) = (serde_json::to_string_pretty(object)?, serde_json::to_string_pretty(&chart[name])?);
        ensure!(base == chart, "{name}: the base has\n{base}\nand the chart\n{chart}");
    }
    Ok(())
}

/// A changed option would change nothing until somebody restarts the pods.
#[test]
fn a_changed_option_replaces_the_pods() -> Result<()> {
    let annotation = |port: &str| -> Result<Value> {
        let values = json!({"config": {"SHEAVE_API_SERVER": API_SERVER, "SHEAVE_SNAT_PORTS": port}});
        let objects = by_name(helm::render(&folder().join("helm/sheave"), &values)?)?;
        Ok(objects["DaemonSet sheave"]["spec"]["template"]["metadata"]["annotations"]["sheave.dev/config"].clone())
    };
    let (one, other) = (annotation("10000-19999")?, annotation("10000-29999")?);
    ensure!(one.is_string() && one != other, "{one} and {other}");

    let base = by_name(kustomize(&folder().join("kustomize"))?)?;
    let name = base.keys().find_map(|name| name.strip_prefix("ConfigMap ")).context("no ConfigMap")?;
    ensure!(name.len() > "sheave-".len(), "{name} is the same for every content");
    let container = &base["DaemonSet sheave"]["spec"]["template"]["spec"]["containers"][0];
    ensure!(container["envFrom"][0]["configMapRef"]["name"] == name, "{:#}", container["envFrom"]);
    Ok(())
}

/// Without it, Sheave would wait for the address that it serves itself.
#[test]
fn the_chart_asks_for_the_api_servers_address() {
    let error = helm::render(&folder().join("helm/sheave"), &json!({})).map(|_| ()).unwrap_err();
    assert!(format!("{error:#}").contains("config.SHEAVE_API_SERVER"), "{error:#}");
}

/// Fields that Kubernetes doesn't know, or knows in another place, would be refused or, worse, ignored.
#[test]
fn every_field_is_one_of_kubernetes() -> Result<()> {
    let chart = folder().join("helm/sheave");
    let volume = json!({"name": "kubeconfig", "secret": {"secretName": "sheave"}});
    let values = json!({
        "config": {"SHEAVE_KUBECONFIG": "/etc/sheave/kubeconfig"},
        "image": {"repository": "registry.example/sheave", "tag": "main"},
        "imagePullSecrets": [{"name": "registry"}],
        "extraCapabilities": ["SYS_RESOURCE"],
        "podAnnotations": {"example.com/team": "network"},
        "extraVolumes": [volume],
        "extraVolumeMounts": [{"name": "kubeconfig", "mountPath": "/etc/sheave", "readOnly": true}],
        "serviceMonitor": {"enabled": true}, "dashboard": {"enabled": true},
    });
    let mut objects = helm::render(&chart, &values)?;
    let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").context("no DaemonSet")?;
    let pod = &daemon_set["spec"]["template"]["spec"];
    ensure!(pod["volumes"].as_array().is_some_and(|volumes| volumes.contains(&volume)), "{pod:#}");
    ensure!(pod["containers"][0]["image"] == "registry.example/sheave:main", "{pod:#}");
    ensure!(pod["containers"][0]["securityContext"]["capabilities"]["add"][3] == "SYS_RESOURCE", "{pod:#}");
    objects.extend(kustomize(&folder().join("kustomize"))?);
    for object in &objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        match kind {
            "ServiceAccount" => sound::<ServiceAccount>(object),
            "ClusterRole" => sound::<ClusterRole>(object),
            "ClusterRoleBinding" => sound::<ClusterRoleBinding>(object),
            "ConfigMap" => sound::<ConfigMap>(object),
            "DaemonSet" => sound::<DaemonSet>(object),
            "Service" => sound::<Service>(object),
            // The Prometheus operator's; its fields are not Kubernetes'.
            "ServiceMonitor" => continue,
            _ => bail!("a {kind} is something new: {object:#}"),
        }
        .with_context(|| format!("{kind} {}", object["metadata"]["name"]))?;
    }
    Ok(())
}

/// Fails if reading an object as a type of Kubernetes loses or changes anything.
fn sound<K: DeserializeOwned + Serialize + Debug>(object: &Value) -> Result<()> {
    let read: K = serde_json::from_value(object.clone())?;
    contains(&serde_json::to_value(read)?, object, "")
}

fn contains(read: &Value, given: &Value, path: &str) -> Result<()> {
    match (read, given) {
        (Value::Object(read), Value::Object(given)) => given.iter().try_for_each(|(key, value)| {
            let path = format!("{path}.{key}");
            contains(read.get(key).with_context(|| format!("{path} is no field"))?, value, &path)
        }),
        (Value::Array(read), Value::Array(given)) if read.len() == given.len() => {
            read.iter().zip(given).try_for_each(|(read, given)| contains(read, given, path))
        }
        _ if read == given => Ok(()),
        _ => bail!("{path} is {given}, read as {read}"),
    }
}

/// `kubectl apply` of what the README says, with the cluster of `SHEAVE_TEST_KUBECONFIG` (as a dry run, on its server) or with
/// the tests' own API.
#[test]
fn an_api_server_takes_the_base_and_what_the_chart_renders() -> Result<()> {
    let values = json!({"config": {"SHEAVE_API_SERVER": API_SERVER}});
    let chart = helm::render(&folder().join("helm/sheave"), &values)?;
    let rendered = std::env::temp_dir().join(format!("{}.json", unique_name()));
    fs::write(&rendered, json!({"apiVersion": "v1", "kind": "List", "items": chart}).to_string())?;
    let base = folder().join("kustomize");
    let outcome = match std::env::var_os("SHEAVE_TEST_KUBECONFIG") {
        Some(kubeconfig) => [["-k".as_ref(), base.as_os_str()], ["-f".as_ref(), rendered.as_os_str()]]
            .into_iter()
            .try_for_each(|what| apply(Path::new(&kubeconfig), &["--dry-run=server"], what).map(|_| ())),
        None => apply_to_own(&base, &rendered),
    };
    fs::remove_file(&rendered)?;
    outcome
}

fn apply_to_own(base: &Path, chart: &Path) -> Result<()> {
    let api = KubeApi::serve(TcpListener::bind("127.0.0.1:0")?);
    api.apply(json!({"kind": "Namespace", "metadata": {"name": "kube-system"}}));
    let kubeconfig = std::env::temp_dir().join(unique_name());
    fs::write(&kubeconfig, api.kubeconfig())?;
    // It has no OpenAPI document to validate against.
    let apply = |what| apply(&kubeconfig, &["--validate=false"], what);
    let base = ["-k".as_ref(), base.as_os_str()];
    let said = apply(base)?;
    ensure!(said.lines().filter(|line| line.ends_with(" created")).count() == 5, "{said}");
    let said = apply(base)?;
    ensure!(said.lines().filter(|line| line.ends_with(" unchanged")).count() == 5, "{said}");
    // The chart's, over it: the same objects but for the ConfigMap's name.
    let said = apply(["-f".as_ref(), chart.as_os_str()])?;
    ensure!(said.contains("configmap/sheave created"), "{said}");
    let sets = api.objects(Resource::DaemonSets);
    ensure!(sets.len() == 1 && sets[0]["metadata"]["namespace"] == "kube-system", "{sets:#?}");
    fs::remove_file(&kubeconfig)?;
    Ok(())
}

fn apply(kubeconfig: &Path, options: &[&str], what: [&std::ffi::OsStr; 2]) -> Result<String> {
    let home = std::env::temp_dir().join(unique_name());
    let mut kubectl = Command::new("kubectl");
    kubectl.arg("apply").args(options).args(what).arg("--request-timeout=20s");
    let output = kubectl.env("KUBECONFIG", kubeconfig).env("HOME", &home).output();
    let _ = fs::remove_dir_all(&home);
    let output = output.context("cannot run kubectl (`cargo xtask setup` installs it on Debian)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "kubectl apply {what:?}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}
