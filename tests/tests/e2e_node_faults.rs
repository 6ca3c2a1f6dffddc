//! What a node itself does to Sheave: notifications that the kernel drops, pods that come and go with the index of the one before,
//! memory that runs out, clocks of another kind. Traffic goes on, and what is lost is made up for.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::cgroup::MemoryCgroup;
use sheave_tests::client::{self, Conversation};
use sheave_tests::manifests::{Endpoint, Service};
use sheave_tests::process::{built, eventually};
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{PodNetwork, Shape};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 1);
const LIMIT: Duration = Duration::from_secs(20);

/// The first pod only asks; the others answer.
fn start(pods: PodNetwork, arguments: &[&str]) -> Result<Scenario> {
    let scenario = Scenario::start_with_folder(Shape { pods, pod_counts: [3, 2], ..Shape::default() }, arguments)?;
    publish(&scenario)?;
    Ok(scenario)
}

fn publish(scenario: &Scenario) -> Result<()> {
    let web = Service::new("web", WEB).tcp("http", 80, server::WHO).node_port(30_500);
    let web = web.tcp("echo", 7, server::ECHO);
    scenario.publish(&web, scenario.node().pods[1..].iter().chain(&scenario.cluster.nodes[1].pods))
}

/// Asks from another pod and from outside while something happens. Every question has to be answered.
fn meanwhile<T>(scenario: &mut Scenario, happens: impl FnOnce(&mut Scenario) -> Result<T>) -> Result<T> {
    let (pod, outside) = (scenario.pod(1, 2).namespace.clone(), scenario.cluster.client.clone());
    let (inside, node_port) = (scenario.at(WEB, 80), scenario.at(NODE, 30_500));
    let stop = AtomicBool::new(false);
    let ask = |target| {
        std::thread::sleep(Duration::from_millis(2));
        client::who(target)
    };
    std::thread::scope(|scope| {
        let askers = [
            scope.spawn(|| client::until(Some(&pod), &stop, 1, &|| ask(inside))),
            scope.spawn(|| client::until(Some(&outside), &stop, 1, &|| ask(node_port))),
        ];
        let outcome = happens(scenario);
        stop.store(true, Ordering::Relaxed);
        for asker in askers {
            let answers = asker.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            answers.all_answered()?;
            ensure!(answers.by_backend.len() == 4, "{:?}", answers.by_backend);
        }
        outcome
    })
}

/// Pods that came while Sheave was too slow to hear of them would never be served.
#[test]
fn what_came_and_went_while_notifications_were_dropped_is_found_out() -> Result<()> {
    const MANY: u8 = 100;
    let mut scenario = start(PodNetwork::Bridged, &["--nodeport-addresses", "all"])?;
    let address = |number: u8| Ipv4Addr::new(192, 168, 50, 100 + number);
    meanwhile(&mut scenario, |scenario| {
        scenario.agent.process().context("it runs")?.signal(libc::SIGSTOP);
        let node = &mut scenario.cluster.nodes[0];
        let index = node.link_index(&node.pods[0].host_link)?;
        // More than fits into what the socket keeps.
        let noise = |from: u32| (0..8_000).map(|n| format!("link set dev lo mtu {}", from + n)).collect::<Vec<_>>();
        node.namespace.ip(&noise(20_000))?;
        node.replace_first_pod(index)?;
        node.add_pod()?;
        let beside = node.pods[1].namespace.path();
        let come = |number: u8| {
            [
                format!("link add name cali-{number} type veth peer name peer-{number} netns {beside}"),
                format!("link set dev cali-{number} up"),
                format!("address add {}/24 dev eth0", address(number)),
            ]
        };
        node.namespace.ip(&(0..MANY).flat_map(come).collect::<Vec<_>>())?;
        let go = |number: u8| {
            [format!("link delete dev cali-{number}"), format!("address delete {}/24 dev eth0", address(number))]
        };
        node.namespace.ip(&(0..MANY).step_by(2).flat_map(go).collect::<Vec<_>>())?;
        node.namespace.ip(&noise(40_000))?;
        scenario.agent.process().context("it runs")?.signal(libc::SIGCONT);
        for pod in [0, 3] {
            let namespace = scenario.node().pods[pod].namespace.clone();
            eventually(LIMIT, || namespace.run(|| client::who(scenario.at(WEB, 80))))?;
            client::who_many(Some(&namespace), scenario.at(WEB, 80), 100, 2).all_answered()?;
        }
        scenario.agent.wait_for_services("node ports at the addresses that are there, and at no other", |shown| {
            let shown = shown.to_string();
            (0..MANY).all(|number| shown.contains(&format!("\"{}\"", address(number))) == (number % 2 == 1))
        })?;
        let said = scenario.agent.log().matches("ENOBUFS").count();
        ensure!((1..=3).contains(&said), "the log tells {said} times that notifications were dropped");
        // As one finds it that has just been started.
        let attached = |scenario: &Scenario| -> Result<BTreeSet<_>> {
            let links = std::fs::read_dir(scenario.agent.pins().join("links"))?;
            links.map(|link| Ok(link?.file_name())).collect()
        };
        let followed = eventually(LIMIT, || {
            let links = attached(scenario)?;
            ensure!(links.len() >= usize::from(MANY), "{} links", links.len());
            Ok(links)
        })?;
        scenario.agent.stop()?;
        scenario.agent.restart()?;
        eventually(LIMIT, || {
            let found = attached(scenario)?;
            ensure!(found == followed, "{followed:?}, and after a restart {found:?}");
            Ok(())
        })
    })
}

