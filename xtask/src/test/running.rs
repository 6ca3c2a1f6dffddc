//! Running one unit: all that it says is kept, and it must end in time and leave nothing behind.

use std::io::{PipeReader, Read as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Options;
use super::summary::Summary;
use super::unit::Unit;
use crate::process;

/// What takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(10 * 60);
const SLOW_LIMIT: Duration = Duration::from_secs(30 * 60);
/// How long after a test's end its children may hold its output open.
const GRACE: Duration = Duration::from_secs(5);
/// How the tests' time limits grow where others run beside them.
const PATIENCE: (&str, &str) = ("SHEAVE_TEST_PATIENCE", "3");

/// What holds for all units.
pub(super) struct Environment {
    patient: bool,
    /// Also what passing tests say.
    pub(super) shows_everything: bool,
}

impl Environment {
    pub(super) fn new(at_once: usize, options: &Options) -> Self {
        let shows = |argument: &String| ["--nocapture", "--no-capture", "--show-output"].contains(&argument.as_str());
        Self {
            patient: at_once > 1 && std::env::var_os(PATIENCE.0).is_none(),
            shows_everything: options.passed_on.iter().any(shows),
        }
    }
}

/// What has become of a unit.
pub(super) struct Ended {
    pub(super) took: Duration,
    pub(super) output: String,
    pub(super) summary: Summary,
    /// What is wrong, if something is.
    pub(super) wrong: Option<String>,
}

/// Runs a unit to its end.
pub(super) fn run(unit: &Unit<'_>, environment: &Environment) -> Result<Ended> {
    let program = unit.program;
    let mut command = if program.of_the_kernel { process::root(&program.path) } else { Command::new(&program.path) };
    // Both in one pipe, so that they stay in order.
    let (reader, writer) = std::io::pipe()?;
    command.args(&unit.arguments).current_dir(&program.folder).stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    if environment.patient {
        command.env(PATIENCE.0, PATIENCE.1);
    }
    let started = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.path.display()))?;
    // With the command go its copies of the pipe: the output ends with the last process that writes there.
    drop(command);
    let output = collect(reader);
    let limit = if unit.slow { SLOW_LIMIT } else { LIMIT };
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let took = started.elapsed();
    let output = whole(&output, Instant::now() + GRACE);
    let left = left_behind(child.id());
    let mut summary = Summary::default();
    let text = String::from_utf8_lossy(&output.bytes).into_owned();
    text.lines().for_each(|line| summary.add(line));
    let wrong = judge(unit, status, &summary, limit)
        .or_else(|| output.open.then(|| "left a process behind, which holds its output open".to_owned()))
        .or_else(|| (!left.is_empty()).then(|| format!("left behind {}", left.join(", "))));
    if wrong.is_some() && summary.failed == 0 {
        summary.failed = 1;
        summary.passed = summary.passed.saturating_sub(1);
    }
    Ok(Ended { took, output: text, summary, wrong })
}

/// What is wrong with how a unit ended.
fn judge(unit: &Unit<'_>, status: Option<ExitStatus>, summary: &Summary, limit: Duration) -> Option<String> {
    match status {
        None => Some(format!("hangs; killed after {} minutes", limit.as_secs() / 60)),
        Some(status) if !status.success() => Some(match summary.failed {
            0 => format!("{status}"),
            _ => "failed".to_owned(),
        }),
        Some(_) if unit.test.is_some() && summary.passed == 0 => Some("did not run".to_owned()),
        Some(_) => None,
    }
}

/// What was read, and whether more could come.
struct Output {
    bytes: Vec<u8>,
    open: bool,
}

/// Reads in a thread of its own, which ends with the last writer.
fn collect(mut reader: PipeReader) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            if sender.send(buffer[..length].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Everything that comes until the last writer is gone, or until it is too late.
fn whole(output: &Receiver<Vec<u8>>, until: Instant) -> Output {
    let mut bytes = Vec::new();
    loop {
        match output.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(more) => bytes.extend(more),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Output { bytes, open: false },
            Err(mpsc::RecvTimeoutError::Timeout) => return Output { bytes, open: true },
        }
    }
}

/// Pins, cgroups and folders that carry a process's name; see `tests/src/leftovers.rs`. (Through sudo, the process is sudo's,
/// and nothing is found.)
fn left_behind(pid: u32) -> Vec<String> {
    let prefix = format!("sheave-test-{pid}-");
    let temporary = std::env::temp_dir();
    let folders =
        [Path::new("/sys/fs/bpf"), Path::new("/sys/fs/cgroup"), Path::new("/sys/fs/cgroup/unified"), &temporary];
    let entries = folders.into_iter().filter_map(|folder| folder.read_dir().ok()).flatten().filter_map(Result::ok);
    let own = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    own.map(|entry| entry.path().display().to_string()).collect()
}
