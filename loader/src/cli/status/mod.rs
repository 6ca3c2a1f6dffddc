//! `sheave status`: how this node's Sheave is, on one screen. The dataplane is read from its pins, and what only the daemon
//! knows is asked of its health and metrics endpoints; so most of it is there while the daemon is down.

mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::{Deserialize, Serialize};
use sheave_common::LAYOUT_VERSION;
use sheave_common::config::{Config, flags};
use sheave_common::interface::flags as interface_flags;

use super::output::OutputArgs;
use super::views::{ReadError, ViewError, interface_name, open, protocol_name};
use super::{DISAPPOINTED, PinArgs, http, values};
use crate::config::BindAddresses;
use crate::dataplane::{self, Census, Features, Fullness, MapError, PinnedMaps};

/// Flags of `sheave status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    pub(super) daemon: DaemonArgs,
}

/// Where the daemon answers: the same flags as those of `sheave run`.
#[derive(Clone, Debug, Args)]
pub struct DaemonArgs {
    /// Where the daemon serves /healthz.
    #[arg(long, env = "SHEAVE_HEALTHZ_BIND_ADDRESS", value_name = "ADDRESSES", value_parser = values::bind_addresses,
          default_value = "0.0.0.0:10256,[::]:10256")]
    pub(super) healthz_bind_address: BindAddresses,
    /// Where the daemon serves /metrics.
    #[arg(long, env = "SHEAVE_METRICS_BIND_ADDRESS", value_name = "ADDRESSES", value_parser = values::bind_addresses,
          default_value = "127.0.0.1:10249")]
    pub(super) metrics_bind_address: BindAddresses,
}

/// Everything that is shown.
#[derive(Debug, Serialize)]
pub(super) struct Status {
    /// Of this program.
    version: &'static str,
    map_layout: u32,
    kernel: String,
    pins: PathBuf,
    daemon: Daemon,
    /// What is pinned; absent if nothing is, or it can't be read.
    dataplane: Option<Dataplane>,
    /// Why it can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The running process.
#[derive(Debug, Default, Serialize)]
struct Daemon {
    running: bool,
    healthy: bool,
    /// Its version.
    version: Option<String>,
    /// This node is to get traffic: its Node object is there to stay.
    node_eligible: Option<bool>,
    /// Since everything that is known was last applied.
    sync_age_seconds: Option<u64>,
    /// For how long a change has waited.
    unapplied_seconds: Option<f64>,
    /// Since the last comparison of maps, programs and pins with what they should be.
    audit_age_seconds: Option<u64>,
    /// What such comparisons have found and repaired since the daemon's start.
    audit_findings: Option<u64>,
    /// What the last one could not repair.
    audit_unrepaired: Option<u64>,
    /// Why nobody answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The pinned maps and what is attached.
#[derive(Debug, Serialize)]
struct Dataplane {
    /// As `--connect`.
    connect: &'static str,
    /// Flows may bypass netfilter.
    bypass: bool,
    /// Connections of another proxy drain.
    drain_foreign: bool,
    /// Attached programs by hook.
    programs: BTreeMap<&'static str, i64>,
    /// Kind of the tc hooks: TCX or clsact.
    tc: &'static str,
    interfaces: Vec<InterfaceRow>,
    service_ports: usize,
    frontends: usize,
    backends: usize,
    flows: Vec<Flows>,
    maps: Vec<Fullness>,
    /// Packets by reason; without reasons that never came up.
    drops: BTreeMap<&'static str, u64>,
    /// SYNs that went to another backend than the one that had not answered; absent if `--syn-failover` is off.
    #[serde(skip_serializing_if = "Option::is_none")]
    syn_failovers: Option<u64>,
}

#[derive(Debug, Serialize)]
struct InterfaceRow {
    name: String,
    index: u32,
    role: &'static str,
    xdp: bool,
}

#[derive(Debug, Serialize)]
struct Flows {
    protocol: String,
    state: &'static str,
    flows: u64,
}

/// `sheave status`. Unless the daemon runs and is healthy, the exit code says so.
///
/// # Errors
///
/// If the output can't be written, or there may be maps and this process may not read them.
pub fn status(args: &StatusArgs) -> Result<ExitCode, ViewError> {
    let mut healthy = false;
    args.output.show(|| {
        let status = Status::read(&args.pins.pin_path, &args.daemon)?;
        healthy = status.daemon.healthy;
        Ok::<_, ViewError>(args.output.format(&status, |wide| status.text(wide))?)
    })?;
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::from(DISAPPOINTED) })
}

impl Status {
    /// Looks around.
    pub(super) fn read(pins: &Path, daemon: &DaemonArgs) -> Result<Self, ViewError> {
        let (dataplane, error) = match Dataplane::read(pins) {
            Ok(dataplane) => (Some(dataplane), None),
            Err(error @ ReadError::NotPermitted { .. }) => return Err(error.into()),
            Err(error) => (None, Some(error.to_string())),
        };
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            map_layout: LAYOUT_VERSION,
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            pins: pins.to_owned(),
            daemon: Daemon::ask(daemon),
            dataplane,
            error,
        })
    }
}

