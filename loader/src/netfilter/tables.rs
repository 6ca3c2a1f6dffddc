//! nf_tables (linux/netfilter/nf_tables.h), which include what iptables-nft made: reading every chain and rule, and changing them.

use std::io;

use super::ForwardChain;
use super::expression::{self, Facts};
use super::netlink::{self, Batch, find, find_in, number, put, put_nested, put_text, text};

const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DELETE_RULE: u16 = 8;

const TABLE_NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;

const PREROUTING: u32 = 0;
/// NF_INET_FORWARD
const FORWARD: u32 = 2;
const NF_DROP: u32 = 0;
/// NFPROTO_INET
const INET: u8 = 1;

/// Where something is: family number, table, chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) chain: String,
}

impl Place {
    /// `ip`, `ip6`, `inet`: the families that routed packets meet.
    pub(super) fn family_name(&self) -> Option<&'static str> {
        family_name(self.family)
    }
}

/// A chain.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub(super) place: Place,
    /// Which hook it is on; `None` if rules have to jump there.
    pub(super) hook: Option<u32>,
    pub(super) drops: bool,
}

/// A rule.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) place: Place,
    handle: Vec<u8>,
    pub(super) facts: Facts,
}

/// All of a network namespace's.
#[derive(Clone, Debug, Default)]
pub(super) struct Ruleset {
    /// Family and name.
    pub(super) tables: Vec<(u8, String)>,
    pub(super) chains: Vec<Chain>,
    /// In the order of their chains.
    pub(super) rules: Vec<Rule>,
}

impl Ruleset {
    pub(super) fn read() -> io::Result<Self> {
        let mut set = Self::default();
        dump(GET_TABLE, NEW_TABLE, |family, attributes| {
            set.tables.extend(find(attributes, TABLE_NAME).map(|name| (family, text(name))));
        })?;
        dump(GET_CHAIN, NEW_CHAIN, |family, attributes| {
            let Some(place) = place(family, attributes, CHAIN_TABLE, CHAIN_NAME) else { return };
            let hook = find_in(attributes, &[CHAIN_HOOK, HOOK_NUMBER]).and_then(number);
            let drops = find(attributes, CHAIN_POLICY).and_then(number) == Some(NF_DROP);
            set.chains.push(Chain { place, hook, drops });
        })?;
        dump(GET_RULE, NEW_RULE, |family, attributes| {
            let Some(place) = place(family, attributes, RULE_TABLE, RULE_CHAIN) else { return };
            let handle = find(attributes, RULE_HANDLE).unwrap_or_default().to_vec();
            let facts = Facts::of(find(attributes, RULE_EXPRESSIONS).unwrap_or_default());
            set.rules.push(Rule { place, handle, facts });
        })?;
        Ok(set)
    }

    /// Forward chains that hold rules of others than kube-proxy, or drop by their policy.
    pub(super) fn forward_chains(&self) -> Vec<ForwardChain> {
        let chains =
            self.chains.iter().filter(|chain| chain.hook == Some(FORWARD) && chain.place.table != "kube-proxy");
        let chains = chains.filter_map(|chain| {
            let rules = self.rules.iter().filter(|rule| rule.place == chain.place);
            let rules = rules.filter(|rule| !rule.facts.jumps_to(super::kube_proxy::is_own_name)).count();
            let family = chain.place.family_name()?;
            let Place { table, chain: name, .. } = chain.place.clone();
            let chain = ForwardChain { family, table, chain: name, rules: Some(rules), drops: chain.drops };
            (chain.drops || rules != 0).then_some(chain)
        });
        chains.collect()
    }

    /// Chains with a rule that masquerades whatever goes to a pod of this node, too: neither does it look at where a packet goes,
    /// nor does one before it let go what goes there. kube-proxy's rules go by their mark.
    pub(super) fn masquerades(&self) -> Vec<String> {
        let mut spared: Option<&Place> = None;
        let mut found = Vec::new();
        for rule in &self.rules {
            if rule.facts.narrow && rule.facts.lets_go {
                spared = Some(&rule.place);
            }
            if rule.facts.masquerades && !rule.facts.narrow && spared != Some(&rule.place) {
                let Place { table, chain, .. } = &rule.place;
                found.extend(rule.place.family_name().map(|family| format!("chain {chain} of table {family} {table}")));
            }
        }
        found
    }
}