/// A pod that crashes at every start would make the next one inherit its connections, or leave programs and flows behind.
#[test]
fn pods_that_come_and_go_with_one_index_leave_nothing_to_each_other() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let mut scenario = start(pods, &[])?;
        let links = |scenario: &Scenario| std::fs::read_dir(scenario.agent.pins().join("links")).map(Iterator::count);
        let before = links(&scenario)?;
        let echo = scenario.at(WEB, 7);
        meanwhile(&mut scenario, |scenario| {
            let index = scenario.node().link_index(&scenario.pod(1, 1).host_link)?;
            for round in 0..12 {
                let pod = scenario.pod(1, 1);
                let source = std::net::SocketAddrV4::new(pod.address, 6_000);
                let talk = || Conversation::open_from(source, echo);
                // The same source port each time, and left open.
                let mut talk =
                    eventually(LIMIT, || pod.namespace.run(talk)).with_context(|| format!("round {round}"))?;
                talk.say(b"before it goes")?;
                scenario.cluster.nodes[0].replace_first_pod(index)?;
                if round % 3 == 0 {
                    // Gone again before anybody can have looked.
                    scenario.cluster.nodes[0].replace_first_pod(index)?;
                }
                drop(talk);
            }
            Ok(())
        })?;
        eventually(LIMIT, || {
            let now = links(&scenario)?;
            ensure!(now == before, "{now} links, and before there were {before}");
            Ok(())
        })?;
        let attached = scenario.agent.log().matches("cannot attach").count();
        ensure!(attached <= 12, "the log complains {attached} times");
    }
    Ok(())
}

/// A Service of many endpoints, each of which takes memory here and in the kernel.
fn many(number: u16) -> (Service, Vec<Endpoint>) {
    let [high, low] = number.to_be_bytes();
    let service = Service::new(&format!("many-{number}"), Ipv4Addr::new(10, 97, high, low)).tcp("http", 80, 80);
    let endpoints = (0..100_u8).map(|pod| Endpoint {
        address: Ipv4Addr::new(10, 245, low, pod).into(),
        node: "elsewhere".into(),
        ready: true,
        serving: true,
        terminating: false,
    });
    (service, endpoints.collect())
}

