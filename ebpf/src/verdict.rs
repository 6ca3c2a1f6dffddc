//! What becomes of a packet, and how that is told to the kernel.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC, xdp_action};
use sheave_common::DropReason;

use crate::observe;

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// Other programs and the stack go on with it, translated or not.
    Pass,
    /// It ends here, and is counted.
    Drop(DropReason),
    /// The action that a helper returned (redirects).
    Action(i32),
    /// XDP only: out of the interface that it came in by.
    Transmit,
}

/// How a verdict crosses a call between programs' functions, which return one register.
const PASS: u64 = 0;
const TRANSMIT: u64 = 1 << 32;
const ACTION: u64 = 2 << 32;
const DROP: u64 = 3 << 32;
/// Not a verdict: the packet has a flow, which is to be applied.
pub const FLOW: u64 = 4 << 32;
/// Not a verdict: the packet is about nothing that is known here.
pub const FOREIGN: u64 = 5 << 32;

impl Verdict {
    /// As one register.
    #[inline(always)]
    pub fn to_bits(self) -> u64 {
        match self {
            Self::Pass => PASS,
            Self::Transmit => TRANSMIT,
            Self::Action(action) => ACTION | u64::from(action as u32),
            Self::Drop(reason) => DROP | reason as u64,
        }
    }

    /// From [`Self::to_bits`].
    #[inline(always)]
    pub fn from_bits(bits: u64) -> Self {
        match bits & !0xffff_ffff {
            PASS => Self::Pass,
            TRANSMIT => Self::Transmit,
            ACTION => Self::Action(bits as i32),
            // SAFETY: `to_bits` put a reason there.
            _ => Self::Drop(unsafe { core::mem::transmute::<u32, DropReason>(bits as u32) }),
        }
    }

    /// The tc action. "Pass" means the next program, never "accept".
    #[inline(always)]
    pub fn tc_action(self) -> i32 {
        match self {
            Self::Pass | Self::Transmit => TC_ACT_UNSPEC,
            Self::Action(action) => action,
            Self::Drop(reason) => {
                observe::count(reason);
                TC_ACT_SHOT
            }
        }
    }

    /// The XDP action.
    #[inline(always)]
    pub fn xdp_action(self) -> u32 {
        match self {
            Self::Pass => xdp_action::XDP_PASS,
            Self::Transmit => xdp_action::XDP_TX,
            Self::Action(action) => action as u32,
            Self::Drop(reason) => {
                observe::count(reason);
                xdp_action::XDP_DROP
            }
        }
    }
}
