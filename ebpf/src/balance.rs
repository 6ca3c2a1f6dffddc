//! From a frontend to a backend: policy, affinity, choice.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_get_prandom_u32;
use sheave_common::backend::{self, Backend, TableElement};
use sheave_common::flow::EDGE_UPLINK;
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, algorithm, client_hash, flags};
use sheave_common::{DropReason, Ipv4Address, Ipv6Address};

use crate::affinity::{self, Last, Whose};
use crate::conntrack::Found;
use crate::maps::{BACKEND_TABLE, Family};
use crate::packet::network::Network;
use crate::scratch::scratch;
use crate::{features, load, observe, versioned};

/// How often a choice starts again when the set changed under it.
const ATTEMPTS: u32 = 3;
/// How many elements of a run are looked at for another backend than one that does not answer. More in a row are one backend's only
/// where it outweighs all others together by more than this.
const OTHERS: u32 = 32;

/// Where a new connection comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Origin {
    /// A pod of this node, or a process on this host.
    Inside,
    /// An uplink or a tunnel.
    Outside,
}

/// Where a new connection comes from, by which of the client's ports, and what became of its first attempt, in one word: BPF
/// functions take five arguments.
#[derive(Clone, Copy)]
pub struct From(u64);

impl From {
    const OUTSIDE: u64 = 1 << 16;
    const AGAIN: u64 = 1 << 17;
    const ALIVE: u64 = 1 << 24;

    /// Of a packet that has no flow, or one that has not been answered.
    #[inline(always)]
    pub fn new(origin: Origin, found: Found) -> Self {
        let again = if found == Found::Unanswered { Self::AGAIN } else { 0 };
        Self(if origin == Origin::Outside { Self::OUTSIDE } else { 0 } | again)
    }

    /// By this port of the client's, or any number that is the connection's own.
    #[inline(always)]
    pub fn by(self, port_be: u16) -> Self {
        Self(self.0 | u64::from(port_be))
    }

    /// This backend has not answered, but it has answered others meanwhile if it is `alive`.
    #[inline(always)]
    pub fn unanswered_by(self, id: u32, alive: bool) -> Self {
        Self(self.0 | u64::from(id) << 32 | if alive { Self::ALIVE } else { 0 })
    }

    /// Whether it is not the first attempt.
    #[inline(always)]
    pub fn is_again(self) -> bool {
        self.0 & Self::AGAIN != 0
    }

    /// Where it comes from.
    #[inline(always)]
    pub fn origin(self) -> Origin {
        if self.is_inside() { Origin::Inside } else { Origin::Outside }
    }

