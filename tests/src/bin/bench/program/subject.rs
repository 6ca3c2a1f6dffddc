//! Paths through the programs, each with a way to take one sample that says whether the packet came out right.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::Pod;
use sheave_common::flow::{Flow, FlowKey};
use sheave_common::{PROTOCOL_TCP, names};
use sheave_tests::family::Family;
use sheave_tests::packet::{Packet, SYN, View};
use sheave_tests::program::{NEXT, Outcome, Programs, REDIRECT, SkbContext, XDP_TX};

use super::walk::{Circle, KeyAddress};

/// New connections that one run of the kernel's makes: as many as a TTL allows.
pub(crate) const CHAIN: u32 = 250;
/// The chains' service ids begin here.
pub(crate) const FIRST_CHAIN_ID: u32 = 100;
/// TTL that packets start with.
const TTL: u8 = 255;
/// Most packets whose TTL falls can be run so often.
const TTL_RUNS: u32 = 250;

/// A program, and where its packets are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hook {
    /// Its name; `uplink_xdp` is XDP's.
    pub(crate) program: &'static str,
    /// The interface.
    pub(crate) ifindex: u32,
}

impl Hook {
    /// Runs it again and again on what it makes of a packet.
    pub(crate) fn run(&self, programs: &mut Programs, packet: &[u8], repeat: u32) -> Result<Outcome> {
        match self.program {
            "uplink_xdp" => programs.xdp_repeated(packet, self.ifindex, repeat),
            tc => {
                let context = SkbContext { ifindex: self.ifindex, ..SkbContext::default() };
                programs.tc_repeated(tc, packet, context, repeat)
            }
        }
    }

    /// How many calls of so many runs each make about `runs`. The kernel waits for a grace period before and after each call
    /// of an XDP program, so of those there are few.
    fn calls(&self, runs: u32, each: u32) -> u32 {
        let most = if self.is_xdp() { 4 } else { u32::MAX };
        (runs / each).clamp(1, most)
    }

    fn is_xdp(&self) -> bool {
        self.program == "uplink_xdp"
    }
}

/// What is done with the packets.
#[derive(Clone, Debug)]
pub(crate) enum Path {
    /// A packet that is none of Sheave's.
    Pass {
        /// The packet.
        packet: Vec<u8>,
        /// What the program should say.
        action: i32,
    },
    /// Packets of flows that are there.
    Walk {
        /// The flows.
        circle: Circle,
        /// The backend's packets.
        reply: bool,
        /// They are redirected, so their TTL falls.
        redirected: bool,
    },
    /// First packets of connections.
    New {
        /// The chain of services.
        chain: Chain,
    },
}

/// Something to time.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// As the figure is called.
    pub(crate) name: &'static str,
    /// Where.
    pub(crate) hook: Hook,
    /// What.
    pub(crate) path: Path,
}

/// Services whose only endpoint is the next one's address: a packet that comes out of one run opens a new connection in
/// the next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chain {
    /// Family of all addresses.
    pub(crate) family: Family,
    /// TCP or UDP.
    pub(crate) protocol: u8,
    /// The endpoints are on another node: SNAT.
    pub(crate) remote: bool,
}

impl Chain {
    /// Address of the service at a place.
    pub(crate) fn address(&self, place: u32) -> SocketAddr {
        let kind = if self.remote { 98 } else { 97 };
        let [_, _, _, low] = place.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd00, 0x10, kind.into(), 0, 0, 0, 0, low.into());
        SocketAddr::new(self.family.pick(Ipv4Addr::new(10, kind, 0, low), v6), 80)
    }

    fn client(&self, number: u32) -> SocketAddr {
        let [_, high, middle, low] = number.to_be_bytes();
        let v6 = Ipv6Addr::new(0xfd01, 0x99, 0, 0, 0, 0, high.into(), u16::from_be_bytes([middle, low]));
        let address: IpAddr = self.family.pick(Ipv4Addr::new(19, high, middle, low), v6);
        SocketAddr::new(address, 40_000)
    }

    /// The map that its flows go to.
    pub(crate) fn map(&self) -> &'static str {
        match self.family {
            Family::V4 => names::HALF_OPEN4,
            Family::V6 => names::HALF_OPEN6,
        }
    }

    fn packet(&self, client: SocketAddr, place: u32, ttl: u8) -> Vec<u8> {
        let (client, service) = (client.to_string(), self.address(place).to_string());
        let packet = match self.protocol {
            PROTOCOL_TCP => Packet::tcp(&client, &service, SYN),
            _ => Packet::udp(&client, &service),
        };
        packet.ttl(ttl).build().to_vec()
    }

    /// Fails unless the last service's endpoint is where a packet came out.
    fn check(&self, outcome: &Outcome, client: SocketAddr, hook: &Hook) -> Result<()> {
        let ttl = if self.remote { TTL - u8::try_from(CHAIN)? } else { TTL };
        if !self.remote {
            ensure!(outcome.action == NEXT, "the verdict is {}", outcome.action);
            ensure!(outcome.packet == self.packet(client, CHAIN, ttl), "{}", View(&outcome.packet).tuple());
            return Ok(());
        }
        let action = if hook.is_xdp() { XDP_TX } else { REDIRECT };
        ensure!(outcome.action == action, "the verdict is {}", outcome.action);
        let view = View(&outcome.packet);
        ensure!(view.destination() == self.address(CHAIN) && view.ttl() == ttl, "{}", view.tuple());
        let mut expected = self.packet(view.source(), CHAIN, ttl);
        if hook.is_xdp() {
            expected[..12].copy_from_slice(&outcome.packet[..12]);
        }
        ensure!(outcome.packet == expected, "not the SYN of {}", view.tuple());
        Ok(())
    }
}

