//! kube-proxy's rules: whether they are there, and removing them.
//!
//! Its nftables mode has tables of its own; its iptables mode has chains `KUBE-…` in other people's tables, and rules that lead
//! to them. Chains of others have such names, too, and stay: kubelet's, kube-router's NetworkPolicies, container runtimes' hostPorts.
//!
//! Netfilter translates a connection for as long as it lasts, whatever becomes of the rules, but only while its family has a
//! nat chain in the network namespace, and some rule that looks at connections: without one they are not tracked, and the kernel
//! notices a moment after the last such rule went. So one chain that does nothing takes the place of kube-proxy's until the
//! last of those connections has ended ([`release`]).

use std::collections::BTreeSet;
use std::io;
use std::process::{Command, Stdio};

use super::connections;
use super::legacy;
use super::netlink::Batch;
use super::tables::{self, Place, Ruleset};

/// The table that holds that chain.
pub const KEEPER: &str = "sheave-drain";
const NFTABLES_MODE: &str = "kube-proxy";
const IPTABLES: &[&str] = &["nat", "filter", "mangle"];
/// Chains of which each table has one that kube-proxy's iptables mode uses.
const MARKS: &[&str] = &["KUBE-SERVICES", "KUBE-PROXY-CANARY"];
/// Chains of its iptables and IPVS modes.
const CHAINS: &[&str] = &[
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FORWARD",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-LOAD-BALANCER",
    "KUBE-MARK-MASQ",
    "KUBE-NODE-PORT",
    "KUBE-NODEPORTS",
    "KUBE-POSTROUTING",
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
    "KUBE-SOURCE-RANGES-FIREWALL",
];
/// How the names of chains begin that it makes for Services and endpoints.
const CHAINS_OF_SERVICES: &[&str] = &["KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-XLB-"];
const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// Why kube-proxy's rules could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// nf_tables refused.
    #[error("cannot {action} (CAP_NET_ADMIN is needed in this network namespace)")]
    Netfilter {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A tool for the older tables can't be run.
    #[error(
        "kube-proxy's rules are in the older iptables tables; changing those takes `{tool}` (Debian: package iptables)"
    )]
    NoTool {
        /// The tool.
        tool: String,
        /// Why it does not run.
        source: io::Error,
    },
    /// A tool for the older tables failed.
    #[error("{tool} failed: {said}")]
    Tool {
        /// The tool.
        tool: String,
        /// What it said.
        said: String,
    },
}

/// What was removed, and what was not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// What is gone, in words.
    pub gone: Vec<String>,
    /// Connections that netfilter still translates.
    pub translated: usize,
    /// Families (`ip`, `ip6`) whose translations need the chain that is there now.
    pub kept: Vec<&'static str>,
}

/// What there is of kube-proxy's, in words; nothing if its rules are not there.
///
/// # Errors
///
/// If the rules can't be read.
pub fn traces() -> io::Result<Vec<String>> {
    Ok(described(&Ruleset::read()?).chain(legacy::with_chains(MARKS)?.into_iter().map(legacy_name)).collect())
}

fn described(rules: &Ruleset) -> impl Iterator<Item = String> {
    let own = rules.tables.iter().filter(|(_, table)| table == NFTABLES_MODE);
    let own = own.map(|(family, table)| format!("table {} {table}", tables::family_name(*family).unwrap_or("?")));
    let tables: BTreeSet<(u8, &str)> = rules
        .chains
        .iter()
        .filter(|chain| is_own(&chain.place) && MARKS.contains(&chain.place.chain.as_str()))
        .map(|chain| (chain.place.family, chain.place.table.as_str()))
        .collect();
    let shared = tables.into_iter().map(|(family, table)| {
        format!("chains KUBE-… of table {} {table}", tables::family_name(family).unwrap_or("?"))
    });
    own.chain(shared.collect::<Vec<_>>())
}

