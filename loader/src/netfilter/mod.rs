//! Other people's rules in netfilter: forward chains, which traffic that bypasses netfilter would not meet, and what
//! kube-proxy left ([`kube_proxy`]); and the connections that netfilter translates ([`connections`]).
//!
//! Read from the kernel, of this network namespace, without any tool: nf_tables by netlink, which includes what iptables-nft
//! made; the older iptables tables by socket options. kube-proxy's own chains do what Sheave does, so they are none of the rules
//! that would be bypassed.

pub mod connections;
mod expression;
pub mod kube_proxy;
mod legacy;
mod netlink;
mod tables;

use std::fmt;
use std::io;

/// A base chain on the forward hook that holds something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardChain {
    /// `ip`, `ip6`, `inet`
    pub family: &'static str,
    /// The table's name.
    pub table: String,
    /// The chain's name.
    pub chain: String,
    /// Rules that are not kube-proxy's; `None` where the kernel does not say how many.
    pub rules: Option<usize>,
    /// What no rule decides is dropped.
    pub drops: bool,
}

impl fmt::Display for ForwardChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} of table {} {} (", self.chain, self.family, self.table)?;
        match self.rules {
            Some(0) => {}
            Some(1) => f.write_str("1 rule")?,
            Some(number) => write!(f, "{number} rules")?,
            None => f.write_str("rules")?,
        }
        match (self.drops, self.rules) {
            (true, Some(0)) => f.write_str("policy drop)"),
            (true, _) => f.write_str(", policy drop)"),
            (false, _) => f.write_str(")"),
        }
    }
}

/// Why netfilter is not bypassed.
#[derive(Debug, thiserror::Error)]
pub enum BypassError {
    /// There are rules that would be skipped.
    #[error(
        "--bypass-netfilter would skip rules of others: {}; remove them, or accept that Services' traffic to this node's pods \
         does not meet them with --bypass-netfilter=force",
        list(chains)
    )]
    Rules {
        /// Where they are.
        chains: Vec<ForwardChain>,
    },
    /// The rules can't be read.
    #[error(
        "cannot read netfilter's rules, which --bypass-netfilter must know (--bypass-netfilter=force does without)"
    )]
    Unreadable(#[source] io::Error),
}

fn list(chains: &[ForwardChain]) -> String {
    chains.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Makes sure that no rule of others would be skipped.
///
/// # Errors
///
/// If one would be, or if that can't be found out.
pub fn may_be_bypassed() -> Result<(), BypassError> {
    let chains = forward_chains().map_err(BypassError::Unreadable)?;
    if chains.is_empty() { Ok(()) } else { Err(BypassError::Rules { chains }) }
}

/// Forward chains that hold rules of others, or drop by their policy.
///
/// # Errors
///
/// If the rules can't be read.
pub fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let mut chains = tables::Ruleset::read()?.forward_chains();
    chains.extend(legacy::forward_chains()?);
    Ok(chains)
}

/// Chains of nf_tables with a rule that gives this node's address to what goes from others to pods of this node, in words. The
/// older tables are not looked at.
///
/// # Errors
///
/// If the rules can't be read.
pub fn masquerades() -> io::Result<Vec<String>> {
    Ok(tables::Ruleset::read()?.masquerades())
}