    /// The backend that has not answered; no backend has the id 0.
    #[inline(always)]
    fn unanswered(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    fn is_alive(self) -> bool {
        self.0 & Self::ALIVE != 0
    }

    /// Whether it comes from a pod of this node, or a process on this host.
    #[inline(always)]
    pub fn is_inside(self) -> bool {
        self.0 & Self::OUTSIDE == 0
    }

    #[inline(always)]
    fn port_be(self) -> u16 {
        self.0 as u16
    }
}

/// A chosen backend.
#[derive(Clone, Copy)]
pub struct Choice<A: Family> {
    /// Its id.
    pub id: u32,
    /// Its value.
    pub backend: Backend<A>,
}

/// The set that traffic of this origin may reach. The short circuit is in the flags: inside traffic to a frontend under
/// the external policy uses the cluster set.
#[inline(always)]
fn set(frontend: &Frontend, from: From) -> (BackendSet, bool) {
    let local = frontend.flags & if from.is_inside() { flags::INTERNAL_LOCAL } else { flags::EXTERNAL_LOCAL } != 0;
    (if local { frontend.local } else { frontend.cluster }, local)
}

/// Chooses a backend for a process's new connection to the frontend `key`, and remembers it where the service has affinity.
/// `number` is any that is the connection's own. A function of its own in the kernel too, for its callers' stack.
#[inline(never)]
pub fn choose<A: Family>(
    key: &FrontendKey<A>,
    number: u16,
    client: &A,
    now: u32,
    choice: &mut MaybeUninit<Choice<A>>,
) -> Result<(), DropReason> {
    let from = From::new(Origin::Inside, Found::Miss).by(number);
    for _ in 0..ATTEMPTS {
        match attempt(key, from, EDGE_UPLINK, client, now, choice) {
            Err(DropReason::BackendMissing) => {}
            result => return result,
        }
    }
    Err(DropReason::BackendMissing)
}

/// The same for the packet whose key is this CPU's scratch's `forward`, and into its `choice`. Another backend
/// than the one that has not answered is chosen if there is one.
#[inline(always)]
pub fn choose_for_packet<A: Network>(from: From, now: u32) -> Result<(), DropReason> {
    let reasons = [
        DropReason::NoEndpoint,
        DropReason::NoLocalEndpoint,
        DropReason::SourceRange,
        DropReason::BackendMissing,
        DropReason::RewriteFailed,
    ];
    let mut result = DropReason::BackendMissing as u32;
    for _ in 0..ATTEMPTS {
        if result == DropReason::BackendMissing as u32 {
            result = A::attempt(from.0, now);
        }
    }
    for reason in reasons {
        if result == reason as u32 {
            return Err(reason);
        }
    }
    if result == 0 { Ok(()) } else { Err(DropReason::Contended) }
}

/// [`attempt`]. Global functions in the kernel, whose verifier looks at them once and not once for every way to get there, nor for
/// every attempt; so they take nothing but numbers. 0, or the reason for a drop.
macro_rules! attempts {
    ($($name:ident: $address:ty;)+) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $name(from: u64, now: u32) -> u32 {
                let Some(scratch) = scratch::<$address>() else { return DropReason::RewriteFailed as u32 };
                // SAFETY: the scratch is this run's alone; `create` has filled the key, and uses neither meanwhile.
                let (forward, choice) = unsafe { (&(*scratch).forward, &mut (*scratch).choice) };
                let tuple = &forward.tuple;
                let key = FrontendKey::new(tuple.destination, tuple.destination_port_be, forward.protocol);
                match attempt(&key, From(from), forward.edge, &tuple.source, now, choice) {
                    Ok(()) => 0,
                    Err(reason) => reason as u32,
                }
            }
        )+
    };
}

attempts! {
    attempt4: Ipv4Address;
    attempt6: Ipv6Address;
}

/// Chooses once. [`DropReason::BackendMissing`] if the frontend or its backend is not there: the set may have changed meanwhile.
#[inline(always)]
fn attempt<A: Family>(
    key: &FrontendKey<A>,
    from: From,
    edge: u32,
    client: &A,
    now: u32,
    choice: &mut MaybeUninit<Choice<A>>,
) -> Result<(), DropReason> {
    let frontend = versioned::frontend(key)?.ok_or(DropReason::BackendMissing)?;
    if frontend.flags & flags::SOURCE_RANGES != 0 && !A::in_source_ranges(frontend.service_id, *client) {
        return Err(DropReason::SourceRange);
    }
    let (set, local) = set(&frontend, from);
    if set.length == 0 {
        let nowhere = frontend.cluster.length == 0;
        return Err(if nowhere { DropReason::NoEndpoint } else { DropReason::NoLocalEndpoint });
    }
    let mut needed = if local { backend::flags::IN_LOCAL_SET } else { backend::flags::IN_CLUSTER_SET };
    let whose = Whose::new(frontend.service_id, edge);
    let last = if frontend.affinity_seconds == 0 { Last::NONE } else { affinity::remembered::<A>(whose, client) };
    let table = affinity::table(edge, from);
    let mut id = last.backend_id();
    let stays = last != Last::NONE
        && features::elapsed(last.new_connection(), now) < frontend.affinity_seconds
        && (id != from.unanswered() || from.is_alive())
        && fits::<A>(id, frontend.service_id, needed);
    if stays {
        if last.new_connection() != now {
            affinity::remember(whose, client, Last::to(id, now), table);
        }
    } else {
        let number = number(&frontend, key, client, from, last);
        let least = frontend.algorithm == algorithm::LEAST_CONNECTIONS && last == Last::NONE;
        let mut picked = pick::<A>(set, number % set.length, least);
        if from.is_again() && picked == from.unanswered() {
            picked = other(set.first, set.length, number, picked);
        }
        id = if frontend.affinity_seconds == 0 {
            picked
        } else {
            affinity::bind(whose, client, last, Last::to(picked, now), table)
        };
        if id == picked {
            // The set says that it is in it.
            needed = 0;
        }
    }
    if candidate(id, frontend.service_id, needed, choice)? { Ok(()) } else { Err(DropReason::BackendMissing) }
}

