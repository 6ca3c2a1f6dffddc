//! A batch's writes, in order: each that succeeds moves the mirror, each that fails hurts its service port only.

use super::diff::Planner;
use super::write::{Batch, Failure, Operation, Outcome, Owner, Write};
use crate::model::desired::ServicePortName;

/// The most writes that are handed over together.
const TOGETHER: usize = 4_096;

/// Who makes writes.
pub trait Sink {
    /// Why a write could not be made.
    type Error;

    /// Makes one write.
    ///
    /// # Errors
    ///
    /// If it could not be made.
    fn write(&mut self, write: &Write) -> Result<(), Self::Error>;

    /// Makes several of one kind, in order, and stops at the first one that is better tried alone. Returns how many were
    /// made.
    fn write_together(&mut self, operations: &[Operation]) -> usize {
        let _ = operations;
        0
    }
}

/// A function that makes one write at a time.
struct OneByOne<F>(F);

impl<E, F: FnMut(&Write) -> Result<(), E>> Sink for OneByOne<F> {
    type Error = E;

    fn write(&mut self, write: &Write) -> Result<(), E> {
        self.0(write)
    }
}

impl Planner {
    /// As [`Self::execute_in`], one write at a time.
    pub fn execute<E>(&mut self, batch: Batch, write: impl FnMut(&Write) -> Result<(), E>) -> Outcome<E> {
        self.execute_in(batch, &mut OneByOne(write))
    }

    /// Makes a batch's writes, in order, and moves the mirror with each that succeeds. A service port of which one
    /// write failed gets no more of this batch; the others are not affected.
    pub fn execute_in<S: Sink>(&mut self, batch: Batch, sink: &mut S) -> Outcome<S::Error> {
        let refused = batch.refused.into_iter().map(|(name, error)| (name, Failure::Plan(error)));
        let mut outcome = Outcome { written: 0, failed: refused.collect(), other: None };
        let mut rest = &batch.operations[..];
        while let [operation, others @ ..] = rest {
            let is_skipped = |operation: &Operation| match &operation.owner {
                Owner::Service(name) => outcome.failed.contains_key(name),
                Owner::Nobody | Owner::Batch => false,
            };
            if is_skipped(operation) {
                rest = others;
                continue;
            }
            let kind = kind(&operation.write);
            let alike =
                rest.iter().take(TOGETHER).take_while(|next| self::kind(&next.write) == kind && !is_skipped(next));
            let alike = if kind.is_some() { alike.count() } else { 1 };
            let together = if alike > 1 { sink.write_together(&rest[..alike]) } else { 0 };
            for operation in &rest[..together] {
                self.written(&operation.write);
            }
            outcome.written += together;
            if together > 0 {
                rest = &rest[together..];
                continue;
            }
            rest = others;
            match sink.write(&operation.write) {
                Ok(()) => {
                    outcome.written += 1;
                    self.written(&operation.write);
                }
                Err(error) => match &operation.owner {
                    Owner::Service(name) => {
                        self.fail(name);
                        outcome.failed.insert(name.clone(), Failure::Write(error));
                    }
                    Owner::Nobody => outcome.other = Some(error),
                    Owner::Batch => {
                        outcome.other = Some(error);
                        break;
                    }
                },
            }
        }
        for operation in rest {
            if let Owner::Service(name) = &operation.owner {
                self.fail(name);
            }
        }
        self.actual.runs.free_fresh();
        outcome
    }

    fn fail(&mut self, name: &ServicePortName) {
        self.unfinished.insert(name.clone());
        if let Some(service) = self.services.get_mut(name) {
            service.sets = None;
        }
    }

    fn written(&mut self, write: &Write) {
        match write {
            Write::Reserve { next_backend_id, next_service_id } => {
                self.identity.reserved(*next_backend_id, *next_service_id);
            }
            Write::DeleteName { service_id } => self.forget_service(*service_id),
            _ => {}
        }
        let left = match write {
            Write::PutFrontend { address, .. } | Write::DeleteFrontend { address } => {
                self.actual.frontends.get(address)
            }
            _ => None,
        };
        let left = left.map(|frontend| frontend.service_id);
        let unnamed = self.actual.apply(write);
        self.queue.runs(unnamed);
        if let Some(service_id) = left {
            self.queue_rest(service_id);
        }
    }

    fn forget_service(&mut self, service_id: u32) {
        if let Some(name) = self.actual.names.get(&service_id)
            && self.services.get(name).is_some_and(|s| s.desired.is_none() && s.id == Some(service_id))
        {
            self.services.remove(name);
        }
        self.identity.retire_service(service_id);
    }
}

/// Writes that may be made together: puts into one map. `None` for those that are made alone.
const fn kind(write: &Write) -> Option<(u8, bool)> {
    match write {
        Write::PutName { .. } => Some((0, true)),
        Write::PutBackend { backend, .. } => Some((1, backend.address.is_ipv4())),
        Write::WriteRun { .. } => Some((2, true)),
        Write::PutFrontend { address, .. } => Some((3, address.address.is_ipv4())),
        _ => None,
    }
}
