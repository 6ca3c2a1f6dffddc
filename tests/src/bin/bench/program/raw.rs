//! What the real programs are compared with: nothing at all, one lookup, the inserts of one new flow. Each walks through
//! the same maps as they do; its memory between repeats is an array element.

use std::os::fd::AsFd as _;

use anyhow::{Result, ensure};
use aya::Pod;
use sheave_common::flow::{Flow, FlowKey, state};
use sheave_tests::program::{NEXT, Programs, XDP_PASS};
use sheave_tests::raw_bpf::{
    ADD, Array, CALL, COPY, EXIT, JUMP_IF, JUMP_UNLESS, Kind, LOAD_WORD, MOVE, Program, STORE_WORD, element_address,
    instruction, map_address,
};

use super::walk::{Circle, KeyAddress};

/// `bpf_map_lookup_elem`
const LOOKUP: i32 = 1;
/// `bpf_map_update_elem`
const UPDATE: i32 = 2;
/// BPF_NOEXIST
const NOEXIST: i32 = 1;
/// Sixty-four bytes, because the kernel wants an Ethernet frame.
const FRAME: [u8; 64] = [0; 64];

/// A hand-written program.
#[derive(Debug)]
pub(crate) struct Raw {
    program: Program,
    /// Action of a run that did what it should.
    action: i32,
    memory: Option<(Array, Vec<u8>)>,
}

impl Raw {
    /// Does nothing: what the kernel itself takes for a run.
    pub(crate) fn empty(kind: Kind) -> Result<Self> {
        let action = if kind == Kind::Xdp { XDP_PASS } else { NEXT };
        let program = Program::load(kind, &[instruction(MOVE, 0, 0, 0, action), EXIT])?;
        Ok(Self { program, action, memory: None })
    }

    /// Looks a flow of a circle up and takes the tuple that it rewrites to as the next key. Without `lookup`, only moves the
    /// bytes.
    pub(crate) fn lookup<A: KeyAddress>(
        programs: &mut Programs,
        map: &str,
        circle: &Circle,
        lookup: bool,
    ) -> Result<Self>
    where
        FlowKey<A>: Pod,
    {
        let first = bytes_of(&circle.key::<A>(0));
        let (map, memory) = (programs.descriptor(map)?, Array::new(&first)?);
        let mut code = element_address(6, &memory).to_vec();
        if lookup {
            code.extend(map_address(1, map.as_fd()));
            code.push(instruction(COPY, 2, 6, 0, 0));
            code.push(instruction(CALL, 0, 0, 0, LOOKUP));
            code.extend(unless_zero_fail(JUMP_UNLESS));
        } else {
            code.push(instruction(COPY, 0, 6, 0, 0));
        }
        for word in 0..size_of_val(&circle.key::<A>(0).tuple) / 4 {
            let offset = i16::try_from(word * 4)?;
            code.push(instruction(LOAD_WORD, 1, 0, offset, 0));
            code.push(instruction(STORE_WORD, 6, 1, offset, 0));
        }
        code.extend([instruction(MOVE, 0, 0, 0, 0), EXIT]);
        Ok(Self { program: Program::load(Kind::Classifier, &code)?, action: 0, memory: Some((memory, first)) })
    }

    /// Inserts both halves of a flow that was not there, another one each time.
    pub(crate) fn inserts<A: KeyAddress>(programs: &mut Programs, map: &str, circle: &Circle) -> Result<Self>
    where
        FlowKey<A>: Pod,
        Flow<A>: Pod,
    {
        let key = circle.key::<A>(0);
        let flow = Flow {
            rewrite: circle.key::<A>(1).tuple,
            service_id: circle.service_id,
            backend_id: circle.backend_id,
            last_seen: super::walk::second(),
            state: state::NEW,
            flags: 0,
            closing: 0,
            tried: 0,
        };
        let parts = [bytes_of(&key), bytes_of(&flow.sibling_key(&key)), bytes_of(&flow), bytes_of(&flow.sibling(&key))];
        let mut offsets = [0_i32; 4];
        let mut first = Vec::new();
        for (part, offset) in parts.iter().zip(&mut offsets) {
            *offset = i32::try_from(first.len())?;
            first.extend_from_slice(part);
            first.resize(first.len().next_multiple_of(8), 0);
        }
        let (map, memory) = (programs.descriptor(map)?, Array::new(&first)?);
        let mut code = element_address(6, &memory).to_vec();
        for (key, value) in [(offsets[0], offsets[2]), (offsets[1], offsets[3])] {
            // The ports' word counts, as with a client that opens one connection after another.
            let ports = i16::try_from(key)? + i16::try_from(size_of_val(&circle.key::<A>(0).tuple.source) * 2)?;
            code.push(instruction(LOAD_WORD, 1, 6, ports, 0));
            code.push(instruction(ADD, 1, 0, 0, 1));
            code.push(instruction(STORE_WORD, 6, 1, ports, 0));
            code.extend(map_address(1, map.as_fd()));
            for (register, offset) in [(2, key), (3, value)] {
                code.push(instruction(COPY, register, 6, 0, 0));
                code.push(instruction(ADD, register, 0, 0, offset));
            }
            code.push(instruction(MOVE, 4, 0, 0, NOEXIST));
            code.push(instruction(CALL, 0, 0, 0, UPDATE));
            code.extend(unless_zero_fail(JUMP_IF));
        }
        code.extend([instruction(MOVE, 0, 0, 0, 0), EXIT]);
        Ok(Self { program: Program::load(Kind::Classifier, &code)?, action: 0, memory: Some((memory, first)) })
    }

    /// Begins where it began at first.
    pub(crate) fn rewind(&self) -> Result<()> {
        if let Some((memory, first)) = &self.memory {
            memory.set(first)?;
        }
        Ok(())
    }

    /// Nanoseconds that each of so many runs took.
    pub(crate) fn sample(&self, runs: u32) -> Result<f64> {
        let outcome = self.program.run(&FRAME, runs)?;
        ensure!(outcome.action == self.action, "the hand-written program ends with {}", outcome.action);
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of one run")]
        Ok(outcome.duration.as_nanos() as f64)
    }
}

/// Ends with 1, unless this jump's condition on r0 and 0 holds.
fn unless_zero_fail(jump: u8) -> [u64; 3] {
    [instruction(jump, 0, 0, 2, 0), instruction(MOVE, 0, 0, 0, 1), EXIT]
}

/// A map's key or value as the kernel sees it.
fn bytes_of<T: Pod>(value: &T) -> Vec<u8> {
    // SAFETY: a Pod has no padding, so every byte of it is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
}
