//! What goes wrong with a watch: what it means, how it is said, and for how long it lasts.

use std::time::Duration;

use kube::runtime::watcher;
use tokio::time::Instant;

use super::super::SourceEvent;
use super::backoff::Backoff;
use super::servers::chain;

/// The account may not read this kind, or the server doesn't have it.
pub(super) fn is_unreadable(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => matches!(status.code, 403 | 404),
        _ => false,
    }
}

/// The place in the history where a watch wants to go on is no longer there (HTTP 410, or an ERROR event with it).
pub(super) fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status.code == 410,
        _ => false,
    }
}

/// Going on where the watch was would not help: behind an event that could not be read, it would be missing; and where the server
/// sees no place in its history at all, it won't later either.
pub(super) fn needs_list(error: &watcher::Error) -> bool {
    match error {
        // kube takes what is no event for an answer of another kind.
        watcher::Error::WatchFailed(kube::Error::SerdeError(_) | kube::Error::Api(_)) => true,
        watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 400,
        _ => false,
    }
}

/// What is wrong at the moment: each thing is said once, and once that it is over.
pub(super) struct Trouble {
    kind: &'static str,
    backoff: Backoff,
    said: Option<String>,
    /// When something last went wrong.
    pub(super) since: Instant,
    /// Whether the kind is followed, as it was told.
    followed: Option<bool>,
}

impl Trouble {
    pub(super) fn new(kind: &'static str) -> Self {
        Self { kind, backoff: Backoff::new(), said: None, since: Instant::now(), followed: None }
    }

    pub(super) const fn is_on(&self) -> bool {
        self.said.is_some()
    }

    /// What there is to tell when the kind is followed, or is not.
    pub(super) fn news(&mut self, followed: bool) -> Option<SourceEvent> {
        let is_news = self.followed.replace(followed) != Some(followed);
        is_news.then_some(SourceEvent::Followed { kind: self.kind, followed })
    }

    /// Says what is wrong, and returns how long to wait.
    pub(super) fn report(&mut self, server: &str, error: &watcher::Error) -> Duration {
        let wait = self.backoff.next();
        self.since = Instant::now();
        let text = chain(error);
        if self.said.as_ref() == Some(&text) {
            tracing::debug!(kind = self.kind, server, error = text, "still can't follow");
        } else {
            tracing::warn!(
                kind = self.kind,
                server,
                error = text,
                remedy = remedy(error),
                "can't follow: what is known stays in place, and it will be tried again"
            );
            self.said = Some(text);
        }
        wait
    }

    pub(super) fn over(&mut self, server: &str) {
        self.backoff.reset();
        if self.said.take().is_some() {
            tracing::info!(kind = self.kind, server, "followed again");
        }
    }
}

fn remedy(error: &watcher::Error) -> &'static str {
    let cause = match error {
        watcher::Error::InitialListFailed(cause)
        | watcher::Error::WatchStartFailed(cause)
        | watcher::Error::WatchFailed(cause) => cause,
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => {
            return "look at the API server's own log";
        }
    };
    match cause {
        kube::Error::Api(status) if status.code == 401 => "check the token or certificate in the kubeconfig",
        kube::Error::Api(status) if status.code == 403 => {
            "give this account list and watch on services, nodes and endpointslices.discovery.k8s.io (deploy/kustomize/rbac.yaml)"
        }
        kube::Error::Api(_) => "look at the API server's own log",
        _ => {
            "check that this address answers from this node and its certificate is trusted; --api-server sets another \
             one, and must not be the ClusterIP that Sheave itself serves"
        }
    }
}
