//! What became of the packet, and why.

use std::net::SocketAddr;

use serde::Serialize;
use sheave_common::DropReason;
use sheave_common::flow::flags;
use sheave_common::frontend::flags as frontend_flags;

use super::frame::{self, Headers};
use super::place::Place;
use crate::cli::output::{BAD, GOOD, TITLE};
use crate::cli::views::protocol_name;
use crate::dataplane::{MapError, PinnedMaps, Trial, TrialOutcome};

/// tc's "next program" (TC_ACT_UNSPEC) and "drop" (TC_ACT_SHOT). The others are redirects.
const NEXT: i32 = -1;
const SHOT: i32 = 2;

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    /// Translated, and up to this node's stack.
    Translated,
    /// Translated, and sent on without the stack.
    Forwarded,
    /// Rejected or reset: an answer goes back.
    Rejected,
    /// Dropped silently.
    Dropped,
    /// None of Sheave's business.
    Untouched,
}

/// All that is told.
#[derive(Debug, Serialize)]
pub(super) struct Story {
    verdict: Verdict,
    protocol: String,
    from: SocketAddr,
    to: SocketAddr,
    interface: String,
    service: Option<String>,
    backend: Option<SocketAddr>,
    /// Source and destination that the backend gets.
    rewritten: Option<(SocketAddr, SocketAddr)>,
    reasons: Vec<&'static str>,
    /// Why, a sentence each.
    why: Vec<String>,
}

impl Story {
    pub(super) fn new(
        maps: &PinnedMaps,
        place: &Place,
        trial: &Trial,
        outcome: &TrialOutcome,
    ) -> Result<Self, MapError> {
        let out = frame::read(&outcome.frame);
        let verdict = verdict(trial, outcome, out.as_ref());
        let flow = outcome.flow.filter(|_| matches!(verdict, Verdict::Translated | Verdict::Forwarded));
        let id = flow.map(|flow| flow.service_id).or(outcome.frontend.map(|frontend| frontend.service_id));
        let names = maps.service_names()?;
        let name = id.and_then(|id| names.iter().find(|(known, _)| *known == id));
        let mut story = Self {
            verdict,
            protocol: protocol_name(trial.protocol),
            from: trial.from,
            to: trial.to,
            interface: place.name.clone(),
            service: name.and_then(|(_, name)| name.as_str()).map(str::to_owned),
            backend: flow.map(|flow| flow.destination),
            rewritten: out.filter(|_| flow.is_some()).map(|out| (out.source, out.destination)),
            reasons: outcome.reasons.iter().map(|reason| reason.name()).collect(),
            why: Vec::new(),
        };
        story.explain(place, outcome);
        Ok(story)
    }

    pub(super) fn is_served(&self) -> bool {
        self.backend.is_some()
    }

