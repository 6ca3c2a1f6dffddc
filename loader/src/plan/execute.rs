//! A batch's writes, one by one: each that succeeds moves the mirror, each that fails hurts its service port only.

use super::diff::Planner;
use super::write::{Batch, Failure, Outcome, Owner, Write};
use crate::model::desired::ServicePortName;

impl Planner {
    /// Makes a batch's writes, in order, and moves the mirror with each that succeeds. A service port of which one
    /// write failed gets no more of this batch; the others are not affected.
    pub fn execute<E>(&mut self, batch: Batch, mut write: impl FnMut(&Write) -> Result<(), E>) -> Outcome<E> {
        let refused = batch.refused.into_iter().map(|(name, error)| (name, Failure::Plan(error)));
        let mut outcome = Outcome { written: 0, failed: refused.collect(), other: None };
        let mut operations = batch.operations.into_iter();
        for operation in operations.by_ref() {
            if let Owner::Service(name) = &operation.owner
                && outcome.failed.contains_key(name)
            {
                continue;
            }
            match write(&operation.write) {
                Ok(()) => {
                    outcome.written += 1;
                    self.written(&operation.write);
                }
                Err(error) => match operation.owner {
                    Owner::Service(name) => {
                        self.fail(&name);
                        outcome.failed.insert(name, Failure::Write(error));
                    }
                    Owner::Nobody => outcome.other = Some(error),
                    Owner::Batch => {
                        outcome.other = Some(error);
                        break;
                    }
                },
            }
        }
        for operation in operations {
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
        let unnamed = self.actual.apply(write);
        self.queue.runs(unnamed);
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
