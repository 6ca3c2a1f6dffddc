//! Closes connected UDP sockets of host processes whose endpoint is gone.
//!
//! A connected socket was pointed at a backend once and for all, and no program sees its datagrams, so what a flow gets with
//! its next packet must be done to it from outside: it is closed (SOCK_DESTROY), its process is told ECONNABORTED, and
//! connects again. That is done by a thread of its own, which reads maps and writes none, whenever something was
//! taken away from a UDP service port, and once everything is as desired after a start: a backend may have gone while no
//! daemon ran.
//!
//! Only sockets that connect-time balancing pointed at a backend are closed, and only those of the daemon's network
//! namespace: the kernel does not show others. Such sockets of pods (`--connect tcp` and `all`) stay as they are.

mod balanced;
pub(super) mod diagnosis;

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use sheave_common::PROTOCOL_UDP;
use tracing::{info, warn};

use super::error::MapError;
use super::worker::{Call, Calls, Worker};
use crate::model::desired::Protocol;
use crate::plan::{Batch, Owner, Write};
use balanced::Balanced;
use diagnosis::Diagnosis;

/// The least time between two looks: what is taken away meanwhile needs only one.
const PAUSE: Duration = Duration::from_millis(50);
/// After something was taken away, a second look: a connect() may have chosen before, and be done only after the first.
const AGAIN: Duration = Duration::from_secs(1);
/// How often sockets are looked at otherwise, so that they are known before an LRU map forgets them.
const ROUTINE: Duration = Duration::from_secs(60);

/// Closes sockets, in a thread of its own; there is none where the kernel can't do it.
#[derive(Debug)]
pub(super) struct Closer(Option<Worker>);

impl Closer {
    /// Starts the thread, for the calling thread's network namespace and the maps pinned in a directory.
    pub(super) fn start(directory: &Path) -> Result<Self, MapError> {
        let balanced = Balanced::open(directory)?;
        Ok(Self(match Diagnosis::open() {
            Ok(diagnosis) => Some(Worker::start(move |calls| work(calls, &diagnosis, balanced))),
            Err(error) => {
                report_unable(&error);
                None
            }
        }))
    }

    /// Has every connected UDP socket looked at. Does not wait for that.
    pub(super) fn look(&self) {
        if let Some(worker) = &self.0 {
            worker.wake();
        }
    }
}

/// Whether a batch may take away what a connected UDP socket rests on.
pub(super) fn concerned(batch: &Batch) -> bool {
    batch.operations.iter().any(|operation| match &operation.write {
        Write::PutFrontend { address, .. } | Write::DeleteFrontend { address } => address.protocol == PROTOCOL_UDP,
        Write::DeleteBackend { .. } => match &operation.owner {
            Owner::Service(name) => name.protocol == Protocol::Udp,
            Owner::Nobody | Owner::Batch => true,
        },
        _ => false,
    })
}

fn work(calls: &Calls, diagnosis: &Diagnosis, mut balanced: Balanced) {
    let mut wait = ROUTINE;
    loop {
        wait = match calls.wait(wait) {
            Call::Woken => AGAIN,
            Call::Time => ROUTINE,
            Call::End => return,
        };
        match close_stale(diagnosis, &mut balanced) {
            Ok(0) => {}
            Ok(closed) => info!(closed, "closed connected UDP sockets whose endpoint is gone"),
            Err(Failure::Diagnosis(error)) if is_lasting(&error) => return report_unable(&error),
            Err(Failure::Diagnosis(error)) => warn!(%error, "cannot look at connected UDP sockets"),
            Err(Failure::Map(error)) => warn!(%error, "cannot tell which connected UDP sockets lost their endpoint"),
        }
        thread::sleep(PAUSE);
    }
}

enum Failure {
    Diagnosis(io::Error),
    Map(MapError),
}

/// The kernel lacks the operation, or its module, or does not let this process use it.
fn is_lasting(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOENT | libc::EINVAL | libc::EPERM | libc::EACCES))
}

/// Closes what has to be closed, and returns how many that were.
fn close_stale(diagnosis: &Diagnosis, balanced: &mut Balanced) -> Result<usize, Failure> {
    let connected = diagnosis.connected(PROTOCOL_UDP).map_err(Failure::Diagnosis)?;
    let sockets: Vec<_> = connected.iter().map(|socket| (socket.cookie(), socket.peer())).collect();
    balanced.learn(&sockets).map_err(Failure::Map)?;
    let mut closed = 0;
    for socket in &connected {
        if balanced.is_stale(socket.cookie(), socket.peer()).map_err(Failure::Map)? {
            closed += usize::from(diagnosis.close(socket).map_err(Failure::Diagnosis)?);
        }
    }
    Ok(closed)
}

fn report_unable(error: &io::Error) {
    warn!(%error, "cannot close connected UDP sockets whose endpoint goes (CONFIG_INET_UDP_DIAG, CONFIG_INET_DIAG_DESTROY)");
}
