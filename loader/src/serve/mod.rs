//! What Sheave tells others by HTTP: [`health`] of the proxy, [`service_health`] of single Services to load balancers,
//! and [`metrics`]. [`status`] is how the controller tells them; [`events`] tells the API server what can't be served.
//!
//! All servers live in the daemon's network namespace. One that can't have its port is tried again and stops nothing.
//! They hold no state of their own: everything comes from the controller or, when asked, from the pinned maps.

mod events;
mod health;
mod metrics;
mod server;
mod service_health;
mod status;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, StatusCode};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::warn;

use crate::config::RunConfig;
pub(crate) use events::known_api_servers;
use events::{Events, Publisher};
use health::{Health, Question};
use metrics::Metrics;
use server::{Answer, Request};
use service_health::HealthChecks;
pub use status::{Arrival, Status};

/// Every server that the configuration asks for.
pub struct Servers {
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    checks: watch::Receiver<HealthChecks>,
    events: Events,
    publisher: Option<Publisher>,
    healthz: Vec<SocketAddr>,
    metrics_addresses: Vec<SocketAddr>,
    pin_path: PathBuf,
}

/// The servers, and what they are told through.
#[must_use]
pub fn new(config: &RunConfig) -> (Status, Servers) {
    let (health, metrics) = (Arc::new(Health::new(config.health_timeout)), Arc::new(Metrics::new()));
    let (sender, checks) = watch::channel(HealthChecks::default());
    let (events, publisher) = events::channel(config);
    let status = Status::new(Arc::clone(&health), Arc::clone(&metrics), sender);
    let servers = Servers {
        health,
        metrics,
        checks,
        events,
        publisher,
        healthz: config.healthz.0.clone(),
        metrics_addresses: config.metrics.0.clone(),
        pin_path: config.pin_path.clone(),
    };
    (status, servers)
}

impl Servers {
    /// Serves until the [`Status`] is gone. Dropping the future ends all servers.
    pub async fn run(self) {
        if let Err(error) = server::allow_many_sockets() {
            warn!(%error, "cannot raise the limit of file descriptors: health checks of many Services may not fit");
        }
        let mut tasks = JoinSet::new();
        for address in self.healthz {
            let (health, metrics) = (Arc::clone(&self.health), Arc::clone(&self.metrics));
            tasks.spawn(server::serve_at("health", address, move |request| {
                std::future::ready(answer_health(&health, &metrics, &request))
            }));
        }
        for address in self.metrics_addresses {
            let (health, metrics) = (Arc::clone(&self.health), Arc::clone(&self.metrics));
            let pin_path = self.pin_path.clone();
            tasks.spawn(server::serve_at("metrics", address, move |request| {
                metrics.waited(health.waited(Instant::now()));
                answer_metrics(Arc::clone(&metrics), pin_path.clone(), request)
            }));
        }
        if let Some(publisher) = self.publisher {
            tasks.spawn(publisher.run());
        }
        service_health::run(self.checks, self.health, self.events).await;
    }
}

fn answer_health(health: &Health, metrics: &Metrics, request: &Request) -> Answer {
    let (question, counter) = match request.uri().path() {
        "/healthz" => (Question::Healthz, &metrics.healthz),
        "/livez" => (Question::Livez, &metrics.livez),
        _ => return server::not_found("/healthz and /livez"),
    };
    let answer = health.answer(question);
    Metrics::count(counter, answer.status());
    answer
}

async fn answer_metrics(metrics: Arc<Metrics>, pin_path: PathBuf, request: Request) -> Answer {
    if request.uri().path() != "/metrics" {
        return server::not_found("/metrics");
    }
    // Reading the maps is system calls, thousands of them in a large cluster.
    match tokio::task::spawn_blocking(move || metrics.text(&pin_path)).await {
        Ok(text) => server::with_type(StatusCode::OK, HeaderValue::from_static(prometheus::TEXT_FORMAT), text),
        Err(_) => server::with_type(StatusCode::INTERNAL_SERVER_ERROR, HeaderValue::from_static("text/plain"), ""),
    }
}
