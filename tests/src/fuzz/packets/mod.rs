//! Packets, from whoever sends them, through the kernel programs compiled for the host.
//!
//! The input is a node (features, configuration) and a conversation: up to a dozen packets at its hooks, most of them nearly
//! sound and between parties that the node knows, so that flows come about, and then spoilt: truncated, overwritten, fragmented,
//! with lengths that lie. [`laws`] says what must hold of each.

mod laws;
mod sender;
mod world;

use arbitrary::Unstructured;
use sheave_ebpf_host::kernel::{Fate, Hook, Kernel, Output};

use laws::{Laws, Sight};
use sender::Sender;
use world::World;

/// Packets of a conversation.
const PACKETS: usize = 12;

/// Runs one input.
///
/// # Panics
/// If a law is broken.
pub fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(plan) = world::Plan::read(&mut input) else { return };
    let mut sender = Sender::default();
    let mut sights = Vec::new();
    while sights.len() < PACKETS && !input.is_empty() {
        match sender.packet(&mut input, plan.ipv6) {
            Ok(sight) => sights.push(sight),
            Err(_) => break,
        }
    }
    converse(&plan, &sights, Offload::Tc, &mut sender);
    if plan.compare && sights.iter().any(|sight| sight.hook == Hook::UplinkIngress) {
        agree(&plan, &sights);
    }
}

/// Runs one input of the target `headers`: one packet, which is read and rewritten, but comes to no hook.
///
/// # Panics
/// If a law of parsing or rewriting is broken.
pub fn run_headers(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok(ipv6) = input.arbitrary() else { return };
    let Ok(sight) = Sender::default().packet(&mut input, ipv6) else { return };
    laws::parsing(&Kernel::boot(0), &sight);
}

/// Whether XDP has a look at what comes to an uplink before tc does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Offload {
    Tc,
    XdpFirst,
}

/// Has a node see a conversation, and returns what became of each packet.
fn converse(plan: &world::Plan, sights: &[Sight], offload: Offload, sender: &mut Sender) -> Vec<Output> {
    let world = World::new(plan);
    let mut laws = Laws::default();
    let mut outputs: Vec<Output> = Vec::new();
    for sight in sights {
        // An answer to what came out before is made here, where it is known.
        let sight = sender.resolve(sight, &outputs);
        world.kernel.wait(sight.pause);
        world.kernel.set_random(sight.random);
        if offload == Offload::Tc {
            laws::parsing(&world.kernel, &sight);
        }
        let first = if offload == Offload::XdpFirst && sight.hook == Hook::UplinkIngress {
            let output = world.kernel.run(Hook::Xdp, &sight.as_frame());
            if output.fate == Fate::Pass {
                assert_eq!(output.bytes, sight.input.bytes, "XDP changed a frame that it passed up");
            }
            (output.fate != Fate::Pass).then_some(output)
        } else {
            None
        };
        let output = first.unwrap_or_else(|| world.kernel.run(sight.hook, &sight.input));
        laws.seen(&world, &sight, &output);
        outputs.push(output);
    }
    outputs
}

/// XDP does to a packet what tc would do, or leaves it to tc.
fn agree(plan: &world::Plan, sights: &[Sight]) {
    let sights: Vec<Sight> = sights.iter().map(Sight::whole).collect();
    let [tc, xdp] =
        [Offload::Tc, Offload::XdpFirst].map(|offload| converse(plan, &sights, offload, &mut Sender::default()));
    for ((sight, tc), xdp) in sights.iter().zip(&tc).zip(&xdp) {
        laws::same(sight, tc, xdp);
    }
}
