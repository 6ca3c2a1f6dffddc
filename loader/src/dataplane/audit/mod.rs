//! The audit: compares what the kernel holds with what this process has written, attached and pinned there, repairs what
//! differs, and tells what that was.
//!
//! It goes in slices of a fraction of a millisecond, between which changes are applied, and compares each element with the
//! mirror in the moment in which it is read. Nobody else writes in that moment, so nothing has to be compared twice. What
//! differs goes the way of every change: the mirror learns what the kernel holds, and the plan writes the difference in the
//! usual order. Elements that the mirror doesn't have are somebody else's, and are deleted.
//!
//! A link that seems dead gets time first: its interface may be gone, and the kernel's notification on its way.
//!
//! What programs write is theirs: flows, affinity, sockets, loads, counters, and the filter's elements of sources.

mod maps;
mod objects;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use sheave_common::names;

use super::Dataplane;
use super::error::DataplaneError;
use super::map::Walk;
use crate::interfaces::Interface;
use crate::plan::{Drift, FrontendAddress};

/// How long a slice may take; one step more is in it.
const SLICE: Duration = Duration::from_micros(250);
/// How long a link must have been dead.
const SETTLED: Duration = Duration::from_millis(500);
/// Frontends that one step compares.
const FRONTENDS: usize = 32;
/// Elements of each kind of finding that are named.
const NAMED: usize = 10;

/// What is wrong with something that an audit found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An element of a map is missing, or not what was written.
    Changed,
    /// An element of a map that Sheave has not written.
    Strange,
    /// A link that is dead, or has another program.
    Detached,
    /// A pin that is missing, or is another object's.
    Unpinned,
}

impl Kind {
    /// What was found and done, in words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Changed => "elements of a map were missing or changed, and are written again",
            Self::Strange => "elements of a map were not Sheave's, and are deleted",
            Self::Detached => "programs were detached or replaced, and are attached again",
            Self::Unpinned => "pins were missing or replaced, and are made again",
        }
    }
}

/// Everything of one kind that an audit found in one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finding {
    /// How many.
    pub number: u64,
    /// The first ones.
    pub names: Vec<String>,
}

/// An audit under way, or done.
#[derive(Default)]
pub struct Audit {
    stage: Stage,
    /// By place (a map's name, `links` or `pins`) and kind.
    pub findings: BTreeMap<(&'static str, Kind), Finding>,
    /// What could not be repaired, and why.
    pub troubles: Vec<String>,
    /// Interfaces with a dead link, and since when that is known.
    suspects: BTreeSet<u32>,
    suspected: Option<Instant>,
    /// Interfaces that programs could not be put on again.
    pub unattached: BTreeSet<u32>,
    /// For how long it has worked.
    pub busy: Duration,
    /// Pins can't be made.
    unpinnable: bool,
}

/// What comes next. Strangers among the source ranges go before what is missing there is looked for, because the kernel
/// finds a range in a wider one.
#[derive(Default)]
enum Stage {
    #[default]
    Pins,
    Cgroup,
    /// Links of the interfaces behind this one.
    Interfaces(Option<u32>),
    Settings,
    /// `destinations` from this element on.
    Destinations(u32),
    SourceRanges(Strangers),
    /// Everything of the service ids from this one on, but for frontends.
    Services(u32),
    /// Those behind this one.
    Frontends(Option<FrontendAddress>),
    Strangers(Strangers),
    /// Dead links.
    Reattach,
    Done,
}

/// A walk over several maps, by their place in a list.
#[derive(Default)]
struct Strangers {
    map: usize,
    walk: Walk,
}

impl Audit {
    /// Whether everything was compared.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    fn found(&mut self, place: &'static str, kind: Kind, name: impl FnOnce() -> String) {
        let finding = self.findings.entry((place, kind)).or_default();
        finding.number += 1;
        if finding.names.len() < NAMED {
            finding.names.push(name());
        }
    }
}

impl Dataplane {
    /// A slice of an audit. All of `interfaces` should have programs, but for those that are known not to.
    ///
    /// # Errors
    ///
    /// If a map can't be read or written; then the audit is over.
    pub fn audit(
        &mut self,
        audit: &mut Audit,
        interfaces: &BTreeMap<u32, Interface>,
        unattached: &BTreeSet<u32>,
    ) -> Result<(), DataplaneError> {
        let started = Instant::now();
        let attached = |index| interfaces.get(&index).filter(|_| !unattached.contains(&index));
        while !audit.is_done() && started.elapsed() < SLICE {
            let next = |last: Option<u32>| {
                let first = last.map_or(0, |last| last.saturating_add(1));
                interfaces.range(first..).map(|(index, _)| *index).next()
            };
            if !self.audit_step(audit, attached, next)? {
                break;
            }
        }
        audit.busy += started.elapsed();
        Ok(())
    }

