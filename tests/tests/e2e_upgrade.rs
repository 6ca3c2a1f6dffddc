//! Restarts, crashes, other builds and other map sizes under a thousand new connections a second, while two hundred stay
//! open: nothing is lost.
//!
//! The other build is this one with another octet in its BPF object, so the kernel verifies and swaps all of its programs, or
//! the one that `SHEAVE_OLD_BINARY` names.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Conversation};
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::other_build::OtherBuild;
use sheave_tests::process::built;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::Shape;

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const OPEN: usize = 200;
/// New connections in a second.
const RATE: u32 = 1_000;

/// `xdp`: native, on the uplinks.
fn start(xdp: bool, arguments: &[&str]) -> Result<Scenario> {
    let shape = Shape { pod_counts: [3, 2], xdp, ..Shape::default() };
    let scenario = Scenario::start(shape, arguments)?;
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).node_port(30_500);
    let web = web.tcp("echo", 7, server::ECHO).node_port(30_007);
    scenario.publish(&web, scenario.node().pods[1..].iter().chain(&scenario.cluster.nodes[1].pods))?;
    Ok(scenario)
}

/// Connections that stay open.
struct Open(Vec<Conversation>);

impl Open {
    /// Each has to carry something there and back.
    fn all_work(&mut self, when: &str) -> Result<()> {
        let mut each = self.0.iter_mut().enumerate();
        each.try_for_each(|(number, talk)| talk.say(when.as_bytes()).with_context(|| format!("{number}, {when}")))
    }
}

/// What happens to the agent, while connections are made inside and from outside, [`RATE`] a second, and [`OPEN`] stay open.
fn under_load(scenario: &mut Scenario, events: impl FnOnce(&mut Agent, &mut Open) -> Result<()>) -> Result<()> {
    let (pod, outside) = (scenario.pod(1, 1).namespace.clone(), scenario.cluster.client.clone());
    let (web, node_port) = (scenario.at(WEB, 80), scenario.at(NODE, 30_500));
    let mut open = Open(Vec::new());
    for _ in 0..OPEN / 2 {
        open.0.push(pod.run(|| Conversation::open(scenario.at(WEB, 7)))?);
        open.0.push(outside.run(|| Conversation::open(scenario.at(NODE, 30_007)))?);
    }
    let again = syns_sent_again(&pod)? + syns_sent_again(&outside)?;
    let (stop, begun, started) = (AtomicBool::new(false), AtomicU32::new(0), Instant::now());
    let ask = |target| {
        let due = started + Duration::from_secs(1) * begun.fetch_add(1, Ordering::Relaxed) / RATE;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        client::who(target)
    };
    let agent = &mut scenario.agent;
    let answers = std::thread::scope(|scope| -> Result<_> {
        let inside = scope.spawn(|| client::until(Some(&pod), &stop, 4, &|| ask(web)));
        let from_outside = scope.spawn(|| client::until(Some(&outside), &stop, 4, &|| ask(node_port)));
        let outcome = events(agent, &mut open);
        stop.store(true, Ordering::Relaxed);
        let mut answers = inside.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        answers.merge(from_outside.join().map_err(|_| anyhow::anyhow!("the client panicked"))?);
        outcome.map(|()| answers)
    })?;
    let again = syns_sent_again(&pod)? + syns_sent_again(&outside)? - again;
    let seconds = started.elapsed().as_secs().max(1);
    println!("{} connections in {seconds} s, {again} SYNs sent again", answers.total());
    answers.all_answered()?;
    ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
    ensure!(answers.total() as u64 > seconds * u64::from(RATE) / 10, "hardly any connections were made");
    Ok(())
}

/// How many SYNs got no answer in time, by a namespace's own count.
fn syns_sent_again(namespace: &Namespace) -> Result<u64> {
    let text = namespace.output("cat", &["/proc/self/net/netstat"])?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TcpExt")?;
    let mut fields = names.split_whitespace().zip(values.split_whitespace());
    Ok(fields.find(|(name, _)| *name == "TCPSynRetrans").context("no TCPSynRetrans")?.1.parse()?)
}

