//! A pod that sends with another's address. Nothing on the node stops such packets before they reach Sheave.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::client::{self, Conversation};
use sheave_tests::family::Family;
use sheave_tests::packet::{ACK, FIN, PSH, Packet, RST, SYN};
use sheave_tests::process::eventually;
use sheave_tests::raw_packets::RawSocket;
use sheave_tests::scenario::Scenario;
use sheave_tests::topology::{PodNetwork, Shape};

use super::{web, web_at};

/// Rows of a view that have this client.
fn rows(scenario: &Scenario, view: &str, names_client: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
    let shown: Value = serde_json::from_str(&scenario.agent.view(view, &["-o", "json"])?)?;
    Ok(shown.as_array().into_iter().flatten().filter(|row| names_client(row)).cloned().collect())
}

/// Whoever shares a node with a victim could end its connections, or choose its backends.
#[test]
fn a_pod_that_uses_anothers_address_changes_nothing_of_that_ones() -> Result<()> {
    for pods in [PodNetwork::Bridged, PodNetwork::Routed] {
        let scenario = Scenario::start(Shape { pods, pod_counts: [3, 3], ..Shape::default() }, &[])?;
        let backends: Vec<_> = scenario.cluster.nodes[1].pods.iter().collect();
        scenario.publish(&web().affinity(600), backends)?;
        let [victim, liar] = [scenario.pod(1, 1), scenario.pod(1, 2)];
        for family in Family::BOTH {
            let what = || format!("{pods:?} pods, {family}");
            let address = victim.address_of(family);
            let [echo, udp] = [7, 53].map(|port| web_at(&scenario, family, port));
            let lie = |packets: &[Packet]| -> Result<()> {
                liar.namespace.run(|| {
                    let raw = RawSocket::open()?;
                    packets.iter().try_for_each(|packet| Ok(raw.send(&packet.build())?))
                })
            };
            let bound = |row: &Value| row["client"] == address.to_string() && row["service"] == "default/web:echo";
            // Before the victim has asked anything.
            let syns: Vec<Packet> = (0..50_u16)
                .map(|n| Packet::tcp(&SocketAddr::new(address, 20_000 + n).to_string(), &echo.to_string(), SYN))
                .collect();
            lie(&syns)?;
            let edges = || -> Result<Vec<Value>> {
                Ok(rows(&scenario, "affinity", bound)?.iter().map(|row| row["edge"].clone()).collect())
            };
            eventually(Duration::from_secs(5), || {
                ensure!(edges()?.len() == 1, "{}: the lies have not arrived: {:?}", what(), edges()?);
                Ok(())
            })?;
            let liars_edge = edges()?;

            let source = SocketAddr::new(address, 33_333);
            let mut conversation = victim.namespace.run(|| Conversation::open_from(source, echo)).with_context(what)?;
            let datagrams = victim.namespace.run(|| -> Result<UdpSocket> {
                let socket = client::udp_to(udp)?;
                client::ask_udp_with(&socket, "one")?;
                Ok(socket)
            })?;
            let known = rows(&scenario, "affinity", bound)?;
            let own: Vec<&Value> = known.iter().filter(|row| !liars_edge.contains(&row["edge"])).collect();
            ensure!(own.len() == 1, "{}: whose affinity is whose: {known:#?}", what());

            let tuple = (source.to_string(), echo.to_string());
            let same = [SYN, RST, RST | ACK, FIN | ACK, PSH | ACK].map(|flags| Packet::tcp(&tuple.0, &tuple.1, flags));
            let datagram_from = SocketAddr::new(address, datagrams.local_addr()?.port());
            let datagram = Packet::udp(&datagram_from.to_string(), &udp.to_string()).payload(b"lie");
            lie(&[same.as_slice(), &[datagram]].concat())?;

            conversation.say(b"still here").with_context(what)?;
            // The pod's answer to the lie comes first, if it is the same pod: it goes to whom the lie names.
            let answer = client::ask_udp_with(&datagrams, "two")
                .or_else(|_| client::ask_udp_with(&datagrams, "two"))
                .with_context(what)?;
            ensure!(answer.seen == datagram_from, "{}: {answer:?}", what());
            let flows = rows(&scenario, "conntrack", |row| {
                row["source"] == source.to_string() && row["destination"] == echo.to_string()
            })?;
            let of_victim: Vec<&Value> = flows.iter().filter(|row| !liars_edge.contains(&row["edge"])).collect();
            ensure!(
                of_victim.len() == 1 && of_victim[0]["state"] == "established",
                "{}: the victim's flow is {of_victim:#?}",
                what()
            );
            let after = rows(&scenario, "affinity", bound)?;
            let now: Vec<&Value> = after.iter().filter(|row| !liars_edge.contains(&row["edge"])).collect();
            ensure!(now.len() == 1 && now[0]["backend"] == own[0]["backend"], "{}: {now:?}, not {own:?}", what());
        }
    }
    Ok(())
}
