//! Rulesets of kube-proxy's shape, by which netfilter does what kube-proxy has it do.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};

use crate::family::Family;
use crate::netns::Namespace;

/// A ruleset's mark for packets that are to be masqueraded, as kube-proxy has it.
const MASQUERADE: &str = "0x4000";

/// A port of a Service, of one family.
#[derive(Clone, Debug)]
pub struct Port {
    /// What tells its chains from others'.
    pub name: String,
    /// Its ClusterIP and port.
    pub at: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Its nodePort.
    pub node_port: Option<u16>,
    /// Its endpoints, at least one.
    pub endpoints: Vec<SocketAddr>,
}

/// The pods' network: clients in it are not masqueraded.
fn pods(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.244.0.0/16",
        Family::V6 => "fd00:10:244::/48",
    }
}

/// `iptables-restore` input, or `ip6tables-restore`: kube-proxy's iptables mode.
#[must_use]
pub fn iptables(family: Family, ports: &[Port]) -> String {
    let (mut chains, mut rules) = (String::new(), String::new());
    let pods = pods(family);
    for Port { name, at, protocol, node_port, endpoints } in ports {
        let destination = format!("-d {} -p {protocol} -m {protocol} --dport {}", at.ip(), at.port());
        let _ = writeln!(chains, ":KUBE-SVC-{name} - [0:0]");
        let _ = writeln!(
            rules,
            "-A KUBE-SERVICES {destination} -m comment --comment \"{name} cluster IP\" -j KUBE-SVC-{name}\n\
             -A KUBE-SVC-{name} ! -s {pods} {destination} -m comment --comment \"{name} cluster IP\" -j KUBE-MARK-MASQ"
        );
        for (number, endpoint) in endpoints.iter().enumerate() {
            let chain = format!("KUBE-SEP-{name}-{number}");
            let chance = match endpoints.len() - number {
                1 => String::new(),
                left => format!(" -m statistic --mode random --probability {:.10}", 1.0 / f64::from(left as u32)),
            };
            let (_, address) = (writeln!(chains, ":{chain} - [0:0]"), endpoint.ip());
            let _ = writeln!(
                rules,
                "-A KUBE-SVC-{name} -m comment --comment \"{name} -> {endpoint}\"{chance} -j {chain}\n\
                 -A {chain} -s {address} -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
                 -A {chain} -p {protocol} -m comment --comment \"{name}\" -m {protocol} -j DNAT --to-destination {endpoint}"
            );
        }
        if let Some(node_port) = node_port {
            let _ = writeln!(chains, ":KUBE-EXT-{name} - [0:0]");
            let _ = writeln!(
                rules,
                "-A KUBE-NODEPORTS -p {protocol} -m comment --comment \"{name}\" -m {protocol} --dport {node_port} -j KUBE-EXT-{name}\n\
                 -A KUBE-EXT-{name} -m comment --comment \"{name} external\" -j KUBE-MARK-MASQ\n\
                 -A KUBE-EXT-{name} -j KUBE-SVC-{name}"
            );
        }
    }
    format!(
        "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n\
         *filter\n:KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark {MASQUERADE}/{MASQUERADE} -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\nCOMMIT\n\
         *nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE}\n\
         -A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE}/{MASQUERADE} -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE}\n-A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         {rules}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n"
    )
}

