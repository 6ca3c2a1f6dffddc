//! Development builds only: the programs' own log lines (aya-log), as this process's log lines of target `bpf`.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{debug, error, info, trace, warn};

/// Hands what aya-log reports to tracing.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        match record.level() {
            Level::Error => error!(target: "bpf", "{}", record.args()),
            Level::Warn => warn!(target: "bpf", "{}", record.args()),
            Level::Info => info!(target: "bpf", "{}", record.args()),
            Level::Debug => debug!(target: "bpf", "{}", record.args()),
            Level::Trace => trace!(target: "bpf", "{}", record.args()),
        }
    }

    fn flush(&self) {}
}

/// Follows the programs' log for as long as the process lives. Outside a tokio runtime there is nobody to follow it.
pub(super) fn follow(ebpf: &mut Ebpf) {
    if tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let logger = match EbpfLogger::init_with_logger(ebpf, ToTracing) {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "the programs have no log");
            return;
        }
    };
    // SAFETY: the logger owns the ring buffer's descriptor and closes it only when it is dropped, with the `AsyncFd`.
    let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = match registered {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "cannot follow the programs' log");
            return;
        }
    };
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
}