fn dump(request: u16, answer: u16, each: impl FnMut(u8, &[u8])) -> io::Result<()> {
    netlink::dump(netlink::NF_TABLES | request, netlink::NF_TABLES | answer, each)
}

fn place(family: u8, attributes: &[u8], table: u16, chain: u16) -> Option<Place> {
    Some(Place { family, table: text(find(attributes, table)?), chain: text(find(attributes, chain)?) })
}

pub(super) fn family_name(family: u8) -> Option<&'static str> {
    match i32::from(family) {
        libc::AF_INET => Some("ip"),
        libc::AF_INET6 => Some("ip6"),
        _ => (family == INET).then_some("inet"),
    }
}

/// Has a table made with what netfilter needs to translate connections that it knows: a nat chain, and a rule that has
/// connections tracked, but changes nothing: `ct state != 0 accept`.
pub(super) fn keep_nat(batch: &mut Batch, family: u8, table: &str) {
    let mut attributes = Vec::new();
    put_text(&mut attributes, TABLE_NAME, table);
    batch.add(NEW_TABLE, libc::NLM_F_CREATE, family, &attributes);
    let mut attributes = Vec::new();
    put_text(&mut attributes, CHAIN_TABLE, table);
    put_text(&mut attributes, CHAIN_NAME, "keep");
    put_nested(&mut attributes, CHAIN_HOOK, |hook| {
        put(hook, HOOK_NUMBER, &PREROUTING.to_be_bytes());
        // NF_IP_PRI_NAT_DST
        put(hook, HOOK_PRIORITY, &(-100_i32).to_be_bytes());
    });
    put_text(&mut attributes, CHAIN_TYPE, "nat");
    batch.add(NEW_CHAIN, libc::NLM_F_CREATE, family, &attributes);
    let mut attributes = Vec::new();
    put_text(&mut attributes, RULE_TABLE, table);
    put_text(&mut attributes, RULE_CHAIN, "keep");
    put_nested(&mut attributes, RULE_EXPRESSIONS, expression::put_tracked);
    batch.add(NEW_RULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, family, &attributes);
}

/// Has a table deleted with all that is in it.
pub(super) fn delete_table(batch: &mut Batch, family: u8, table: &str) {
    let mut attributes = Vec::new();
    put_text(&mut attributes, TABLE_NAME, table);
    batch.add(DELETE_TABLE, 0, family, &attributes);
}

/// Has a rule deleted.
pub(super) fn delete_rule(batch: &mut Batch, rule: &Rule) {
    let mut attributes = Vec::new();
    put_text(&mut attributes, RULE_TABLE, &rule.place.table);
    put_text(&mut attributes, RULE_CHAIN, &rule.place.chain);
    put(&mut attributes, RULE_HANDLE, &rule.handle);
    batch.add(DELETE_RULE, 0, rule.place.family, &attributes);
}

/// Has the rules of a chain deleted.
pub(super) fn empty(batch: &mut Batch, chain: &Place) {
    let mut attributes = Vec::new();
    put_text(&mut attributes, RULE_TABLE, &chain.table);
    put_text(&mut attributes, RULE_CHAIN, &chain.chain);
    batch.add(DELETE_RULE, 0, chain.family, &attributes);
}

/// Has a chain deleted, which must be empty by then, and nobody's target.
pub(super) fn delete_chain(batch: &mut Batch, chain: &Place) {
    let mut attributes = Vec::new();
    put_text(&mut attributes, CHAIN_TABLE, &chain.table);
    put_text(&mut attributes, CHAIN_NAME, &chain.chain);
    batch.add(DELETE_CHAIN, 0, chain.family, &attributes);
}