/// An element of a set's run, or, for the least connections, the better of it and another one at random. 0 if there is none. A
/// function of its own in the kernel too, for its stack.
#[inline(never)]
fn pick<A: Family>(set: BackendSet, offset: u32, least: bool) -> u32 {
    let first = element(set, offset);
    if !least || set.length < 2 {
        return first;
    }
    // SAFETY: the helper takes no arguments.
    let distance = 1 + unsafe { bpf_get_prandom_u32() } % (set.length - 1);
    load::lighter::<A>(first, element(set, (offset + distance) % set.length))
}

/// Another element of the run of `length` elements from `first` on than this one, or this one if there is none near: first a place
/// that the number decides on, each of the others being as likely, then those behind it. A global function in the kernel: its
/// verifier looks at the loop once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn other(first: u32, length: u32, number: u32, unanswered: u32) -> u32 {
    if length < 2 {
        return unanswered;
    }
    let set = BackendSet { first, length };
    let mut offset = number % length + 1 + number / length % (length - 1);
    for _ in 0..OTHERS {
        let id = element(set, offset % length);
        if id != unanswered {
            return id;
        }
        offset += 1;
    }
    unanswered
}

/// An element of a set's run: a backend's id, which is to be checked, because it may be written at the same time.
#[inline(always)]
fn element(set: BackendSet, offset: u32) -> u32 {
    let index = set.first + offset;
    let ids = BACKEND_TABLE.get(index / backend::IDS_PER_ELEMENT);
    let id = |ids: &TableElement| core::ptr::from_ref(&ids[(index % backend::IDS_PER_ELEMENT) as usize]);
    // SAFETY: an aligned word of an array element.
    ids.map_or(0, |ids| unsafe { id(ids).read_volatile() })
}

/// The number that decides on an element of a set's run.
#[inline(always)]
fn number<A: Family>(frontend: &Frontend, key: &FrontendKey<A>, client: &A, from: From, last: Last) -> u32 {
    // By a hash, a connection that is tried again and again would get one of the same two.
    if frontend.algorithm == algorithm::MAGLEV && !from.is_again() {
        let port_be = if frontend.affinity_seconds == 0 { from.port_be() } else { 0 };
        return hash(client, port_be, key.port_be, key.protocol);
    }
    if last != Last::NONE {
        // An element can't be replaced only if it is still the one that was read. So all who replace one write the same, and
        // two connections of one client that come at once go to one backend.
        return hash(client, last.backend_id() as u16, last.new_connection() as u16, key.protocol);
    }
    if frontend.algorithm == algorithm::ROUND_ROBIN && !from.is_again() {
        return observe::connections(frontend.service_id);
    }
    // SAFETY: the helper takes no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// [`client_hash`]. A function of its own in the kernel too, for its stack.
#[inline(never)]
fn hash<A: Family>(client: &A, port_be: u16, frontend_port_be: u16, protocol: u8) -> u32 {
    client_hash(client, port_be, frontend_port_be, protocol)
}

/// Whether a backend is there, is this service port's, and has the flags that are needed, as far as can be told at a glance:
/// [`candidate`] reads it whole.
#[inline(always)]
fn fits<A: Family>(id: u32, service_id: u32, needed: u32) -> bool {
    A::backend(id).is_some_and(|element| {
        // SAFETY: a map value stays readable while the program runs, and these are aligned words.
        let (owner, flags) = unsafe {
            ((&raw const (*element).service_id).read_volatile(), (&raw const (*element).flags).read_volatile())
        };
        owner == service_id && flags & needed == needed
    })
}

/// Reads a backend into `choice`; false unless it is there, is this service port's, and has the flags that are needed. A
/// function of its own in the kernel too, for its stack.
#[inline(never)]
fn candidate<A: Family>(
    id: u32,
    service_id: u32,
    needed: u32,
    choice: &mut MaybeUninit<Choice<A>>,
) -> Result<bool, DropReason> {
    let choice = choice.as_mut_ptr();
    // SAFETY: the place is a choice's. Its backend is read only after it was filled.
    let backend = unsafe { &raw mut (*choice).backend };
    if !versioned::backend(id, backend)? {
        return Ok(false);
    }
    // SAFETY: as above.
    let (owner, flags) = unsafe { ((*backend).service_id, (*backend).flags) };
    if owner != service_id || flags & needed != needed {
        return Ok(false);
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*choice).id).write(id) };
    Ok(true)
}