/// `nft -f` input: kube-proxy's nftables mode, on a node with this address.
#[must_use]
pub fn nftables(family: Family, ports: &[Port], node: IpAddr) -> String {
    let (ip, kind) = match family {
        Family::V4 => ("ip", "ipv4_addr"),
        Family::V6 => ("ip6", "ipv6_addr"),
    };
    let pods = pods(family);
    let mut chains = String::new();
    let (mut services, mut node_ports, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    for Port { name, at, protocol, node_port, endpoints } in ports {
        let (address, port) = (at.ip(), at.port());
        let mut choices = Vec::new();
        for (number, endpoint) in endpoints.iter().enumerate() {
            let chain = format!("endpoint-{name}-{number}");
            let _ = writeln!(
                chains,
                "chain {chain} {{\n {ip} saddr {} jump mark-for-masquerade\n meta l4proto {protocol} dnat to {endpoint}\n}}",
                endpoint.ip()
            );
            choices.push(format!("{number} : goto {chain}"));
        }
        let _ = writeln!(
            chains,
            "chain service-{name} {{\n {ip} daddr {address} {protocol} dport {port} {ip} saddr != {pods} jump mark-for-masquerade\n \
             numgen random mod {} vmap {{ {} }}\n}}",
            endpoints.len(),
            choices.join(", ")
        );
        if let Some(node_port) = node_port {
            let _ = writeln!(chains, "chain external-{name} {{ jump mark-for-masquerade; goto service-{name}; }}");
            node_ports.push(format!("{protocol} . {node_port} : goto external-{name}"));
        }
        services.push(format!("{address} . {protocol} . {port} : goto service-{name}"));
        if !addresses.contains(&address.to_string()) {
            addresses.push(address.to_string());
        }
    }
    // An empty list of elements is no syntax.
    let elements = |list: &[String]| match list {
        [] => String::new(),
        list => format!("elements = {{ {} }}", list.join(", ")),
    };
    format!(
        "table {ip} kube-proxy {{\nset cluster-ips {{ type {kind}; {} }}\nset nodeport-ips {{ type {kind}; elements = {{ {node} }} }}\n\
         map no-endpoint-services {{ type {kind} . inet_proto . inet_service : verdict; }}\n\
         map no-endpoint-nodeports {{ type inet_proto . inet_service : verdict; }}\n\
         map firewall-ips {{ type {kind} . inet_proto . inet_service : verdict; }}\n\
         chain mark-for-masquerade {{ meta mark set meta mark or {MASQUERADE}; }}\n\
         chain masquerading {{\n meta mark and {MASQUERADE} == 0 return\n meta mark set meta mark xor {MASQUERADE}\n masquerade fully-random\n}}\n\
         chain cluster-ips-check {{ {ip} daddr @cluster-ips reject; }}\n\
         chain firewall-check {{ {ip} daddr . meta l4proto . th dport vmap @firewall-ips; }}\n\
         chain service-endpoints-check {{ {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services; }}\n\
         chain nodeport-endpoints-check {{ {ip} daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }}\n{chains}\
         map service-ips {{ type {kind} . inet_proto . inet_service : verdict; {} }}\n\
         map service-nodeports {{ type inet_proto . inet_service : verdict; {} }}\n\
         chain services {{\n {ip} daddr . meta l4proto . th dport vmap @service-ips\n \
         {ip} daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports\n}}\n\
         chain filter-prerouting-pre-dnat {{ type filter hook prerouting priority dstnat - 10; ct state new jump firewall-check; }}\n\
         chain filter-input {{ type filter hook input priority filter - 10; ct state new jump nodeport-endpoints-check; ct state new jump service-endpoints-check; }}\n\
         chain filter-forward {{ type filter hook forward priority filter - 10; ct state new jump service-endpoints-check; ct state new jump cluster-ips-check; }}\n\
         chain filter-output {{ type filter hook output priority -110; ct state new jump service-endpoints-check; ct state new jump firewall-check; }}\n\
         chain filter-output-post-dnat {{ type filter hook output priority -90; ct state new jump cluster-ips-check; }}\n\
         chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}\n\
         chain nat-output {{ type nat hook output priority -100; jump services; }}\n\
         chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}\n}}\n",
        elements(&addresses),
        elements(&services),
        elements(&node_ports)
    )
}

/// Runs a program in a namespace with this on its standard input.
///
/// # Errors
/// If it fails; with what it said.
pub fn feed(namespace: &Namespace, program: &str, arguments: &[&str], text: &str) -> Result<()> {
    let mut command = namespace.command(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    let written = child.stdin.take().map(|mut input| input.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    let said: String = String::from_utf8_lossy(&output.stderr).chars().take(1_000).collect();
    ensure!(output.status.success() && written.is_some_and(|written| written.is_ok()), "{program}: {said}");
    Ok(())
}
