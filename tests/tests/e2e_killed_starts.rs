//! `kill -9` between any two writes of a start: the first one of all, one that finds other Services than the last left, one that
//! gives maps another size, and one of another build. Whoever asks meanwhile is answered by an endpoint of before or of after,
//! connections go on, and the next start ends where an undisturbed one does.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::MapData;
use sheave_tests::agent::Agent;
use sheave_tests::client::{self, Conversation};
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::other_build::OtherBuild;
use sheave_tests::process::{built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Pod, Shape};

const STAYS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const MOVES: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 11);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const SMALL: &str = "4096";
const LARGE: &str = "8192";
const LIMIT: Duration = Duration::from_secs(20);
/// How long to wait for an answer that need not come.
const PERHAPS: Duration = Duration::from_millis(200);

/// What a start has to do, in turns: even ones one way, odd ones back.
struct Case {
    name: &'static str,
    /// Nothing is there before, so nobody need be answered.
    first: bool,
    prepare: fn(&mut Scenario, &Builds, odd: bool) -> Result<()>,
}

struct Builds {
    own: PathBuf,
    other: OtherBuild,
}

const CASES: [Case; 4] = [
    Case { name: "the first start", first: true, prepare: |scenario, _, _| scenario.agent.clean_up().map(drop) },
    Case { name: "other Services", first: false, prepare: |scenario, _, odd| publish(scenario, odd) },
    Case {
        name: "another size",
        first: false,
        prepare: |scenario, _, odd| {
            scenario.agent.set_arguments(&arguments(if odd { LARGE } else { SMALL }));
            Ok(())
        },
    },
    Case {
        name: "another build",
        first: false,
        prepare: |scenario, builds, odd| {
            scenario.agent.set_program(&if odd { builds.other.program() } else { builds.own.clone() });
            Ok(())
        },
    },
];

fn arguments(entries: &str) -> [&str; 6] {
    ["--xdp", "native", "--max-conntrack", entries, "--max-half-open", entries]
}

/// Writes what there is: one Service that stays, and one that moves from a pod here to another node's.
fn publish(scenario: &Scenario, odd: bool) -> Result<()> {
    let stays = Service::new("stays", STAYS).tcp("http", 80, server::WHO).node_port(30_500);
    let stays = stays.tcp("echo", 7, server::ECHO).node_port(30_007);
    scenario.update(&stays, &stays.endpoints([scenario.pod(1, 2), scenario.pod(2, 1)]))?;
    let moves = Service::new("moves", MOVES).tcp("http", 80, server::WHO);
    scenario.update(&moves, &moves.endpoints([moved_to(scenario, odd)]))?;
    // And some that only come and go.
    for number in 0..4_u8 {
        let comes =
            Service::new(&format!("comes-{number}"), Ipv4Addr::new(10, 96, 1, number)).tcp("http", 80, server::WHO);
        if (number % 2 == 0) == odd {
            scenario.update(&comes, &comes.endpoints([scenario.pod(1, 2), scenario.pod(2, 2)]))?;
        } else if scenario.manifests().path().join(format!("comes-{number}.yaml")).exists() {
            scenario.manifests().remove(&format!("comes-{number}.yaml"))?;
        }
    }
    Ok(())
}

fn moved_to(scenario: &Scenario, odd: bool) -> &Pod {
    if odd { scenario.pod(2, 2) } else { scenario.pod(1, 3) }
}

/// What a start leaves: what is served, each pin, how large a map is.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    services: String,
    pins: BTreeSet<PathBuf>,
    size: u32,
}

impl Left {
    fn of(agent: &Agent) -> Result<Self> {
        let mut pins = BTreeSet::new();
        collect(agent.pins(), Path::new(""), &mut pins)?;
        let size = MapData::from_pin(agent.pins().join("conntrack4"))?.info()?.max_entries();
        Ok(Self { services: agent.view("services", &["-o", "json"])?, pins, size })
    }
}

