//! Numbered reasons for packets that are not simply passed or translated. Append only: numbers are an interface.

macro_rules! reasons {
    ($( $(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal; )+) => {
        /// Why a packet was not simply passed or translated; the index into `drop_counters`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum DropReason { $( $(#[doc = $doc])+ $name = $number, )+ }

        impl DropReason {
            /// All reasons in numeric order.
            pub const ALL: &[Self] = &[$( Self::$name, )+];

            /// The reason's name in metrics and output.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $( Self::$name => $text, )+ }
            }
        }
    };
}

reasons! {
    /// Rejected: the service port has no usable endpoint anywhere.
    NoEndpoint = 1, "no_endpoint";
    /// Dropped: endpoints exist, none on this node, and the policy is Local.
    NoLocalEndpoint = 2, "no_local_endpoint";
    /// Rejected: the address is a ClusterIP that does not have this port.
    UnknownPort = 3, "unknown_port";
    /// Reset: mid-flow TCP to a frontend, and no flow knows it.
    NoFlow = 4, "no_flow";
    /// Dropped: a map value kept changing while it was read.
    Contended = 5, "contended";
    /// Dropped: the backend table names a backend that does not exist.
    BackendMissing = 6, "backend_missing";
    /// Dropped: a flow could not be inserted.
    ConntrackFull = 7, "conntrack_full";
    /// Dropped: no free source port for SNAT was found.
    SnatPortsExhausted = 8, "snat_ports_exhausted";
    /// Answered with ICMP time exceeded: a redirected packet's TTL ran out.
    TtlExceeded = 9, "ttl_exceeded";
    /// Answered with ICMP fragmentation needed: a redirected packet is larger than its route's MTU.
    TooBig = 10, "too_big";
    /// Dropped: no route to the backend or back to the client.
    NoRoute = 11, "no_route";
    /// Dropped: a fragment to a service address whose first fragment was not seen before it.
    Fragment = 12, "fragment";
    /// Dropped: an ICMP redirect about a translated flow.
    IcmpRedirect = 13, "icmp_redirect";
    /// Dropped: rewriting the packet failed.
    RewriteFailed = 14, "rewrite_failed";
    /// Dropped: a reject or reset that the rate limit did not allow.
    RejectLimited = 15, "reject_limited";
    /// Dropped: the egress interface has no address to use as SNAT source.
    NoSourceAddress = 16, "no_source_address";
    /// Passed untouched, or dropped on its way to a ClusterIP: lengths in the headers contradict the packet.
    Malformed = 17, "malformed";
    /// Left alone at connect time: the socket is bound to loopback and the backend is not.
    LoopbackSource = 18, "loopback_source";
    /// Dropped: a hairpin packet on a device without Ethernet header.
    HairpinUnsupported = 19, "hairpin_unsupported";
    /// Dropped: the packet's protocol is not translated, and its destination is a service address.
    UnsupportedProtocol = 20, "unsupported_protocol";
    /// Dropped: a packet to a frontend from an address that no single host can have.
    MartianSource = 21, "martian_source";
    /// Dropped: the client is in none of loadBalancerSourceRanges.
    SourceRange = 22, "source_range";
    /// Dropped: an address inside a ServiceCIDR that no Service has.
    Unallocated = 23, "unallocated";
    /// Forgotten: a flow that was never established, whose source port went to a new one, since none was free.
    HalfOpenReplaced = 24, "half_open_replaced";
}

/// Index in `drop_counters` of what is no drop: SYNs that went to another backend than the one that had not answered.
pub const SYN_FAILOVERS: u32 = 0;

/// Number of elements of `drop_counters`: room for new reasons without a new layout.
pub const DROP_COUNTERS: usize = 64;

const _: () = assert!(DropReason::ALL[DropReason::ALL.len() - 1] as usize == DropReason::ALL.len());
const _: () = assert!(DropReason::ALL.len() < DROP_COUNTERS);
