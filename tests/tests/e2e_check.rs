//! `sheave check`: what is in Sheave's way on a node is named, with what to do about it.

use std::net::TcpListener;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sheave_tests::family::Family;
use sheave_tests::kube_proxy::{self, feed};
use sheave_tests::process::built;
use sheave_tests::topology::{Cluster, Node, NodeNetwork, Shape};
use sheave_tests::wire::XdpPass;

const ARGUMENTS: &[&str] = &["check", "-o", "json", "--manifests", "/etc/sheave"];

/// What a check says on a node, and whether the command succeeded.
fn check(mut command: Command, arguments: &[&str]) -> Result<(bool, Vec<Value>)> {
    let output = command
        .args(ARGUMENTS)
        .args(arguments)
        .env("SHEAVE_PIN_PATH", "/sys/fs/bpf/sheave-check")
        .output()
        .context("cannot run sheave check")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    let findings = serde_json::from_str(&text).with_context(|| format!("not JSON: {text}{said}"))?;
    Ok((output.status.success(), findings))
}

/// Fails unless one of a check's findings has this verdict and says this.
fn expect(node: &Node, arguments: &[&str], verdict: &str, name: &str, words: &str) -> Result<()> {
    let (succeeded, findings) = check(node.namespace.command(built("sheave")?), arguments)?;
    let said = |finding: &Value| finding["found"].as_str().is_some_and(|found| found.contains(words));
    let found =
        findings.iter().find(|finding| finding["check"] == name && finding["verdict"] == verdict && said(finding));
    let found = found.with_context(|| format!("no {verdict} of {name} that says {words:?}: {findings:#?}"))?;
    ensure!((verdict == "pass") == found["remedy"].is_null(), "a remedy, or none: {found}");
    ensure!(succeeded == findings.iter().all(|finding| finding["verdict"] != "fail"), "exit code: {findings:#?}");
    Ok(())
}

/// Runs a command on the node that breaks something, checks, and has it mended by another.
fn defect(node: &Node, does: [&str; 2], verdict: &str, name: &str, words: &str) -> Result<()> {
    node.namespace.output("sh", &["-c", does[0]])?;
    expect(node, &[], verdict, name, words).with_context(|| does[0].to_owned())?;
    node.namespace.output("sh", &["-c", does[1]]).map(drop)
}

