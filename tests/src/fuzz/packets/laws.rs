//! What must hold of every packet that the programs have seen, by a parser that is not theirs (etherparse).

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket};
use sheave_common::drop_reason::{self, DropReason};
use sheave_common::{PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_SCTP, PROTOCOL_TCP, PROTOCOL_UDP};
use sheave_ebpf_host::kernel::{Fate, Hook, Input, Kernel, Output, Redirect};
use sheave_ebpf_host::maps;
use sheave_ebpf_host::parsing::Found;
use sheave_ebpf_host::programs::Checksum;

use super::world::{HAIRPIN, NODE, SNAT_PORTS, World};
use crate::packet::{FIN, RST, SYN};

/// A packet that comes to a hook.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    pub(super) hook: Hook,
    /// It is what came out earlier: which and how, see [`super::sender::Sender::resolve`].
    pub(super) answered: Option<[u8; 2]>,
    /// Time since the packet before.
    pub(super) pause: Duration,
    /// What programs get for a random number.
    pub(super) random: u32,
    pub(super) input: Input,
}

impl Sight {
    /// The same without what XDP can't see: the kernel's view of whom the frame is for, checksums that others finish. And without
    /// segments that open and end a connection at once: XDP notes that it is over and may pass them up, where they have none.
    pub(super) fn whole(&self) -> Self {
        let mut sight = self.clone();
        sight.input.linear = sight.input.bytes.len();
        sight.input.kind = if sight.input.bytes.first().is_some_and(|first| first & 1 != 0) { 2 } else { 0 };
        sight.input.gso_size = 0;
        sight.input.checksum = Checksum::Final;
        let consistent = |flags: u8| if flags & SYN != 0 { flags & !(FIN | RST) } else { flags };
        let network = sight.hook.network() as usize;
        if let Some(flags) = tcp_flags(&sight.input.bytes, network) {
            set_tcp_flags(&mut sight.input.bytes, network, consistent(flags));
        }
        sight.answered = sight.answered.map(|[which, flags]| [which, consistent(flags)]);
        sight
    }

    /// The same packet as a program left it.
    fn after(&self, output: &Output) -> Input {
        Input { bytes: output.bytes.clone(), linear: output.bytes.len(), ..self.input.clone() }
    }

    /// As an XDP frame.
    pub(super) fn as_frame(&self) -> Input {
        self.input.clone()
    }
}

/// Where a packet has what, and what it says.
struct Fields {
    ipv6: bool,
    network: usize,
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    transport: usize,
    /// Behind the last byte that the IP header counts, and the packet has.
    end: usize,
    /// No fragment but perhaps an atomic one.
    whole: bool,
    /// It has the first byte of the transport header, as far as that is there.
    first: bool,
    /// The parser found nothing wrong.
    sound: bool,
}

impl Fields {
    fn of(bytes: &[u8], network: usize) -> Option<Self> {
        let packet = match network {
            0 => LaxSlicedPacket::from_ip(bytes).ok()?,
            _ => LaxSlicedPacket::from_ethernet(bytes).ok()?,
        };
        let place = |part: &[u8]| part.as_ptr() as usize - bytes.as_ptr() as usize;
        let net = packet.net.as_ref()?;
        let payload = net.ip_payload_ref()?;
        let (ipv6, source, destination, first): (_, IpAddr, IpAddr, _) = match net {
            LaxNetSlice::Ipv4(ip) => {
                let header = ip.header();
                let first = header.fragments_offset().value() == 0;
                (false, header.source_addr().into(), header.destination_addr().into(), first)
            }
            LaxNetSlice::Ipv6(ip) => {
                let header = ip.header();
                // The fragment header comes last of what is walked, if the packet is a fragment.
                let offset = bytes.get(place(payload.payload).checked_sub(8)? + 2..)?;
                let first = !payload.fragmented || offset.first_chunk().is_some_and(|o| u16::from_be_bytes(*o) < 8);
                (true, header.source_addr().into(), header.destination_addr().into(), first)
            }
            LaxNetSlice::Arp(_) => return None,
        };
        Some(Self {
            ipv6,
            network,
            source,
            destination,
            protocol: payload.ip_number.0,
            transport: place(payload.payload),
            end: place(payload.payload) + payload.payload.len(),
            whole: !payload.fragmented,
            first,
            sound: packet.stop_err.is_none() && payload.ip_number != IpNumber::AUTHENTICATION_HEADER,
        })
    }

