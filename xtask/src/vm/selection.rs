//! Which tests run on which kernel.

use super::kernels::Kernel;
use super::machine::Accelerator;

/// The target that loads and attaches every program, and says what that costs the verifier.
pub(super) const LOADING: &str = "kernel";

/// Test targets that run where the processor is emulated, in this order, and parts of the names of the tests in them; all of
/// them if there are none. Loading the programs takes a minute there, so each is a test of few clusters, and together they
/// ask ClusterIPs by TCP, UDP and ICMP, nodePorts with SNAT by tc and by XDP, and at connect time, with affinity and over
/// a restart, in both families.
pub(super) const EMULATED: &[(&str, &[&str])] = &[
    (LOADING, &[]),
    ("program", &[]),
    ("e2e_clusterip", &["datagrams_go_both_ways", "clients_with_affinity_stay_with_their_pod"]),
    ("e2e_pings", &[]),
    ("e2e_nodeport", &["a_transfer_over_a_narrower_road_succeeds"]),
    ("e2e_host", &["a_host_process_asks_by_datagram"]),
    ("e2e_lifecycle", &["a_change_made_while_sheave_was_down_is_caught_up"]),
];

/// Tests that can't run in some machines.
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

/// Parts of names of tests that are left out in a machine, with the reason.
pub(super) fn left_out(kernel: &Kernel, accelerator: Accelerator) -> Vec<(&'static str, &'static [&'static str])> {
    let applies = |entry: &&LeftOut| match entry.since {
        Some(version) => kernel.version() < version,
        None => accelerator == Accelerator::Emulation,
    };
    LEFT_OUT.iter().filter(applies).map(|entry| (entry.why, entry.tests)).collect()
}
