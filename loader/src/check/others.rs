//! Who else balances, filters, translates or attaches programs here.

use std::io;
use std::net::TcpListener;
use std::path::Path;

use super::{Finding, Findings, Node, fail, pass, warn};
use crate::config::{Bypass, RunConfig, XdpMode};
use crate::dataplane;
use crate::interfaces::Role;
use crate::netfilter::{self, kube_proxy};

/// What other balancers and CNIs pin, below the BPF file system.
const PINS: &[(&str, &str)] = &[
    ("cilium", "Cilium"),
    ("tc/globals/cilium_lb4_services_v2", "Cilium"),
    ("calico", "Calico's eBPF dataplane"),
    ("tc/globals/cali_v4_nat_fe3", "Calico's eBPF dataplane"),
];
/// Where that usually is; in a container the node's may be elsewhere, with our own pins.
const BPFFS: &str = "/sys/fs/bpf";
const IPVS: &str = "/proc/thread-self/net/ip_vs";
const IPVS_DEVICE: &str = "kube-ipvs0";

pub(super) fn findings(config: &RunConfig, node: &Node) -> Findings {
    let mut findings = vec![proxy(node), balancers(config)];
    findings.extend(programs(config, node));
    findings.push(forward_rules(config));
    findings.push(masquerading());
    findings.push(ports(config));
    findings
}

fn unreadable(check: &'static str, error: &io::Error) -> Finding {
    warn(check, format!("netfilter's rules can't be read: {error}"), "run this on the node, as root")
}

fn proxy(node: &Node) -> Finding {
    let traces = match kube_proxy::traces() {
        Ok(traces) => traces,
        Err(error) => return unreadable("kube-proxy", &error),
    };
    let ipvs = node.listing.links.iter().any(|link| link.name == IPVS_DEVICE) || balances_by_ipvs();
    if traces.is_empty() && !ipvs {
        return pass("kube-proxy", "not here");
    }
    let mut found = traces;
    found.extend(ipvs.then(|| "IPVS".to_owned()));
    warn(
        "kube-proxy",
        format!("was or is here: {}", found.join(", ")),
        "start Sheave beside it, stop it then, and run sheave cleanup --kube-proxy",
    )
}

/// Whether IPVS has virtual services: the table's head is three lines.
fn balances_by_ipvs() -> bool {
    std::fs::read_to_string(IPVS).is_ok_and(|table| table.lines().count() > 3)
}

fn balancers(config: &RunConfig) -> Finding {
    let roots = [Some(Path::new(BPFFS)), config.pin_path.parent()];
    let is_there = |pin: &str| roots.iter().flatten().any(|root| root.join(pin).exists());
    let found: Vec<&str> = PINS.iter().filter(|(pin, _)| is_there(pin)).map(|(_, name)| *name).collect();
    match found.first() {
        None => pass("balancers", "no pins of another one"),
        Some(name) => warn(
            "balancers",
            format!("{name} has pinned maps here"),
            format!("if {name} balances Services itself, turn that off (kubeProxyReplacement, BPFKubeProxy…)"),
        ),
    }
}

fn programs(config: &RunConfig, node: &Node) -> Findings {
    let mut findings = Vec::new();
    for interface in &node.interfaces {
        let Some(details) = node.details(interface.index) else { continue };
        let xdp = details.xdp.and_then(dataplane::foreign_program);
        if let Some(program) = xdp.filter(|_| interface.role == Role::Uplink && config.xdp != XdpMode::Off) {
            let found = format!("{} has the XDP program {program}, and room for one", interface.name);
            findings.push(match config.xdp {
                XdpMode::Auto => warn("programs", found, "nothing has to be done: tc does the work; --xdp off says so"),
                _ => fail("programs", found, "give --xdp off, or remove it"),
            });
        }
        let filters = details.filters.iter().filter(|name| !dataplane::is_own_program(name)).cloned();
        let others: Vec<String> = dataplane::foreign_programs(&interface.name).into_iter().chain(filters).collect();
        if !others.is_empty() {
            findings.push(warn(
                "programs",
                format!("{} has other tc programs: {}", interface.name, others.join(", ")),
                "make sure that they neither redirect Services' packets nor end the chain (TC_ACT_OK) before Sheave's",
            ));
        }
    }
    if findings.is_empty() {
        findings.push(pass("programs", "no others on these interfaces"));
    }
    findings
}

fn forward_rules(config: &RunConfig) -> Finding {
    let chains = match netfilter::forward_chains() {
        Ok(chains) => chains,
        Err(error) => return unreadable("forward-rules", &error),
    };
    if chains.is_empty() {
        return pass("forward-rules", "none that would be bypassed");
    }
    let list = chains.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    match config.bypass_netfilter {
        Bypass::Safe => fail(
            "forward-rules",
            format!("--bypass-netfilter would skip {list}"),
            "remove them, or accept that with --bypass-netfilter=force",
        ),
        _ => warn(
            "forward-rules",
            format!("what goes from outside through this node to a pod of another one does not meet {list}"),
            "filter such traffic on the node of the pod, where it does",
        ),
    }
}

fn masquerading() -> Finding {
    match netfilter::masquerades() {
        Err(error) => unreadable("masquerade", &error),
        Ok(rules) if rules.is_empty() => pass("masquerade", "no rule that would hide clients from pods of this node"),
        Ok(rules) => warn(
            "masquerade",
            format!("rules that hide clients from pods of this node, too: {}", rules.join(", ")),
            "let them except destinations in the pods' network, or name the outgoing interface",
        ),
    }
}

fn ports(config: &RunConfig) -> Finding {
    let wanted = config.healthz.0.iter().chain(&config.metrics.0);
    let taken = wanted
        .filter(|address| TcpListener::bind(address).is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse));
    let taken: Vec<String> = taken.map(ToString::to_string).collect();
    if taken.is_empty() {
        return pass("ports", "those for health and metrics are free");
    }
    warn(
        "ports",
        format!("in use: {}", taken.join(", ")),
        "kube-proxy's or a running Sheave's: Sheave takes them when they are free; else --healthz-bind-address, --metrics-bind-address",
    )
}