    /// [`Self::of`]; where the other parser stops (extension headers in an order that is not the RFC's), by the programs' parser.
    fn agreed(world: &World, hook: Hook, input: &Input) -> Option<Self> {
        let network = hook.network() as usize;
        let mut fields = Self::of(&input.bytes, network)?;
        if !fields.sound
            && let Some(parsed) = world.kernel.parse(hook, input)
        {
            fields.transport = parsed.transport as usize;
            fields.end = input.bytes.len().min(network + parsed.length as usize).max(fields.transport);
            fields.protocol = parsed.protocol;
            fields.whole = !matches!(parsed.kind, Found::First | Found::Later);
            fields.first = parsed.kind != Found::Later;
        }
        Some(fields)
    }

    fn port(&self, bytes: &[u8], at: usize) -> u16 {
        bytes.get(self.transport + at..).and_then(|rest| rest.first_chunk()).map_or(0, |port| u16::from_be_bytes(*port))
    }

    fn from(&self, bytes: &[u8]) -> SocketAddr {
        SocketAddr::new(self.source, self.port(bytes, 0))
    }

    fn to(&self, bytes: &[u8]) -> SocketAddr {
        SocketAddr::new(self.destination, self.port(bytes, 2))
    }

    fn ttl(&self, bytes: &[u8]) -> u8 {
        bytes[self.network + if self.ipv6 { 7 } else { 8 }]
    }

    /// Whether the transport checksum is right, where it can be told; with `partial`, whether it covers the pseudo-header.
    fn transport_sums(&self, bytes: &[u8], partial: bool) -> Option<bool> {
        let segment = &bytes[self.transport..self.end];
        let length = u16::try_from(segment.len()).ok()?;
        let pseudo = [sum(&octets(self.source)), sum(&octets(self.destination)), u16::from(self.protocol), length];
        let pseudo = pseudo.into_iter().fold(0, add);
        let (field, pseudo) = match self.protocol {
            PROTOCOL_TCP if segment.len() >= 20 => (16, pseudo),
            PROTOCOL_UDP if segment.len() >= 8 => (6, pseudo),
            PROTOCOL_ICMP if segment.len() >= 4 => (2, 0),
            PROTOCOL_ICMPV6 if segment.len() >= 4 => (2, pseudo),
            PROTOCOL_SCTP if segment.len() >= 12 => return Some(crate::packet::sctp_checksum_is_right(segment)),
            _ => return None,
        };
        let is = u16::from_be_bytes([segment[field], segment[field + 1]]);
        match self.protocol {
            PROTOCOL_UDP if is == 0 && !self.ipv6 => Some(true),
            PROTOCOL_UDP if is == 0 => None,
            _ if partial => Some(is % u16::MAX == pseudo % u16::MAX),
            _ => Some(add(pseudo, sum(segment)) == u16::MAX),
        }
    }

    /// Whether every checksum of the packet is right, as far as each can be told.
    fn sums(&self, bytes: &[u8], checksum: Checksum) -> [Option<bool>; 3] {
        let header = (!self.ipv6).then(|| {
            let length = usize::from(bytes[self.network] & 15) * 4;
            bytes.get(self.network..self.network + length).is_some_and(|header| sum(header) == u16::MAX)
        });
        let transport = self.whole.then(|| self.transport_sums(bytes, matches!(checksum, Checksum::Partial(_))));
        // Of a datagram without a checksum nobody verifies anything, and nothing in it makes up for changed ports.
        let unverified = self.protocol == PROTOCOL_UDP && self.port(bytes, 6) == 0;
        let all = match (checksum, complete(bytes, self.network)) {
            _ if unverified => None,
            (Checksum::Complete(said), Checksum::Complete(is)) => Some(said % u16::MAX == is % u16::MAX),
            _ => None,
        };
        [header, transport.flatten(), all]
    }
}

/// One's-complement addition.
fn add(one: u16, other: u16) -> u16 {
    let (sum, carry) = one.overflowing_add(other);
    sum + u16::from(carry)
}

/// One's-complement sum of big-endian words.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    words.fold(0, add)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What a device says that has summed all of a packet.
pub(super) fn complete(bytes: &[u8], network: usize) -> Checksum {
    let sum = sum(bytes.get(network..).unwrap_or_default());
    Checksum::Complete(u16::from_ne_bytes(sum.to_be_bytes()))
}

