//! What a test tells the kernel under the programs, and what it hears.

use std::cell::Cell;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheave_common::{Address as _, DropReason, Ipv4Address, Ipv6Address};

use crate::balance::Origin;
use crate::bindings::bpf_redir_neigh;
use crate::context::Skb;
use crate::memory::Memory;
use crate::packet::ethernet;
use crate::programs::{Checksum, SocketBuffer, TcContext, XdpContext, XdpFrame};
use crate::verdict::Verdict;
use crate::{create, edge, failover, maps};

/// An address of either family as the kernel's four words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words(pub [u32; 4]);

impl From<IpAddr> for Words {
    fn from(address: IpAddr) -> Self {
        Self(match address {
            IpAddr::V4(address) => Ipv4Address::from(address).words(),
            IpAddr::V6(address) => Ipv6Address::from(address).words(),
        })
    }
}

impl Words {
    /// # Safety
    ///
    /// All of the struct is initialised.
    pub(crate) unsafe fn of_next_hop(next_hop: &bpf_redir_neigh) -> Self {
        // SAFETY: by the caller's promise; the larger member covers the smaller.
        Self(unsafe { next_hop.__bindgen_anon_1.ipv6_nh })
    }
}

/// A route to one destination.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Interface that packets leave by.
    pub ifindex: u32,
    /// Its MTU.
    pub mtu: u16,
    /// Whether the neighbour is known.
    pub resolved: bool,
    /// Source address that the kernel would choose.
    pub source: Words,
}

/// Where a program sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// Out of an interface, as it is.
    Frame(u32),
    /// Out of an interface, to a next hop.
    Neighbour(u32, Words),
    /// Into the namespace behind a veth.
    Peer(u32),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Tc,
    Xdp,
}

pub(crate) struct State {
    program: Program,
    pub(crate) features: u32,
    pub(crate) nanoseconds: u64,
    pub(crate) random: u32,
    redirected: Option<Redirect>,
    routes: Vec<(Words, Route)>,
}

/// What the clock shows at first.
const BOOTED: u64 = 1_000_000_000_000;
/// TC_ACT_REDIRECT, and XDP_REDIRECT.
const REDIRECTED: [i64; 2] = [7, 4];
/// TC_ACT_SHOT, and XDP_ABORTED.
const FAILED: [i64; 2] = [2, 0];

impl State {
    const fn new() -> Self {
        Self { program: Program::Tc, features: 0, nanoseconds: BOOTED, random: 0, redirected: None, routes: Vec::new() }
    }

    pub(crate) fn redirect(&mut self, to: Redirect) -> i64 {
        self.redirected = Some(to);
        REDIRECTED[self.program as usize]
    }

    pub(crate) fn redirect_failed(&self) -> i64 {
        FAILED[self.program as usize]
    }

    pub(crate) fn route(&self, destination: Words) -> Option<Route> {
        self.routes.iter().find(|(known, _)| *known == destination).map(|(_, route)| *route)
    }
}

static STATE: Mutex<State> = Mutex::new(State::new());
static TURN: Mutex<()> = Mutex::new(());

