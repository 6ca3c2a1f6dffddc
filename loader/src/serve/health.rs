//! Whether this proxy does its work: `/healthz`, for load balancers and readiness probes, and `/livez`, for who would
//! restart it.
//!
//! It is out of date when something that it was told has waited for longer than a time-out: the first pass over what
//! was there at the start, a change, or a write that keeps failing. A proxy that is still starting waits for others, so
//! it is live, but not healthy: it can't know yet.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;
use serde::Serialize;

use super::server::{self, Answer};

/// What was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Question {
    /// `/healthz`: should clients be sent to this node?
    Healthz,
    /// `/livez`: does this process work?
    Livez,
}

/// What the controller last said of itself and of its node.
#[derive(Debug, Default)]
struct State {
    /// What was there at the start has been applied.
    synced: bool,
    /// When everything that was known was last applied.
    applied: Option<SystemTime>,
    /// Since when something has waited to be applied, without a moment in which nothing did.
    waiting: Option<Instant>,
    node_leaving: bool,
}

impl State {
    fn is_up_to_date(&self, now: Instant, timeout: Duration) -> bool {
        self.waiting.is_none_or(|since| now.saturating_duration_since(since) <= timeout)
    }
}

/// The proxy's health. Its owner tells, its servers ask.
#[derive(Debug)]
pub(super) struct Health {
    timeout: Duration,
    state: Mutex<State>,
}

/// The body of an answer; kube-proxy's names.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// When what was known was last applied. As with kube-proxy, the present while healthy: nothing waits.
    last_updated: Option<String>,
    current_time: String,
    node_eligible: bool,
    healthy: bool,
}

impl Health {
    pub(super) fn new(timeout: Duration) -> Self {
        Self { timeout, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is to be done from now on.
    pub(super) fn wait(&self, now: Instant) {
        self.state().waiting.get_or_insert(now);
    }

    /// Nothing waits any more.
    pub(super) fn rest(&self) {
        self.state().waiting = None;
    }

    /// Everything that is known has been applied.
    pub(super) fn applied(&self, now: SystemTime) {
        let mut state = self.state();
        state.synced = true;
        state.applied = Some(now);
    }

    /// What was there at the start has been read and tried, if not applied in full.
    pub(super) fn synced(&self) {
        self.state().synced = true;
    }

    /// For how long something has waited by now.
    pub(super) fn waited(&self, now: Instant) -> Duration {
        self.state().waiting.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Whether this node is on its way out of the cluster.
    pub(super) fn set_node_leaving(&self, leaving: bool) {
        self.state().node_leaving = leaving;
    }

    /// Whether the proxy is healthy, wherever its node goes.
    pub(super) fn is_healthy(&self, now: Instant) -> bool {
        let state = self.state();
        state.synced && state.is_up_to_date(now, self.timeout)
    }

    fn report(&self, question: Question, now: Instant, time: SystemTime) -> Report {
        let state = self.state();
        let up_to_date = state.is_up_to_date(now, self.timeout);
        let healthy = match question {
            Question::Healthz => state.synced && up_to_date && !state.node_leaving,
            Question::Livez => !state.synced || up_to_date,
        };
        let last_updated = if healthy && state.synced { Some(time) } else { state.applied };
        Report {
            last_updated: last_updated.map(text),
            current_time: text(time),
            node_eligible: !state.node_leaving,
            healthy,
        }
    }

    /// The answer of now.
    pub(super) fn answer(&self, question: Question) -> Answer {
        let report = self.report(question, Instant::now(), SystemTime::now());
        let status = if report.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        server::json(status, &report)
    }
}

/// RFC 3339.
fn text(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map(|time| time.to_string()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(120);

    struct Proxy {
        health: Health,
        start: Instant,
    }

    impl Proxy {
        fn new() -> Self {
            Self { health: Health::new(TIMEOUT), start: Instant::now() }
        }

        fn ready() -> Self {
            let proxy = Self::new();
            proxy.health.applied(SystemTime::UNIX_EPOCH);
            proxy
        }

        fn after(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// healthz, livez, and what healthCheckNodePorts say.
        fn at(&self, seconds: u64) -> (bool, bool, bool) {
            let now = self.after(seconds);
            let healthy = |question| self.health.report(question, now, SystemTime::UNIX_EPOCH).healthy;
            (healthy(Question::Healthz), healthy(Question::Livez), self.health.is_healthy(now))
        }
    }

    #[test]
    fn a_starting_proxy_is_live_however_long_it_takes_and_healthy_once_it_has_synced() {
        let proxy = Proxy::new();
        proxy.health.wait(proxy.start);
        assert_eq!(proxy.at(1_000), (false, true, false));
        proxy.health.applied(SystemTime::UNIX_EPOCH);
        proxy.health.rest();
        assert_eq!(proxy.at(1_000), (true, true, true));
    }

    #[test]
    fn a_change_that_waits_too_long_makes_it_unhealthy_until_it_is_applied() {
        let proxy = Proxy::ready();
        assert_eq!(proxy.at(100_000), (true, true, true), "idle for long");
        proxy.health.wait(proxy.after(10));
        proxy.health.wait(proxy.after(100));
        assert_eq!(proxy.at(130), (true, true, true));
        assert_eq!(proxy.at(131), (false, false, false), "the oldest counts");
        proxy.health.rest();
        assert_eq!(proxy.at(131), (true, true, true));
        proxy.health.wait(proxy.after(200));
        assert_eq!(proxy.at(300), (true, true, true), "what was applied no longer counts");
    }

    #[test]
    fn a_node_that_leaves_is_no_reason_to_restart_the_proxy_or_to_forget_its_endpoints() {
        let proxy = Proxy::ready();
        proxy.health.set_node_leaving(true);
        assert_eq!(proxy.at(1), (false, true, true));
        proxy.health.set_node_leaving(false);
        assert_eq!(proxy.at(1), (true, true, true));
    }

    #[test]
    fn the_body_says_when_what_was_known_was_last_applied() {
        let proxy = Proxy::ready();
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400);
        let report = |question, seconds| {
            serde_json::to_value(proxy.health.report(question, proxy.after(seconds), time)).unwrap()
        };
        let now = "1970-01-02T00:00:00Z";
        assert_eq!(
            report(Question::Healthz, 0),
            serde_json::json!({"lastUpdated": now, "currentTime": now, "nodeEligible": true, "healthy": true})
        );
        proxy.health.wait(proxy.start);
        proxy.health.set_node_leaving(true);
        assert_eq!(
            report(Question::Livez, 121),
            serde_json::json!({"lastUpdated": "1970-01-01T00:00:00Z", "currentTime": now, "nodeEligible": false,
                "healthy": false})
        );
        let starting = Proxy::new().health.report(Question::Livez, Instant::now(), time);
        assert_eq!((starting.last_updated, starting.healthy), (None, true));
    }
}
