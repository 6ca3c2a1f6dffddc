//! What each program costs the running kernel's verifier, against the checked-in table.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::programs::{Program, ProgramError};
use aya::util::KernelVersion;
use aya::{EbpfLoader, VerifierLogLevel};
use sheave::dataplane::{self, Features};
use sheave_common::names;

use crate::table::Table;

/// The verifier gives up at a million; a kernel of which nothing is known yet may need more than those that are.
const UNKNOWN_KERNEL: u64 = 500_000;

/// What the verifier said of a program.
struct Cost {
    /// Instructions that it looked at, those of repeated paths each time.
    instructions: u64,
    /// Bytes of stack of the largest function.
    frame: u64,
    /// Bytes of stack of the deepest chain of calls, where the kernel says so (7.2 does).
    chain: Option<u64>,
}

/// A program that grows without notice ends where some kernel refuses it, and that kernel's users find out first.
#[test]
fn no_program_costs_the_verifier_more_than_the_table_says() -> Result<()> {
    let kernel = running_kernel()?;
    let compiler = compiler().context("the object does not name its compiler")?;
    let table = Table::checked_in()?;
    let costs = costs()?;
    // `cargo xtask vm test` reads these lines.
    println!("\nverifier-compiler: {compiler}");
    for (program, cost) in &costs {
        let chain = cost.chain.map_or_else(|| "-".to_owned(), |chain| chain.to_string());
        println!("verifier-cost: {kernel} {program} {} {} {chain}", cost.instructions, cost.frame);
    }
    if std::env::var_os("SHEAVE_ACCEPT_COSTS").is_some() {
        return Ok(());
    }
    let column = (compiler == table.compiler).then(|| table.kernel(&kernel)).flatten();
    let mut wrong = Vec::new();
    for (program, cost) in &costs {
        let Some(column) = &column else {
            if cost.instructions > UNKNOWN_KERNEL {
                wrong.push(format!("{program}: {} instructions", cost.instructions));
            }
            continue;
        };
        match column.get(program.as_str()) {
            None => wrong.push(format!("{program} is not in the table")),
            Some(known) if cost.instructions > known + known / 5 => {
                wrong.push(format!("{program}: {} instructions, the table says {known}", cost.instructions));
            }
            Some(_) => {}
        }
    }
    ensure!(
        wrong.is_empty(),
        "on kernel {kernel}, more than the known cost and a fifth:\n{}\nif it is worth it: cargo xtask vm test --load-only \
         --update-costs",
        wrong.join("\n")
    );
    Ok(())
}

/// `6.12` of `6.12.107+deb13-amd64`.
fn running_kernel() -> Result<String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let numbers: Vec<&str> = release.split(['.', '-', '+', '\n']).take(2).collect();
    Ok(numbers.join("."))
}

/// What made the object, as its debug information says: `rustc version 1.96.0`.
fn compiler() -> Option<String> {
    let start = b"rustc version ";
    let at = sheave::EBPF_OBJECT.windows(start.len()).position(|window| window == start)?;
    let words = sheave::EBPF_OBJECT[at..].split(|byte| byte.is_ascii_whitespace() || *byte == b'(').take(3);
    Some(words.map(String::from_utf8_lossy).collect::<Vec<_>>().join(" "))
}

/// Has the kernel verify every program.
fn costs() -> Result<BTreeMap<String, Cost>> {
    // Before 5.11, BPF memory counts as locked. Later it does not matter that a container may not raise the limit.
    let _ = set_limit(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY);
    let features = Features::detect().bits();
    let mut loader = EbpfLoader::new();
    for name in names::MAPS.iter().copied().filter(|name| !["config", "drop_counters", "reject_budget"].contains(name))
    {
        loader.map_max_entries(name, 64);
    }
    loader.override_global("FEATURES", &features, true).verifier_log_level(VerifierLogLevel::STATS);
    let mut object = loader.load(&dataplane::object(features)).context("loading the BPF object")?;
    let mut costs = BTreeMap::new();
    for (name, program) in object.programs_mut() {
        // aya keeps the verifier's words only if loading fails. Without a free descriptor it does, after the verifier has
        // accepted the program.
        let descriptors = set_limit(libc::RLIMIT_NOFILE, 0)?;
        let result = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            _ => return Err(anyhow!("unexpected program type of {name}")),
        };
        set_limit(libc::RLIMIT_NOFILE, descriptors)?;
        match result {
            Err(ProgramError::LoadError { io_error, verifier_log })
                if io_error.raw_os_error() == Some(libc::EMFILE) =>
            {
                let log = verifier_log.to_string();
                costs.insert(name.to_owned(), cost(&log).with_context(|| format!("{name}: {log}"))?);
            }
            result => return Err(anyhow!("{name} on {:?}: {result:?}", KernelVersion::current())),
        }
    }
    Ok(costs)
}

/// Reads the verifier's statistics.
fn cost(log: &str) -> Option<Cost> {
    let after = |start: &str| log.lines().find_map(|line| line.strip_prefix(start));
    let stack = after("stack depth ")?;
    let (frames, chain) = stack.split_once(" max ").map_or((stack, None), |(frames, chain)| (frames, Some(chain)));
    Some(Cost {
        instructions: after("processed ")?.split(' ').next()?.parse().ok()?,
        frame: frames.trim().split('+').filter_map(|frame| frame.parse().ok()).max()?,
        chain: chain.and_then(|chain| chain.trim().parse().ok()),
    })
}

/// Sets the soft limit and returns what it was.
fn set_limit(resource: libc::__rlimit_resource_t, value: libc::rlim_t) -> Result<libc::rlim_t> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit outlives both calls.
    let failed = unsafe {
        let failed = libc::getrlimit(resource, &raw mut limit) != 0;
        let new = libc::rlimit { rlim_cur: value, rlim_max: limit.rlim_max.max(value) };
        failed || libc::setrlimit(resource, &raw const new) != 0
    };
    ensure!(!failed, "setrlimit: {}", std::io::Error::last_os_error());
    Ok(limit.rlim_cur)
}

/// A kernel that says it otherwise would be taken for one that says nothing.
#[test]
fn the_verifiers_statistics_are_read_as_old_and_new_kernels_print_them() {
    let old = cost("verification time 87 usec\nstack depth 8+160+80\nprocessed 20536 insns (limit 1000000) peak 9\n");
    let old = old.expect("kernel 5.10's");
    assert_eq!((old.instructions, old.frame, old.chain), (20_536, 160, None));
    let new = cost("stack depth 8+160+80 max 432\ninsns processed 14974+4934\nprocessed 19908 insns (limit 1000000)\n");
    let new = new.expect("kernel 7.2's");
    assert_eq!((new.instructions, new.frame, new.chain), (19_908, 160, Some(432)));
    assert!(cost("verification time 87 usec\n").is_none());
}
