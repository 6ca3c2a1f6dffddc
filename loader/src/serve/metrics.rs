//! What `/metrics` shows: this process's own counts, under kube-proxy's names where they mean the same, and, read when
//! somebody asks, the kernel's counters in the pinned maps.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::StatusCode;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use tracing::debug;

use crate::dataplane::{self, Census, Fullness, MapError, PinnedMaps};
use crate::model::desired::Protocol;

/// Counts of this process.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub(super) sync_duration: Histogram,
    pub(super) last_sync: Gauge,
    pub(super) last_queued: Gauge,
    pub(super) endpoint_changes: Changes,
    pub(super) service_changes: Changes,
    pub(super) no_local_endpoints: IntGaugeVec,
    pub(super) network_programming: Histogram,
    pub(super) healthz: IntCounterVec,
    pub(super) livez: IntCounterVec,
    pub(super) map_writes: IntCounter,
    pub(super) map_entries: IntGaugeVec,
    pub(super) map_capacity: IntGaugeVec,
    pub(super) map_refusals: IntCounterVec,
    pub(super) skipped_fields: IntCounter,
    pub(super) audits: IntCounter,
    pub(super) audit_findings: IntCounterVec,
    pub(super) audit_troubles: IntGauge,
    pub(super) audit_busy: Gauge,
    pub(super) last_audit: Gauge,
    pub(super) followed: IntGaugeVec,
    unapplied: Gauge,
    flows: IntGaugeVec,
    programs: IntGaugeVec,
    census: Mutex<Option<Counted>>,
}

/// When what traffic fills was counted, and how long that took.
#[derive(Debug)]
struct Counted {
    at: Instant,
    took: Duration,
}

/// What traffic fills is counted again after this time at the earliest,
const CENSUS: Duration = Duration::from_secs(10);
/// and never takes more than this part of one CPU's time, however many flows there are and however often somebody asks.
const CENSUS_PART: u32 = 50;

/// Changes of one kind of object: those that wait, and all there were.
#[derive(Debug)]
pub(super) struct Changes {
    pub(super) pending: IntGauge,
    pub(super) total: IntCounter,
}

/// A registry in the making.
struct Maker(Registry);

impl Maker {
    fn add<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let metric = made.expect("a metric's name and labels are well formed");
        self.0.register(Box::new(metric.clone())).expect("every metric has a name of its own");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), &[label]))
    }

    fn gauges(&self, name: &str, help: &str, label: &str) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), &[label]))
    }

    fn seconds(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::new(name, help))
    }

    fn histogram(&self, name: &str, help: &str, buckets: Vec<f64>) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }

    fn changes(&self, object: &str) -> Changes {
        let name = |end: &str| format!("kubeproxy_sync_proxy_rules_{object}_changes_{end}");
        Changes {
            pending: self.add(IntGauge::new(name("pending"), format!("{object} changes that are not applied yet"))),
            total: self.counter(&name("total"), &format!("{object} changes so far")),
        }
    }
}

/// kube-proxy's: 1 ms to 16 s.
fn sync_buckets() -> Vec<f64> {
    prometheus::exponential_buckets(0.001, 2.0, 15).expect("sound buckets")
}

/// kube-proxy's, which the network-programming SLI is computed from.
fn programming_buckets() -> Vec<f64> {
    let linear = |start, width, count| prometheus::linear_buckets(start, width, count).expect("sound buckets");
    [linear(0.25, 0.25, 2), linear(1.0, 1.0, 59), linear(60.0, 5.0, 12), linear(120.0, 30.0, 7)].concat()
}

