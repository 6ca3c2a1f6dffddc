//! The programs' parser and rewriting by themselves, without maps.

use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};

use sheave_common::flow::FlowKey;
use sheave_common::{Address, Ipv4Address, Ipv6Address};

use crate::context::{Context, Skb};
use crate::kernel::{Family, Hook, Input, Kernel, family};
use crate::memory::Memory;
use crate::packet::network::Network;
use crate::packet::{Kind, Packet, Part, ethernet};
use crate::programs::{SocketBuffer, TcContext, XdpContext, XdpFrame};
use crate::translate;

/// What the parser says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Source address and port.
    pub source: SocketAddr,
    /// Destination address and port.
    pub destination: SocketAddr,
    /// Protocol number.
    pub protocol: u8,
    /// What kind of packet it is.
    pub kind: Found,
    /// Offset of the transport header.
    pub transport: u32,
    /// Bytes from the network header on.
    pub length: u32,
    /// TTL or hop limit.
    pub ttl: u8,
}

/// [`Kind`], as far as a test compares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A whole TCP, UDP or SCTP packet, with ports.
    Transport,
    /// A first fragment of one, with ports.
    First,
    /// A later fragment.
    Later,
    /// An ICMP error.
    IcmpError,
    /// An echo request.
    Echo,
    /// Whatever isn't translated.
    Other,
    /// Lengths that contradict the packet or each other.
    Broken,
}

fn found<A: Network>(kind: Kind, packet: &Packet<A>) -> Found {
    match kind {
        Kind::Transport if packet.part == Part::First => Found::First,
        Kind::Transport => Found::Transport,
        Kind::Later => Found::Later,
        Kind::IcmpError => Found::IcmpError,
        Kind::Echo => Found::Echo,
        Kind::Other | Kind::NotOurs => Found::Other,
        Kind::BadLength | Kind::Malformed => Found::Broken,
    }
}

fn ip<A: Address>(address: A) -> IpAddr {
    let words = address.words();
    if size_of::<A>() == size_of::<Ipv4Address>() {
        IpAddr::V4(Ipv4Address::from_be_word(words[0]).into())
    } else {
        IpAddr::V6(Ipv6Address::from_words(words).into())
    }
}

fn parse<C: Context, A: Network>(ctx: &C) -> Option<Parsed> {
    let mut room = MaybeUninit::<Packet<A>>::uninit();
    let kind = A::parse(ctx, 0, &mut room);
    if kind == Kind::NotOurs {
        return None;
    }
    // SAFETY: `parse` fills it unless it says so.
    let packet = unsafe { room.assume_init_ref() };
    let tuple = &packet.key.tuple;
    Some(Parsed {
        source: SocketAddr::new(ip(tuple.source), u16::from_be(tuple.source_port_be)),
        destination: SocketAddr::new(ip(tuple.destination), u16::from_be(tuple.destination_port_be)),
        protocol: packet.key.protocol,
        kind: found(kind, packet),
        transport: packet.transport::<C>(),
        length: packet.length,
        ttl: packet.ttl,
    })
}

/// An address that can be changed octet by octet.
trait Octets: Network {
    fn octets(&mut self) -> &mut [u8];
}

impl Octets for Ipv4Address {
    fn octets(&mut self) -> &mut [u8] {
        &mut self.octets
    }
}

impl Octets for Ipv6Address {
    fn octets(&mut self) -> &mut [u8] {
        &mut self.octets
    }
}

/// Something to do with a packet.
trait Work {
    type Result;
    fn run<C: Context, A: Octets>(self, ctx: &C) -> Option<Self::Result>;
}

struct Parse;

impl Work for Parse {
    type Result = Parsed;

    fn run<C: Context, A: Octets>(self, ctx: &C) -> Option<Parsed> {
        parse::<C, A>(ctx)
    }
}

/// Rewriting to what differs by so much, and back.
struct ThereAndBack([u8; 4]);

impl Work for ThereAndBack {
    type Result = bool;

    fn run<C: Context, A: Octets>(self, ctx: &C) -> Option<bool> {
        let mut room = MaybeUninit::<Packet<A>>::uninit();
        if A::parse(ctx, 0, &mut room) != Kind::Transport {
            return None;
        }
        // SAFETY: `parse` fills it.
        let before = unsafe { room.assume_init_ref() };
        let (old, mut new) = (before.key.tuple, before.key.tuple);
        for address in [&mut new.source, &mut new.destination] {
            for (octet, mask) in address.octets().iter_mut().rev().zip(self.0) {
                *octet ^= mask;
            }
        }
        new.source_port_be ^= u16::from_ne_bytes([self.0[0], self.0[1]]);
        new.destination_port_be ^= u16::from_ne_bytes([self.0[2], self.0[3]]);
        let mut room = MaybeUninit::<Packet<A>>::uninit();
        if translate::rewrite(ctx, before, &new, false).is_none() || A::parse(ctx, 0, &mut room) != Kind::Transport {
            return Some(false);
        }
        // SAFETY: as above.
        let after = unsafe { room.assume_init_ref() };
        let moved = FlowKey { tuple: new, ..before.key };
        Some(after.key == moved && translate::rewrite(ctx, after, &old, false).is_some())
    }
}

/// Does something with a packet in a hook's context; the packet afterwards.
fn in_context<W: Work>(hook: Hook, input: &Input, work: W) -> (Option<W::Result>, Vec<u8>) {
    fn of_family<W: Work, C: Context>(family: Option<Family>, ctx: &C, work: W) -> Option<W::Result> {
        match family? {
            Family::V4 => work.run::<C, Ipv4Address>(ctx),
            Family::V6 => work.run::<C, Ipv6Address>(ctx),
        }
    }
    let memory = Memory::new(&input.bytes, input.linear, hook.network());
    let family = family(hook, &input.bytes);
    if hook == Hook::Xdp {
        let mut frame = XdpFrame::new(memory, input.ifindex);
        let result = of_family(family, &XdpContext::new(&mut frame), work);
        return (result, frame.memory.bytes());
    }
    let mut buffer = SocketBuffer::new(memory, input.checksum, hook.network(), |context| {
        context.ifindex = input.ifindex;
        context.gso_size = input.gso_size;
    });
    let ctx = TcContext::new(&mut buffer);
    let result = if hook.network() == 0 {
        of_family(family, &Skb::<0>(ctx), work)
    } else {
        of_family(family, &Skb::<{ ethernet::LENGTH }>(ctx), work)
    };
    (result, buffer.memory.bytes())
}

impl Kernel {
    /// What a hook's program takes a packet for; `None` if it doesn't concern it.
    #[must_use]
    pub fn parse(&self, hook: Hook, input: &Input) -> Option<Parsed> {
        in_context(hook, input, Parse).0
    }

    /// Rewrites a packet to addresses and ports that are `mask` away from its own, and back. `None` if it has no ports;
    /// otherwise whether both rewrites succeeded and the parser read between them what was written, and the packet.
    #[must_use]
    pub fn rewrite_there_and_back(&self, hook: Hook, input: &Input, mask: [u8; 4]) -> Option<(bool, Vec<u8>)> {
        let (result, bytes) = in_context(hook, input, ThereAndBack(mask));
        result.map(|complete| (complete, bytes))
    }
}