impl Subject {
    /// Nanoseconds that each of about so many runs took. The packet that comes out of each call is compared with the one
    /// that should, byte by byte.
    pub(crate) fn sample<A: KeyAddress>(&self, programs: &mut Programs, runs: u32) -> Result<f64>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let sampled = match &self.path {
            Path::Pass { packet, action } => {
                let outcome = self.hook.run(programs, packet, runs)?;
                ensure!(outcome.action == *action, "the verdict is {}, not {action}", outcome.action);
                ensure!(outcome.packet == *packet, "the packet has changed");
                Ok(nanoseconds(&outcome))
            }
            Path::Walk { circle, reply, redirected: false } => self.walk(programs, circle, *reply, runs),
            Path::Walk { circle, reply, redirected: true } => {
                let calls = self.hook.calls(runs, TTL_RUNS);
                let each = (0..calls).map(|_| self.walk(programs, circle, *reply, TTL_RUNS.min(runs)));
                Ok(each.sum::<Result<f64>>()? / f64::from(calls))
            }
            Path::New { chain } => self.open::<A>(programs, chain, self.hook.calls(runs, CHAIN)),
        };
        sampled.with_context(|| self.name)
    }

    fn walk(&self, programs: &mut Programs, circle: &Circle, reply: bool, runs: u32) -> Result<f64> {
        let outcome = self.hook.run(programs, &circle.packet(0, reply, TTL), runs)?;
        let redirected = matches!(self.path, Path::Walk { redirected: true, .. });
        let (action, ttl) = match (redirected, self.hook.is_xdp()) {
            (false, _) => (NEXT, TTL),
            (true, xdp) => (if xdp { XDP_TX } else { REDIRECT }, TTL - u8::try_from(runs)?),
        };
        ensure!(outcome.action == action, "the verdict is {}, not {action}", outcome.action);
        let mut expected = circle.packet(circle.place_after(runs, reply), reply, ttl);
        if self.hook.is_xdp() {
            // XDP writes the next hop's MAC addresses.
            let macs = [super::ROUTER_MAC, super::UPLINK_MAC].concat();
            expected[..12].copy_from_slice(&macs);
        }
        ensure!(
            outcome.packet == expected,
            "{} came out, not {}",
            View(&outcome.packet).tuple(),
            View(&expected).tuple()
        );
        Ok(nanoseconds(&outcome))
    }

    fn open<A: KeyAddress>(&self, programs: &mut Programs, chain: &Chain, calls: u32) -> Result<f64>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let mut sum = 0.0;
        for number in 0..calls {
            let client = chain.client(number);
            let outcome = self.hook.run(programs, &chain.packet(client, 0, TTL), CHAIN)?;
            chain.check(&outcome, client, &self.hook)?;
            sum += nanoseconds(&outcome);
        }
        let made = forget::<A>(programs, chain.map())?;
        ensure!(made == 2 * CHAIN * calls, "{made} entries were made of {calls} times {CHAIN} connections");
        Ok(sum / f64::from(calls))
    }
}

/// Removes the flows of chains, and says how many entries they were.
pub(crate) fn forget<A: KeyAddress>(programs: &mut Programs, map: &str) -> Result<u32>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut map = programs.hash::<FlowKey<A>, Flow<A>>(map)?;
    let entries = map.iter().filter(|entry| entry.as_ref().is_ok_and(|(_, flow)| flow.service_id >= FIRST_CHAIN_ID));
    let keys: Vec<FlowKey<A>> = entries.map(|entry| entry.map(|(key, _)| key)).collect::<Result<_, _>>()?;
    for key in &keys {
        map.remove(key)?;
    }
    Ok(u32::try_from(keys.len())?)
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one run")]
fn nanoseconds(outcome: &Outcome) -> f64 {
    outcome.duration.as_nanos() as f64
}
