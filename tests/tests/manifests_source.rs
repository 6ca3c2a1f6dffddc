//! The folder of manifests as a source, used as editors, `cp`, `kubectl` and configuration management use folders.
//!
//! Nothing here needs root. Every wait is bounded by [`PATIENCE`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheave::config::NodePortAddresses;
use sheave::model::{Change, Model, ModelOptions};
use sheave::source::{self, SourceError, SourceEvent};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// More than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to have happened: several times the source's own pause.
const SILENCE: Duration = Duration::from_millis(300);

/// A folder that goes with its value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sheave-manifests-source-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("a file can be written");
    }

    /// As editors save: a file beside it, moved over it.
    fn save(&self, name: &str, text: &str) {
        let beside = self.path(&format!(".{name}.swp"));
        fs::write(&beside, text).expect("a file can be written");
        fs::rename(beside, self.path(name)).expect("a file can be moved");
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("the file is there");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _: io::Result<()> = fs::remove_dir_all(&self.0);
    }
}

fn service(name: &str) -> String {
    service_at(name, 80)
}

fn service_at(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: 10.96.0.10\n  ports:\n  - port: {port}\n"
    )
}

/// What is logged on this thread. The tests' runtimes have one thread, so that is what their source says.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines_with(&self, text: &str) -> Vec<String> {
        let log = self.0.lock().expect("nobody panicked");
        String::from_utf8_lossy(&log).lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }

    fn follow(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panicked").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A running source and a model that takes in what it reports.
struct Running {
    receiver: mpsc::Receiver<SourceEvent>,
    task: JoinHandle<Result<(), SourceError>>,
    model: Model,
    synced: usize,
    changes: Vec<Change>,
}

impl Running {
    fn start(directory: &Path) -> Self {
        let (sender, receiver) = mpsc::channel(16);
        let run = source::manifests::run(directory.to_owned(), "here".to_owned(), sender);
        let options = ModelOptions {
            node_name: "here".to_owned(),
            external_ips: true,
            nodeport_addresses: NodePortAddresses::Primary,
        };
        Self { receiver, task: tokio::spawn(run), model: Model::new(options), synced: 0, changes: Vec::new() }
    }

    async fn follow(directory: &Path) -> Self {
        let mut running = Self::start(directory);
        running.until("synced", |running| running.synced == 1).await;
        running
    }

    fn take(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Synced => self.synced += 1,
            SourceEvent::Changes(changes) => {
                for change in changes {
                    self.changes.push(change.clone());
                    self.model.apply(change);
                }
            }
        }
    }

    async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition(self) {
            match tokio::time::timeout_at(deadline, self.receiver.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source ended while waiting for: {what}"),
                Err(_) => panic!("waited in vain for: {what}; services are {:?}", self.services()),
            }
        }
    }

    async fn until_services(&mut self, names: &[&str]) {
        let names: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.until(&format!("services {names:?}"), |running| running.services() == names).await;
    }

    async fn until_port(&mut self, port: u16) {
        self.until(&format!("port {port}"), |running| running.ports() == BTreeSet::from([port])).await;
    }

    /// Takes in whatever comes for a moment, and returns how much that was.
    async fn settle(&mut self) -> usize {
        let before = self.changes.len();
        while let Ok(Some(event)) = timeout(SILENCE, self.receiver.recv()).await {
            self.take(event);
        }
        self.changes.len() - before
    }

    fn services(&self) -> BTreeSet<String> {
        self.model.services().map(|key| key.name.clone()).collect()
    }

    fn ports(&self) -> BTreeSet<u16> {
        let desired = self.model.services().flat_map(|key| self.model.desired(key).into_values());
        desired.flat_map(|port| port.frontends.into_keys()).map(|frontend| frontend.port()).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Otherwise a machine would start without the Services that its folder describes.
#[tokio::test]
async fn what_is_in_the_folder_is_reported_and_then_synced_once() {
    let folder = Folder::new("start");
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: here}\n---\napiVersion: v1\nkind: Node\nmetadata: {name: there}\n";
    folder.write("a.yaml", &format!("{}---\n{}", service("a"), service("b")));
    folder.write(
        "c.yml",
        &format!("apiVersion: v1\nkind: List\nitems:\n- {}", service("c").trim().replace('\n', "\n  ")),
    );
    folder.write("d.json", r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "d"}, "spec": {}}"#);
    folder.write("node.yaml", node);
    folder.write("deployment.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n");
    folder.write("notes.txt", "kind: [");
    folder.write(".hidden.yaml", "kind: [");
    fs::create_dir(folder.path("folder.yaml")).expect("a folder can be made");
    let log = Log::default();
    let _guard = log.follow();
    let mut running = Running::follow(&folder.0).await;
    assert_eq!(running.services(), ["a", "b", "c", "d"].map(str::to_owned).into());
    let nodes = running.changes.iter().filter(|change| matches!(change, Change::Node(_))).count();
    assert_eq!(nodes, 1, "only this node's");
    assert_eq!(running.settle().await, 0);
    assert_eq!(running.synced, 1);
    assert_eq!(log.lines_with("WARN sheave::source"), Vec::<String>::new());
}

