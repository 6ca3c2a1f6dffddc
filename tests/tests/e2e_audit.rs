//! What somebody else does to Sheave's maps, programs and pins: traffic goes on or is back within the audit's period.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client::{self, Conversation};
use sheave_tests::http;
use sheave_tests::manifests::Service;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const SOON: Duration = Duration::from_secs(15);

fn start() -> Result<Scenario> {
    let shape = Shape { pod_counts: [3, 0], ..Shape::default() };
    let scenario = Scenario::start_with_folder(shape, &["--audit-period", "1"])?;
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).tcp("echo", 7, server::ECHO);
    for service in [web, Service::new("other", OTHER).tcp("http", 80, server::WHO)] {
        scenario.publish(&service, &scenario.node().pods[1..])?;
    }
    Ok(scenario)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Waits until a line of the log has all of these words.
fn wait_for_line(scenario: &Scenario, words: &[&str]) -> Result<()> {
    eventually(SOON, || {
        let log = scenario.agent.log();
        let found = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(found, "no line with {words:?} in\n{log}");
        Ok(())
    })
}

/// Somebody who cleans up with bpftool would take a Service down until Sheave is restarted, and nobody would know.
#[test]
fn edited_maps_and_detached_programs_are_back_within_the_period_and_told() -> Result<()> {
    let scenario = start()?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let ask = |address| pod.run(|| client::who(client::at(address, 80)));
    let mut talk = pod.run(|| Conversation::open(client::at(WEB, 7)))?;
    let frontends = scenario.agent.pins().join("frontends4");
    let frontends = frontends.to_str().context("a path")?;
    let [a, b, c, d] = WEB.octets().map(|octet| octet.to_string());
    // Address, port in network order, protocol, filling.
    let key = ["key", &a, &b, &c, &d, "0", "80", "6", "0"];
    let stop = AtomicBool::new(false);
    let bystander = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| client::until(Some(&pod), &stop, 1, &|| client::who(client::at(OTHER, 80))));
        let outcome = (|| -> Result<()> {
            run("bpftool", &[&["map", "delete", "pinned", frontends], &key[..]].concat())?;
            let edited = Instant::now();
            eventually(SOON, || ask(WEB).map(drop))?;
            println!("a deleted frontend was back after {:?}", edited.elapsed());
            wait_for_line(&scenario, &["place=\"frontends4\"", "10.96.0.10:80/TCP"])
        })();
        stop.store(true, Ordering::Relaxed);
        let answers = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        outcome.map(|()| answers)
    })?;
    bystander.all_answered().context("another Service noticed")?;

    let index = scenario.agent.pins().join("links");
    let ingress = fs::read_dir(&index)?.filter_map(Result::ok).map(|entry| entry.path());
    let ingress: Vec<_> = ingress.filter(|path| path.to_string_lossy().ends_with("_ingress")).collect();
    for link in &ingress {
        run("bpftool", &["link", "detach", "pinned", link.to_str().context("a path")?])?;
    }
    let detached = Instant::now();
    eventually(SOON, || ask(WEB).map(drop))?;
    println!("{} detached programs were back after {:?}", ingress.len(), detached.elapsed());
    wait_for_line(&scenario, &["place=\"links\"", "ingress on"])?;
    talk.say(b"the flow is still there").context("after its programs were detached")?;

    let answer = scenario.node().namespace.run(|| http::get(([127, 0, 0, 1], 10_249).into(), "/metrics"))?;
    let count = |place: &str| {
        let line =
            answer.body.lines().find(|line| line.starts_with("sheave_audit_findings_total{") && line.contains(place));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<usize>().ok())
    };
    ensure!(count("frontends4") == Some(1) && count("links") == Some(ingress.len()), "{}", answer.body);
    let status = scenario.agent.view("status", &[])?;
    ensure!(status.contains("found and repaired") && status.contains("as it should be"), "{status}");
    Ok(())
}

/// A mount on the pins' directory that ends with the test, however it ends.
struct Mount<'a>(&'a str);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", self.0]);
    }
}

/// Unmounting the BPF file system, or removing pins, would take the node's Services down, or the next restart's connections.
#[test]
fn connections_go_on_without_pins_and_over_the_next_restart() -> Result<()> {
    let mut scenario = start()?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let pins = scenario.agent.pins().to_owned();
    let path = pins.to_str().context("a path")?;
    // On a file system of their own, below the one that the pins come back to.
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    fs::create_dir(&pins)?;
    run("mount", &["-t", "bpf", "bpf", path])?;
    let mount = Mount(path);
    scenario.agent.restart()?;
    let mut talk = pod.run(|| Conversation::open(client::at(WEB, 7)))?;
    let stop = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| -> Result<_> {
        let asking = scope.spawn(|| client::until(Some(&pod), &stop, 2, &|| client::who(client::at(WEB, 80))));
        let outcome = (|| -> Result<()> {
            drop(mount);
            wait_for_line(&scenario, &["place=\"pins\"", "frontends4"])?;
            talk.say(b"after the unmount")?;
            scenario.agent.services().context("the pins are back")?;
            scenario.agent.restart()?;
            talk.say(b"after a restart")?;
            fs::remove_dir_all(&pins)?;
            wait_for_line(&scenario, &["place=\"pins\"", "frontends4"])?;
            talk.say(b"after the removal of all pins")?;
            scenario.agent.kill();
            talk.say(b"while nobody is there")?;
            scenario.agent.restart()?;
            talk.say(b"after another restart")
        })();
        stop.store(true, Ordering::Relaxed);
        let answers = asking.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        outcome.map(|()| answers)
    })?;
    answers.all_answered()
}