fn legacy_name((family, table): (&'static str, String)) -> String {
    format!("chains KUBE-… of table {family} {table} (iptables-legacy)")
}

/// Whether a chain is that of kube-proxy's iptables mode.
fn is_own(place: &Place) -> bool {
    FAMILIES.contains(&place.family) && IPTABLES.contains(&place.table.as_str()) && is_own_name(&place.chain)
}

/// Whether kube-proxy gives a chain this name.
pub(super) fn is_own_name(chain: &str) -> bool {
    CHAINS.contains(&chain) || CHAINS_OF_SERVICES.iter().any(|begin| chain.starts_with(begin))
}

/// Removes kube-proxy's rules. Doing it again, or where none are, is no error; it also takes the chains of [`KEEPER`] away when
/// nothing needs them any more.
///
/// # Errors
///
/// If the rules can't be read or changed. All changes of nf_tables are made together, or none.
pub fn remove() -> Result<Removed, RemoveError> {
    let netfilter = |action| move |source| RemoveError::Netfilter { action, source };
    let rules = Ruleset::read().map_err(netfilter("read netfilter's rules"))?;
    let legacy = legacy::with_chains(MARKS).map_err(netfilter("read iptables' older tables"))?;
    let mut removed = Removed { gone: described(&rules).collect(), ..Removed::default() };
    let asked = connections::translated().map_err(netfilter("list netfilter's connections"))?;
    removed.translated = asked.len();
    let mut batch = Batch::default();
    for family in FAMILIES {
        let kept = rules.tables.iter().any(|(of, table)| *of == family && table == KEEPER);
        let needed = asked.iter().any(|(address, _)| address.is_ipv4() == (i32::from(family) == libc::AF_INET));
        let goes = rules.chains.iter().any(|chain| is_own(&chain.place) && chain.place.family == family)
            || rules.tables.iter().any(|(of, table)| *of == family && table == NFTABLES_MODE)
            || legacy.iter().any(|(of, _)| Some(*of) == tables::family_name(family));
        if needed && (goes || kept) {
            if !kept {
                tables::keep_nat(&mut batch, family, KEEPER);
            }
            removed.kept.extend(tables::family_name(family));
        } else if kept {
            tables::delete_table(&mut batch, family, KEEPER);
        }
    }
    delete(&rules, &mut batch);
    if !batch.is_empty() {
        batch.commit().map_err(netfilter("change netfilter's rules"))?;
    }
    for (family, table) in legacy {
        remove_legacy(family, &table)?;
        removed.gone.push(legacy_name((family, table)));
    }
    Ok(removed)
}

fn delete(rules: &Ruleset, batch: &mut Batch) {
    for (family, table) in rules.tables.iter().filter(|(_, table)| table == NFTABLES_MODE) {
        tables::delete_table(batch, *family, table);
    }
    let shared = |place: &Place| FAMILIES.contains(&place.family) && IPTABLES.contains(&place.table.as_str());
    for rule in rules.rules.iter().filter(|rule| shared(&rule.place) && !is_own(&rule.place)) {
        if rule.facts.jumps_to(is_own_name) {
            tables::delete_rule(batch, rule);
        }
    }
    let own: Vec<&Place> = rules.chains.iter().map(|chain| &chain.place).filter(|place| is_own(place)).collect();
    // They lead to each other, so all are emptied first.
    own.iter().for_each(|chain| tables::empty(batch, chain));
    own.iter().for_each(|chain| tables::delete_chain(batch, chain));
}

/// Whether a nat chain is there for connections that still drain.
///
/// # Errors
///
/// If the tables can't be read.
pub fn is_keeping() -> io::Result<bool> {
    Ok(Ruleset::read()?.tables.iter().any(|(_, table)| table == KEEPER))
}

/// Takes those nat chains away, now that nothing needs them.
///
/// # Errors
///
/// If the tables can't be read or changed.
pub fn release() -> io::Result<()> {
    let mut batch = Batch::default();
    for (family, table) in Ruleset::read()?.tables.iter().filter(|(_, table)| table == KEEPER) {
        tables::delete_table(&mut batch, *family, table);
    }
    if batch.is_empty() { Ok(()) } else { batch.commit() }
}

/// Removes the chains from one of the older tables, whose format only its own tools know.
fn remove_legacy(family: &'static str, table: &str) -> Result<(), RemoveError> {
    let prefix = if family == "ip" { "iptables-legacy" } else { "ip6tables-legacy" };
    let saved = run(&format!("{prefix}-save"), &["-t", table], "")?;
    let changes = legacy_changes(table, &saved);
    run(&format!("{prefix}-restore"), &["--noflush", "--wait"], &changes).map(drop)
}

/// What iptables-restore has to be told to remove kube-proxy's chains from a table that iptables-save printed.
fn legacy_changes(table: &str, saved: &str) -> String {
    let chains = saved.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    let own: BTreeSet<&str> = chains.filter(|chain| is_own_name(chain)).collect();
    let mut changes = format!("*{table}\n");
    for rule in saved.lines().filter_map(|line| line.strip_prefix("-A ")) {
        let target = rule.rsplit_once(" -j ").or_else(|| rule.rsplit_once(" -g ")).map(|(_, target)| target.trim());
        let chain = rule.split(' ').next().unwrap_or_default();
        if !own.contains(chain) && target.is_some_and(|target| own.contains(target)) {
            changes += &format!("-D {rule}\n");
        }
    }
    own.iter().for_each(|chain| changes += &format!("-F {chain}\n"));
    own.iter().for_each(|chain| changes += &format!("-X {chain}\n"));
    changes + "COMMIT\n"
}

fn run(tool: &str, arguments: &[&str], input: &str) -> Result<String, RemoveError> {
    use std::io::Write as _;
    let unusable = |source| RemoveError::NoTool { tool: tool.to_owned(), source };
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(unusable)?;
    if let Some(mut standard_input) = child.stdin.take() {
        // A tool that does not read says why on standard error.
        let _ = standard_input.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(unusable)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(RemoveError::Tool { tool: tool.to_owned(), said })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_kube_proxys_goes_from_an_older_table() {
        let saved = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n\
                     -A PREROUTING -m comment --comment \"kubernetes -j portals\" -j KUBE-SERVICES\n\
                     :KUBE-HOSTPORTS - [0:0]\n:KUBE-POD-FW-A - [0:0]\n-A PREROUTING -j KUBE-HOSTPORTS\n\
                     -A PREROUTING -j CNI\n-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-A\nCOMMIT\n";
        let changes = "*nat\n-D PREROUTING -m comment --comment \"kubernetes -j portals\" -j KUBE-SERVICES\n\
                       -F KUBE-SERVICES\n-F KUBE-SVC-A\n-X KUBE-SERVICES\n-X KUBE-SVC-A\nCOMMIT\n";
        assert_eq!(legacy_changes("nat", saved), changes);
    }
}