impl Metrics {
    pub(super) fn new() -> Self {
        let make = Maker(Registry::new());
        let metrics = Self {
            sync_duration: make.histogram(
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "How long a pass took that applied changes",
                sync_buckets(),
            ),
            last_sync: make.seconds(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When everything that was known was last applied",
            ),
            last_queued: make
                .seconds("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "When a change last came in"),
            endpoint_changes: make.changes("endpoint"),
            service_changes: make.changes("service"),
            no_local_endpoints: make.add(IntGaugeVec::new(
                Opts::new(
                    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                    "Service ports under traffic policy Local with endpoints elsewhere only",
                ),
                &["traffic_policy"],
            )),
            network_programming: make.histogram(
                "kubeproxy_network_programming_duration_seconds",
                "From the change of a pod or Service to the kernel that knows of it",
                programming_buckets(),
            ),
            healthz: make.counters("kubeproxy_proxy_healthz_total", "Answers of /healthz", "code"),
            livez: make.counters("kubeproxy_proxy_livez_total", "Answers of /livez", "code"),
            map_writes: make.counter("sheave_map_writes_total", "Writes to pinned maps that applied changes"),
            map_entries: make.gauges(
                "sheave_map_entries",
                "Elements in use of a map; those that traffic fills are counted every ten seconds at most",
                "map",
            ),
            map_capacity: make.gauges("sheave_map_capacity", "Elements that the map has room for", "map"),
            map_refusals: make.counters(
                "sheave_map_refused_writes_total",
                "Service ports that a full map had no room for, each time that it was tried; the log names them",
                "map",
            ),
            skipped_fields: make
                .counter("sheave_skipped_fields_total", "Fields of objects that could not be used; the log names them"),
            audits: make.counter(
                "sheave_audits_total",
                "Comparisons of the kernel's maps, programs and pins with what they should be",
            ),
            audit_findings: make.counters(
                "sheave_audit_findings_total",
                "Elements of a map, links or pins that were not as they should be; the log names them",
                "place",
            ),
            audit_troubles: make.add(IntGauge::new(
                "sheave_audit_unrepaired",
                "What the last audit could not repair; the log says why",
            )),
            audit_busy: make.seconds("sheave_audit_duration_seconds", "For how long the last audit has worked"),
            last_audit: make.seconds("sheave_audit_last_timestamp_seconds", "When the last audit ended"),
            followed: make.gauges(
                "sheave_source_followed",
                "1 while objects of a kind are followed; what is known of them may be out of date while it is 0",
                "kind",
            ),
            unapplied: make.seconds(
                "sheave_oldest_unapplied_change_seconds",
                "For how long a change that the source has told has waited to be applied",
            ),
            flows: make.add(IntGaugeVec::new(
                Opts::new("sheave_conntrack_flows", "Flows by state, counted every ten seconds at most"),
                &["protocol", "state"],
            )),
            programs: make.gauges("sheave_attached_programs", "Programs that are attached, by hook", "hook"),
            census: Mutex::default(),
            registry: make.0.clone(),
        };
        let build = make
            .add(IntGaugeVec::new(Opts::new("sheave_build_info", "1, for what runs here"), &["version", "map_layout"]));
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), &sheave_common::LAYOUT_VERSION.to_string()]).set(1);
        for code in ["200", "503"] {
            metrics.healthz.with_label_values(&[code]);
            metrics.livez.with_label_values(&[code]);
        }
        for policy in ["internal", "external"] {
            metrics.no_local_endpoints.with_label_values(&[policy]).set(0);
        }
        metrics
    }

    /// Everything in Prometheus' text format, the maps pinned in `pin_path` included. Blocks while they are read.
    pub(super) fn text(&self, pin_path: &Path) -> Vec<u8> {
        if let Err(error) = self.look(pin_path) {
            debug!(%error, "cannot count what traffic fills");
        }
        let mut families = self.registry.gather();
        match kernel(pin_path) {
            Ok(kernel) => families.extend(kernel),
            // They come with the first start of the dataplane.
            Err(error) => debug!(%error, "no metrics of the kernel's"),
        }
        families.retain(|family| !family.get_metric().is_empty());
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&families, &mut text) {
            debug!(%error, "metrics can't be written down");
        }
        text
    }

    /// For how long something has waited to be applied.
    pub(super) fn waited(&self, time: Duration) {
        self.unapplied.set(time.as_secs_f64());
    }

    /// Takes in what is pinned and attached, and, if that is due, what traffic fills.
    fn look(&self, pin_path: &Path) -> Result<(), MapError> {
        self.programs.reset();
        match dataplane::attached(pin_path) {
            Ok(attached) => attached.into_iter().for_each(|(hook, number)| {
                self.programs.with_label_values(&[hook]).set(number);
            }),
            Err(error) => debug!(%error, "cannot tell what is attached"),
        }
        let mut counted = self.census.lock().unwrap_or_else(PoisonError::into_inner);
        let due = |last: &Counted| last.at.elapsed() >= CENSUS.max(last.took * CENSUS_PART);
        if !counted.as_ref().is_none_or(due) {
            return Ok(());
        }
        let started = Instant::now();
        let census = Census::take_traffic(pin_path)?;
        let number = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.flows.reset();
        for ((protocol, state), flows) in census.flows {
            let protocol = Protocol::from_number(protocol).map(|protocol| protocol.to_string()).unwrap_or_default();
            self.flows.with_label_values(&[&protocol, state]).set(i64::try_from(flows).unwrap_or(i64::MAX));
        }
        for Fullness { map, entries, capacity } in census.traffic {
            self.map_entries.with_label_values(&[map]).set(number(entries));
            self.map_capacity.with_label_values(&[map]).set(capacity.into());
        }
        *counted = Some(Counted { at: started, took: started.elapsed() });
        Ok(())
    }

    /// Counts an answer.
    pub(super) fn count(counter: &IntCounterVec, status: StatusCode) {
        counter.with_label_values(&[status.as_str()]).inc();
    }

    /// A change was for something that happened then, and is now in the kernel.
    pub(super) fn programmed(&self, triggered: SystemTime, now: SystemTime) {
        self.network_programming.observe(now.duration_since(triggered).unwrap_or(Duration::ZERO).as_secs_f64());
    }
}

