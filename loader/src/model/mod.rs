//! Pure: Kubernetes objects and this node in, desired service ports out, exactly as SEMANTICS.md says.
//!
//! Nothing here knows of tokio, kube's client or aya.

pub mod desired;
