//! Single packets through single programs.

use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use aya::programs::{SchedClassifier, TestRun, Xdp};
use aya::{TestRunOptions, TestRunResult};

use super::Programs;
use crate::raw_bpf::{self, xdp_context};

/// What a program did to a packet.
#[derive(Debug)]
pub struct Outcome {
    /// The action.
    pub action: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// How long a run took: the mean of all repeats, in whole nanoseconds.
    pub duration: Duration,
}

/// The fields of `__sk_buff` that a test may set; the rest is zero.
#[derive(Clone, Copy, Default)]
pub struct SkbContext {
    /// Interface that the packet is on; 0 is loopback.
    pub ifindex: u32,
    /// Payload per segment of a GSO packet.
    pub gso_size: u32,
    /// Number of segments.
    pub gso_segs: u32,
}

/// `struct __sk_buff` up to `hwtstamp` (kernel 6.18): 192 bytes.
const SK_BUFF: usize = 192;
const SK_BUFF_IFINDEX: usize = 40;
const SK_BUFF_GSO_SEGS: usize = 164;
const SK_BUFF_GSO_SIZE: usize = 176;

impl Programs {
    /// A tc program by itself, which another thread can run meanwhile; its packets come in by the loopback device.
    pub fn detach(&mut self, name: &str) -> Result<raw_bpf::Program> {
        Ok(self.classifier(name)?.fd()?.as_fd().try_clone_to_owned()?.into())
    }

    /// Runs a tc program once.
    pub fn tc(&mut self, program: &str, packet: &[u8], context: SkbContext) -> Result<Outcome> {
        self.tc_repeated(program, packet, context, 1)
    }

    /// Runs a tc program again and again on what it has made of the packet; the outcome is the last run's.
    pub fn tc_repeated(&mut self, program: &str, packet: &[u8], context: SkbContext, repeat: u32) -> Result<Outcome> {
        let program = self.classifier(program)?;
        let mut skb = [0_u8; SK_BUFF];
        for (offset, value) in [
            (SK_BUFF_IFINDEX, context.ifindex),
            (SK_BUFF_GSO_SIZE, context.gso_size),
            (SK_BUFF_GSO_SEGS, context.gso_segs),
        ] {
            skb[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        // An answer may be longer than the packet that it answers.
        run(program, packet, &skb, repeat, 256)
    }

    /// A tc program, loaded when it is asked for first: the kernel's verifier takes its time over each.
    fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program: &mut SchedClassifier =
            self.bpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?;
        if program.fd().is_err() {
            program.load().with_context(|| format!("loading {name}"))?;
        }
        Ok(program)
    }

    /// Runs the XDP program once, as if the frame had come in by an interface of the calling thread's namespace.
    pub fn xdp(&mut self, packet: &[u8], ifindex: u32) -> Result<Outcome> {
        self.xdp_repeated(packet, ifindex, 1)
    }

    /// Runs the XDP program again and again on what it has made of the frame; the outcome is the last run's.
    pub fn xdp_repeated(&mut self, packet: &[u8], ifindex: u32, repeat: u32) -> Result<Outcome> {
        let context = xdp_context(packet, ifindex)?;
        run(self.uplink_xdp()?, packet, &context, repeat, 4_096)
    }

    /// Runs the XDP program on frames that then really leave (see [`raw_bpf::live_frames`]).
    pub fn xdp_live(&mut self, packet: &[u8], ifindex: u32, frames: u32) -> Result<Duration> {
        let program = self.uplink_xdp()?.fd()?.as_fd();
        Ok(raw_bpf::live_frames(program, packet, ifindex, frames)?)
    }

    fn uplink_xdp(&mut self) -> Result<&mut Xdp> {
        let program: &mut Xdp = self.bpf.program_mut("uplink_xdp").context("no program uplink_xdp")?.try_into()?;
        if program.fd().is_err() {
            program.load().context("loading uplink_xdp")?;
        }
        Ok(program)
    }
}

/// Runs a program again and again on what it has made of a packet, which may grow by so many bytes.
fn run<P>(program: &P, packet: &[u8], context: &[u8], repeat: u32, growth: usize) -> Result<Outcome>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0_u8; packet.len() + growth];
    let result = program.test_run(TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ctx_in: Some(context),
        repeat,
        ..TestRunOptions::new()
    })?;
    out.truncate(usize::try_from(result.data_size_out)?);
    Ok(Outcome { action: result.return_value.cast_signed(), packet: out, duration: result.duration })
}