impl Daemon {
    fn ask(args: &DaemonArgs) -> Self {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Health {
            healthy: bool,
            node_eligible: bool,
        }
        let mut daemon = Self::default();
        match http::get(&args.healthz_bind_address, "/healthz") {
            Ok((_, body)) => match serde_json::from_str::<Health>(&body) {
                Ok(health) => {
                    daemon.running = true;
                    daemon.healthy = health.healthy;
                    daemon.node_eligible = Some(health.node_eligible);
                }
                // kube-proxy has the same ports.
                Err(_) => daemon.error = Some("another process answers there".to_owned()),
            },
            Err(error) => daemon.error = Some(error.to_string()),
        }
        if let Ok((_, metrics)) = http::get(&args.metrics_bind_address, "/metrics")
            && metrics.contains("\nsheave_build_info{")
        {
            daemon.running = true;
            daemon.learn(&metrics, SystemTime::now());
        }
        daemon
    }

    /// What the daemon's metrics say.
    fn learn(&mut self, metrics: &str, now: SystemTime) {
        let value = |name: &str| -> Option<f64> {
            metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        };
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let age = |name: &str| value(name).filter(|time| *time > 0.0).map(|time| (now - time).max(0.0) as u64);
        self.sync_age_seconds = age("kubeproxy_sync_proxy_rules_last_timestamp_seconds");
        self.audit_age_seconds = age("sheave_audit_last_timestamp_seconds");
        if self.audit_age_seconds.is_some() {
            let findings = metrics.lines().filter_map(|line| line.strip_prefix("sheave_audit_findings_total{"));
            let findings = findings.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
            self.audit_findings = Some(findings.sum::<f64>() as u64);
            self.audit_unrepaired = value("sheave_audit_unrepaired").map(|number| number as u64);
        }
        self.unapplied_seconds = value("sheave_oldest_unapplied_change_seconds");
        let build = metrics.lines().find_map(|line| line.strip_prefix("sheave_build_info{"));
        let version = build.and_then(|labels| labels.split("version=\"").nth(1)?.split('"').next());
        self.version = version.map(str::to_owned);
    }
}

impl Dataplane {
    fn read(pins: &Path) -> Result<Self, ReadError> {
        let maps = open(pins)?;
        Self::look(pins, &maps).map_err(ReadError::Map)
    }

    fn look(pins: &Path, maps: &PinnedMaps) -> Result<Self, MapError> {
        let config = maps.config()?;
        let bits = config.map_or(0, |config| config.flags);
        let census = Census::take(pins)?;
        let entries = |wanted: &[&str]| {
            census.services.iter().filter(|map| wanted.contains(&map.map)).map(|map| map.entries).sum()
        };
        let mut interfaces: Vec<InterfaceRow> = maps.interfaces()?.into_iter().map(InterfaceRow::new).collect();
        interfaces.sort_by_key(|interface| interface.index);
        let marks = maps.frontends4()?.iter().filter(|(key, _)| key.protocol == 0).count()
            + maps.frontends6()?.iter().filter(|(key, _)| key.protocol == 0).count();
        let frontends: usize = entries(&["frontends4", "frontends6"]);
        Ok(Self {
            connect: connect(config),
            bypass: bits & flags::BYPASSED != 0,
            drain_foreign: bits & flags::DRAIN_FOREIGN != 0,
            programs: dataplane::attached(pins).unwrap_or_default(),
            tc: if Features::detect().tcx { "TCX" } else { "clsact" },
            interfaces,
            service_ports: entries(&["service_names"]),
            frontends: frontends.saturating_sub(marks),
            backends: entries(&["backends4", "backends6"]),
            flows: census
                .flows
                .iter()
                .map(|((protocol, state), flows)| Flows { protocol: protocol_name(*protocol), state, flows: *flows })
                .collect(),
            drops: maps
                .drop_counters()?
                .into_iter()
                .filter(|(_, packets)| *packets > 0)
                .map(|(reason, packets)| (reason.name(), packets))
                .collect(),
            syn_failovers: if bits & flags::SYN_FAILOVER != 0 { Some(maps.syn_failovers()?) } else { None },
            maps: [census.services, census.traffic].concat(),
        })
    }
}

/// Whose sockets are balanced, as `--connect` says it.
fn connect(config: Option<Config>) -> &'static str {
    let bits = config.map_or(0, |config| config.flags);
    [(flags::CONNECT_ALL, "all"), (flags::CONNECT_TCP, "tcp"), (flags::CONNECT_HOST, "host")]
        .into_iter()
        .find_map(|(flag, name)| (bits & flag != 0).then_some(name))
        .unwrap_or("off")
}

impl InterfaceRow {
    fn new((index, interface): (u32, sheave_common::interface::Interface)) -> Self {
        Self {
            name: interface_name(index).unwrap_or_else(|| "(gone)".to_owned()),
            index,
            role: if interface.flags & interface_flags::POD != 0 { "pod" } else { "uplink or tunnel" },
            xdp: interface.flags & interface_flags::XDP != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_daemons_metrics_tell_its_version_and_how_old_its_last_sync_is() {
        let metrics = "# TYPE sheave_build_info gauge\nsheave_build_info{map_layout=\"3\",version=\"9.8.7\"} 1\n\
                       kubeproxy_sync_proxy_rules_last_timestamp_seconds 1000.5\n\
                       sheave_oldest_unapplied_change_seconds 2.5\n";
        let mut daemon = Daemon::default();
        daemon.learn(metrics, UNIX_EPOCH + Duration::from_secs(1_060));
        assert_eq!((daemon.version.as_deref(), daemon.sync_age_seconds), (Some("9.8.7"), Some(59)));
        assert_eq!(daemon.unapplied_seconds, Some(2.5));
        daemon.learn("kubeproxy_sync_proxy_rules_last_timestamp_seconds 0\n", UNIX_EPOCH);
        assert_eq!(daemon.sync_age_seconds, None, "never synced");
    }
}
