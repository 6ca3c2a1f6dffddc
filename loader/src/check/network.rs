//! How packets travel on this node.

use super::{Finding, Findings, Node, fail, pass, sysctl, warn};
use crate::interfaces::{Interface, Role};

pub(super) fn findings(node: &Node) -> Findings {
    let mut findings = roles(node);
    findings.extend(["ipv4", "ipv6"].iter().filter_map(|family| forwarding(node, family)));
    findings.push(reverse_path(node));
    findings.extend(bridges(node));
    findings.push(widths(node));
    findings
}

fn of(node: &Node, role: Role) -> impl Iterator<Item = &Interface> {
    node.interfaces.iter().filter(move |interface| interface.role == role)
}

fn names<'a>(interfaces: impl Iterator<Item = &'a Interface>) -> String {
    interfaces.map(|interface| interface.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn roles(node: &Node) -> Findings {
    let flags = "name them with --uplink-interfaces, --tunnel-interfaces, --pod-interfaces or --ignore-interfaces";
    let line = |(role, kind): (Role, &str)| match names(of(node, role)) {
        none if none.is_empty() && role == Role::Uplink => {
            warn("interfaces", "no uplink: clients outside are not served", flags)
        }
        none if none.is_empty() => pass("interfaces", format!("{kind}: none")),
        names => pass("interfaces", format!("{kind}: {names}")),
    };
    [(Role::Uplink, "uplinks"), (Role::Tunnel, "tunnels"), (Role::Pod, "pods")].map(line).into()
}

/// `None` for a family that this node has no addresses of.
fn forwarding(node: &Node, family: &str) -> Option<Finding> {
    let ipv4 = family == "ipv4";
    let used = node.interfaces.iter().any(|one| if ipv4 { one.source4.is_some() } else { one.source6.is_some() });
    if !used {
        return None;
    }
    let all = if ipv4 { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
    let remedy = |settings: &[String]| format!("sysctl -w {}", settings.join(" "));
    let setting = |name: &str| format!("{}=1", name.replace('/', "."));
    if sysctl(all).as_deref() != Some("1") {
        let found = format!("{} is off: this node forwards nothing", all.replace('/', "."));
        return Some(fail("forwarding", found, remedy(&[setting(all)])));
    }
    let own = |interface: &&Interface| format!("net/{family}/conf/{}/forwarding", interface.name);
    let off: Vec<&Interface> = node.interfaces.iter().filter(|one| sysctl(&own(one)).as_deref() == Some("0")).collect();
    if off.is_empty() {
        return Some(pass("forwarding", format!("{family}: on, at every interface")));
    }
    let found = format!(
        "{family} is not forwarded at {}: routes are refused to packets from there",
        names(off.iter().copied())
    );
    // A dot in an interface's name would be taken for a slash.
    let settings: Vec<String> = off.iter().map(|one| format!("{}=1", own(one))).collect();
    Some(fail("forwarding", found, remedy(&settings)))
}

/// Answers may come by another interface than the one that a route back would take.
fn reverse_path(node: &Node) -> Finding {
    let outward: Vec<&Interface> = node.interfaces.iter().filter(|one| one.role != Role::Pod).collect();
    let value = |name: &str| sysctl(&format!("net/ipv4/conf/{name}/rp_filter")).and_then(|text| text.parse().ok());
    let all: u8 = value("all").unwrap_or(0);
    let strict = |one: &&&Interface| value(&one.name).unwrap_or(0).max(all) == 1;
    let strict: Vec<&Interface> = outward.iter().filter(strict).copied().collect();
    if strict.is_empty() || outward.len() < 2 {
        return pass("rp_filter", "answers are accepted whatever interface they come by");
    }
    let settings: Vec<String> = strict.iter().map(|one| format!("net/ipv4/conf/{}/rp_filter=2", one.name)).collect();
    warn(
        "rp_filter",
        format!("strict at {}: what comes by another way than the route back is dropped", names(strict.into_iter())),
        format!("sysctl -w {}{}", if all == 1 { "net/ipv4/conf/all/rp_filter=0 " } else { "" }, settings.join(" ")),
    )
}

/// Whether netfilter sees what two pods of one bridge send each other. `None` without bridged pods.
fn bridges(node: &Node) -> Option<Finding> {
    let bridged =
        |one: &&Interface| node.listing.links.iter().any(|link| link.index == one.index && link.controller.is_some());
    let bridged = names(of(node, Role::Pod).filter(bridged));
    if bridged.is_empty() {
        return None;
    }
    let settings = ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"];
    let off: Vec<String> = settings
        .iter()
        .filter(|name| sysctl(name).as_deref() != Some("1"))
        .map(|name| format!("{}=1", name.replace('/', ".")))
        .collect();
    if off.is_empty() {
        return Some(pass("bridge-nf", "netfilter sees the packets between pods of one bridge"));
    }
    Some(warn(
        "bridge-nf",
        format!(
            "netfilter sees only one direction of connections between bridged pods ({bridged}): a rule that drops INVALID breaks them"
        ),
        format!("modprobe br_netfilter; sysctl -w {}", off.join(" ")),
    ))
}

/// Octets that a tunnel adds to each packet.
fn overhead(kind: &str) -> u32 {
    match kind {
        "vxlan" | "geneve" | "bareudp" => 50,
        "wireguard" => 60,
        "ipip" | "sit" => 20,
        _ => 24,
    }
}

fn widths(node: &Node) -> Finding {
    let mtu = |one: &Interface| node.details(one.index).map_or(0, |details| details.mtu);
    let Some(uplink) = of(node, Role::Uplink).map(mtu).min() else { return pass("mtu", "no uplink to compare with") };
    for tunnel in of(node, Role::Tunnel) {
        let kind =
            node.listing.links.iter().find(|link| link.index == tunnel.index).and_then(|link| link.kind.as_deref());
        let room = uplink.saturating_sub(overhead(kind.unwrap_or_default()));
        if mtu(tunnel) > room {
            let found =
                format!("{} takes packets of {}, the uplink {uplink}, header included", tunnel.name, mtu(tunnel));
            return warn("mtu", found, format!("ip link set {} mtu {room}, or the CNI's MTU", tunnel.name));
        }
    }
    let wide = of(node, Role::Pod).filter(|pod| of(node, Role::Tunnel).any(|tunnel| mtu(pod) > mtu(tunnel)));
    match names(wide) {
        none if none.is_empty() => pass("mtu", format!("uplink {uplink}, and nothing wider behind it")),
        wide => warn(
            "mtu",
            format!("pods send larger packets than the tunnel takes: {wide}"),
            "set the CNI's MTU; until then large packets wait for path-MTU discovery",
        ),
    }
}