pub(crate) fn with<R>(use_state: impl FnOnce(&mut State) -> R) -> R {
    use_state(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A hook, with the program that Sheave attaches there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// tc, host side of a pod's veth.
    PodIngress,
    /// The same, toward the pod.
    PodEgress,
    /// tc, uplink.
    UplinkIngress,
    /// The same, outward.
    UplinkEgress,
    /// tc, a device without link-layer headers.
    UplinkIngressL3,
    /// The same, outward.
    UplinkEgressL3,
    /// XDP, uplink.
    Xdp,
}

impl Hook {
    /// Offset of the network header.
    #[must_use]
    pub const fn network(self) -> u32 {
        if matches!(self, Self::UplinkIngressL3 | Self::UplinkEgressL3) { 0 } else { ethernet::LENGTH }
    }
}

/// A packet that comes to a hook.
#[derive(Clone, Debug)]
pub struct Input {
    /// From the link-layer header on, if the hook has one.
    pub bytes: Vec<u8>,
    /// How many of the bytes are linear.
    pub linear: usize,
    /// Interface of the hook.
    pub ifindex: u32,
    /// The kernel's PACKET_HOST, PACKET_BROADCAST, …
    pub kind: u32,
    /// Payload per segment; 0 if it isn't a GSO packet.
    pub gso_size: u32,
    /// Whose work the checksum is.
    pub checksum: Checksum,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The next program, and then the stack.
    Pass,
    /// Dropped, for this reason.
    Drop(DropReason),
    /// Sent on by the program.
    Redirect(Redirect),
    /// XDP: out of the interface that it came in by.
    Transmit,
}

/// A packet that a program has seen.
#[derive(Clone, Debug)]
pub struct Output {
    /// What became of it.
    pub fate: Fate,
    /// As it is now.
    pub bytes: Vec<u8>,
    /// Whose work the checksum is.
    pub checksum: Checksum,
}

/// The one kernel of this process, for one test at a time.
pub struct Kernel {
    /// A program ran, and may have left something outside of maps.
    ran: Cell<bool>,
    _turn: MutexGuard<'static, ()>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        every_map::ALL.iter().for_each(|map| map.clear());
        if !self.ran.get() {
            return;
        }
        // SAFETY: no program runs, and none will before the next kernel has its turn.
        unsafe {
            (&raw mut failover::ANSWERED).write_bytes(0, 1);
            create::NEXT_TAKEOVER = 0;
        }
    }
}

impl Kernel {
    /// A kernel with empty maps, no routes, and these bits of [`sheave_common::features`].
    #[must_use]
    pub fn boot(features: u32) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        with(|state| *state = State { features, ..State::new() });
        Self { ran: Cell::new(false), _turn: turn }
    }

    /// Adds a route.
    pub fn route(&self, destination: IpAddr, route: Route) {
        with(|state| state.routes.push((destination.into(), route)));
    }

    /// Lets time pass.
    pub fn wait(&self, time: Duration) {
        with(|state| state.nanoseconds += time.as_nanos() as u64);
    }

    /// What the programs get for a random number from now on.
    pub fn set_random(&self, number: u32) {
        with(|state| state.random = number);
    }

    /// Runs a hook's program on a packet.
    #[must_use]
    pub fn run(&self, hook: Hook, input: &Input) -> Output {
        let program = if hook == Hook::Xdp { Program::Xdp } else { Program::Tc };
        with(|state| (state.program, state.redirected) = (program, None));
        self.ran.set(true);
        let memory = Memory::new(&input.bytes, input.linear, hook.network());
        let family = family(hook, &input.bytes);
        let (fate, memory, checksum) = if hook == Hook::Xdp {
            let mut frame = XdpFrame::new(memory, input.ifindex);
            let verdict = {
                let ctx = XdpContext::new(&mut frame);
                match family {
                    Some(Family::V4) => edge::ingress::<_, Ipv4Address>(&ctx, Origin::Outside),
                    Some(Family::V6) => edge::ingress::<_, Ipv6Address>(&ctx, Origin::Outside),
                    None => Verdict::Pass.to_bits(),
                }
            };
            (fate(verdict, |verdict| verdict.xdp_action() as i32), frame.memory, input.checksum)
        } else {
            let mut buffer = SocketBuffer::new(memory, input.checksum, hook.network(), |context| {
                context.ifindex = input.ifindex;
                context.pkt_type = input.kind;
                context.gso_size = input.gso_size;
            });
            let ctx = TcContext::new(&mut buffer);
            let verdict = match (hook.network(), family) {
                (0, Some(family)) => family.tc(hook, &Skb::<0>(ctx)),
                (_, Some(family)) => family.tc(hook, &Skb::<{ ethernet::LENGTH }>(ctx)),
                (_, None) => Verdict::Pass.to_bits(),
            };
            (fate(verdict, Verdict::tc_action), buffer.memory, buffer.checksum)
        };
        Output { fate, bytes: memory.bytes(), checksum }
    }
}