/// Otherwise an empty folder would leave a node waiting for ever.
#[tokio::test]
async fn an_empty_folder_is_synced() {
    let folder = Folder::new("empty");
    let running = Running::follow(&folder.0).await;
    assert!(running.changes.is_empty());
}

/// Otherwise an edited manifest would count only after a restart.
#[tokio::test]
async fn files_that_are_written_saved_renamed_and_deleted_are_followed() {
    let folder = Folder::new("follow");
    let mut running = Running::follow(&folder.0).await;
    folder.write("a.yaml", &service_at("a", 80));
    running.until_port(80).await;
    folder.write("a.yaml", &service_at("a", 81));
    running.until_port(81).await;
    folder.save("a.yaml", &service_at("a", 82));
    running.until_port(82).await;
    folder.save("b.yaml", &service("b"));
    running.until_services(&["a", "b"]).await;
    folder.remove("b.yaml");
    running.until_services(&["a"]).await;
    fs::rename(folder.path("a.yaml"), folder.path("c.yaml")).expect("a file can be moved");
    assert_eq!(running.settle().await, 0, "the same object from another file is no change");
    fs::rename(folder.path("c.yaml"), folder.path("c.disabled")).expect("a file can be moved");
    running.until_services(&[]).await;
}

/// Otherwise every save of a large file would disturb Services that it doesn't change.
#[tokio::test]
async fn only_what_differs_is_reported() {
    let folder = Folder::new("differs");
    folder.write("a.yaml", &format!("{}---\n{}", service_at("a", 80), service_at("b", 81)));
    let mut running = Running::follow(&folder.0).await;
    let before = running.changes.len();
    folder.write("a.yaml", &format!("# a comment\n{}---\n{}", service_at("a", 80), service_at("b", 82)));
    running.until("a change", |running| running.changes.len() > before).await;
    running.settle().await;
    assert!(matches!(&running.changes[before..], [Change::Service(service)] if service.key.name == "b"));
}

/// Otherwise a file that takes a while to write would be read in half, and its Services would flap.
#[tokio::test]
async fn a_file_is_read_when_its_writer_has_finished() {
    let folder = Folder::new("half");
    let log = Log::default();
    let _guard = log.follow();
    let mut running = Running::follow(&folder.0).await;
    let text = format!("{}---\n{}", service("a"), service("b"));
    let (first, second) = text.split_at(text.len() - 20);
    let mut file = fs::File::create(folder.path("a.yaml")).expect("a file can be made");
    file.write_all(first.as_bytes()).expect("it can be written");
    assert_eq!(running.settle().await, 0);
    file.write_all(second.as_bytes()).expect("it can be written");
    drop(file);
    running.until_services(&["a", "b"]).await;
    assert_eq!(log.lines_with("WARN sheave::source"), Vec::<String>::new());
}

/// Otherwise a typing error would take Services down, and nobody would know where it is.
#[tokio::test]
async fn a_broken_file_is_named_once_with_its_line_and_changes_nothing() {
    let folder = Folder::new("broken");
    let log = Log::default();
    let _guard = log.follow();
    folder.write("a.yaml", &service("a"));
    folder.write("b.yaml", &service("b"));
    let mut running = Running::follow(&folder.0).await;
    let broken = format!("{}---\n{}", service("c"), service("d").replace("name: d", "name: [d"));
    folder.write("a.yaml", &broken);
    assert_eq!(running.settle().await, 0);
    folder.write("a.yaml", &broken);
    assert_eq!(running.settle().await, 0);
    let lines = log.lines_with("a.yaml");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = lines[0].split("line ").nth(1).and_then(|rest| rest.split(':').next()?.parse::<u64>().ok());
    assert!(line.is_some_and(|line| (13..=18).contains(&line)), "{lines:?}");
    folder.write("b.yaml", &service_at("b", 81));
    running.until("others go on", |running| running.ports().contains(&81)).await;
    folder.write("a.yaml", &service("e"));
    running.until_services(&["b", "e"]).await;
    assert_eq!(log.lines_with("can be read again").len(), 1);
}

/// Otherwise a field of the wrong type would be reported without saying where.
#[tokio::test]
async fn a_wrong_type_is_named_with_its_line() {
    let folder = Folder::new("type");
    let log = Log::default();
    let _guard = log.follow();
    folder.write("a.yaml", &service("a").replace("port: 80", "port: http"));
    let running = Running::follow(&folder.0).await;
    assert!(running.services().is_empty());
    assert_eq!(log.lines_with("line 8").len(), 1, "{:?}", log.lines_with("a.yaml"));
}