    /// Returns false if the next step has to wait. `attached` finds interfaces that should have programs by index, `next` the
    /// index of the one behind another.
    fn audit_step<'a>(
        &mut self,
        audit: &mut Audit,
        attached: impl Fn(u32) -> Option<&'a Interface>,
        next: impl Fn(Option<u32>) -> Option<u32>,
    ) -> Result<bool, DataplaneError> {
        audit.stage = match std::mem::take(&mut audit.stage) {
            Stage::Pins => {
                self.audit_pins(audit);
                Stage::Cgroup
            }
            Stage::Cgroup => {
                self.audit_cgroup(audit);
                Stage::Interfaces(None)
            }
            Stage::Interfaces(last) => match next(last) {
                Some(index) => {
                    if let Some(interface) = attached(index) {
                        self.audit_interface(audit, interface);
                    }
                    Stage::Interfaces(Some(index))
                }
                None => Stage::Settings,
            },
            Stage::Settings => {
                self.audit_settings(audit)?;
                Stage::Destinations(0)
            }
            Stage::Destinations(first) => self
                .audit_destinations(audit, first)?
                .map_or(Stage::SourceRanges(Strangers::default()), Stage::Destinations),
            Stage::SourceRanges(mut strangers) => {
                let more = self.audit_source_ranges(audit, &mut strangers)?;
                if more { Stage::SourceRanges(strangers) } else { Stage::Services(self.planner.service_ids().start) }
            }
            Stage::Services(id) if id < self.planner.service_ids().end => {
                let drifts = self.writer.drifts_of(id, &self.planner.mirrored(id))?;
                self.repair(audit, &drifts)?;
                Stage::Services(id + 1)
            }
            Stage::Services(_) => Stage::Frontends(None),
            Stage::Frontends(last) => {
                let next: Vec<_> =
                    self.planner.frontends_behind(last).take(FRONTENDS).map(|(key, value)| (*key, *value)).collect();
                let drifts = self.writer.drifts_among(&next)?;
                self.repair(audit, &drifts)?;
                next.last()
                    .map_or_else(|| Stage::Strangers(Strangers::default()), |(key, _)| Stage::Frontends(Some(*key)))
            }
            Stage::Strangers(mut strangers) => {
                let more = self.audit_strangers(audit, &mut strangers)?;
                if more { Stage::Strangers(strangers) } else { Stage::Reattach }
            }
            Stage::Reattach if audit.suspected.is_some_and(|suspected| suspected.elapsed() < SETTLED) => {
                audit.stage = Stage::Reattach;
                return Ok(false);
            }
            Stage::Reattach => match audit.suspects.pop_first() {
                Some(index) => {
                    if let Some(interface) = attached(index) {
                        self.audit_suspect(audit, interface);
                    }
                    Stage::Reattach
                }
                None => Stage::Done,
            },
            Stage::Done => Stage::Done,
        };
        Ok(true)
    }

    /// Has the mirror learn what the kernel holds, and writes what is missing. What can't be written stays unfinished and is
    /// tried again with the next changes.
    fn repair(&mut self, audit: &mut Audit, drifts: &[Drift]) -> Result<(), DataplaneError> {
        if drifts.is_empty() {
            return Ok(());
        }
        for drift in drifts {
            let (place, name) = self.describe(drift);
            audit.found(place, Kind::Changed, || name);
        }
        let batch = self.planner.repair(drifts);
        match self.execute(batch).other {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// The map that something is missing in, and what that is.
    fn describe(&self, drift: &Drift) -> (&'static str, String) {
        let name =
            |id: u32| self.planner.mirrored(id).name.map_or_else(|| format!("service id {id}"), ToString::to_string);
        let of = |is_ipv4: bool, v4: &'static str, v6: &'static str| if is_ipv4 { v4 } else { v6 };
        match drift {
            Drift::Frontend(address) => {
                (of(address.address.is_ipv4(), names::FRONTENDS4, names::FRONTENDS6), address.to_string())
            }
            Drift::Backend { id, written, .. } => (
                of(written.address.is_ipv4(), names::BACKENDS4, names::BACKENDS6),
                format!("{id} ({} of {})", written.endpoint(), name(written.service_id)),
            ),
            Drift::Run { service_id, set, .. } => (
                names::BACKEND_TABLE,
                format!("{} to {} of {}", set.first, set.first + set.length - 1, name(*service_id)),
            ),
            Drift::SourceRange { service_id, network } => (
                of(network.address().is_ipv4(), names::SOURCE_RANGES4, names::SOURCE_RANGES6),
                format!("{network} of {}", name(*service_id)),
            ),
            Drift::Name { service_id } => (names::SERVICE_NAMES, name(*service_id)),
        }
    }
}
