//! The folder of manifests as a source, used as editors, `cp`, `kubectl` and configuration management use folders.
//!
//! Nothing here needs root. Every wait is bounded by [`PATIENCE`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;

use sheave::model::Change;
use sheave::source;
use sheave_tests::follower::{Folder, Follower, HERE, PATIENCE};
use sheave_tests::log::Log;
use tokio::time::timeout;

/// As editors save: a file beside it, moved over it.
fn save(folder: &Folder, name: &str, text: &str) {
    let beside = format!(".{name}.swp");
    folder.write(&beside, text);
    fs::rename(folder.path(&beside), folder.path(name)).expect("a file can be moved");
}

fn remove(folder: &Folder, name: &str) {
    fs::remove_file(folder.path(name)).expect("the file is there");
}

fn service(name: &str) -> String {
    service_at(name, 80)
}

fn service_at(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: 10.96.0.10\n  ports:\n  - port: {port}\n"
    )
}

fn start(directory: &Path) -> Follower {
    let directory = directory.to_owned();
    Follower::start(|sender| source::manifests::run(directory, HERE.to_owned(), sender), ())
}

async fn follow(directory: &Path) -> Follower {
    start(directory).synced().await
}

fn ports(follower: &Follower) -> BTreeSet<u16> {
    let desired = follower.model.services().flat_map(|key| follower.model.desired(key).into_values());
    desired.flat_map(|port| port.frontends.into_keys()).map(|frontend| frontend.port()).collect()
}

async fn until_port(follower: &mut Follower, port: u16) {
    follower.until(&format!("port {port}"), |follower| ports(follower) == BTreeSet::from([port])).await;
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
    let mut running = follow(&folder.0).await;
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
    let running = follow(&folder.0).await;
    assert_eq!(
        running.changes,
        [Change::ServiceCidrsReplaced(Vec::new())],
        "there is no ServiceCIDR, and nothing else"
    );
}

/// Otherwise an edited manifest would count only after a restart.
#[tokio::test]
async fn files_that_are_written_saved_renamed_and_deleted_are_followed() {
    let folder = Folder::new("follow");
    let mut running = follow(&folder.0).await;
    folder.write("a.yaml", &service_at("a", 80));
    until_port(&mut running, 80).await;
    folder.write("a.yaml", &service_at("a", 81));
    until_port(&mut running, 81).await;
    save(&folder, "a.yaml", &service_at("a", 82));
    until_port(&mut running, 82).await;
    save(&folder, "b.yaml", &service("b"));
    running.until_services(&["a", "b"]).await;
    remove(&folder, "b.yaml");
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
    let mut running = follow(&folder.0).await;
    let before = running.changes.len();
    folder.write("a.yaml", &format!("# a comment\n{}---\n{}", service_at("a", 80), service_at("b", 82)));
    running.until("a change", |running| running.changes.len() > before).await;
    running.settle().await;
    assert!(matches!(&running.changes[before..], [Change::Service(service)] if *service.key.name == *"b"));
}

/// Otherwise a file that takes a while to write would be read in half, and its Services would flap.
#[tokio::test]
async fn a_file_is_read_when_its_writer_has_finished() {
    let folder = Folder::new("half");
    let log = Log::default();
    let _guard = log.follow();
    let mut running = follow(&folder.0).await;
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
    let mut running = follow(&folder.0).await;
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
    running.until("others go on", |running| ports(running).contains(&81)).await;
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
    let running = follow(&folder.0).await;
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
    let mut running = follow(&folder.0).await;
    folder.write("c.yaml", &service_at("web", 82));
    assert_eq!(running.settle().await, 0);
    let lines = log.lines_with("several files");
    assert!(lines.len() == 1 && lines[0].contains("b.yaml") && lines[0].contains("c.yaml"), "{lines:?}");
    folder.write("a.yaml", &service_at("web", 80));
    until_port(&mut running, 80).await;
    remove(&folder, "a.yaml");
    until_port(&mut running, 81).await;
    remove(&folder, "b.yaml");
    until_port(&mut running, 82).await;
}

/// Otherwise replacing the folder (a checkout, a mount) would end everything, or stop Sheave from following.
#[tokio::test]
async fn a_folder_that_goes_and_comes_back_leaves_no_gap() {
    let parent = Folder::new("comes-and-goes");
    let directory = parent.path("manifests");
    let mut running = start(&directory);
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
    let mut running = follow(&folder.0).await;
    until_port(&mut running, 80).await;
    version(81);
    until_port(&mut running, 81).await;
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
    let mut running = follow(&parent.path("current")).await;
    until_port(&mut running, 80).await;
    std::os::unix::fs::symlink("two", parent.path("next")).expect("a link can be made");
    fs::rename(parent.path("next"), parent.path("current")).expect("a link can be moved");
    until_port(&mut running, 81).await;
}

/// Otherwise a burst of a thousand files would be a thousand passes over the kernel's maps.
#[tokio::test]
async fn a_burst_of_files_is_few_reports() {
    let folder = Folder::new("burst");
    let mut running = follow(&folder.0).await;
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
        remove(&folder, &format!("{i}.yaml"));
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
    let mut running = follow(&folder.0).await;
    running.receiver.close();
    let result = timeout(PATIENCE, &mut running.task).await.expect("ends in time").expect("no panic");
    assert!(result.is_ok());
}
