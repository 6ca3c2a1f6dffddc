//! Which tests run on which kernel.

use super::kernels::Kernel;
use super::machine::Accelerator;

/// The target that loads and attaches every program, and says what that costs the verifier.
pub(super) const LOADING: &str = "kernel";

/// Test targets that run where the processor is emulated, in this order, and parts of the names of the tests in them; all of
/// them if there are none. Of the tests of single programs, those in which the kernel has most to say: about routes, the
/// widths of roads, and neighbours. The others would take a quarter of an hour for each kernel.
pub(super) const EMULATED: &[(&str, &[&str])] =
    &[(LOADING, &[]), ("e2e_every_way", &[]), (PROGRAM, &["nodeport::", "icmp::"])];

/// The target that runs single programs by BPF_PROG_TEST_RUN.
pub(super) const PROGRAM: &str = "program";

/// Tests of the target [`PROGRAM`] that can't run in some machines.
struct LeftOut {
    why: &'static str,
    /// Parts of their names.
    tests: &'static [&'static str],
    /// The kernel that brought what they need.
    since: Option<(u32, u32)>,
}

const LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        why: "the emulated processor is too slow for readers and writers at full speed",
        tests: &["versions::"],
        since: None,
    },
    LeftOut {
        why: "before 5.15, BPF_PROG_TEST_RUN gives XDP no interface",
        tests: &["xdp", "frames_for_another_host_are_left_alone", "a_packet_whose_ttl_runs_out_here_is_answered"],
        since: Some((5, 15)),
    },
    LeftOut {
        why: "before 5.12, bpf_fib_lookup does not judge a GSO packet's segments",
        tests: &["a_gso_packet_is_judged_by_its_segments"],
        since: Some((5, 12)),
    },
];

/// Parts of names of tests of the target [`PROGRAM`] that are left out in a machine, with the reason.
pub(super) fn left_out(kernel: &Kernel, accelerator: Accelerator) -> Vec<(&'static str, &'static [&'static str])> {
    let applies = |entry: &&LeftOut| match entry.since {
        Some(version) => kernel.version() < version,
        None => accelerator == Accelerator::Emulation,
    };
    LEFT_OUT.iter().filter(applies).map(|entry| (entry.why, entry.tests)).collect()
}
