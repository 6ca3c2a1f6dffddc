//! `sheave trace`: what would become of a packet, and why. [`Trial`] has the real program decide on the live maps, without a side
//! effect; [`frame`] makes the packet, [`place`] finds where it would come in, [`story`] says what happened.

mod frame;
mod place;
mod story;

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;

use clap::Args;

use super::output::{OutputArgs, OutputError};
use super::views::{ReadError, ViewError, open};
use super::{DISAPPOINTED, PinArgs};
use crate::dataplane::{MapError, Trial, TrialError};
use crate::interfaces::InterfaceError;
use crate::model::desired::Protocol;
use story::Story;

/// The client's port, if none is given.
const CLIENT_PORT: u16 = 40_000;

/// Why nothing can be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The pinned maps can't be read.
    #[error(transparent)]
    View(#[from] ViewError),
    /// The program can't be tried.
    #[error(transparent)]
    Trial(#[from] TrialError),
    /// Interfaces can't be listed.
    #[error(transparent)]
    Interfaces(#[from] InterfaceError),
    /// It can't be shown.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The runtime for asking the kernel.
    #[error("cannot start a runtime")]
    Runtime(#[source] std::io::Error),
    /// A process of this node.
    #[error(
        "{0} is an address of this node: its processes' sockets are pointed at a backend when they connect, which can't be \
         tried. `sheave services` shows what they reach; --interface traces the packet as if it came in there"
    )]
    Own(IpAddr),
    /// An interface that doesn't exist or has no programs.
    #[error("{wanted}: Sheave is not attached to it; give --interface, one of: {known}")]
    Interface {
        /// What was given or found.
        wanted: String,
        /// Those that could be given.
        known: String,
    },
}

impl From<MapError> for TraceError {
    fn from(error: MapError) -> Self {
        Self::View(ReadError::Map(error).into())
    }
}

/// Flags of `sheave trace`.
#[derive(Clone, Debug, Args)]
pub struct TraceArgs {
    #[command(flatten)]
    pins: PinArgs,
    #[command(flatten)]
    output: OutputArgs,
    /// The client: ADDRESS, ADDRESS:PORT or [ADDRESS]:PORT.
    #[arg(long, env = "SHEAVE_FROM", value_name = "ADDRESS[:PORT]", value_parser = client)]
    from: SocketAddr,
    /// Where to: ADDRESS:PORT, with /udp or /sctp if it isn't TCP.
    #[arg(long, env = "SHEAVE_TO", value_name = "ADDRESS:PORT[/PROTOCOL]", value_parser = target)]
    to: (SocketAddr, Protocol),
    /// Where the packet comes in: a pod's veth on this node's side, or an uplink [default: as the client is routed].
    #[arg(long, env = "SHEAVE_INTERFACE", value_name = "NAME")]
    interface: Option<String>,
}

fn client(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, CLIENT_PORT));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "write an address like 10.244.1.5, 10.244.1.5:40000 or [fd00::5]:40000".to_owned())
}

fn target(text: &str) -> Result<(SocketAddr, Protocol), String> {
    let (address, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return Err(format!("`{protocol}` is no protocol: write tcp, udp or sctp")),
    };
    let address = address.parse().map_err(|_| "write an address with a port, like 10.96.0.10:53/udp".to_owned())?;
    Ok((address, protocol))
}

/// `sheave trace`. Unless the packet reaches a backend, the exit code says so.
///
/// # Errors
///
/// If the packet can't be tried.
pub fn trace(args: &TraceArgs) -> Result<ExitCode, TraceError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(TraceError::Runtime)?;
    let (to, protocol) = args.to;
    let mut served = false;
    args.output.show(|| {
        let pins = &args.pins.pin_path;
        let maps = open(pins).map_err(ViewError::from)?;
        let place = runtime.block_on(place::find(&maps, args.from.ip(), args.interface.as_deref()))?;
        let protocol = protocol.number();
        let frame = frame::build(place.hardware_address, protocol, args.from, to);
        let trial = Trial { from: args.from, to, protocol, index: place.index, frame };
        let outcome = trial.run(pins)?;
        let story = Story::new(&maps, &place, &trial, &outcome)?;
        served = story.is_served();
        Ok::<_, TraceError>(args.output.format(&story, |_| story.text())?)
    })?;
    Ok(if served { ExitCode::SUCCESS } else { ExitCode::from(DISAPPOINTED) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_written_as_people_write_them() {
        assert_eq!(client("10.244.1.5"), Ok("10.244.1.5:40000".parse().unwrap()));
        assert_eq!(client("fd00::5"), Ok("[fd00::5]:40000".parse().unwrap()));
        assert_eq!(client("[fd00::5]:7"), Ok("[fd00::5]:7".parse().unwrap()));
        assert!(client("web").is_err());
        assert_eq!(target("10.96.0.10:53/udp"), Ok(("10.96.0.10:53".parse().unwrap(), Protocol::Udp)));
        assert_eq!(target("[fd00::5]:80"), Ok(("[fd00::5]:80".parse().unwrap(), Protocol::Tcp)));
        assert!(target("10.96.0.10").unwrap_err().contains("10.96.0.10:53/udp"));
        assert!(target("10.96.0.10:53/icmp").unwrap_err().contains("tcp, udp or sctp"));
    }
}
