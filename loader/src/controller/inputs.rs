//! What the controller waits for: events, the time for another pass, the end of a grace period, the end of a task.

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::ControllerError;
use super::migration::Over;
use crate::interfaces::Event;
use crate::plan::Grace;
use crate::source::SourceEvent;

/// Events that may wait for the controller.
pub(super) const QUEUE: usize = 1_024;

/// A grace period that is passing, in a thread of its own.
pub(super) type Passing = (JoinHandle<()>, Grace);

/// Something to do.
pub(super) enum Input {
    /// From the source.
    Source(SourceEvent),
    /// From the interface watch.
    Interface(Event),
    /// Something that was waited for is over.
    Over(Over),
    /// It is time.
    Due,
    /// A grace period has passed.
    GraceOver(Grace),
}

/// Where inputs come from.
pub(super) struct Inputs {
    pub(super) source: mpsc::Receiver<SourceEvent>,
    pub(super) interfaces: mpsc::Receiver<Event>,
    pub(super) overs: mpsc::Receiver<Over>,
    /// Nothing goes on when one of them ends.
    pub(super) tasks: JoinSet<Result<(), ControllerError>>,
}

impl Inputs {
    /// The next thing to do. Nothing is lost when the future is dropped before its end.
    pub(super) async fn next(
        &mut self,
        due: Option<Instant>,
        grace: &mut Option<Passing>,
    ) -> Result<Input, ControllerError> {
        tokio::select! {
            Some(event) = self.source.recv() => Ok(Input::Source(event)),
            Some(event) = self.interfaces.recv() => Ok(Input::Interface(event)),
            Some(over) = self.overs.recv() => Ok(Input::Over(over)),
            () = until(due) => Ok(Input::Due),
            grace = grace_over(grace) => Ok(Input::GraceOver(grace?)),
            ended = self.tasks.join_next() => match ended {
                Some(result) => result?.and(Err(ControllerError::Ended)),
                None => Err(ControllerError::Ended),
            },
        }
    }

    /// Something more that is there already. Interfaces first: they are few, and a pod without programs is not served.
    pub(super) fn ready(&mut self) -> Option<Input> {
        let interface = self.interfaces.try_recv().ok().map(Input::Interface);
        interface.or_else(|| self.source.try_recv().ok().map(Input::Source))
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Completes when a grace period has passed; never if none does.
async fn grace_over(passing: &mut Option<Passing>) -> Result<Grace, JoinError> {
    match passing {
        Some((thread, grace)) => {
            let grace = *grace;
            thread.await?;
            *passing = None;
            Ok(grace)
        }
        None => std::future::pending().await,
    }
}
