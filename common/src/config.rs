//! `config` (array of one): what can change while the programs run, and what must survive a restart of the controller.

use crate::flow::{closing, state};
use crate::{Ipv4Address, Ipv6Address, PROTOCOL_UDP};

/// The one element of the config map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Config {
    /// Next value for [`crate::frontend::Frontend::version`] and [`crate::backend::Backend::version`]; raised before use.
    pub next_version: u64,
    /// Cookie of the network namespace whose processes are balanced at connect time; see [`flags::CONNECT_INIT_NETNS`].
    pub host_netns_cookie: u64,
    /// [`crate::LAYOUT_VERSION`] of the pinned maps; 0 in a map that was never written.
    pub layout_version: u32,
    /// Next backend id; raised before use, never reused. Ids start at 1.
    pub next_backend_id: u32,
    /// Smallest service id that was never used; raised before use. Ids start at 1.
    pub next_service_id: u32,
    /// Bits of [`flags`].
    pub flags: u32,
    /// When flows expire.
    pub timeouts: Timeouts,
    /// First source port for SNAT, machine order.
    pub snat_port_first: u16,
    /// Last source port for SNAT, machine order, inclusive.
    pub snat_port_last: u16,
    /// ICMP errors and resets that one CPU may send in a second.
    pub rejects_per_second: u32,
    /// Source of a pod's packets to itself through a Service (hairpin).
    pub hairpin4: Ipv4Address,
    /// The same for IPv6.
    pub hairpin6: Ipv6Address,
    /// This node's primary address: the affinity key of processes on this host. Unspecified if unknown.
    pub node4: Ipv4Address,
    /// The same for IPv6.
    pub node6: Ipv6Address,
}

/// Idle time in seconds after which a flow no longer matches, by its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Timeouts {
    /// TCP, handshake incomplete.
    pub syn: u32,
    /// TCP, open.
    pub established: u32,
    /// TCP, after a FIN.
    pub closing: u32,
    /// TCP, after a RST.
    pub reset: u32,
    /// UDP, no reply seen.
    pub udp_new: u32,
    /// UDP, replied.
    pub udp_established: u32,
}

/// Bits of [`Config::flags`].
pub mod flags {
    /// Connect-time balancing for processes whose network namespace has [`super::Config::host_netns_cookie`].
    pub const CONNECT_HOST: u32 = 1 << 0;
    /// Connect-time balancing for TCP of every process below the cgroup.
    pub const CONNECT_TCP: u32 = 1 << 1;
    /// Connect-time balancing for every process below the cgroup.
    pub const CONNECT_ALL: u32 = 1 << 2;
    /// The host's network namespace is the kernel's initial one: kernels before 5.14 don't tell userspace a
    /// namespace's cookie, so the programs ask for the initial one's themselves.
    pub const CONNECT_INIT_NETNS: u32 = 1 << 3;
    /// Mid-flow TCP to a frontend without a flow passes untouched instead of being reset: connections that netfilter
    /// translates drain in peace.
    pub const DRAIN_FOREIGN: u32 = 1 << 4;
    /// `service_cidrs4` is not empty.
    pub const SERVICE_CIDRS4: u32 = 1 << 5;
    /// `service_cidrs6` is not empty.
    pub const SERVICE_CIDRS6: u32 = 1 << 6;
    /// There may be flows that bypass netfilter ([`crate::flow::EDGE_BYPASS`]); never taken back.
    pub const BYPASSED: u32 = 1 << 7;
    /// Another proxy takes over: what no flow knows passes untouched, and sockets are no longer pointed at backends. Flows and
    /// sockets that are known carry on.
    pub const LEAVING: u32 = 1 << 8;
    /// A SYN that a client sends again because nothing has answered it goes to another backend.
    pub const SYN_FAILOVER: u32 = 1 << 9;
}

impl Timeouts {
    /// The values that DESIGN gives.
    pub const DEFAULT: Self =
        Self { syn: 60, established: 86_400, closing: 120, reset: 10, udp_new: 30, udp_established: 120 };

    /// How long a flow may be idle, given its protocol, [`crate::flow::Flow::state`] and [`crate::flow::Flow::closing`].
    #[inline(always)]
    #[must_use]
    pub const fn of(&self, protocol: u8, state: u8, closing: u8) -> u32 {
        let established = state == state::ESTABLISHED;
        if protocol == PROTOCOL_UDP {
            if state == state::NEW { self.udp_new } else { self.udp_established }
        } else if closing & closing::RESET != 0 {
            self.reset
        } else if closing != 0 {
            self.closing
        } else if established {
            self.established
        } else {
            self.syn
        }
    }
}

crate::layout::layout!(Timeouts, size 24, {
    syn @ 0 + 4, established @ 4 + 4, closing @ 8 + 4, reset @ 12 + 4, udp_new @ 16 + 4, udp_established @ 20 + 4,
});
crate::layout::layout!(Config, size 104, {
    next_version @ 0 + 8, host_netns_cookie @ 8 + 8, layout_version @ 16 + 4, next_backend_id @ 20 + 4,
    next_service_id @ 24 + 4, flags @ 28 + 4, timeouts @ 32 + 24, snat_port_first @ 56 + 2, snat_port_last @ 58 + 2,
    rejects_per_second @ 60 + 4, hairpin4 @ 64 + 4, hairpin6 @ 68 + 16, node4 @ 84 + 4, node6 @ 88 + 16,
});