    fn explain(&mut self, place: &Place, outcome: &TrialOutcome) {
        let mut say = |text: String| self.why.push(text);
        let role = if outcome.inside { "a pod" } else { "outside" };
        match &place.guess {
            Some(guess) => say(format!("comes in from {role} by {}: {guess}", place.name)),
            None => say(format!("comes in from {role} by {}", place.name)),
        }
        if let Some(frontend) = outcome.frontend {
            say(format!("{} is {}", self.to, kinds(frontend.flags)));
            if frontend.flags & frontend_flags::SOURCE_RANGES != 0 {
                let refused = outcome.reasons.contains(&DropReason::SourceRange);
                let whether = if refused { "not among" } else { "among" };
                say(format!("the client is {whether} the Service's loadBalancerSourceRanges"));
            }
            let flag = if outcome.inside { frontend_flags::INTERNAL_LOCAL } else { frontend_flags::EXTERNAL_LOCAL };
            let local = frontend.flags & flag != 0;
            let set = if local { frontend.local } else { frontend.cluster };
            let (policy, place) = if local { ("Local", " on this node") } else { ("Cluster", "") };
            say(format!("traffic policy {policy}: of {} elements in the set of endpoints{place}", set.length));
        }
        match outcome.flow {
            Some(flow) if !flow.new => say("its flow is known: the backend was chosen before".to_owned()),
            Some(flow) => match outcome.remembered {
                Some((id, _)) if id == flow.backend_id => say("session affinity: the client's last backend".to_owned()),
                Some(_) => {
                    say("session affinity: the client's last backend is not usable any more; a fresh choice".to_owned());
                }
                None => say("a new connection: the choice differs from time to time, unless by Maglev".to_owned()),
            },
            None => {}
        }
        if let Some(flow) = outcome.flow {
            if flow.flags & flags::HAIRPIN != 0 {
                say("the pod is its own backend: the packet is turned round, under another source".to_owned());
            } else if flow.flags & flags::BYPASS != 0 {
                say("straight into the pod, past netfilter (taken to be on, because it has been)".to_owned());
            } else if flow.flags & flags::REDIRECT != 0 {
                say("the backend is on another node and the client outside: SNAT, so that replies come back here"
                    .to_owned());
            }
        }
        for reason in &outcome.reasons {
            say(because(*reason).to_owned());
        }
        if self.verdict == Verdict::Untouched {
            say("no Service has this address and port, as far as packets that come in here go".to_owned());
        }
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let (style, verdict) = match self.verdict {
            Verdict::Translated => (GOOD, "translated, and on through this node's stack"),
            Verdict::Forwarded => (GOOD, "translated, and sent on directly"),
            Verdict::Rejected => (BAD, "rejected: the client is told at once"),
            Verdict::Dropped => (BAD, "dropped"),
            Verdict::Untouched => (TITLE, "left alone"),
        };
        let mut text = format!("{TITLE}{} {} > {}{TITLE:#}\n", self.protocol, self.from, self.to);
        let mut line = |name: &str, value: &str| text += &format!("{name:<10} {value}\n");
        line("verdict", &format!("{style}{verdict}{style:#}"));
        if !self.reasons.is_empty() {
            line("reason", &self.reasons.join(", "));
        }
        if let Some(service) = &self.service {
            line("service", service);
        }
        if let Some(backend) = self.backend {
            line("backend", &backend.to_string());
        }
        if let Some((source, destination)) = self.rewritten {
            line("rewritten", &format!("{source} > {destination}"));
        }
        for (number, why) in self.why.iter().enumerate() {
            line(if number == 0 { "why" } else { "" }, why);
        }
        text
    }
}

fn verdict(trial: &Trial, outcome: &TrialOutcome, out: Option<&Headers>) -> Verdict {
    let original = frame::read(&trial.frame);
    let answered =
        out.is_some_and(|out| out.destination.ip() == trial.from.ip() && (out.reset || out.protocol != trial.protocol));
    match outcome.action {
        SHOT => Verdict::Dropped,
        NEXT if out == original.as_ref() => Verdict::Untouched,
        NEXT => Verdict::Translated,
        _ if answered => Verdict::Rejected,
        _ => Verdict::Forwarded,
    }
}

fn kinds(bits: u32) -> String {
    let kinds = [
        (frontend_flags::CLUSTER_IP, "a ClusterIP"),
        (frontend_flags::NODE_PORT, "a node port"),
        (frontend_flags::LOAD_BALANCER, "a load-balancer IP"),
        (frontend_flags::EXTERNAL_IP, "an external IP"),
    ];
    let names: Vec<&str> = kinds.into_iter().filter(|(flag, _)| bits & flag != 0).map(|(_, name)| name).collect();
    let host = if bits & frontend_flags::HOST_ONLY != 0 { ", for processes of this node alone" } else { "" };
    format!("{}{host}", names.join(" and "))
}

fn because(reason: DropReason) -> &'static str {
    match reason {
        DropReason::NoEndpoint => "the Service has no endpoint that is ready, on any node",
        DropReason::NoLocalEndpoint => "the policy is Local, and this node has no endpoint of the Service",
        DropReason::UnknownPort => "the address is a Service's, which has no such port",
        DropReason::SourceRange => "only clients in loadBalancerSourceRanges may use it",
        DropReason::Unallocated => "the address lies in a ServiceCIDR, and no Service has it",
        DropReason::MartianSource => "no single host can have the client's address",
        DropReason::NoRoute => "there is no route to the backend, or its neighbour is not known",
        DropReason::NoSourceAddress => "the interface towards the backend has no address for SNAT",
        DropReason::SnatPortsExhausted => "no source port is free towards this backend (--snat-ports)",
        _ => "see common/src/drop_reason.rs for what this reason means",
    }
}
