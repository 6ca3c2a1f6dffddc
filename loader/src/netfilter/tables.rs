//! nf_tables, by netlink (linux/netfilter/nf_tables.h).

use std::collections::BTreeMap;
use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use super::ForwardChain;

const SUBSYSTEM: u16 = 10 << 8;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;

const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const HOOK_NUMBER: u16 = 1;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;

/// NF_INET_FORWARD
const FORWARD: u32 = 2;
const NF_DROP: u32 = 0;

/// Octets of `struct nlmsghdr` and of `struct nfgenmsg` behind it.
const HEADER: usize = 16;
const GENERIC: usize = 4;
/// Octets that the kernel may put into one answer.
const ROOM: usize = 64 * 1024;

/// Family number, table, chain.
type ChainKey = (u8, String, String);

/// Forward chains that hold rules of others, or drop by their policy.
pub(super) fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let mut chains = BTreeMap::new();
    dump(GET_CHAIN, NEW_CHAIN, |family, attributes| {
        let hook = find(attributes, CHAIN_HOOK).and_then(|hook| number(find(hook, HOOK_NUMBER)?));
        let names = (find(attributes, CHAIN_TABLE), find(attributes, CHAIN_NAME));
        if let (Some(FORWARD), (Some(table), Some(name)), Some(family_name)) = (hook, names, family_name(family)) {
            let (table, chain) = (text(table), text(name));
            let drops = find(attributes, CHAIN_POLICY).and_then(number) == Some(NF_DROP);
            let key = (family, table.clone(), chain.clone());
            chains.insert(key, ForwardChain { family: family_name, table, chain, rules: Some(0), drops });
        }
    })?;
    dump(GET_RULE, NEW_RULE, |family, attributes| {
        let Some(key) = chain_of(family, attributes) else { return };
        if let Some(rules) = chains.get_mut(&key).and_then(|chain| chain.rules.as_mut())
            && !leads_to_kube_proxy(attributes)
        {
            *rules += 1;
        }
    })?;
    chains.retain(|(_, table, _), chain| table != "kube-proxy" && (chain.drops || chain.rules != Some(0)));
    Ok(chains.into_values().collect())
}

fn chain_of(family: u8, attributes: &[u8]) -> Option<ChainKey> {
    Some((family, text(find(attributes, RULE_TABLE)?), text(find(attributes, RULE_CHAIN)?)))
}

/// Families whose forward hook a routed packet meets.
fn family_name(family: u8) -> Option<&'static str> {
    match i32::from(family) {
        1 => Some("inet"),
        libc::AF_INET => Some("ip"),
        libc::AF_INET6 => Some("ip6"),
        _ => None,
    }
}

/// Whether a rule does nothing but jump to a chain of kube-proxy's iptables mode.
fn leads_to_kube_proxy(rule: &[u8]) -> bool {
    let expressions = find(rule, RULE_EXPRESSIONS).unwrap_or_default();
    Attributes(expressions).any(|(_, expression)| {
        let verdict = find(expression, EXPRESSION_DATA)
            .and_then(|data| find(data, IMMEDIATE_DATA))
            .and_then(|data| find(data, DATA_VERDICT));
        verdict.and_then(|verdict| find(verdict, VERDICT_CHAIN)).is_some_and(|chain| text(chain).starts_with("KUBE-"))
    })
}

/// Asks for all objects of a kind, of every family, and hands on each one's family and attributes. Without nf_tables in the
/// kernel there are none.
fn dump(request: u16, answer: u16, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let mut message = Vec::with_capacity(HEADER + GENERIC);
    message.extend(((HEADER + GENERIC) as u32).to_ne_bytes());
    message.extend((SUBSYSTEM | request).to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    // Sequence number and port; then the family (all), the version and the resource.
    message.extend([0; 8 + GENERIC]);
    socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
    loop {
        let mut received = bytes::BytesMut::with_capacity(ROOM);
        socket.recv(&mut received, 0)?;
        let mut rest = &received[..];
        while rest.len() >= HEADER {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            let Some(body) = rest.get(HEADER..length) else { return Err(io::ErrorKind::InvalidData.into()) };
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => return refused(body),
                _ if kind == SUBSYSTEM | answer && body.len() >= GENERIC => each(body[0], &body[GENERIC..]),
                _ => {}
            }
            rest = rest.get(aligned(length)..).unwrap_or_default();
        }
    }
}

fn refused(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    match -code {
        // There is no such subsystem.
        0 | libc::EINVAL | libc::EOPNOTSUPP => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Netlink attributes: type and content.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const HEADER: usize = 4;
        /// Without the bits that say "nested" and "network order".
        const TYPE: u16 = 0x3fff;
        let [low, high, kind_low, kind_high] = *self.0.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let content = self.0.get(HEADER..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some((u16::from_ne_bytes([kind_low, kind_high]) & TYPE, content))
    }
}

fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attributes(attributes).find(|(kind, _)| *kind == wanted).map(|(_, content)| content)
}

/// A number in network order.
fn number(content: &[u8]) -> Option<u32> {
    content.first_chunk().map(|octets| u32::from_be_bytes(*octets))
}

/// A string that ends with a zero.
fn text(content: &[u8]) -> String {
    String::from_utf8_lossy(content.strip_suffix(&[0]).unwrap_or(content)).into_owned()
}