/// Offset of the network header, by what follows.
pub(super) fn network_of(bytes: &[u8]) -> Option<usize> {
    match (bytes.first()?, bytes.get(12..14)) {
        (_, Some([0x08, 0x00] | [0x86, 0xdd])) => Some(14),
        (first, _) if matches!(first >> 4, 4 | 6) => Some(0),
        _ => None,
    }
}

/// Turns a packet round: addresses, and ports where there are some. No checksum changes by that.
pub(super) fn turn(bytes: &mut [u8], network: usize) {
    let Some(fields) = Fields::of(bytes, network) else { return };
    let (at, length) = if fields.ipv6 { (network + 8, 16) } else { (network + 12, 4) };
    let (source, destination) = bytes[at..at + 2 * length].split_at_mut(length);
    source.swap_with_slice(destination);
    if fields.first
        && let Some(ports) = bytes.get_mut(fields.transport..fields.transport + 4)
    {
        ports.rotate_left(2);
    }
}

/// Changes the flags of a TCP segment, and its checksum with them.
pub(super) fn set_tcp_flags(bytes: &mut [u8], network: usize, flags: u8) {
    let Some(at) = tcp_header(bytes, network) else { return };
    let header = &mut bytes[at..at + 20];
    let checksum = !u16::from_be_bytes([header[16], header[17]]);
    let checksum = !add(add(checksum, !u16::from(header[13])), u16::from(flags));
    header[13] = flags;
    header[16..18].copy_from_slice(&checksum.to_be_bytes());
}

/// The flags of a packet that has a TCP header.
fn tcp_flags(bytes: &[u8], network: usize) -> Option<u8> {
    tcp_header(bytes, network).map(|at| bytes[at + 13])
}

/// Where a packet's TCP header is, if it has one whole.
fn tcp_header(bytes: &[u8], network: usize) -> Option<usize> {
    let fields = Fields::of(bytes, network)?;
    let has = fields.protocol == PROTOCOL_TCP && fields.first && fields.transport + 20 <= bytes.len();
    has.then_some(fields.transport)
}

/// Leaves a packet's transport checksum to the device, where it has one of these (protocol, offset) and is a whole packet.
pub(super) fn leave_checksum(sight: &mut Sight, of: &[(u8, usize)]) {
    let bytes = &mut sight.input.bytes;
    let Some(fields) = Fields::of(bytes, 14).filter(|fields| fields.whole && fields.sound) else { return };
    let Some((_, field)) = of.iter().find(|(protocol, _)| *protocol == fields.protocol) else { return };
    let place = fields.transport + field;
    if place + 2 > fields.end || fields.port(bytes, *field) == 0 {
        return;
    }
    let length = (fields.end - fields.transport) as u16;
    let parts = [sum(&octets(fields.source)), sum(&octets(fields.destination)), u16::from(fields.protocol), length];
    bytes[place..place + 2].copy_from_slice(&parts.into_iter().fold(0, add).to_be_bytes());
    let place = if sight.hook.network() == 0 { place - 14 } else { place };
    sight.input.checksum = Checksum::Partial(place as u32);
}

/// The parser reads no ports that aren't there, and the same as another parser; rewriting is undone by rewriting.
pub(super) fn parsing(kernel: &Kernel, sight: &Sight) {
    let (hook, input) = (sight.hook, &sight.input);
    let network = hook.network() as usize;
    let Some(parsed) = kernel.parse(hook, input) else { return };
    if let Found::Transport | Found::First = parsed.kind {
        let least = if parsed.protocol == PROTOCOL_TCP { 20 } else { 8 };
        assert!(parsed.transport as usize + least <= input.bytes.len(), "ports beyond the packet: {parsed:?}");
        assert!(parsed.transport as usize + least <= network + parsed.length as usize, "ports beyond: {parsed:?}");
        let fields = Fields::of(&input.bytes, network).expect("what the programs can read, others can");
        // A GSO packet's length isn't in its header, and others stop at headers in an order that is not the RFC's.
        if fields.sound && input.gso_size == 0 {
            let (from, to) = (fields.from(&input.bytes), fields.to(&input.bytes));
            assert_eq!((parsed.source, parsed.destination, parsed.protocol), (from, to, fields.protocol));
            assert_eq!((parsed.transport as usize, parsed.ttl), (fields.transport, fields.ttl(&input.bytes)));
            assert_eq!(parsed.kind == Found::Transport, fields.whole, "{parsed:?}");
            assert!(fields.first, "a later fragment's ports");
        }
    }
    let Some((complete, bytes)) = kernel.rewrite_there_and_back(hook, input, [1, 2, 3, sight.random as u8]) else {
        return;
    };
    // A fragmented SCTP packet can't be rewritten: its checksum would need the whole.
    if parsed.protocol == PROTOCOL_SCTP && parsed.kind == Found::First {
        return;
    }
    assert!(complete, "a rewrite that the parser doesn't read: {parsed:?}");
    assert_eq!(bytes.len(), input.bytes.len());
    if bytes == input.bytes {
        return;
    }
    let fields = [network + 10, parsed.transport as usize + 16, parsed.transport as usize + 6];
    for (at, (is, was)) in bytes.iter().zip(&input.bytes).enumerate() {
        // Of a checksum that was wrong, or zero, the two forms of zero may be exchanged.
        let zero =
            fields.iter().any(|field| at / 2 * 2 == *field && is_zero(&bytes, *field) && is_zero(&input.bytes, *field));
        assert!(is == was || zero, "byte {at} is {is:#x} and was {was:#x}: {parsed:?}");
    }
}

