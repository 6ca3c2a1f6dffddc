//! XDP forwarding with frames that really leave by the uplink, beside a program that sends every frame back as it came.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Result, ensure};
use aya::Pod;
use sheave_common::flow::{EDGE_UPLINK, Flow, FlowKey, flags};
use sheave_common::{Ipv4Address, Ipv6Address, PROTOCOL_TCP, names};
use sheave_tests::family::Family;
use sheave_tests::process::eventually;
use sheave_tests::program::{Programs, XDP_TX};
use sheave_tests::raw_bpf::{
    ADD, AND, ATOMIC_ADD, Array, CALL, COPY, EXIT, JUMP_ABOVE, JUMP_IF, JUMP_UNLESS, Kind, LOAD_WORD, MOVE, Program,
    STORE_IMMEDIATE, STORE_WORD, element_address, instruction, live_frames,
};
use sheave_tests::wire;

use super::node::{self, TCP_SERVICE};
use super::walk::{Circle, KeyAddress, destinations};
use crate::effort::Effort;
use crate::findings::{Better, Findings};
use crate::goal::{Goal, Reach};
use crate::progress::Progress;
use crate::statistics::ratios;

/// Frames of one call: the kernel keeps 64 in flight and uses them again and again, and each time their TTL falls.
const FRAMES: u32 = 64 * 100;
/// How often a sample is taken again whose frames did not all arrive: the veth pair's queue is short.
const TRIES: u32 = 5;
/// XDP_DROP
const DROP: i32 = 1;

/// Frames per second of one direction.
#[derive(Default)]
struct Rates {
    untouched: Vec<f64>,
    /// What no router can do without: `bpf_fib_lookup` says where each frame goes, and nothing else is done.
    looked_up: Vec<f64>,
    forwarded: Vec<f64>,
}

/// Measures both directions of flows to another node.
pub(crate) fn measure(effort: &Effort, findings: &mut Findings, progress: &Progress) -> Result<()> {
    node::namespace()?.run(|| -> Result<()> {
        let uplink = node::uplink()?;
        let (mut programs, backends) = node::programs(uplink, super::DEFAULT_FLOWS)?;
        let untouched = Program::load(Kind::Xdp, &[instruction(MOVE, 0, 0, 0, XDP_TX), EXIT])?;
        let fib_lookup = fib_lookup(uplink)?;
        for (family, backends) in Family::BOTH.into_iter().zip(backends) {
            let circle = Circle {
                family,
                protocol: PROTOCOL_TCP,
                edge: EDGE_UPLINK,
                flags: flags::REDIRECT,
                number: 40,
                length: 2,
                service_id: TCP_SERVICE,
                backend_id: backends[0],
            };
            match family {
                Family::V4 => insert::<Ipv4Address>(&circle, &mut programs, names::CONNTRACK4)?,
                Family::V6 => insert::<Ipv6Address>(&circle, &mut programs, names::CONNTRACK6)?,
            }
            for (name, reply) in [("forward", false), ("reply", true)] {
                let packet = circle.packet(0, reply, 255);
                let counter = Counter::attach(family, reply)?;
                let mut rates = Rates::default();
                for round in 0..=effort.rounds {
                    progress.step(&format!("{family} {name}, round {round} of {}", effort.rounds));
                    let plain = counter.rate(|| Ok(live_frames(untouched.descriptor(), &packet, uplink, FRAMES)?))?;
                    let looked_up =
                        counter.rate(|| Ok(live_frames(fib_lookup.descriptor(), &packet, uplink, FRAMES)?))?;
                    let forwarded = counter.rate(|| programs.xdp_live(&packet, uplink, FRAMES))?;
                    if round > 0 {
                        rates.untouched.push(plain);
                        rates.looked_up.push(looked_up);
                        rates.forwarded.push(forwarded);
                    }
                }
                report(rates, &format!("{name} tcp, {family}"), findings);
            }
        }
        Ok(())
    })
}

fn insert<A: KeyAddress>(circle: &Circle, programs: &mut Programs, map: &str) -> Result<()>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    circle.insert::<A>(programs, map)
}

fn report(rates: Rates, case: &str, findings: &mut Findings) {
    let found = ratios(&rates.forwarded, &rates.untouched);
    findings.reach(Goal::new("XDP forwarding", case, "≥ 0.5 × XDP_TX untouched", Reach::AtLeast(0.5), &found));
    findings.add(format!("XDP live frames/sheave/{case}"), "1/s", Better::Higher, rates.forwarded);
    findings.add(format!("XDP live frames/XDP_TX untouched/{case}"), "1/s", Better::Higher, rates.untouched);
    findings.add(format!("XDP live frames/XDP_TX after a FIB lookup/{case}"), "1/s", Better::Higher, rates.looked_up);
}