#[test]
fn every_defect_of_a_node_is_named_with_its_remedy() -> Result<()> {
    let cluster = Cluster::build(Shape { nodes: NodeNetwork::Vxlan, pod_counts: [2, 0], ..Shape::default() })?;
    let node = &cluster.nodes[0];
    let (succeeded, findings) = check(node.namespace.command(built("sheave")?), &[])?;
    let wrong = findings.iter().find(|finding| finding["verdict"] == "fail");
    ensure!(succeeded && wrong.is_none(), "a good node: {wrong:?}");
    for (name, words) in [
        ("interfaces", "uplinks: eth0"),
        ("interfaces", "tunnels: flannel.1, flannel-v6.1"),
        ("interfaces", "pods: veth1, veth2"),
        ("kube-proxy", "not here"),
        ("ports", "free"),
        ("mtu", "uplink 1500"),
        ("programs", "no others"),
        ("forward-rules", "none"),
        ("masquerade", "no rule"),
    ] {
        expect(node, &[], "pass", name, words)?;
    }

    for (file, verdict, name, words) in [
        ("ipv4/ip_forward", "fail", "forwarding", "net.ipv4.ip_forward is off"),
        ("ipv6/conf/all/forwarding", "fail", "forwarding", "net.ipv6.conf.all.forwarding is off"),
        ("ipv4/conf/veth1/forwarding", "fail", "forwarding", "ipv4 is not forwarded at veth1:"),
        ("bridge/bridge-nf-call-iptables", "warn", "bridge-nf", "veth1, veth2"),
    ] {
        let does = [0, 1].map(|value| format!("echo {value} > /proc/sys/net/{file}"));
        defect(node, [&does[0], &does[1]], verdict, name, words)?;
    }
    let strict = [1, 0].map(|value| format!("echo {value} > /proc/sys/net/ipv4/conf/flannel.1/rp_filter"));
    defect(node, [&strict[0], &strict[1]], "warn", "rp_filter", "strict at flannel.1")?;
    let wide = ["ip link set eth0 mtu 1460", "ip link set eth0 mtu 1500"];
    defect(node, wide, "warn", "mtu", "flannel.1 takes packets of 1450")?;
    let wide = ["ip link set veth2 mtu 1500", "ip link set veth2 mtu 1430"];
    defect(node, wide, "warn", "mtu", "than the tunnel takes: veth2")?;
    let filter = [
        "nft 'add table inet fw; add chain inet fw f { type filter hook forward priority 0; policy drop; }'",
        "nft delete table inet fw",
    ];
    defect(node, filter, "warn", "forward-rules", "chain f of table inet fw (policy drop)")?;
    node.namespace.output("sh", &["-c", filter[0]])?;
    expect(node, &["--bypass-netfilter"], "fail", "forward-rules", "chain f of table inet fw")?;
    node.namespace.output("sh", &["-c", filter[1]])?;
    let masquerade = |how: &str| {
        format!(
            "nft 'add table ip cni; add chain ip cni post {{ type nat hook postrouting priority 100; }}; add rule ip cni post {how} masquerade'"
        )
    };
    for (how, verdict, words) in [
        ("ip saddr 10.244.0.0/16", "warn", "chain post of table ip cni"),
        ("ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4", "warn", "chain post of table ip cni"),
        ("ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16", "pass", "no rule"),
        ("oifname eth0", "pass", "no rule"),
    ] {
        defect(node, [&masquerade(how), "nft delete table ip cni"], verdict, "masquerade", words)?;
    }
    for family in Family::BOTH {
        let ip = if family == Family::V4 { "ip" } else { "ip6" };
        feed(&node.namespace, "nft", &["-f", "-"], &kube_proxy::nftables(family, &[], node.address_of(family)))?;
        expect(node, &[], "warn", "kube-proxy", &format!("table {ip} kube-proxy"))?;
    }
    node.namespace.output("nft", &["flush ruleset"])?;
    for (tool, words) in [
        ("iptables-nft-restore", "chains KUBE-… of table ip nat"),
        ("iptables-legacy-restore", "chains KUBE-… of table ip nat (iptables-legacy)"),
    ] {
        feed(&node.namespace, tool, &[], &kube_proxy::iptables(Family::V4, &[]))?;
        expect(node, &[], "warn", "kube-proxy", words)?;
        expect(node, &[], "pass", "masquerade", "no rule")?;
        node.namespace.output("nft", &["flush ruleset"])?;
    }
    {
        let _listener = node.namespace.run(|| TcpListener::bind("0.0.0.0:10256"))?;
        expect(node, &[], "warn", "ports", "0.0.0.0:10256")?;
    }
    {
        let _program = XdpPass::attach(&node.namespace, "eth0")?;
        expect(node, &[], "warn", "programs", "eth0 has the XDP program")?;
        expect(node, &["--xdp", "native"], "fail", "programs", "eth0 has the XDP program")?;
        expect(node, &["--xdp", "off"], "pass", "programs", "no others")?;
    }
    expect(node, &["--pin-path", "/tmp/sheave"], "fail", "bpffs", "/tmp/sheave")?;
    expect(node, &["--cgroup", "/tmp"], "fail", "cgroup", "/tmp")?;
    expect(node, &["--uplink-interfaces", "veth2"], "pass", "interfaces", "uplinks: eth0, veth2")?;

    let mut poor = node.namespace.command("setpriv");
    poor.arg("--bounding-set=-sys_admin,-bpf").arg(built("sheave")?);
    let (succeeded, findings) = check(poor, &[])?;
    let missing = findings.iter().find(|finding| finding["check"] == "capabilities").context("no such check")?;
    ensure!(!succeeded && missing["found"] == "CAP_BPF is missing", "{missing:#}");
    Ok(())
}
