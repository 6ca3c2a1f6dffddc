//! From a frontend to a backend: policy, affinity, choice.

use core::mem::MaybeUninit;

use aya_ebpf::helpers::bpf_get_prandom_u32;
use sheave_common::DropReason;
use sheave_common::affinity::{Affinity, AffinityKey};
use sheave_common::backend::{self, Backend};
use sheave_common::frontend::{BackendSet, Frontend, FrontendKey, flags};

use crate::maps::{self, BACKEND_TABLE, Family};
use crate::{features, versioned};

/// How often a choice starts again when the set changed under it.
const ATTEMPTS: u32 = 3;

/// Where a new connection comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A pod of this node, or a process on this host.
    Inside,
    /// An uplink or a tunnel.
    Outside,
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
fn set(frontend: &Frontend, origin: Origin) -> (BackendSet, bool) {
    let local = match origin {
        Origin::Inside => frontend.flags & flags::INTERNAL_LOCAL != 0,
        Origin::Outside => frontend.flags & flags::EXTERNAL_LOCAL != 0,
    };
    (if local { frontend.local } else { frontend.cluster }, local)
}

/// Chooses a backend for a new connection to the frontend `key`, and remembers it where the service has affinity.
#[inline(always)]
pub fn choose<'a, A: Family>(
    key: &FrontendKey<A>,
    origin: Origin,
    client: &A,
    now: u32,
    choice: &'a mut MaybeUninit<Choice<A>>,
) -> Result<&'a Choice<A>, DropReason> {
    choose_into(key, origin, client, now, choice)?;
    // SAFETY: `choose_into` fills it whenever it succeeds.
    Ok(unsafe { choice.assume_init_ref() })
}

/// A function of its own in the kernel too: new connections are rare enough, and the caller's stack is short.
#[inline(never)]
fn choose_into<A: Family>(
    key: &FrontendKey<A>,
    origin: Origin,
    client: &A,
    now: u32,
    choice: &mut MaybeUninit<Choice<A>>,
) -> Result<(), DropReason> {
    for _ in 0..ATTEMPTS {
        let frontend = versioned::frontend(key)?.ok_or(DropReason::BackendMissing)?;
        if frontend.flags & flags::SOURCE_RANGES != 0 && !A::in_source_ranges(frontend.service_id, *client) {
            return Err(DropReason::SourceRange);
        }
        let (set, local) = set(&frontend, origin);
        if set.length == 0 {
            let nowhere = frontend.cluster.length == 0;
            return Err(if nowhere { DropReason::NoEndpoint } else { DropReason::NoLocalEndpoint });
        }
        if frontend.affinity_seconds != 0
            && let Some(known) = remembered(&frontend, *client, local, now)
        {
            remember(&frontend, *client, known.id, now);
            choice.write(known);
            return Ok(());
        }
        // SAFETY: the helper takes no arguments.
        let random = unsafe { bpf_get_prandom_u32() };
        let index = set.first + random % set.length;
        let Some(id) = BACKEND_TABLE.get(index) else { continue };
        // SAFETY: an aligned word of an array element, which may be written at the same time; it is checked below.
        let id = unsafe { core::ptr::from_ref(id).read_volatile() };
        if let Some(backend) = versioned::backend::<A>(id)?
            && backend.service_id == frontend.service_id
        {
            if frontend.affinity_seconds != 0 {
                remember(&frontend, *client, id, now);
            }
            choice.write(Choice { id, backend });
            return Ok(());
        }
    }
    Err(DropReason::BackendMissing)
}

/// The backend of the client's last connection, if that is recent and the backend is still in the set.
#[inline(always)]
fn remembered<A: Family>(frontend: &Frontend, client: A, local: bool, now: u32) -> Option<Choice<A>> {
    let key = AffinityKey { service_id: frontend.service_id, client };
    // SAFETY: a map value stays readable while the program runs; what is read is checked below.
    let affinity = unsafe { maps::copy(A::affinity(&key)?) };
    if features::elapsed(affinity.last_new_connection, now) >= frontend.affinity_seconds {
        return None;
    }
    let backend = versioned::backend::<A>(affinity.backend_id).ok()??;
    let needed = if local { backend::flags::IN_LOCAL_SET } else { backend::flags::IN_CLUSTER_SET };
    if backend.service_id != frontend.service_id || backend.flags & needed == 0 {
        return None;
    }
    Some(Choice { id: affinity.backend_id, backend })
}

/// Remembers a client's backend.
#[inline(always)]
fn remember<A: Family>(frontend: &Frontend, client: A, backend_id: u32, now: u32) {
    let key = AffinityKey { service_id: frontend.service_id, client };
    A::insert_affinity(&key, &Affinity { backend_id, last_new_connection: now });
}
