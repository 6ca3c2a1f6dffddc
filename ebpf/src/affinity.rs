//! Session affinity: which backend a client of a service port used last.
//!
//! What a packet chooses waits in the map of newcomers until one of the client's connections is established, as that one waits in the
//! half-open map: whoever only claims to be somebody can't make others forget theirs. Processes of this host are who they are.

use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::flow::{EDGE_UPLINK, Flow, FlowKey, flags};
use sheave_common::frontend::FrontendKey;

use crate::balance::From;
use crate::maps::{self, ANY, EXIST, Family, NOEXIST, Table};

/// What is remembered of a client, in one word: BPF functions take five arguments.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Last(u64);

impl Last {
    /// Nothing: no backend has the id 0.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    fn new(affinity: Affinity) -> Self {
        Self(u64::from(affinity.backend_id) << 32 | u64::from(affinity.last_new_connection))
    }

    /// A new connection to this backend.
    #[inline(always)]
    pub fn to(backend_id: u32, now: u32) -> Self {
        Self::new(Affinity { backend_id, last_new_connection: now })
    }

    #[inline(always)]
    fn affinity(self) -> Affinity {
        Affinity { backend_id: self.backend_id(), last_new_connection: self.new_connection() }
    }

    /// The client's backend.
    #[inline(always)]
    pub fn backend_id(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The second in which its last connection was new.
    #[inline(always)]
    pub fn new_connection(self) -> u32 {
        self.0 as u32
    }
}

/// Whose affinity it is: a service port's for an edge, in one word as well.
#[derive(Clone, Copy)]
pub struct Whose(u64);

impl Whose {
    /// Of a service port's client behind an edge.
    #[inline(always)]
    pub fn new(service_id: u32, edge: u32) -> Self {
        Self(u64::from(service_id) << 32 | u64::from(edge))
    }

    #[inline(always)]
    fn key<A: Family>(self, client: &A) -> AffinityKey<A> {
        AffinityKey { service_id: (self.0 >> 32) as u32, edge: self.0 as u32, client: *client }
    }
}

/// Where a client's choice is kept: a packet's with the newcomers, a process's with the known at once.
#[inline(always)]
pub fn table(edge: u32, from: From) -> Table {
    if edge == EDGE_UPLINK && from.is_inside() { Table::Established } else { Table::HalfOpen }
}

/// The client's last new connection, however long ago. A function of its own in the kernel too, for its stack.
#[inline(never)]
pub fn remembered<A: Family>(whose: Whose, client: &A) -> Last {
    read::<A>(&whose.key(client))
}

#[inline(always)]
fn read<A: Family>(key: &AffinityKey<A>) -> Last {
    let element = A::affinity(Table::Established, key).or_else(|| A::affinity(Table::HalfOpen, key));
    // SAFETY: a map value stays readable while the program runs; what is read is checked by `candidate`.
    element.map_or(Last::NONE, |element| Last::new(unsafe { maps::copy(element) }))
}

/// Binds a client to a backend in place of what was `remembered` of it; returns the id of the one that it is bound to:
/// another CPU may have been faster with another of its connections. A function of its own in the kernel too, for its stack.
#[inline(never)]
pub fn bind<A: Family>(whose: Whose, client: &A, last: Last, new: Last, table: Table) -> u32 {
    let key = whose.key(client);
    let is_first = last == Last::NONE && A::insert_affinity(table, &key, &new.affinity(), NOEXIST).is_ok();
    // Not by `remembered`: kernels before 6.6 count 32 bytes for a call from here, and none are left. For the first, this finds what
    // has become established since the last look.
    let current = read::<A>(&key);
    if current != Last::NONE && current != last {
        return current.backend_id();
    }
    if !is_first {
        write(&key, new, table);
    }
    new.backend_id()
}

/// Remembers a client's backend. A function of its own in the kernel too, for its stack.
#[inline(never)]
pub fn remember<A: Family>(whose: Whose, client: &A, new: Last, table: Table) {
    write(&whose.key(client), new, table);
}

/// Where the client is known already, or else in this table.
#[inline(always)]
fn write<A: Family>(key: &AffinityKey<A>, new: Last, table: Table) {
    let affinity = new.affinity();
    // A look first: the kernel makes room in an LRU map before it sees that there is nothing to replace.
    if A::affinity(Table::Established, key).is_some()
        && A::insert_affinity(Table::Established, key, &affinity, EXIST).is_ok()
    {
        return;
    }
    // An LRU map makes room; if it can't, the client's next connection is a fresh choice.
    let _ = A::insert_affinity(table, key, &affinity, ANY);
}

/// Remembers the client of a flow that has become established, given the packet that says so, and takes it from the newcomers. (A
/// backend's datagram past netfilter does not tell where the client is, who stays a newcomer then.) A function of its own in the kernel
/// too, for its stack.
#[inline(never)]
pub fn establish<A: Family>(flow: &Flow<A>, key: &FlowKey<A>) {
    let (frontend, port_be, client) = if flow.flags & flags::REPLY == 0 {
        (&key.tuple.destination, key.tuple.destination_port_be, &key.tuple.source)
    } else {
        (&flow.rewrite.source, flow.rewrite.source_port_be, &flow.rewrite.destination)
    };
    let untold = flow.flags & (flags::REPLY | flags::BYPASS) == flags::REPLY | flags::BYPASS;
    if untold || !has_affinity(&FrontendKey::new(*frontend, port_be, key.protocol), flow.service_id) {
        return;
    }
    let key = Whose::new(flow.service_id, key.edge).key(client);
    let affinity = match A::affinity(Table::HalfOpen, &key) {
        // SAFETY: a map value stays readable while the program runs.
        Some(element) => unsafe { maps::copy(element) },
        // Known already, or forgotten among too many newcomers.
        None => Affinity { backend_id: flow.backend_id, last_new_connection: flow.last_seen },
    };
    // Another of the client's connections may have been bound to another backend since.
    if affinity.backend_id == flow.backend_id
        && (A::insert_affinity(Table::Established, &key, &affinity, NOEXIST).is_ok()
            || A::affinity(Table::Established, &key).is_some())
    {
        A::remove_affinity(Table::HalfOpen, &key);
    }
}

/// Whether a frontend is this service port's, and that one has affinity.
#[inline(always)]
fn has_affinity<A: Family>(key: &FrontendKey<A>, service_id: u32) -> bool {
    A::frontend(key).is_some_and(|element| {
        // SAFETY: a map value stays readable while the program runs, and these are aligned words.
        let (owner, seconds) = unsafe {
            (
                (&raw const (*element).service_id).read_volatile(),
                (&raw const (*element).affinity_seconds).read_volatile(),
            )
        };
        owner == service_id && seconds != 0
    })
}