/// The folders of loaded programs, which are named by what was loaded.
fn loaded(agent: &Agent) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(agent.pins().join("programs"))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// People would have to drain a node before they touch Sheave on it.
#[test]
fn restarts_crashes_upgrades_and_a_downgrade_lose_nothing() -> Result<()> {
    let (own, other) = (built("sheave")?, OtherBuild::make()?);
    let other = std::env::var_os("SHEAVE_OLD_BINARY").map_or_else(|| other.program(), PathBuf::from);
    let mut scenario = start(false, &[])?;
    under_load(&mut scenario, |agent, open| {
        for round in 1..=25 {
            if round % 5 == 0 {
                agent.kill();
            } else {
                agent.stop()?;
            }
            open.all_work(&format!("while it is down, {round}"))?;
            agent.restart().with_context(|| format!("restart {round}"))?;
            open.all_work(&format!("when it is up, {round}"))?;
        }
        for program in [&other, &own, &other, &own] {
            let before = loaded(agent)?;
            agent.stop()?;
            agent.restart_as(program).with_context(|| format!("as {}", program.display()))?;
            open.all_work("with another build's programs")?;
            ensure!(before.len() == 1 && loaded(agent)? != before, "the programs are still the other build's");
        }
        Ok(())
    })
}

fn entries(pins: &Path, ending: &str) -> usize {
    let links = fs::read_dir(pins.join("resizing/links")).into_iter().flatten().filter_map(Result::ok);
    links.filter(|entry| entry.file_name().to_string_lossy().ends_with(ending)).count()
}

fn size(pins: &Path, map: &str) -> Result<u32> {
    Ok(MapData::from_pin(pins.join(map))?.info()?.max_entries())
}

/// A table that has become too small could only be made larger by an outage, or a crash on the way would be one.
#[test]
fn maps_get_another_size_under_load_and_being_killed_on_the_way_loses_nothing() -> Result<()> {
    const FIRST: u32 = 131_072;
    type State = fn(&Path) -> bool;
    let moments: [(&str, State); 7] = [
        ("the old programs are kept", |pins| pins.join("resizing/programs/uplink_xdp").exists()),
        ("there is a new map", |pins| pins.join("resizing/maps/conntrack4").exists()),
        ("a hook looks into both maps", |pins| entries(pins, "_behind") >= 1),
        ("a hook may make flows in the new map", |pins| entries(pins, "_before") >= 1),
        ("some hooks make flows in the new map", |pins| entries(pins, "_before") >= 3),
        ("one map has taken its place", |pins| {
            pins.join("resizing/maps/conntrack6").exists() && !pins.join("resizing/maps/conntrack4").exists()
        }),
        ("the maps have taken their places", |pins| {
            pins.join("resizing/programs").exists() && size(pins, "half_open6").is_ok_and(|now| now != FIRST)
        }),
    ];
    let flags =
        |entries: &str| ["--xdp", "native", "--max-conntrack", entries, "--max-half-open", entries].map(str::to_owned);
    let first = flags(&FIRST.to_string());
    let mut scenario = start(true, &first.each_ref().map(String::as_str))?;
    under_load(&mut scenario, |agent, open| {
        let mut interrupted = 0;
        for (wanted, (moment, state)) in (FIRST + 1..).zip(moments) {
            let arguments = flags(&wanted.to_string());
            agent.kill_when(&arguments.each_ref().map(String::as_str), state)?;
            let left = agent.pins().join("resizing").exists();
            interrupted += usize::from(left);
            println!("{moment}: {}", if left { "killed there" } else { "too late" });
            open.all_work(&format!("killed when {moment}"))?;
            agent.restart().with_context(|| format!("after being killed when {moment}"))?;
            open.all_work(&format!("restarted after being killed when {moment}"))?;
            for map in ["conntrack4", "conntrack6", "half_open4", "half_open6"] {
                ensure!(size(agent.pins(), map)? == wanted, "{map} has {} entries", size(agent.pins(), map)?);
            }
            ensure!(!agent.pins().join("resizing").exists(), "something is left behind");
        }
        ensure!(interrupted >= 3, "only {interrupted} changes of size were interrupted");
        Ok(())
    })
}