/// Seconds since the epoch.
pub(super) fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

/// The kernel's counters.
fn kernel(pin_path: &Path) -> Result<Vec<MetricFamily>, MapError> {
    const SERVICE: [&str; 3] = ["service", "port", "protocol"];
    let make = Maker(Registry::new());
    let counters =
        |name: &str, help: &str, labels: &[&str]| make.add(IntCounterVec::new(Opts::new(name, help), labels));
    let drops = counters("sheave_drops_total", "Packets that were dropped, rejected or left alone", &["reason"]);
    let connections = counters("sheave_service_connections_total", "Connections to a service port", &SERVICE);
    let packets = counters("sheave_service_packets_total", "Packets of a service port, both ways", &SERVICE);
    let bytes = counters("sheave_service_bytes_total", "Their bytes, from the network header on", &SERVICE);

    let maps = PinnedMaps::open(pin_path)?;
    const FAILOVERS: &str = "SYNs that went to another backend than the one that had not answered";
    make.counter("sheave_syn_failovers_total", FAILOVERS).inc_by(maps.syn_failovers()?);
    for (reason, count) in maps.drop_counters()? {
        drops.with_label_values(&[reason.name()]).inc_by(count);
    }
    let counted = maps.service_counters()?;
    for (id, name) in maps.service_names()? {
        let Some(text) = name.as_str() else { continue };
        let (service, port) = text.split_once(':').unwrap_or((text, ""));
        let protocol = Protocol::from_number(name.protocol).map(|protocol| protocol.to_string()).unwrap_or_default();
        let labels = [service, port, &protocol];
        let counter = counted.get(&id).copied().unwrap_or_default();
        connections.with_label_values(&labels).inc_by(counter.connections);
        packets.with_label_values(&labels).inc_by(counter.packets);
        bytes.with_label_values(&labels).inc_by(counter.bytes);
    }
    Ok(make.0.gather())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_that_dashboards_of_kube_proxy_know() {
        let sync = sync_buckets();
        assert_eq!((sync.len(), sync[0], sync[14]), (15, 0.001, 16.384));
        let programming = programming_buckets();
        assert_eq!(programming.len(), 2 + 59 + 12 + 7);
        assert_eq!((programming[0], programming[1], programming[2]), (0.25, 0.5, 1.0));
        assert_eq!(programming.last(), Some(&300.0));
        assert!(programming.is_sorted());
    }

    #[test]
    fn every_name_is_there_from_the_start_and_in_the_text_format() {
        let metrics = Metrics::new();
        metrics.programmed(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_millis(400));
        Metrics::count(&metrics.healthz, StatusCode::SERVICE_UNAVAILABLE);
        let text = String::from_utf8(metrics.text(Path::new("/nowhere"))).unwrap();
        for line in [
            "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram",
            "# TYPE kubeproxy_sync_proxy_rules_last_timestamp_seconds gauge",
            "# TYPE kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds gauge",
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0",
            "# TYPE kubeproxy_sync_proxy_rules_endpoint_changes_total counter",
            "kubeproxy_sync_proxy_rules_service_changes_pending 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"external\"} 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.25\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"0.5\"} 1",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 0",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 0",
        ] {
            assert!(text.lines().any(|own| own == line), "no {line:?} in:\n{text}");
        }
    }
}