/// The pins below a folder, which is shown as that. Folders of loaded programs have other names each time: they are numbered.
fn collect(folder: &Path, shown_as: &Path, pins: &mut BTreeSet<PathBuf>) -> Result<()> {
    for (number, entry) in std::fs::read_dir(folder)?.enumerate() {
        let entry = entry?;
        let numbered = shown_as == Path::new("programs");
        let shown_as = if numbered { shown_as.join(number.to_string()) } else { shown_as.join(entry.file_name()) };
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &shown_as, pins)?;
        }
        pins.insert(shown_as);
    }
    Ok(())
}

/// Who asks, and what stays open.
struct Clients {
    pod: Namespace,
    outside: Namespace,
    /// Of a pod with another, past Sheave.
    direct: Conversation,
    /// Through the Service that stays; of a pod, and from outside.
    open: Vec<Conversation>,
}

/// When clients ask.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    /// While a daemon stands still or is dead, after the start of this one, even or odd.
    Halfway(bool),
    /// When one serves after such a start.
    Serving(bool),
}

impl Clients {
    fn new(scenario: &Scenario) -> Result<Self> {
        let (pod, outside) = (scenario.pod(1, 1).namespace.clone(), scenario.cluster.client.clone());
        let neighbour = SocketAddr::new(scenario.pod(2, 1).address.into(), server::ECHO);
        let direct = pod.run(|| Conversation::open(neighbour))?;
        Ok(Self { pod, outside, direct, open: Vec::new() })
    }

    /// Opens connections, half of them by SNAT to the other node.
    fn open(&mut self, scenario: &Scenario) -> Result<()> {
        for _ in 0..4 {
            self.open.push(self.pod.run(|| Conversation::open(scenario.at(STAYS, 7)))?);
            self.open.push(self.outside.run(|| Conversation::open(scenario.at(NODE, 30_007)))?);
        }
        Ok(())
    }

