//! What belongs to this node's own sockets although its address and port are a frontend's.

use aya_ebpf::helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp};
use sheave_common::flow::Tuple;

use crate::context::Context;
use crate::packet::network::Network;

/// The kernel's BPF_F_CURRENT_NETNS: look in the network namespace of the packet's interface.
const CURRENT_NAMESPACE: u64 = u64::MAX;
/// The kernel's TCP_LISTEN.
const LISTEN: u32 = 10;

/// Whether a socket of this node has the TCP connection that a segment belongs to. A listener has none: what comes to a
/// frontend is the Service's.
#[inline(always)]
pub fn connection<C: Context, A: Network>(ctx: &C, tuple: &Tuple<A>) -> bool {
    // SAFETY: the helper only reads the tuple, which lies in memory as the kernel's struct bpf_sock_tuple of its family.
    let socket = unsafe {
        let tuple = core::ptr::from_ref(tuple).cast_mut().cast();
        bpf_skc_lookup_tcp(ctx.as_ptr(), tuple, size_of::<Tuple<A>>() as u32, CURRENT_NAMESPACE, 0)
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the socket isn't null, and is ours until it is released.
    let state = unsafe { (*socket).state };
    // SAFETY: as above; it is not used after this.
    unsafe { bpf_sk_release(socket.cast()) };
    state != LISTEN
}
