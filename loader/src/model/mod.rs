//! Pure: Kubernetes objects and this node in, desired service ports out, exactly as SEMANTICS.md says.
//!
//! Nothing here knows of tokio, kube's client or aya. `source::convert` makes the [`objects`] from Kubernetes' own
//! types; [`index`] holds them and says which Services a change touches; [`frontends`], [`endpoints`],
//! [`topology`] and [`health_check`] are the rules; [`desired`] and [`HealthCheck`] are what comes out, with [`network`]s
//! where clients or addresses are many, and with names that are one [`text::Text`] for all.

mod claims;
pub mod desired;
mod endpoints;
mod frontends;
mod health_check;
mod index;
pub mod network;
pub mod objects;
pub mod text;
mod topology;

#[cfg(test)]
mod tests;

pub use health_check::HealthCheck;
pub use index::{Change, Model, ModelOptions};