/// Looks the route to an IPv4 address beyond the router up, and sends every frame back as it came.
fn fib_lookup(uplink: u32) -> Result<Program> {
    /// `bpf_fib_lookup`
    const FIB_LOOKUP: i32 = 69;
    /// Size of `struct bpf_fib_lookup`.
    const PARAMETERS: i16 = 64;
    let mut code: Vec<u64> =
        (0..PARAMETERS / 8).map(|word| instruction(STORE_IMMEDIATE, 10, 0, word * 8 - PARAMETERS, 0)).collect();
    for (offset, value) in [(0, libc::AF_INET), (8, uplink.cast_signed()), (32, i32::from_le_bytes([10, 96, 0, 11]))] {
        code.push(instruction(MOVE, 2, 0, 0, value));
        code.push(instruction(STORE_WORD, 10, 2, offset - PARAMETERS, 0));
    }
    code.push(instruction(COPY, 2, 10, 0, 0));
    code.push(instruction(ADD, 2, 0, 0, -i32::from(PARAMETERS)));
    code.push(instruction(MOVE, 3, 0, 0, PARAMETERS.into()));
    code.push(instruction(MOVE, 4, 0, 0, 0));
    code.push(instruction(CALL, 0, 0, 0, FIB_LOOKUP));
    // 0 is BPF_FIB_LKUP_RET_SUCCESS; otherwise the frame is dropped, and missed.
    code.push(instruction(JUMP_IF, 0, 0, 2, 0));
    code.extend([instruction(MOVE, 0, 0, 0, DROP), EXIT]);
    code.extend([instruction(MOVE, 0, 0, 0, XDP_TX), EXIT]);
    Ok(Program::load(Kind::Xdp, &code)?)
}

/// The other end of the uplink: counts the circle's frames, and drops them all.
struct Counter {
    count: Array,
    _link: OwnedFd,
}

impl Counter {
    /// A frame counts if its destination (of replies, its source) is one of the two service addresses.
    fn attach(family: Family, reply: bool) -> Result<Self> {
        let count = Array::new(&0_u64.to_ne_bytes())?;
        // Where the last word of source and destination is; the two service addresses differ in its last bit.
        let [source, destination] = if family == Family::V4 { [26, 30] } else { [34, 50] };
        let offset = if reply { source } else { destination };
        let word = match destinations(family)[0].ip() {
            IpAddr::V4(address) => u32::from(address),
            IpAddr::V6(address) => address.to_bits() as u32,
        };
        let mut code = vec![
            instruction(LOAD_WORD, 2, 1, 0, 0),
            instruction(LOAD_WORD, 3, 1, 4, 0),
            instruction(COPY, 4, 2, 0, 0),
            instruction(ADD, 4, 0, 0, i32::from(offset) + 4),
            // Both jumps lead behind the addition.
            instruction(JUMP_ABOVE, 4, 3, 7, 0),
            instruction(LOAD_WORD, 5, 2, offset, 0),
            instruction(AND, 5, 0, 0, i32::from_be(!1)),
            instruction(JUMP_UNLESS, 5, 0, 4, i32::from_be(word.cast_signed())),
        ];
        code.extend(element_address(6, &count));
        code.extend([instruction(MOVE, 7, 0, 0, 1), instruction(ATOMIC_ADD, 6, 7, 0, 0)]);
        code.extend([instruction(MOVE, 0, 0, 0, DROP), EXIT]);
        let link = wire::attach(&Program::load(Kind::Xdp, &code)?, "peer0")?;
        Ok(Self { count, _link: link })
    }

    /// Frames per second, of which every single one arrived as it should.
    fn rate(&self, mut run: impl FnMut() -> Result<Duration>) -> Result<f64> {
        for attempt in 1.. {
            self.count.set(&0_u64.to_ne_bytes())?;
            let each = run()?;
            match self.all_arrived() {
                Ok(()) => return Ok(1.0 / each.as_secs_f64()),
                Err(error) if attempt == TRIES => return Err(error),
                Err(_) => {}
            }
        }
        unreachable!("the last attempt returns")
    }

    /// What a busy machine has not yet taken off the wire comes in a moment.
    fn all_arrived(&self) -> Result<()> {
        eventually(Duration::from_millis(100), || {
            let mut count = [0; 8];
            self.count.get(&mut count)?;
            let count = u64::from_ne_bytes(count);
            ensure!(count == u64::from(FRAMES), "{count} of {FRAMES} frames arrived");
            Ok(())
        })
    }
}
