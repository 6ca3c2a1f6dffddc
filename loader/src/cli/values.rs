//! Parsers of flag values. Each error says what to write instead; clap puts the flag's name in front.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::config::{BindAddresses, Bypass, ConnectMode, DrainForeign, ExternalIps, NodePortAddresses, XdpMode};
use crate::model::desired::Algorithm;

/// How long `--drain` waits if nothing else is said.
const DRAIN: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn connect(text: &str) -> Result<ConnectMode, String> {
    match text {
        "host" => Ok(ConnectMode::Host),
        "tcp" => Ok(ConnectMode::Tcp),
        "all" => Ok(ConnectMode::All),
        "off" => Ok(ConnectMode::Off),
        _ => Err("write host (processes of this node), tcp (and pods' TCP), all, or off".to_owned()),
    }
}

pub(super) fn bypass(text: &str) -> Result<Bypass, String> {
    match text {
        "false" => Ok(Bypass::Off),
        "true" => Ok(Bypass::Safe),
        "force" => Ok(Bypass::Force),
        _ => Err("write true, false, or force (also where that skips rules of others)".to_owned()),
    }
}

pub(super) fn drain_foreign(text: &str) -> Result<DrainForeign, String> {
    match text {
        "auto" => Ok(DrainForeign::Auto),
        "true" => Ok(DrainForeign::On),
        "false" => Ok(DrainForeign::Off),
        time => {
            time_of(time).map(DrainForeign::For).ok_or_else(|| "write auto, true, false, or a time like 2h".to_owned())
        }
    }
}

/// How long connections may take to end; `None` for not draining.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drain(pub(super) Option<Duration>);

pub(super) fn drain(text: &str) -> Result<Drain, String> {
    match text {
        "false" => Ok(Drain(None)),
        "true" => Ok(Drain(Some(DRAIN))),
        time => {
            time_of(time).map(|time| Drain(Some(time))).ok_or_else(|| "write true, false, or a time like 2h".to_owned())
        }
    }
}

fn time_of(text: &str) -> Option<Duration> {
    seconds(text).ok().map(|seconds| Duration::from_secs(seconds.into()))
}

pub(super) fn algorithm(text: &str) -> Result<Algorithm, String> {
    let known = || Algorithm::ALL.map(Algorithm::name).join(", ");
    Algorithm::from_name(text).ok_or_else(|| format!("write one of {}", known()))
}

pub(super) fn xdp(text: &str) -> Result<XdpMode, String> {
    match text {
        "auto" => Ok(XdpMode::Auto),
        "native" => Ok(XdpMode::Native),
        "generic" => Ok(XdpMode::Generic),
        "off" => Ok(XdpMode::Off),
        _ => Err("write auto (native where the driver has it), native, generic, or off".to_owned()),
    }
}

pub(super) fn nodeport_addresses(text: &str) -> Result<NodePortAddresses, String> {
    match text {
        "primary" => Ok(NodePortAddresses::Primary),
        "all" => Ok(NodePortAddresses::All),
        list => networks(list, "primary, all").map(NodePortAddresses::Networks),
    }
}

pub(super) fn external_ips(text: &str) -> Result<ExternalIps, String> {
    match text {
        "true" => Ok(ExternalIps::All),
        "false" => Ok(ExternalIps::None),
        list => networks(list, "true, false").map(ExternalIps::Networks),
    }
}

/// A list of networks; `others` is what might be written instead.
fn networks(text: &str, others: &str) -> Result<Vec<(IpAddr, u8)>, String> {
    text.split(',').map(|text| network(text, others)).collect()
}

fn network(text: &str, others: &str) -> Result<(IpAddr, u8), String> {
    let remedy = || format!("`{text}` is no network: write {others}, or networks like 192.168.0.0/16,fd00::/8");
    let (address, length) = text.trim().split_once('/').ok_or_else(remedy)?;
    let address: IpAddr = address.parse().map_err(|_| remedy())?;
    let length: u8 = length.parse().map_err(|_| remedy())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if length > longest { Err(remedy()) } else { Ok((address, length)) }
}

/// Addresses with ports, or nothing.
pub(super) fn bind_addresses(text: &str) -> Result<BindAddresses, String> {
    let address = |text: &str| {
        let remedy =
            || format!("`{text}` is no address with a port: write some like 0.0.0.0:10256,[::]:10256, or \"\"");
        text.trim().parse::<SocketAddr>().map_err(|_| remedy())
    };
    if text.trim().is_empty() {
        return Ok(BindAddresses::default());
    }
    text.split(',').map(address).collect::<Result<_, _>>().map(BindAddresses)
}

pub(super) fn ports(text: &str) -> Result<(u16, u16), String> {
    let remedy = || "write two ports, FIRST-LAST, both from 1024 to 65535, like 10000-29999".to_owned();
    let (first, last) = text.split_once('-').ok_or_else(remedy)?;
    let (first, last): (u16, u16) =
        (first.trim().parse().map_err(|_| remedy())?, last.trim().parse().map_err(|_| remedy())?);
    if first < 1024 || last < first { Err(remedy()) } else { Ok((first, last)) }
}

/// Whole seconds, or a number with s, m, h or d.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    let remedy = || "write a time of at least one second, like 90, 90s, 5m, 24h or 2d".to_owned();
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(remedy()),
    };
    let number: u32 = number.parse().map_err(|_| remedy())?;
    number.checked_mul(factor).filter(|seconds| *seconds > 0).ok_or_else(remedy)
}

/// How often something is done; 0 for never.
pub(super) fn period(text: &str) -> Result<Period, String> {
    if text == "0" {
        return Ok(Period(None));
    }
    let remedy = |_| "write a time of at least one second, like 90, 90s, 5m, 24h or 2d, or 0 for never".to_owned();
    let seconds = seconds(text).map_err(remedy)?;
    Ok(Period(Some(Duration::from_secs(seconds.into()))))
}

/// See [`period`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Period(pub(super) Option<Duration>);

/// A name pattern of interfaces.
pub(super) fn pattern(text: &str) -> Result<String, String> {
    let valid = !text.is_empty() && !text.contains(['/', ' ', ':']);
    if valid { Ok(text.to_owned()) } else { Err("write an interface name, or a pattern like cali*".to_owned()) }
}