/// A node that runs out of memory would lose its connections, or Sheave would not get up again.
#[test]
fn traffic_goes_on_while_the_memory_limit_is_reached_and_all_is_made_up_for_afterwards() -> Result<()> {
    const AT_ONCE: u16 = 40;
    let mut scenario = start(PodNetwork::Bridged, &[])?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    scenario.agent.confine(MemoryCgroup::new()?);
    scenario.agent.restart()?;
    let mut open = scenario.pod(1, 2).namespace.run(|| Conversation::open(scenario.at(WEB, 7)))?;
    meanwhile(&mut scenario, |scenario| {
        let used = scenario.agent.memory().used()?;
        scenario.agent.memory().limit(used + (1 << 20))?;
        let mut published = 0;
        let ends = loop {
            ensure!(published < 25 * AT_ONCE, "it never runs out of memory:\n{}", scenario.agent.log());
            for number in published..published + AT_ONCE {
                let (service, endpoints) = many(number);
                scenario.manifests().service(&service, &endpoints)?;
            }
            published += AT_ONCE;
            let last = format!("\"default/many-{}:http\"", published - 1);
            let ends = eventually(LIMIT, || {
                let process = scenario.agent.process().context("it was started")?;
                if process.check_alive().is_err() {
                    return Ok(Some("killed"));
                }
                if process.log().contains("no memory for another element") {
                    return Ok(Some("refused"));
                }
                ensure!(scenario.agent.view("services", &["-o", "json"])?.contains(&last), "{last} is missing");
                Ok(None)
            })?;
            if let Some(ends) = ends {
                break ends;
            }
        };
        println!("{ends} with {published} Services of 100 endpoints; {used} octets were used before");
        open.say(b"while there is no memory")?;
        scenario.agent.kill();
        open.say(b"while there is no daemon")?;
        scenario.agent.memory().limit(2 << 30)?;
        scenario.agent.restart()?;
        open.say(b"afterwards")?;
        let all = |shown: &serde_json::Value| {
            let rows = shown.as_array().into_iter().flatten();
            let of_many =
                |row: &&serde_json::Value| row["service"].as_str().is_some_and(|name| name.contains("/many-"));
            let whole =
                |row: &serde_json::Value| row["cluster_backends"].as_array().is_some_and(|all| all.len() == 100);
            let rows: Vec<_> = rows.filter(of_many).collect();
            rows.len() == usize::from(published) && rows.into_iter().all(whole)
        };
        scenario.agent.wait_for_services("all of the many, whole", all)
    })
}

/// A limit that nothing fits into would be a crash loop that nobody understands.
#[test]
fn a_start_that_the_memory_limit_forbids_says_which_map_and_what_to_do() -> Result<()> {
    let mut scenario = start(PodNetwork::Bridged, &["--max-conntrack", "4000000"])?;
    scenario.agent.kill();
    scenario.agent.clean_up()?;
    let memory = MemoryCgroup::new()?;
    memory.limit(96 << 20)?;
    scenario.agent.confine(memory);
    let error = format!("{:#}", scenario.agent.restart().err().context("it started")?);
    ensure!(error.contains("conntrack") && error.contains("memory"), "{error}");
    Ok(())
}

/// In a time namespace the clock that a process sees is not the one by which flows are timed.
#[test]
fn flows_are_as_old_as_they_are_whatever_clock_a_process_is_shown() -> Result<()> {
    let scenario = start(PodNetwork::Bridged, &[])?;
    let pod = scenario.pod(1, 1).namespace.clone();
    let _open = pod.run(|| Conversation::open(scenario.at(WEB, 7)))?;
    let ages = |command: &mut Command| -> Result<Vec<u64>> {
        command.args(["conntrack", "-o", "json", "--pin-path"]).arg(scenario.agent.pins());
        let output = command.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let rows: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let rows = rows.as_array().context("rows")?;
        rows.iter().map(|row| row["age_seconds"].as_u64().with_context(|| format!("{row}"))).collect()
    };
    let mut command = Command::new("unshare");
    let ages = ages(command.args(["--time", "--fork", "--monotonic", "100000"]).arg(built("sheave")?))?;
    ensure!(!ages.is_empty() && ages.iter().all(|seconds| *seconds < 60), "{ages:?}");
    Ok(())
}
