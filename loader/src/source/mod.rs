//! Where Services, EndpointSlices and this Node come from: a Kubernetes API server, or a folder of manifests.
//!
//! A source reports changes; it never looks at what they mean. It serves until its receiver is gone, and takes every
//! trouble of the other side (an unreachable server, a broken file) as something that will pass.

pub mod convert;

use crate::model;

/// What a source reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// Objects changed, in this order.
    Changes(Vec<model::Change>),
    /// Reported once: every object that existed at the start has been reported. Nothing may be pruned before.
    Synced,
}
