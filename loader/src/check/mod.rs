//! `sheave check`: looks at a node before Sheave is installed there, or while it runs, and says what is in its way.
//!
//! Changes nothing. Everything is about the calling thread's network namespace. [`kernel`] is what programs need, [`network`] how
//! packets travel here, [`others`] who else is on their way.

mod kernel;
mod network;
mod others;

use serde::Serialize;

use crate::config::RunConfig;
use crate::interfaces::state::Listing;
use crate::interfaces::{self, Details, Interface, discover};

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Pass,
    /// Works, but not all of it, or not for everyone.
    Warn,
    /// Sheave can't run, or serve, like this.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What, as one word: scripts can rely on it.
    pub check: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it; `None` for what passes.
    pub remedy: Option<String>,
}

/// Findings about one thing.
type Findings = Vec<Finding>;

fn pass(check: &'static str, found: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Pass, found: found.into(), remedy: None }
}

fn warn(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
}

fn fail(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { check, verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
}

/// The interfaces that have a role, what there is to know of them, and everything that was listed.
struct Node {
    listing: Listing,
    interfaces: Vec<Interface>,
    details: Vec<Details>,
}

impl Node {
    async fn look(config: &RunConfig) -> Result<Self, interfaces::InterfaceError> {
        let listing = interfaces::list().await?;
        let view = discover::View {
            links: &listing.links,
            addresses: &listing.addresses,
            routes: &listing.routes,
            // The Node object would say; without it, routes and addresses decide.
            node_addresses: &[],
            rules: &config.interfaces,
        };
        let interfaces = discover::interfaces(&view);
        let indexes: Vec<u32> = interfaces.iter().map(|interface| interface.index).collect();
        let details = interfaces::details(&indexes).await?;
        Ok(Self { listing, interfaces, details })
    }

    fn details(&self, index: u32) -> Option<&Details> {
        self.details.iter().find(|details| details.index == index)
    }
}

/// Looks at everything that `sheave run` with this configuration depends on.
pub async fn run(config: &RunConfig) -> Findings {
    let mut findings = kernel::findings(config);
    match Node::look(config).await {
        Ok(node) => {
            findings.extend(network::findings(&node));
            findings.extend(others::findings(config, &node));
        }
        Err(error) => findings.push(fail("interfaces", error.to_string(), "run this on the node, as root")),
    }
    findings
}

/// What /proc/sys says for a name with slashes; `None` if there is no such setting here.
fn sysctl(name: &str) -> Option<String> {
    std::fs::read_to_string(format!("/proc/sys/{name}")).ok().map(|text| text.trim().to_owned())
}
