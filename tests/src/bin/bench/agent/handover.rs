//! From the API server's event to the first packet at the new endpoint.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sheave_tests::client;
use sheave_tests::server::WHO;

use super::running::{Asked, Running};
use crate::controller::{milliseconds, slowest};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::path::distribution;
use crate::progress::Progress;

/// The service that moves from one pod to the other and back.
const MOVING: Asked = Asked { number: 0 };
/// The pods that it moves between.
const PODS: [usize; 2] = [0, 1];
/// A change that has not arrived by then is lost.
const LIMIT: Duration = Duration::from_secs(5);

/// What clients of the moving service have seen.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// From each event to the first answer of the new endpoint.
    pub(crate) milliseconds: Vec<f64>,
    /// Connections that were answered by the service's pods.
    pub(crate) answered: usize,
    /// Those that were not, and why.
    pub(crate) astray: Vec<String>,
}

impl Seen {
    /// Asks once; says which pod of these answered.
    pub(crate) fn ask(&mut self, running: &Running, asked: Asked, pods: &[usize]) -> Option<usize> {
        match client::who(running.target(asked, WHO)) {
            Ok(answer) => {
                let pod = pods.iter().copied().find(|pod| running.pod(*pod).name == answer.backend);
                match pod {
                    Some(_) => self.answered += 1,
                    None => self.astray.push(format!("{} answered for {asked:?}", answer.backend)),
                }
                pod
            }
            Err(error) => {
                self.astray.push(format!("{error:#}"));
                None
            }
        }
    }

    /// Moves the service once, and asks until it has arrived. To be called in the client's namespace.
    pub(crate) fn hand_over(&mut self, running: &Running, round: u32) -> Result<()> {
        let to = PODS[round as usize % 2];
        let event = Instant::now();
        running.give(MOVING, &[to]);
        while self.ask(running, MOVING, &PODS) != Some(to) {
            ensure!(event.elapsed() < LIMIT, "the endpoint has not changed; {:?}", self.astray);
        }
        self.milliseconds.push(milliseconds(event.elapsed()));
        Ok(())
    }
}

/// Publishes the service.
pub(crate) fn publish(running: &Running) -> Result<()> {
    running.publish(MOVING, &PODS[1..])
}

/// One change after another; nothing else happens.
pub(super) fn measure(running: &Running, effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    publish(running)?;
    let mut seen = Seen::default();
    running.client().run(|| -> Result<()> {
        for round in 0..effort.changes {
            progress.step(&format!("change {} of {}", round + 1, effort.changes));
            seen.hand_over(running, round)?;
            // The old endpoint must not come back.
            for _ in 0..3 {
                let answered = seen.ask(running, MOVING, &PODS);
                ensure!(answered == Some(PODS[round as usize % 2]), "the old endpoint answered; {:?}", seen.astray);
            }
            // Changes that come alone: not before the last one's grace period is over.
            std::thread::sleep(Duration::from_millis(15));
        }
        Ok(())
    })?;
    ensure!(seen.astray.is_empty(), "{:?}", seen.astray);
    let p99 = slowest(&seen.milliseconds);
    let case = format!("API event to first packet, p99, {}", running.load);
    findings.reach(Goal::new("change latency", &case, "≤ 10 ms", Reach::AtMost(10.0), &p99));
    let figure = format!("agent/API event to first packet/{}", running.load);
    findings.add(&figure, "ms", Better::Lower, seen.milliseconds);
    distribution(findings, &figure);
    Ok(())
}
