//! Pure: Kubernetes objects and this node in, desired service ports out, exactly as SEMANTICS.md says.
//!
//! Nothing here knows of tokio, kube's client or aya. `source::convert` makes the [`objects`] from Kubernetes' own
//! types; [`index`] holds them and says which Services a change touches; [`frontends`], [`endpoints`] and
//! [`topology`] are the rules; [`desired`] is what comes out.

mod claims;
pub mod desired;
mod endpoints;
mod frontends;
mod index;
pub mod objects;
mod topology;

#[cfg(test)]
mod tests;

pub use index::{Change, Model, ModelOptions};