/// Otherwise it would depend on chance which of two files counts.
#[tokio::test]
async fn an_object_in_two_files_is_reported_with_both_names_and_the_first_counts() {
    let folder = Folder::new("twice");
    let log = Log::default();
    let _guard = log.follow();
    folder.write("b.yaml", &service_at("web", 81));
    let mut running = Running::follow(&folder.0).await;
    folder.write("c.yaml", &service_at("web", 82));
    assert_eq!(running.settle().await, 0);
    let lines = log.lines_with("several files");
    assert!(lines.len() == 1 && lines[0].contains("b.yaml") && lines[0].contains("c.yaml"), "{lines:?}");
    folder.write("a.yaml", &service_at("web", 80));
    running.until_port(80).await;
    folder.remove("a.yaml");
    running.until_port(81).await;
    folder.remove("b.yaml");
    running.until_port(82).await;
}

/// Otherwise replacing the folder (a checkout, a mount) would end everything, or stop Sheave from following.
#[tokio::test]
async fn a_folder_that_goes_and_comes_back_leaves_no_gap() {
    let parent = Folder::new("comes-and-goes");
    let directory = parent.path("manifests");
    let mut running = Running::start(&directory);
    running.settle().await;
    assert_eq!(running.synced, 0, "nothing is known before the folder is there");
    fs::create_dir(&directory).expect("a folder can be made");
    fs::write(directory.join("a.yaml"), service("a")).expect("a file can be written");
    running.until_services(&["a"]).await;
    running.until("synced", |running| running.synced == 1).await;

    fs::remove_dir_all(&directory).expect("the folder is there");
    assert_eq!(running.settle().await, 0);
    assert!(!running.task.is_finished());
    let beside = parent.path("beside");
    fs::create_dir(&beside).expect("a folder can be made");
    fs::write(beside.join("a.yaml"), service("a")).expect("a file can be written");
    fs::write(beside.join("b.yaml"), service("b")).expect("a file can be written");
    fs::rename(&beside, &directory).expect("a folder can be moved");
    running.until_services(&["a", "b"]).await;
    fs::remove_file(directory.join("a.yaml")).expect("the file is there");
    running.until_services(&["b"]).await;
    assert_eq!(running.synced, 1);
}

/// Otherwise a ConfigMap mounted as the folder would never be updated: its files are links through one link.
#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let folder = Folder::new("config-map");
    let version = |number: u16| {
        let name = format!("..version_{number}");
        fs::create_dir(folder.path(&name)).expect("a folder can be made");
        fs::write(folder.path(&name).join("a.yaml"), service_at("a", number)).expect("a file can be written");
        std::os::unix::fs::symlink(&name, folder.path("..data_tmp")).expect("a link can be made");
        fs::rename(folder.path("..data_tmp"), folder.path("..data")).expect("a link can be moved");
    };
    version(80);
    std::os::unix::fs::symlink("..data/a.yaml", folder.path("a.yaml")).expect("a link can be made");
    let mut running = Running::follow(&folder.0).await;
    running.until_port(80).await;
    version(81);
    running.until_port(81).await;
}

/// Otherwise a release that is switched by turning a link would go unnoticed.
#[tokio::test]
async fn a_link_to_the_folder_can_be_turned() {
    let parent = Folder::new("link");
    for (name, port) in [("one", 80), ("two", 81)] {
        fs::create_dir(parent.path(name)).expect("a folder can be made");
        fs::write(parent.path(name).join("a.yaml"), service_at("a", port)).expect("a file can be written");
    }
    std::os::unix::fs::symlink("one", parent.path("current")).expect("a link can be made");
    let mut running = Running::follow(&parent.path("current")).await;
    running.until_port(80).await;
    std::os::unix::fs::symlink("two", parent.path("next")).expect("a link can be made");
    fs::rename(parent.path("next"), parent.path("current")).expect("a link can be moved");
    running.until_port(81).await;
}

/// Otherwise a burst of a thousand files would be a thousand passes over the kernel's maps.
#[tokio::test]
async fn a_burst_of_files_is_few_reports() {
    let folder = Folder::new("burst");
    let mut running = Running::follow(&folder.0).await;
    for i in 0..500 {
        folder.write(&format!("{i}.yaml"), &service_at(&format!("web-{i}"), 1000 + i));
    }
    let mut reports = 0;
    while running.services().len() < 500 {
        let event = timeout(PATIENCE, running.receiver.recv()).await.expect("in time").expect("still running");
        running.take(event);
        reports += 1;
    }
    assert!(reports < 50, "{reports} reports");
    let mut all = String::new();
    for i in 0..500 {
        folder.remove(&format!("{i}.yaml"));
        write!(all, "---\n{}", service_at(&format!("web-{i}"), 1000 + i)).expect("a string can be written");
    }
    folder.write("all.yaml", &all);
    running.settle().await;
    assert_eq!(running.services().len(), 500);
}

/// Otherwise a controller that stops would leave its watch behind.
#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let folder = Folder::new("end");
    let mut running = Running::follow(&folder.0).await;
    running.receiver.close();
    let result = timeout(PATIENCE, &mut running.task).await.expect("ends in time").expect("no panic");
    assert!(result.is_ok());
}