    fn ask(&mut self, scenario: &Scenario, case: &Case, when: When) -> Result<()> {
        self.direct.say(b"past Sheave")?;
        for (number, talk) in self.open.iter_mut().enumerate() {
            talk.say(b"still there").with_context(|| format!("open connection {number}"))?;
        }
        let staying = [scenario.pod(1, 2), scenario.pod(2, 1)].map(|pod| pod.name.clone());
        let moving = match when {
            When::Halfway(odd) => vec![odd, !odd],
            When::Serving(odd) => vec![odd],
        };
        let moving: Vec<String> = match case.name {
            "other Services" => moving.into_iter().map(|odd| moved_to(scenario, odd).name.clone()).collect(),
            _ => vec![moved_to(scenario, false).name.clone()],
        };
        let asked = [
            (&self.pod, scenario.at(STAYS, 80), &staying[..]),
            (&self.outside, scenario.at(NODE, 30_500), &staying[..]),
            (&self.pod, scenario.at(MOVES, 80), &moving[..]),
        ];
        let perhaps = case.first && matches!(when, When::Halfway(_));
        for (namespace, target, backends) in asked {
            let limit = if perhaps { PERHAPS } else { client::LIMIT };
            match namespace.run(|| client::who_within(target, limit)) {
                Ok(answer) => ensure!(backends.contains(&answer.backend), "{target}: {answer:?}, not of {backends:?}"),
                Err(_) if perhaps => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Kills starts of these kinds at so many of their writes, or at each of them.
fn play(cases: &[Case], points: Option<usize>) -> Result<()> {
    let shape = Shape { pod_counts: [3, 2], xdp: true, ..Shape::default() };
    let mut scenario = Scenario::start_with_folder(shape, &arguments(SMALL))?;
    let builds = Builds { own: built("sheave")?, other: OtherBuild::make()? };
    let mut clients = Clients::new(&scenario)?;
    for case in cases {
        let (writes, kills) = play_case(case, points, &mut scenario, &builds, &mut clients).context(case.name)?;
        println!("{}: {writes:?} writes, killed {kills} times", case.name);
        ensure!(kills > 3, "{}: {kills} starts were killed", case.name);
    }
    Ok(())
}

/// How many writes the start has, one way and back, and how often it was killed.
fn play_case(
    case: &Case,
    points: Option<usize>,
    scenario: &mut Scenario,
    builds: &Builds,
    clients: &mut Clients,
) -> Result<([usize; 2], usize)> {
    clients.open.clear();
    publish(scenario, false)?;
    // What the two starts take and leave when nothing happens to them.
    let (mut writes, mut left) = ([0, 0], Vec::new());
    for odd in [true, false] {
        scenario.agent.kill();
        (case.prepare)(scenario, builds, odd)?;
        writes[usize::from(odd)] = scenario.agent.restart_halfway(usize::MAX)?.made;
        scenario.agent.restart()?;
        clients.ask(scenario, case, When::Serving(odd)).with_context(|| format!("undisturbed, odd: {odd}"))?;
        left.insert(0, Left::of(&scenario.agent)?);
    }
    if !case.first {
        clients.open(scenario)?;
    }
    let most = writes[0].max(writes[1]);
    let step = points.map_or(1, |points| (most / points).max(1));
    let (mut kills, mut odd) = (0, false);
    for at in (0..most).step_by(step) {
        odd = !odd;
        scenario.agent.kill();
        (case.prepare)(scenario, builds, odd)?;
        let halfway = scenario.agent.restart_halfway(at)?;
        let place = match &halfway.next {
            Some(write) => format!("before write {at}, {write}, odd: {odd}"),
            None => format!("after all {} writes, odd: {odd}", halfway.made),
        };
        kills += usize::from(halfway.next.is_some());
        let (halfway_there, serving) = (When::Halfway(odd), When::Serving(odd));
        clients.ask(scenario, case, halfway_there).with_context(|| format!("standing still {place}"))?;
        scenario.agent.kill();
        drop(halfway);
        clients.ask(scenario, case, halfway_there).with_context(|| format!("killed {place}"))?;
        scenario.agent.restart().with_context(|| format!("killed {place}"))?;
        clients.ask(scenario, case, serving).with_context(|| format!("restarted, killed {place}"))?;
        let expected = &left[usize::from(odd)];
        eventually(LIMIT, || {
            let found = Left::of(&scenario.agent)?;
            ensure!(found == *expected, "an undisturbed start leaves {expected:#?}, but there is {found:#?}");
            Ok(())
        })
        .with_context(|| format!("killed {place}"))?;
    }
    // The next case begins with the even way.
    scenario.agent.kill();
    (case.prepare)(scenario, builds, false)?;
    scenario.agent.restart()?;
    Ok((writes, kills))
}

#[test]
fn a_start_that_is_killed_now_and_then_misleads_nobody_and_is_finished_by_the_next_one() -> Result<()> {
    play(&CASES, Some(4))
}

#[test]
#[ignore = "slow: one kill for each of a hundred writes"]
fn the_first_start_killed_before_any_write_is_finished_by_the_next_one() -> Result<()> {
    play(&CASES[..1], None)
}

#[test]
#[ignore = "slow: one kill for each of dozens of writes"]
fn a_start_with_other_services_killed_before_any_write_misleads_nobody() -> Result<()> {
    play(&CASES[1..2], None)
}

#[test]
#[ignore = "slow: one kill for each of 160 writes, which may take a quarter of an hour"]
fn a_start_with_other_sizes_killed_before_any_write_misleads_nobody() -> Result<()> {
    play(&CASES[2..3], None)
}

#[test]
#[ignore = "slow: one kill for each of dozens of writes"]
fn a_start_of_another_build_killed_before_any_write_misleads_nobody() -> Result<()> {
    play(&CASES[3..], None)
}
