//! The screen.

use anstyle::Style;

use super::{Daemon, Dataplane, Status};
use crate::cli::output::{BAD, GOOD, TITLE, titled};
use crate::cli::views::align;

/// From here on, a map is shown as nearly full.
const NEARLY_FULL: f64 = 0.9;

impl Status {
    /// For people; `wide` names the maps that are empty, too.
    pub(in crate::cli) fn text(&self, wide: bool) -> String {
        let mut text = format!(
            "{TITLE}Sheave {}{TITLE:#} (map layout {}), Linux {}\n",
            self.version, self.map_layout, self.kernel
        );
        text += &line("daemon", &self.daemon.text());
        if let Some(version) = self.daemon.version.as_deref().filter(|version| *version != self.version) {
            text += &line("", &paint(BAD, &format!("it is another version: {version}")));
        }
        if let Some(audit) = self.daemon.audit() {
            text += &line("audit", &audit);
        }
        text += &line("pins", &self.pins.display().to_string());
        match (&self.dataplane, &self.error) {
            (Some(dataplane), _) => text += &dataplane.text(wide),
            (None, Some(error)) => text += &line("dataplane", &paint(BAD, error)),
            (None, None) => {}
        }
        text
    }
}

impl Daemon {
    fn text(&self) -> String {
        if !self.running {
            let why = self.error.as_deref().unwrap_or_default();
            return format!("{} ({why}); programs and maps go on without it", paint(BAD, "not running"));
        }
        let mut text = match (self.healthy, self.node_eligible) {
            (true, _) => paint(GOOD, "healthy"),
            (false, Some(false)) => paint(BAD, "not healthy: this node is leaving the cluster"),
            (false, _) => paint(BAD, "not healthy: see its log, and /healthz"),
        };
        match (self.unapplied_seconds, self.sync_age_seconds) {
            (Some(waited), _) if waited > 1.0 => text += &format!("; a change has waited for {waited:.0} s"),
            (_, Some(age)) => text += &format!("; everything was last applied {} ago", time(age)),
            _ => {}
        }
        text
    }
}

impl Daemon {
    /// What audits have found; `None` before the first one.
    fn audit(&self) -> Option<String> {
        let mut text = format!("{} ago: ", time(self.audit_age_seconds?));
        text += &match self.audit_unrepaired {
            Some(1..) => paint(BAD, "not everything could be repaired, see the daemon's log"),
            _ => paint(GOOD, "as it should be"),
        };
        if let Some(found @ 1..) = self.audit_findings {
            text += &format!("; {found} found and repaired since the daemon's start, see its log");
        }
        Some(text)
    }
}

impl Dataplane {
    fn text(&self, wide: bool) -> String {
        let programs: Vec<String> = self.programs.iter().map(|(hook, number)| format!("{number} {hook}")).collect();
        let mut mode = format!("--connect {}, tc by {}", self.connect, self.tc);
        for (set, what) in [(self.bypass, "flows may bypass netfilter"), (self.drain_foreign, "foreign flows drain")] {
            if set {
                mode += &format!(", {what}");
            }
        }
        let mut text = line("mode", &mode);
        text += &line("programs", &programs.join(", "));
        let numbers = (self.service_ports, self.frontends, self.backends);
        text +=
            &line("services", &format!("{} service ports, {} frontends, {} backends", numbers.0, numbers.1, numbers.2));
        let flows: Vec<String> =
            self.flows.iter().map(|flows| format!("{} {} {}", flows.flows, flows.protocol, flows.state)).collect();
        text += &line("flows", &if flows.is_empty() { "none".to_owned() } else { flows.join(", ") });
        let failovers = self.syn_failovers.map_or_else(|| "off".to_owned(), |syns| format!("{syns} SYNs"));
        text += &line("failover", &failovers);

        let interfaces = self.interfaces.iter().map(|interface| {
            let xdp = if interface.xdp { "yes" } else { "no" };
            vec![interface.name.clone(), interface.index.to_string(), interface.role.to_owned(), xdp.to_owned()]
        });
        text += &table(&["INTERFACE", "INDEX", "ROLE", "XDP"], interfaces);
        let maps = self.maps.iter().filter(|map| wide || map.entries > 0).map(|map| {
            let part = map.entries as f64 / f64::from(map.capacity.max(1));
            let full = format!("{:.1} %{}", part * 100.0, if part >= NEARLY_FULL { " (nearly full)" } else { "" });
            vec![map.map.to_owned(), map.entries.to_string(), map.capacity.to_string(), full]
        });
        text += &table(&["MAP", "ENTRIES", "CAPACITY", "FULL"], maps);
        let drops = self.drops.iter().map(|(reason, packets)| vec![(*reason).to_owned(), packets.to_string()]);
        text += &table(&["DROPPED OR REJECTED", "PACKETS"], drops);
        text
    }
}

fn table(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut lines = vec![titles.iter().map(|title| (*title).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows);
    if lines.len() == 1 {
        lines.push(vec!["(none)".to_owned()]);
    }
    format!("\n{}", titled(&align(&lines)))
}

fn line(name: &str, text: &str) -> String {
    format!("{name:<10} {text}\n")
}

fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

fn time(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3_600),
    }
}
