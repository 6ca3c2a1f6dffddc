//! What a rule of nf_tables does, as far as others want to know it.

use super::netlink::{Attributes, find, find_in, number, put, put_nested, put_text, text};

const LIST_ELEMENT: u16 = 1;
const NAME: u16 = 1;
const DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const META_KEY: u16 = 2;
const COMPARED: u16 = 3;
const COMPARED_REGISTER: u16 = 1;
const COMPARE_OPERATION: u16 = 2;
const CT_REGISTER: u16 = 1;
const CT_KEY: u16 = 2;
const IMMEDIATE_REGISTER: u16 = 1;
const DATA_VALUE: u16 = 1;
/// Name of an extension of iptables, in `match` and `target`.
const EXTENSION: u16 = 1;

/// NFT_PAYLOAD_NETWORK_HEADER
const NETWORK_HEADER: u32 = 1;
/// NFT_META_MARK, NFT_META_OIF, NFT_META_OIFNAME
const META_NARROWS: [u32; 3] = [3, 5, 7];
/// NFT_REG_VERDICT and NFT_REG_1
const REGISTER_VERDICT: [u8; 4] = 0_u32.to_be_bytes();
const REGISTER_1: [u8; 4] = 1_u32.to_be_bytes();
/// NFT_CT_STATE and NFT_CMP_NEQ
const CT_STATE: [u8; 4] = 0_u32.to_be_bytes();
const COMPARE_UNEQUAL: [u8; 4] = 1_u32.to_be_bytes();
const NF_ACCEPT: i32 = 1;
const NFT_RETURN: i32 = -5;

/// What matters here of a rule's expressions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// The chain that it jumps or goes to.
    jump: Option<String>,
    /// It gives packets this node's address as their source.
    pub(super) masquerades: bool,
    /// It looks at the destination (more than whether that is a group), the outgoing interface, the mark, or something that is
    /// unknown here.
    pub(super) narrow: bool,
    /// It accepts, or returns from its chain.
    pub(super) lets_go: bool,
}

impl Facts {
    /// From a rule's list of expressions.
    pub(super) fn of(expressions: &[u8]) -> Self {
        let mut facts = Self::default();
        let mut looks_at_destination = false;
        for (_, expression) in Attributes(expressions) {
            let name = find(expression, NAME).map(text).unwrap_or_default();
            let data = find(expression, DATA).unwrap_or_default();
            match name.as_str() {
                "immediate" => facts.verdict(data),
                "masq" => facts.masquerades = true,
                "target" => facts.masquerades |= extension(data) == "MASQUERADE",
                "match" => facts.narrow |= extension(data) != "comment",
                "meta" => facts.narrow |= field(data, META_KEY).is_some_and(|key| META_NARROWS.contains(&key)),
                "payload" => looks_at_destination = is_destination(data),
                "cmp" if looks_at_destination => {
                    let first = find_in(data, &[COMPARED, DATA_VALUE]).and_then(|value| value.first());
                    facts.narrow |= !matches!(first, Some(224 | 0xff));
                    looks_at_destination = false;
                }
                "lookup" | "fib" | "range" => facts.narrow = true,
                _ => {}
            }
        }
        facts
    }

    fn verdict(&mut self, immediate: &[u8]) {
        let Some(verdict) = find_in(immediate, &[IMMEDIATE_DATA, DATA_VERDICT]) else { return };
        self.jump = find(verdict, VERDICT_CHAIN).map(text);
        let code = field(verdict, VERDICT_CODE).map(u32::cast_signed);
        self.lets_go = matches!(code, Some(NF_ACCEPT | NFT_RETURN));
    }

    /// Whether it leads to a chain of such a name.
    pub(super) fn jumps_to(&self, is_meant: impl Fn(&str) -> bool) -> bool {
        self.jump.as_deref().is_some_and(is_meant)
    }
}

/// Appends the expressions of `ct state != 0 accept`.
pub(super) fn put_tracked(expressions: &mut Vec<u8>) {
    put_expression(expressions, "ct", |data| {
        put(data, CT_REGISTER, &REGISTER_1);
        put(data, CT_KEY, &CT_STATE);
    });
    put_expression(expressions, "cmp", |data| {
        put(data, COMPARED_REGISTER, &REGISTER_1);
        put(data, COMPARE_OPERATION, &COMPARE_UNEQUAL);
        put_nested(data, COMPARED, |value| put(value, DATA_VALUE, &[0; 4]));
    });
    put_expression(expressions, "immediate", |data| {
        put(data, IMMEDIATE_REGISTER, &REGISTER_VERDICT);
        put_nested(data, IMMEDIATE_DATA, |value| {
            put_nested(value, DATA_VERDICT, |verdict| put(verdict, VERDICT_CODE, &NF_ACCEPT.to_be_bytes()));
        });
    });
}

fn put_expression(into: &mut Vec<u8>, name: &str, data: impl FnOnce(&mut Vec<u8>)) {
    put_nested(into, LIST_ELEMENT, |expression| {
        put_text(expression, NAME, name);
        put_nested(expression, DATA, data);
    });
}

fn field(data: &[u8], kind: u16) -> Option<u32> {
    find(data, kind).and_then(number)
}

fn extension(data: &[u8]) -> String {
    find(data, EXTENSION).map(text).unwrap_or_default()
}

/// Whether a payload expression loads an IPv4 or IPv6 header's destination.
fn is_destination(payload: &[u8]) -> bool {
    let (base, offset, length) =
        (field(payload, PAYLOAD_BASE), field(payload, PAYLOAD_OFFSET), field(payload, PAYLOAD_LENGTH));
    // iptables-nft loads no more octets than a prefix has.
    let within = |offset: u32, size: u32| (1..=size).map(move |length| (Some(offset), Some(length)));
    base == Some(NETWORK_HEADER) && within(16, 4).chain(within(24, 16)).any(|place| place == (offset, length))
}
