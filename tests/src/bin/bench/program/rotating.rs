//! The established path and the lookup while packets go through many flows in turn, so that none of them is in the caches
//! when it is needed.

use anyhow::{Result, ensure};
use aya::Pod;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_TCP, names};
use sheave_tests::family::Family;
use sheave_tests::program::{NEXT, Programs};

use super::node::{self, TCP_SERVICE};
use super::raw::Raw;
use super::subject::Hook;
use super::walk::{Circle, KeyAddress, second};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;
use crate::statistics::paired;

/// How often two laps are tried until they fit into one second.
const TRIES: u32 = 6;
/// A lap that takes longer than this, in nanoseconds, is not tried again: two of them don't.
const LONGEST: f64 = 0.5e9;

/// Samples of one circle.
#[derive(Default)]
struct Laps {
    lookup: Vec<f64>,
    established: Vec<f64>,
    /// Laps in which each flow's clock was written, because a second began.
    written: Vec<f64>,
}

/// Measures circles of 64 k and, unless there is little time, 1 M flows.
pub(crate) fn measure(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    for (length, name) in [(1 << 16, "64k"), (1 << 20, "1M")] {
        if length > effort.flows {
            continue;
        }
        node::namespace()?.run(|| -> Result<()> {
            let flows = super::DEFAULT_FLOWS.max(length * 4);
            let (mut programs, [backends, _]) = node::programs(node::uplink()?, flows)?;
            for family in Family::BOTH {
                progress.step(&format!("{family}, {name} flows"));
                let circle = Circle {
                    family,
                    protocol: PROTOCOL_TCP,
                    edge: 1,
                    flags: 0,
                    number: 30,
                    length,
                    service_id: TCP_SERVICE,
                    backend_id: backends[0],
                };
                let laps = match family {
                    Family::V4 => rotate::<Ipv4Address>(&mut programs, &circle, names::CONNTRACK4, effort)?,
                    Family::V6 => rotate::<Ipv6Address>(&mut programs, &circle, names::CONNTRACK6, effort)?,
                };
                report(&laps, family, name, findings);
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn report(laps: &Laps, family: Family, name: &str, findings: &mut Findings) {
    let allowed = paired(&laps.established, &laps.lookup, |cost, lookup| cost / (1.4 * lookup + 25.0));
    let case = format!("established TCP, {name} flows, {family}");
    let sentence = "≤ 1.4 lookups + 25 ns (shown in parts of that)";
    findings.reach(Goal::new(super::ROW, &case, sentence, Reach::AtMost(1.0), &allowed));
    for (figure, samples) in [
        ("lookup", &laps.lookup),
        ("established tcp", &laps.established),
        ("established tcp, clock written", &laps.written),
    ] {
        findings.add(format!("program/{figure}/{family}/{name}"), "ns", Better::Lower, samples.clone());
    }
}

fn rotate<A: KeyAddress>(programs: &mut Programs, circle: &Circle, map: &str, effort: &Effort) -> Result<Laps>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    circle.insert::<A>(programs, map)?;
    let [empty, _] = super::empty()?;
    let lookup = Raw::lookup::<A>(programs, map, circle, true)?;
    let moves = Raw::lookup::<A>(programs, map, circle, false)?;
    let mut laps = Laps::default();
    for _ in 0..effort.rounds {
        // A whole lap each, so every lap begins with the first flow.
        let alone = lookup.sample(circle.length)? - moves.sample(circle.length)?;
        let nothing = empty.sample(effort.runs)?;
        for attempt in 1.. {
            let began = second();
            let first = lap(programs, circle)?;
            let again = lap(programs, circle)?;
            let undisturbed = second() == began;
            laps.written.push(first - nothing);
            if undisturbed {
                laps.lookup.push(alone);
                laps.established.push(again - nothing);
                break;
            }
            if attempt == TRIES || first * f64::from(circle.length) > LONGEST {
                break;
            }
        }
    }
    Ok(laps)
}

/// Takes a packet through every flow once.
fn lap(programs: &mut Programs, circle: &Circle) -> Result<f64> {
    let hook = Hook { program: "pod_ingress", ifindex: circle.edge };
    let packet = circle.packet(0, false, 64);
    let outcome = hook.run(programs, &packet, circle.length)?;
    ensure!(outcome.action == NEXT, "the verdict is {}", outcome.action);
    ensure!(outcome.packet == packet, "the packet did not come back to where it began");
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of one run")]
    Ok(outcome.duration.as_nanos() as f64)
}
