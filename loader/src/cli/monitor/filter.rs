//! Which events are shown: those that meet every filter that is given, and one of its values.

use std::net::IpAddr;

use clap::Args;
use sheave_common::DropReason;

use super::happening::Happening;
use crate::cli::views::is_of;

/// Filters of `sheave monitor`. Several values of one are alternatives.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct FilterArgs {
    /// Only this Service: namespace/name, or namespace/name:port.
    #[arg(long, env = "SHEAVE_SERVICE", value_name = "SERVICE", value_delimiter = ',')]
    service: Vec<String>,
    /// Only Services of this namespace.
    #[arg(long, env = "SHEAVE_NAMESPACE", value_name = "NAMESPACE", value_delimiter = ',')]
    namespace: Vec<String>,
    /// Only with this address as client, destination or backend.
    #[arg(long, env = "SHEAVE_ADDRESS", value_name = "ADDRESS", value_delimiter = ',')]
    address: Vec<IpAddr>,
    /// Only with one of these ports as client's, destination's or backend's.
    // Not `--port`: Kubernetes sets SHEAVE_PORT where a Service is called sheave.
    #[arg(long, env = "SHEAVE_PORTS", value_name = "PORT", value_delimiter = ',')]
    ports: Vec<u16>,
    /// Only this protocol.
    #[arg(long, env = "SHEAVE_PROTOCOL", value_name = "PROTOCOL", value_delimiter = ',', value_parser = ["tcp", "udp", "sctp"])]
    protocol: Vec<String>,
    /// Only what was dropped for this reason; the names are those of the metric `sheave_drops_total`.
    #[arg(long, env = "SHEAVE_REASON", value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    reason: Vec<String>,
    /// Only flows that begin, flows that end, SYNs that leave a backend which hasn't answered, or packets that don't get through.
    #[arg(long, env = "SHEAVE_EVENT", value_name = "EVENT", value_delimiter = ',', value_parser = ["new", "end", "failover", "drop"])]
    event: Vec<String>,
}

fn reason(text: &str) -> Result<String, String> {
    let names: Vec<&str> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
    if names.contains(&text) { Ok(text.to_owned()) } else { Err(format!("write one of {}", names.join(", "))) }
}

impl FilterArgs {
    /// Whether to show it.
    pub(super) fn wants(&self, happening: &Happening) -> bool {
        fn one<T>(wanted: &[T], is: impl FnMut(&T) -> bool) -> bool {
            wanted.is_empty() || wanted.iter().any(is)
        }
        let service = happening.service.as_deref().unwrap_or_default();
        let namespace = service.split('/').next().unwrap_or_default();
        let ends = [happening.client, Some(happening.destination), happening.backend, happening.snat];
        let ends = || ends.iter().flatten();
        one(&self.service, |wanted| is_of(service, wanted))
            && one(&self.namespace, |wanted| namespace == wanted)
            && one(&self.address, |wanted| ends().any(|end| end.ip() == *wanted))
            && one(&self.ports, |wanted| ends().any(|end| end.port() == *wanted))
            && one(&self.protocol, |wanted| happening.protocol.eq_ignore_ascii_case(wanted))
            && one(&self.reason, |wanted| happening.reason == Some(wanted))
            && one(&self.event, |wanted| happening.event == wanted)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use sheave_common::event::{Event, kind};

    use super::super::happening::tests::event;
    use super::super::known::Known;
    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        filter: FilterArgs,
    }

    #[test]
    fn every_filter_must_be_met_by_one_of_its_values() {
        let mut known = Known::of(&[(7, "default/web:http")], &[("10.96.0.1:80", 7)]);
        let new = Happening::new(&event(kind::NEW), &mut known).unwrap();
        let reason = DropReason::NoEndpoint as u8;
        let dropped = Happening::new(&Event { service_id: 0, reason, ..event(kind::DROP) }, &mut known).unwrap();
        for (flags, shown) in [
            ("", (true, true)),
            ("--service=default/web", (true, true)),
            ("--service=default/web:http --event=drop", (false, true)),
            ("--service=default/we", (false, false)),
            ("--namespace=kube-system,default", (true, true)),
            ("--namespace=kube-system", (false, false)),
            ("--address=10.0.0.2", (true, false)),
            ("--address=10.0.0.1 --ports=80", (true, true)),
            ("--ports=8080,81", (true, false)),
            ("--protocol=udp", (false, false)),
            ("--protocol=tcp --event=new,end", (true, false)),
            ("--reason=no_endpoint", (false, true)),
            ("--reason=no_flow", (false, false)),
        ] {
            let line = Line::parse_from(["monitor"].into_iter().chain(flags.split_whitespace()));
            assert_eq!((line.filter.wants(&new), line.filter.wants(&dropped)), shown, "{flags}");
        }
        assert!(Line::try_parse_from(["monitor", "--reason=nonsense"]).is_err());
    }
}