/// What a verdict's bits come to, once the kernel has been told.
fn fate(bits: u64, tell: impl FnOnce(Verdict) -> i32) -> Fate {
    let verdict = Verdict::from_bits(bits);
    let action = i64::from(tell(verdict));
    match verdict {
        Verdict::Pass => Fate::Pass,
        Verdict::Transmit => Fate::Transmit,
        Verdict::Drop(reason) => Fate::Drop(reason),
        Verdict::Action(_) => {
            let redirected = with(|state| (REDIRECTED[state.program as usize] == action).then_some(state.redirected));
            Fate::Redirect(redirected.flatten().expect("an action that is a redirect"))
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) enum Family {
    V4,
    V6,
}

/// By EtherType; without a link layer, by version, as a tunnel device tells it.
pub(crate) fn family(hook: Hook, bytes: &[u8]) -> Option<Family> {
    match (hook.network(), bytes) {
        (0, [first, ..]) if first >> 4 == 4 => Some(Family::V4),
        (0, [first, ..]) if first >> 4 == 6 => Some(Family::V6),
        (0, _) => None,
        (_, bytes) => match bytes.get(12..14) {
            Some([0x08, 0x00]) => Some(Family::V4),
            Some([0x86, 0xdd]) => Some(Family::V6),
            _ => None,
        },
    }
}

impl Family {
    /// The entry points of `main`.
    fn tc<const NETWORK: u32>(self, hook: Hook, ctx: &Skb<NETWORK>) -> u64 {
        match (hook, self) {
            (Hook::PodIngress, Self::V4) => edge::ingress::<_, Ipv4Address>(ctx, Origin::Inside),
            (Hook::PodIngress, Self::V6) => edge::ingress::<_, Ipv6Address>(ctx, Origin::Inside),
            (Hook::PodEgress, Self::V4) => edge::egress::<_, Ipv4Address>(ctx, Origin::Inside),
            (Hook::PodEgress, Self::V6) => edge::egress::<_, Ipv6Address>(ctx, Origin::Inside),
            (Hook::UplinkEgress | Hook::UplinkEgressL3, Self::V4) => {
                edge::egress::<_, Ipv4Address>(ctx, Origin::Outside)
            }
            (Hook::UplinkEgress | Hook::UplinkEgressL3, Self::V6) => {
                edge::egress::<_, Ipv6Address>(ctx, Origin::Outside)
            }
            (_, Self::V4) => edge::ingress::<_, Ipv4Address>(ctx, Origin::Outside),
            (_, Self::V6) => edge::ingress::<_, Ipv6Address>(ctx, Origin::Outside),
        }
    }
}

/// Empties every map.
mod every_map {
    use super::maps::*;
    use crate::btf_maps::Clear;

    /// The programs' maps.
    pub(super) static ALL: [&(dyn Clear + Sync); 30] = [
        &CONFIG,
        &FRONTENDS4,
        &FRONTENDS6,
        &BACKENDS4,
        &BACKENDS6,
        &BACKEND_TABLE,
        &BACKEND_LOADS,
        &CONNTRACK4,
        &CONNTRACK6,
        &HALF_OPEN4,
        &HALF_OPEN6,
        &AFFINITY4,
        &AFFINITY6,
        &NEW_AFFINITY4,
        &NEW_AFFINITY6,
        &INTERFACES_MAP,
        &SOURCE_RANGES4,
        &SOURCE_RANGES6,
        &SERVICE_CIDRS4,
        &SERVICE_CIDRS6,
        &FRAGMENTS4,
        &FRAGMENTS6,
        &SERVICE_COUNTERS,
        &DROP_COUNTERS,
        &ROUTES4,
        &ROUTES6,
        &DESTINATIONS,
        &SOURCES,
        &REJECT_BUDGET,
        &LISTENER,
    ];
}