/// What holds over a whole conversation.
#[derive(Default)]
pub(super) struct Laws {
    /// Who has connected: client, frontend, protocol.
    opened: BTreeSet<(SocketAddr, SocketAddr, u8)>,
    /// Packets that are accounted for as dropped or answered.
    counted: u64,
}

/// Packets that were dropped or answered. What others had to give way for is counted in the same map, and goes on.
fn counted() -> u64 {
    let goes_on = [drop_reason::SYN_FAILOVERS, DropReason::HalfOpenReplaced as u32];
    let counters = maps::DROP_COUNTERS.dump().into_iter();
    counters.filter(|(index, _)| !goes_on.contains(index)).map(|(_, count)| count).sum()
}

impl Laws {
    /// What a program made of a packet.
    pub(super) fn seen(&mut self, world: &World, sight: &Sight, output: &Output) {
        let (before, after) = (&sight.input.bytes, &output.bytes);
        let all = counted();
        let counted = all - std::mem::replace(&mut self.counted, all);
        if let Fate::Drop(_) = output.fate {
            assert_eq!(counted, 1, "a drop is counted once");
            return;
        }
        let parsed = world.kernel.parse(sight.hook, &sight.input);
        let fields = Fields::agreed(world, sight.hook, &sight.input);
        let (Some(parsed), Some(fields)) = (parsed, fields) else {
            assert_eq!((output.fate, after), (Fate::Pass, before), "a packet that concerns nobody");
            return;
        };
        if output.fate == Fate::Pass && before == after {
            assert!(!must_not_pass(world, sight, &parsed), "passed to the stack untranslated: {parsed:?}");
            return;
        }
        let is_answer = output.fate == Fate::Redirect(Redirect::Frame(sight.input.ifindex)) && counted == 1;
        if is_answer || parsed.kind == Found::Echo {
            answered(&fields, sight, output);
        } else if parsed.kind == Found::IcmpError {
            sums_stay(world, &fields, sight, output);
        } else {
            self.translated(world, &fields, sight, output);
        }
    }

    /// A packet that goes on with another source or destination.
    fn translated(&mut self, world: &World, fields: &Fields, sight: &Sight, output: &Output) {
        let (before, after) = (&sight.input.bytes, &output.bytes);
        let network = fields.network;
        assert_eq!(before.len(), after.len(), "translation keeps the length");
        let now = Fields::agreed(world, sight.hook, &sight.after(output)).expect("still a packet");
        let mut same = after.clone();
        let addresses = if fields.ipv6 { network + 8..network + 40 } else { network + 12..network + 20 };
        let (ttl, header_sum) = (network + if fields.ipv6 { 7 } else { 8 }, network + 10);
        let mut restored = vec![0..network.min(12), addresses, ttl..ttl + 1];
        if !fields.ipv6 {
            restored.push(header_sum..header_sum + 2);
        }
        if fields.first {
            let sum = match fields.protocol {
                PROTOCOL_TCP => 16..18,
                PROTOCOL_UDP => 6..8,
                _ => 8..12,
            };
            restored.push(fields.transport..fields.transport + 4);
            restored.push(fields.transport + sum.start..fields.transport + sum.end);
        }
        for range in restored {
            same[range.clone()].copy_from_slice(&before[range]);
        }
        assert_eq!(&same, before, "nothing else changes: {sight:x?} → {output:x?}");
        let forwarded = matches!(output.fate, Fate::Transmit)
            || matches!(output.fate, Fate::Redirect(to) if to != Redirect::Frame(sight.input.ifindex));
        assert_eq!(now.ttl(after), fields.ttl(before) - u8::from(forwarded), "TTL of what was {:?}", output.fate);
        sums_stay(world, fields, sight, output);
        if !fields.first {
            return;
        }
        let (from, to, new_from, new_to) = (fields.from(before), fields.to(before), now.from(after), now.to(after));
        if world.is_frontend(to) && world.is_backend(new_to) {
            let sources = [from.ip(), world.plan.of(NODE), world.plan.of(HAIRPIN)];
            assert!(sources.contains(&new_from.ip()), "source {new_from} of a packet from {from}");
            let moved = (SNAT_PORTS[0]..=SNAT_PORTS[1]).contains(&new_from.port());
            assert!(new_from.port() == from.port() || moved, "source port {new_from} of a packet from {from}");
            self.opened.insert((from, to, fields.protocol));
        } else {
            assert!(world.is_backend(from), "{from} → {to} became {new_from} → {new_to}");
            let asked = (new_to, new_from, fields.protocol);
            assert!(self.opened.contains(&asked), "{from} → {to} answers what nobody asked: {new_from} → {new_to}");
        }
    }
}

