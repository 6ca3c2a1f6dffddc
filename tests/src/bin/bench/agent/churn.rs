//! A thousand endpoint changes a second, while clients ask services that change, too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::handover::{self, Seen};
use super::running::{Asked, Running};
use crate::controller::{CHURN, count, slowest};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::path::distribution;
use crate::progress::Progress;

/// A service that keeps one of its pods while the other comes and goes; its pods are not the moving service's.
const WAVERING: Asked = Asked { number: 1 };
/// Its pods.
const PODS: [usize; 2] = [2, 3];

/// Lets the services change, asks, and looks at what the agent takes meanwhile.
pub(super) fn measure(
    running: &mut Running,
    effort: &Effort,
    findings: &mut Findings,
    progress: &Progress,
) -> Result<()> {
    handover::publish(running)?;
    running.publish(WAVERING, &PODS)?;
    let (mut shares, mut seen) = (Vec::new(), Seen::default());
    for second in 0..effort.churn {
        progress.step(&format!("churn, second {} of {}", second + 1, effort.churn));
        let (began, used) = (Instant::now(), running.processor_time()?);
        one_second(running, second, &mut seen)?;
        let used = running.processor_time()? - used;
        shares.push(used.as_secs_f64() / began.elapsed().as_secs_f64());
    }
    for service in 0..running.load.services {
        running.api.apply(running.load.slice(service, &running.load.endpoints_of(service)));
    }
    running.check()?;
    let row = "churn";
    findings.reach(Goal::new(row, "agent, of a core", "≤ 10 %", Reach::AtMost(0.1), &shares));
    let p99 = slowest(&seen.milliseconds);
    findings.reach(Goal::new(row, "API event to first packet, p99", "≤ 5 ms", Reach::AtMost(5.0), &p99));
    for astray in seen.astray.iter().take(5) {
        progress.say(&format!("churn: {astray}"));
    }
    let case = format!("misrouted or lost of {} connections", seen.answered + seen.astray.len());
    findings.reach(Goal::counted(row, &case, "0", Reach::AtMost(0.0), count(seen.astray.len())));
    findings.add("churn/agent's share of a core", "cores", Better::Lower, shares);
    findings.add("churn/API event to first packet", "ms", Better::Lower, seen.milliseconds);
    distribution(findings, "churn/API event to first packet");
    Ok(())
}

/// Changes come evenly; meanwhile one service after another is moved and asked.
fn one_second(running: &Running, second: u32, seen: &mut Seen) -> Result<()> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            change(running);
            done.store(true, Ordering::Relaxed);
        });
        running.client().run(|| -> Result<()> {
            let mut round = second * CHURN;
            while !done.load(Ordering::Relaxed) {
                seen.hand_over(running, round)?;
                for _ in 0..10 {
                    seen.ask(running, WAVERING, &PODS);
                }
                round += 1;
            }
            Ok(())
        })
    })
}

fn change(running: &Running) {
    let (load, began) = (running.load, Instant::now());
    for number in 0..CHURN {
        let due = began + Duration::from_secs(1) / CHURN * number;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        if number % 20 == 0 {
            running.give(WAVERING, &PODS[..1 + number as usize / 20 % 2]);
            continue;
        }
        let service = fastrand::u32(..load.services);
        let mut endpoints = load.endpoints_of(service);
        endpoints.truncate(endpoints.len() - number as usize % 2);
        running.api.apply(load.slice(service, &endpoints));
    }
}
