//! From another proxy to this one, and back: when connections of the other have drained, and when this one's have.
//!
//! Both are found out by looking now and then, in threads of their own: it takes reading a whole table of connections.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::{info, warn};

use super::{ControllerError, chain};
use crate::config::{DrainForeign, RunConfig};
use crate::dataplane::{Handover, Open};
use crate::netfilter::{connections, kube_proxy};

/// The least time between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// Looking takes this part of one CPU's time at most, however many connections there are.
const PART: u32 = 50;
/// How often the log says what is still open.
const REPORT: Duration = Duration::from_secs(60);

/// What has come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    /// No other proxy translates connections to frontends any more.
    Foreign,
    /// Nothing of this node needs the dataplane any more, or the time for it is over.
    Own,
}

/// Decides whether connections of kube-proxy have to drain, where that is to be found out.
pub(super) fn settle(config: &mut RunConfig) {
    if config.drain_foreign != DrainForeign::Auto {
        return;
    }
    match kube_proxy::traces().and_then(|traces| Ok((traces, kube_proxy::is_keeping()?))) {
        Ok((traces, false)) if traces.is_empty() => config.drain_foreign = DrainForeign::Off,
        Ok((traces, _)) => {
            info!(found = traces.join(", "), "kube-proxy was here: its TCP connections carry on until they end");
        }
        Err(error) => {
            warn!(%error, "cannot find out whether kube-proxy was here; TCP that belongs to no flow is passed, not reset");
        }
    }
}

/// Tells when connections of another proxy have drained, where that ever comes.
pub(super) async fn foreign(
    mode: DrainForeign,
    pins: PathBuf,
    over: mpsc::Sender<Over>,
) -> Result<(), ControllerError> {
    match mode {
        DrainForeign::On | DrainForeign::Off => return std::future::pending().await,
        DrainForeign::For(time) => tokio::time::sleep(time).await,
        DrainForeign::Auto => {
            until(Duration::MAX, move || match is_foreign_left(&pins) {
                Ok(left) => !left,
                Err(error) => {
                    warn!(error = chain(&*error), "cannot find out whether another proxy's connections have drained");
                    false
                }
            })
            .await?;
        }
    }
    finish(Over::Foreign, &over).await
}

/// Whether kube-proxy's rules are there, or connections that netfilter translates to a frontend. If neither, the nat
/// chains that such connections needed go.
fn is_foreign_left(pins: &Path) -> Result<bool, Box<dyn Error>> {
    if !kube_proxy::traces()?.is_empty() {
        return Ok(true);
    }
    let frontends = Handover::open(pins)?;
    for (asked, protocol) in connections::translated()? {
        if frontends.is_frontend(asked, protocol)? {
            return Ok(true);
        }
    }
    kube_proxy::release()?;
    Ok(false)
}

/// Tells when the last connection has ended, or `time` is over.
pub(super) async fn own(time: Duration, pins: PathBuf, over: mpsc::Sender<Over>) -> Result<(), ControllerError> {
    let mut reported: Option<Instant> = None;
    info!(within = ?time, "draining: new connections are another proxy's from now on");
    let ended = until(time, move || match Handover::open(&pins).and_then(|maps| maps.remaining()) {
        Ok(open) => {
            if reported.is_none_or(|at| at.elapsed() >= REPORT) {
                reported = Some(Instant::now());
                let Open { flows, sockets } = open;
                info!(flows, ?sockets, "still open");
            }
            open.is_nothing()
        }
        Err(error) => {
            warn!(%error, "cannot find out what is still open");
            false
        }
    })
    .await?;
    if !ended {
        warn!("the time for draining is over: connections that are still open end");
    }
    finish(Over::Own, &over).await
}

/// Looks now and then until it is over, or the time is; which, it returns.
async fn until(time: Duration, mut is_over: impl FnMut() -> bool + Send + 'static) -> Result<bool, ControllerError> {
    let started = Instant::now();
    let mut wait = INTERVAL;
    while started.elapsed() < time {
        tokio::time::sleep(wait.min(time.saturating_sub(started.elapsed()))).await;
        let look = Instant::now();
        let (again, result) = tokio::task::spawn_blocking(move || {
            let result = is_over();
            (is_over, result)
        })
        .await?;
        if result {
            return Ok(true);
        }
        is_over = again;
        wait = INTERVAL.max(look.elapsed() * PART);
    }
    Ok(false)
}

/// Tells, and stays: the controller ends when one of its tasks does.
async fn finish(what: Over, over: &mpsc::Sender<Over>) -> Result<(), ControllerError> {
    // The controller is ending if nobody listens.
    let _ = over.send(what).await;
    std::future::pending().await
}