/// Whether both bytes of a field are the same zero of one's-complement arithmetic.
fn is_zero(bytes: &[u8], field: usize) -> bool {
    matches!(bytes.get(field..field + 2), Some([0, 0] | [255, 255]))
}

/// Whether a packet must be translated, answered or dropped: it is for this node, and opens or carries a connection to a frontend.
fn must_not_pass(world: &World, sight: &Sight, parsed: &sheave_ebpf_host::parsing::Parsed) -> bool {
    let enters = matches!(sight.hook, Hook::PodIngress | Hook::UplinkIngress | Hook::UplinkIngressL3);
    enters
        && sight.input.kind == 0
        && !world.plan.shares()
        && parsed.kind == Found::Transport
        && world.is_frontend(parsed.destination)
}

/// An answer goes back to whom it answers, as if by whom they asked.
fn answered(fields: &Fields, sight: &Sight, output: &Output) {
    let after = Fields::of(&output.bytes, fields.network).expect("an answer is a packet");
    assert_eq!((after.source, after.destination), (fields.destination, fields.source), "an answer's addresses");
    assert_eq!(output.fate, Fate::Redirect(Redirect::Frame(sight.input.ifindex)));
    // What the device or the kernel finishes comes out right only on its way.
    if output.checksum == Checksum::Final {
        let [header, transport, _] = after.sums(&output.bytes, output.checksum);
        assert_ne!(header, Some(false), "header checksum of an answer");
        let [_, was_right, _] = fields.sums(&sight.input.bytes, sight.input.checksum);
        assert!(
            transport != Some(false) || was_right == Some(false),
            "transport checksum of an answer: {sight:x?} → {output:x?}"
        );
    }
}

/// Checksums that were right are right.
fn sums_stay(world: &World, fields: &Fields, sight: &Sight, output: &Output) {
    let before = fields.sums(&sight.input.bytes, sight.input.checksum);
    let after = Fields::agreed(world, sight.hook, &sight.after(output)).expect("still a packet");
    let after = after.sums(&output.bytes, output.checksum);
    for (what, (was, is)) in ["header", "transport", "device's"].iter().zip(before.into_iter().zip(after)) {
        assert!(was != Some(true) || is != Some(false), "the {what} checksum was right: {sight:x?} → {output:x?}");
    }
}

/// XDP and tc come to the same.
pub(super) fn same(sight: &Sight, tc: &Output, xdp: &Output) {
    let (tc_fate, xdp_fate) = match (tc.fate, xdp.fate) {
        (Fate::Redirect(Redirect::Neighbour(to, _)), Fate::Transmit) => (to, sight.input.ifindex),
        (Fate::Redirect(Redirect::Neighbour(to, _)), Fate::Redirect(Redirect::Frame(other))) => (to, other),
        (tc, xdp) => {
            assert_eq!(tc, xdp, "tc and XDP disagree on {sight:?}");
            (0, 0)
        }
    };
    assert_eq!(tc_fate, xdp_fate, "tc and XDP send by different interfaces");
    if let Fate::Drop(_) = tc.fate {
        return;
    }
    let network = |bytes: &[u8]| bytes.get(14..).map(<[u8]>::to_vec);
    assert_eq!(network(&tc.bytes), network(&xdp.bytes), "tc and XDP write different packets");
}
