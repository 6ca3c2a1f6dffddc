//! The kernel's helpers, with its checks (net/core/filter.c).

pub use generated::bpf_get_prandom_u32;

pub mod generated {
    use std::ffi::c_void;

    use crate::bindings::{
        __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, BPF_FIB_LKUP_RET_FRAG_NEEDED,
        BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC,
        bpf_fib_lookup as RouteParameters, bpf_redir_neigh, bpf_sock, bpf_sock_tuple, xdp_md,
    };
    use crate::kernel::{self, Redirect, Words};
    use crate::programs::{Checksum, SocketBuffer, XdpFrame};

    /// -EFAULT
    const FAULT: i64 = -14;
    /// -EINVAL
    const INVALID: i64 = -22;
    /// -ENOMEM
    pub(crate) const NO_MEMORY: i64 = -12;
    /// -ENOTSUPP
    const NOT_SUPPORTED: i64 = -524;
    /// AF_INET
    const AF_INET: u8 = 2;
    /// The largest offset that packet helpers take.
    const MAX_OFFSET: u32 = 0xffff;
    /// Bytes of an Ethernet frame that `bpf_skb_change_tail` allows.
    const MAX_LENGTH: u32 = 65_549;

    /// One's-complement addition.
    fn add(one: u32, other: u32) -> u32 {
        let (sum, carry) = one.overflowing_add(other);
        sum + u32::from(carry)
    }

    /// The kernel's csum_fold, which complements, too.
    fn fold(sum: u32) -> u16 {
        let sum = (sum >> 16) + (sum & 0xffff);
        !(((sum >> 16) + sum) as u16)
    }

    /// One's-complement sum of 16-bit words in memory order.
    pub(crate) fn sum(bytes: &[u8]) -> u32 {
        let words = bytes.chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        words.fold(0, |sum, word| add(sum, u32::from(word)))
    }

    /// # Safety
    ///
    /// The pointer is that of a [`SocketBuffer`]'s context, and nothing is borrowed of the buffer.
    unsafe fn buffer<'a, T>(skb: *mut T) -> &'a mut SocketBuffer {
        // SAFETY: by the caller's promise.
        unsafe { &mut *skb.cast() }
    }

