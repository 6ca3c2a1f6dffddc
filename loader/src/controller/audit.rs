//! When audits run, and what is told of them.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::chain;
use super::passes::Controller;
use crate::dataplane::{Audit, Finding};

/// Between two slices, in which changes are applied.
const PAUSE: Duration = Duration::from_millis(5);

/// Audits of one after the other.
pub(super) struct Audits {
    /// `None`: there are none.
    period: Option<Duration>,
    /// The one that is under way.
    current: Option<Audit>,
    /// When the next one begins, or the next slice of this one; `None` before everything is applied once.
    due: Option<Instant>,
    /// What the last one could not repair.
    troubles: BTreeSet<String>,
}

impl Audits {
    pub(super) const fn new(period: Option<Duration>) -> Self {
        Self { period, current: None, due: None, troubles: BTreeSet::new() }
    }

    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Everything is as desired for the first time.
    pub(super) fn begin(&mut self) {
        self.due = self.period.map(|period| Instant::now() + period);
    }

    /// Says what could not be repaired, once, and that it has ended.
    fn tell_troubles(&mut self, troubles: Vec<String>) {
        let troubles: BTreeSet<String> = troubles.into_iter().collect();
        for trouble in troubles.difference(&self.troubles) {
            warn!("the audit found what it can't repair yet: {trouble}");
        }
        if troubles.is_empty() && !self.troubles.is_empty() {
            info!("the audit could repair what it could not before");
        }
        self.troubles = troubles;
    }
}

impl Controller {
    /// A slice of an audit, if one is due.
    pub(super) fn audit(&mut self, now: Instant) {
        if self.audits.due.is_none_or(|due| due > now) {
            return;
        }
        let mut audit = self.audits.current.take().unwrap_or_default();
        let outcome = self.dataplane.audit(&mut audit, &self.interfaces, &self.unattached);
        let over = audit.is_done() || outcome.is_err();
        if !over {
            self.audits.due = Some(Instant::now() + PAUSE);
            self.audits.current = Some(audit);
            return;
        }
        self.audits.due = self.audits.period.map(|period| now + period);
        if let Err(error) = outcome {
            audit.troubles.push(chain(&error));
        }
        for ((place, kind), Finding { number, names }) in &audit.findings {
            let more = if *number > names.len() as u64 { ", …" } else { "" };
            warn!(place, number, names = names.join(", ") + more, "audit: {}", kind.text());
        }
        debug!(busy = ?audit.busy, "audited");
        self.status.audited(&audit);
        self.unattached.extend(&audit.unattached);
        self.audits.tell_troubles(audit.troubles);
    }
}
