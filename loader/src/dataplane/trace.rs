//! Development builds only: the programs' own log lines (aya-log), handed to whatever logger the process has.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

/// Follows the programs' log for as long as the process lives. Outside a tokio runtime there is nobody to follow it.
pub(super) fn follow(ebpf: &mut Ebpf) {
    if tokio::runtime::Handle::try_current().is_err() {
        return;
    }
    let logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "the programs have no log");
            return;
        }
    };
    let mut logger = match AsyncFd::with_interest(logger, Interest::READABLE) {
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
