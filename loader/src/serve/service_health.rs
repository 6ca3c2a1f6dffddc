//! healthCheckNodePorts: one HTTP server for each Service that asks for one, on every address that serves nodePorts.
//! A cloud's load balancer asks them which nodes have endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderName, HeaderValue, StatusCode};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::events::{Events, Failure};
use super::health::Health;
use super::server::{self, Answer};
use crate::model::HealthCheck;
use crate::model::desired::ServiceKey;
use crate::model::objects::Family;

/// The header in which load balancers that weigh nodes read a node's share.
const ENDPOINT_WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// What is to be served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HealthChecks {
    /// The addresses that serve nodePorts.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// Services with a healthCheckNodePort.
    pub(super) services: BTreeMap<ServiceKey, HealthCheck>,
}

/// The body of an answer; kube-proxy's names, in its order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    service: Named<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Named<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// One server.
type Place = (ServiceKey, SocketAddr);

impl HealthChecks {
    /// Where servers belong: each Service on the addresses of the families that it has.
    fn places(&self) -> BTreeSet<Place> {
        let places = self.services.iter().flat_map(|(key, check)| {
            let addresses = self.addresses.iter().filter(|one| check.endpoints.contains_key(&Family::of(**one)));
            addresses.map(|address| (key.clone(), SocketAddr::new(*address, check.port)))
        });
        places.collect()
    }

    fn answer(&self, key: &ServiceKey, family: Family, proxy_healthy: bool) -> Answer {
        let check = self.services.get(key);
        let local_endpoints = check.and_then(|check| check.endpoints.get(&family)).copied().unwrap_or(0);
        let healthy = local_endpoints > 0 && proxy_healthy;
        let status = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let service = Named { namespace: &key.namespace, name: &key.name };
        let report = Report { service, local_endpoints, service_proxy_healthy: proxy_healthy };
        let mut answer = server::json(status, &report);
        answer.headers_mut().insert(ENDPOINT_WEIGHT, HeaderValue::from(local_endpoints));
        answer
    }
}

/// A running server, which ends with its value.
struct Server(JoinHandle<()>);

impl Server {
    fn start(serving: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(serving))
    }

    /// Ends it, and returns when its port is free.
    async fn stop(mut self) {
        self.0.abort();
        // Aborted is how it ends.
        let _ = (&mut self.0).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The servers that run, and those that should.
struct Servers {
    wanted: watch::Receiver<HealthChecks>,
    health: Arc<Health>,
    events: Events,
    running: BTreeMap<Place, Server>,
    /// Those that have no port, with the reason.
    failing: BTreeMap<Place, String>,
}

/// Serves what is wanted, until nobody can want anything else.
pub(super) async fn run(wanted: watch::Receiver<HealthChecks>, health: Arc<Health>, events: Events) {
    let mut servers = Servers { wanted, health, events, running: BTreeMap::new(), failing: BTreeMap::new() };
    loop {
        servers.update().await;
        let changed = servers.wanted.changed();
        let ended = if servers.failing.is_empty() {
            changed.await.is_err()
        } else {
            tokio::select! {
                changed = changed => changed.is_err(),
                () = sleep(server::RETRY) => false,
            }
        };
        if ended {
            return;
        }
    }
}

impl Servers {
    async fn update(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let places = wanted.places();
        let unwanted: Vec<Place> = self.running.keys().filter(|place| !places.contains(place)).cloned().collect();
        // Ends first: another Service may get a port that one gives up.
        for place in unwanted {
            if let Some(server) = self.running.remove(&place) {
                debug!(service = %place.0, address = %place.1, "no health checks here any more");
                server.stop().await;
            }
        }
        self.failing.retain(|place, _| places.contains(place));
        for place in places {
            if !self.running.contains_key(&place) {
                let uid = wanted.services.get(&place.0).and_then(|check| check.uid.clone());
                self.start(place, uid);
            }
        }
    }

    fn start(&mut self, place: Place, uid: Option<String>) {
        let (service, address) = &place;
        match server::listen(*address) {
            Ok(listener) => {
                if self.failing.remove(&place).is_some() {
                    info!(%service, %address, "health checks are answered after all");
                }
                let (checks, health, key) = (self.wanted.clone(), Arc::clone(&self.health), service.clone());
                let family = Family::of(address.ip());
                let server = Server::start(server::serve(listener, move |_| {
                    let healthy = health.is_healthy(Instant::now());
                    std::future::ready(checks.borrow().answer(&key, family, healthy))
                }));
                self.running.insert(place, server);
            }
            Err(error) => {
                let error = error.to_string();
                if self.failing.get(&place) == Some(&error) {
                    return;
                }
                warn!(%service, %address, error,
                    "cannot answer health checks of a Service; will try again, other Services are not affected");
                self.events.report(Failure { service: service.clone(), uid, address: *address, error: error.clone() });
                self.failing.insert(place, error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ServiceKey {
        ServiceKey { namespace: "default".into(), name: name.into() }
    }

    fn check(port: u16, endpoints: &[(Family, usize)]) -> HealthCheck {
        HealthCheck { port, endpoints: endpoints.iter().copied().collect(), uid: None }
    }

    #[test]
    fn servers_belong_on_the_addresses_of_the_families_that_a_service_has() {
        let addresses = ["192.0.2.1", "198.51.100.1", "2001:db8::1"].map(|text| text.parse().unwrap());
        let dual = check(32_000, &[(Family::V4, 1), (Family::V6, 0)]);
        let single = check(32_001, &[(Family::V6, 1)]);
        let checks = HealthChecks {
            addresses: addresses.into(),
            services: [(key("dual"), dual), (key("single"), single)].into(),
        };
        let places: Vec<String> =
            checks.places().into_iter().map(|(key, address)| format!("{} {address}", key.name)).collect();
        assert_eq!(
            places,
            [
                "dual 192.0.2.1:32000",
                "dual 198.51.100.1:32000",
                "dual [2001:db8::1]:32000",
                "single [2001:db8::1]:32001"
            ]
        );
    }

    #[test]
    fn a_node_is_chosen_only_with_an_endpoint_and_a_healthy_proxy() {
        let services = [(key("web"), check(32_000, &[(Family::V4, 2), (Family::V6, 0)]))].into();
        let checks = HealthChecks { addresses: BTreeSet::new(), services };
        let status = |name: &str, family, healthy| checks.answer(&key(name), family, healthy).status().as_u16();
        assert_eq!(status("web", Family::V4, true), 200);
        assert_eq!(status("web", Family::V4, false), 503);
        assert_eq!(status("web", Family::V6, true), 503);
        assert_eq!(status("gone", Family::V4, true), 503);
        let answer = checks.answer(&key("web"), Family::V4, false);
        assert_eq!(answer.headers()["X-Load-Balancing-Endpoint-Weight"], "2");
    }
}
