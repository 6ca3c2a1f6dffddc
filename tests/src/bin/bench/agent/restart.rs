//! The agent is killed and started again while connections are opened and one stays open.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result};
use sheave_tests::client::{self, Answers, Conversation};
use sheave_tests::server::{ECHO, WHO};

use super::running::{Asked, Running};
use crate::controller::count;
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;

/// The service that is asked meanwhile.
const ASKED: Asked = Asked { number: 2 };

/// Restarts, and counts what goes wrong.
pub(super) fn measure(
    running: &mut Running,
    effort: &Effort,
    findings: &mut Findings,
    progress: &Progress,
) -> Result<()> {
    running.publish(ASKED, &[0, 1, 2, 3])?;
    let (client, target) = (running.client().clone(), running.target(ASKED, WHO));
    let echo = running.target(ASKED, ECHO);
    let mut held = client.run(|| Conversation::open(echo))?;
    let (mut seconds, mut answers) = (Vec::new(), Answers::default());
    for round in 0..effort.restarts {
        progress.step(&format!("restart {} of {}", round + 1, effort.restarts));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| -> Result<()> {
            let asking = scope.spawn(|| client::until(Some(&client), &stop, 1, &|| client::who(target)));
            let started = Instant::now();
            let restarted = running.agent.restart();
            seconds.push(started.elapsed().as_secs_f64());
            stop.store(true, Ordering::Relaxed);
            answers.merge(asking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            restarted
        })?;
        held.say(b"still there").context("a connection that was open during the restart")?;
    }
    running.check()?;
    for error in &answers.errors {
        progress.say(&format!("restart: {error}"));
    }
    let case = format!("agent, lost of {} connections", answers.total() + answers.failed);
    let row = "restart with nothing changed";
    findings.reach(Goal::counted(row, &case, "0", Reach::AtMost(0.0), count(answers.failed)));
    let figure = format!("agent/restart until ready, with the API server's lists/{}", running.load);
    findings.add(figure, "s", Better::Lower, seconds);
    Ok(())
}