    pub unsafe fn bpf_skb_load_bytes(skb: *const c_void, offset: u32, to: *mut c_void, length: u32) -> i64 {
        // SAFETY: programs pass their own context.
        let memory = unsafe { &buffer(skb.cast_mut()).memory };
        // SAFETY: programs pass memory of this length.
        let to = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), length as usize) };
        to.fill(0);
        if offset > MAX_OFFSET || !memory.holds(offset as usize, to.len()) {
            return FAULT;
        }
        for (index, byte) in to.iter_mut().enumerate() {
            *byte = memory.byte(offset as usize + index);
        }
        0
    }

    pub unsafe fn bpf_skb_store_bytes(skb: *mut __sk_buff, offset: u32, bytes: &[u8], flags: u64) -> i64 {
        // SAFETY: programs pass their own context.
        let buffer = unsafe { buffer(skb) };
        if flags & !u64::from(BPF_F_RECOMPUTE_CSUM) != 0 {
            return INVALID;
        }
        if offset > MAX_OFFSET || !buffer.memory.holds(offset as usize, bytes.len()) {
            return FAULT;
        }
        buffer.memory.write(offset as usize, bytes);
        if let Checksum::Complete(_) = buffer.checksum
            && flags & u64::from(BPF_F_RECOMPUTE_CSUM) != 0
        {
            buffer.checksum = Checksum::Complete(!fold(sum(&buffer.memory.bytes()[buffer.network as usize..])));
        }
        0
    }

    pub unsafe fn bpf_l4_csum_replace(skb: *mut __sk_buff, offset: u32, from: u64, to: u64, flags: u64) -> i64 {
        let (pseudo, udp) = (flags & u64::from(BPF_F_PSEUDO_HDR) != 0, flags & u64::from(BPF_F_MARK_MANGLED_0) != 0);
        // SAFETY: programs pass their own context.
        let buffer = unsafe { buffer(skb) };
        if flags & !u64::from(BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0) != 0 || from != 0 {
            return INVALID;
        }
        let place = offset as usize;
        if offset > MAX_OFFSET || !offset.is_multiple_of(2) || !buffer.memory.holds(place, 2) {
            return FAULT;
        }
        let old = u16::from_ne_bytes([buffer.memory.byte(place), buffer.memory.byte(place + 1)]);
        if udp && old == 0 {
            return 0;
        }
        let difference = to as u32;
        let mut new = match buffer.checksum {
            Checksum::Partial(_) if pseudo => !fold(add(difference, u32::from(old))),
            Checksum::Partial(_) => old,
            Checksum::Final | Checksum::Complete(_) => fold(add(difference, !u32::from(old))),
        };
        if let Checksum::Complete(sum) = buffer.checksum
            && pseudo
        {
            buffer.checksum = Checksum::Complete(fold(add(difference, !u32::from(sum))));
        }
        if udp && new == 0 {
            new = u16::MAX;
        }
        buffer.memory.write(place, &new.to_ne_bytes());
        0
    }

    pub unsafe fn bpf_csum_update(skb: *mut __sk_buff, sum: u32) -> i64 {
        // SAFETY: programs pass their own context.
        let buffer = unsafe { buffer(skb) };
        let Checksum::Complete(before) = buffer.checksum else { return NOT_SUPPORTED };
        buffer.checksum = Checksum::Complete(!fold(add(sum, u32::from(before))));
        0
    }

    pub unsafe fn bpf_csum_diff(from: *mut u32, from_size: u32, to: *mut u32, to_size: u32, seed: u32) -> i64 {
        assert!(from.is_null() && from_size == 0 && to_size.is_multiple_of(4), "the one way in which it is used");
        // SAFETY: programs pass memory of this length.
        let bytes = unsafe { std::slice::from_raw_parts(to.cast::<u8>(), to_size as usize) };
        i64::from(add(sum(bytes), seed))
    }

    pub unsafe fn bpf_skb_change_tail(skb: *mut __sk_buff, length: u32, flags: u64) -> i64 {
        // SAFETY: programs pass their own context.
        let buffer = unsafe { buffer(skb) };
        let least = if let Checksum::Partial(offset) = buffer.checksum { offset + 2 } else { buffer.network };
        if flags != 0 || length > MAX_LENGTH || length < least {
            return INVALID;
        }
        if let Checksum::Complete(_) = buffer.checksum {
            buffer.checksum = Checksum::Final;
        }
        buffer.memory.resize(length as usize);
        0
    }

    pub unsafe fn bpf_skb_change_type(_skb: *mut __sk_buff, _kind: u32) -> i64 {
        0
    }

    pub unsafe fn bpf_xdp_get_buff_len(ctx: *mut xdp_md) -> u64 {
        // SAFETY: programs pass their own context, which is a frame's.
        unsafe { (*ctx.cast::<XdpFrame>()).memory.length() as u64 }
    }

    pub unsafe fn bpf_redirect(ifindex: u32, flags: u64) -> i64 {
        kernel::with(|state| {
            if flags != 0 {
                return state.redirect_failed();
            }
            state.redirect(Redirect::Frame(ifindex))
        })
    }

    pub unsafe fn bpf_redirect_peer(ifindex: u32, _flags: u64) -> i64 {
        kernel::with(|state| state.redirect(Redirect::Peer(ifindex)))
    }

    pub unsafe fn bpf_redirect_neigh(ifindex: u32, next_hop: *mut bpf_redir_neigh, length: i32, _flags: u64) -> i64 {
        assert_eq!(length as usize, size_of::<bpf_redir_neigh>(), "the kernel refuses any other");
        // SAFETY: programs pass a whole struct; the union's members are plain numbers, and programs zero all of it first.
        let words = unsafe { Words::of_next_hop(&*next_hop) };
        kernel::with(|state| state.redirect(Redirect::Neighbour(ifindex, words)))
    }

    pub unsafe fn bpf_fib_lookup(_ctx: *mut c_void, parameters: *mut RouteParameters, length: i32, flags: u32) -> i64 {
        assert_eq!(length as usize, size_of::<RouteParameters>(), "the kernel refuses any other");
        // SAFETY: programs pass a whole struct, zeroed before they fill it.
        let parameters = unsafe { &mut *parameters };
        // SAFETY: the members of the family that it names.
        let destination = unsafe {
            match parameters.family {
                AF_INET => Words([parameters.__bindgen_anon_4.ipv4_dst, 0, 0, 0]),
                _ => Words(parameters.__bindgen_anon_4.ipv6_dst),
            }
        };
        let Some(route) = kernel::with(|state| state.route(destination)) else {
            return i64::from(BPF_FIB_LKUP_RET_NOT_FWDED);
        };
        // SAFETY: every lookup fills it.
        let asked = unsafe { parameters.__bindgen_anon_1.tot_len };
        parameters.ifindex = route.ifindex;
        if flags & BPF_FIB_LOOKUP_SRC != 0 && route.resolved {
            match parameters.family {
                AF_INET => parameters.__bindgen_anon_3.ipv4_src = route.source.0[0],
                _ => parameters.__bindgen_anon_3.ipv6_src = route.source.0,
            }
        }
        if asked != 0 {
            parameters.__bindgen_anon_1.mtu_result = route.mtu;
            if asked > route.mtu {
                return i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED);
            }
        }
        if !route.resolved {
            return i64::from(BPF_FIB_LKUP_RET_NO_NEIGH);
        }
        parameters.smac = [2, 0, 0, 0, 0, 0x0a];
        parameters.dmac = [2, 0, 0, 0, 0, 0x0b];
        i64::from(BPF_FIB_LKUP_RET_SUCCESS)
    }

    pub unsafe fn bpf_skc_lookup_tcp(
        _ctx: *mut c_void,
        tuple: *mut bpf_sock_tuple,
        length: u32,
        _namespace: u64,
        _flags: u64,
    ) -> *mut bpf_sock {
        // SAFETY: programs pass memory of this length.
        let _tuple = unsafe { std::slice::from_raw_parts(tuple.cast::<u8>(), length as usize) };
        std::ptr::null_mut()
    }

    pub unsafe fn bpf_sk_release(_socket: *mut c_void) -> i64 {
        0
    }

    pub unsafe fn bpf_get_prandom_u32() -> u32 {
        kernel::with(|state| state.random)
    }

    pub unsafe fn bpf_jiffies64() -> u64 {
        kernel::with(|state| state.nanoseconds / 4_000_000)
    }

    pub unsafe fn bpf_ktime_get_ns() -> u64 {
        kernel::with(|state| state.nanoseconds)
    }

    pub unsafe fn bpf_ktime_get_coarse_ns() -> u64 {
        // SAFETY: it takes no arguments.
        unsafe { bpf_ktime_get_ns() }
    }
}
