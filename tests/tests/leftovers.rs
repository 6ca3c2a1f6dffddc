//! However a test ends, the machine is afterwards as it was: at once after a panic, with the next test after `kill -9`.
//!
//! Namespaces need no look: without a name in the file system they end with the last process in them.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::cgroup;
use sheave_tests::leftovers::unique_name;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::topology::Shape;

/// Tells the other process what to do.
const PART: &str = "SHEAVE_TEST_PART";
const CLUSTER: &str = "cluster";
const NEXT: &str = "next";
const UP: &str = "the cluster is up";

#[test]
#[ignore = "a part that the tests of this file have another process play"]
fn another_process() -> Result<()> {
    match std::env::var(PART).as_deref() {
        Ok(CLUSTER) => {
            let scenario = Scenario::start_with_folder(Shape { pod_counts: [1, 1], ..Shape::default() }, &[])?;
            println!("{UP}");
            std::io::stdin().read_line(&mut String::new())?;
            panic!("on purpose, on {}", scenario.node().name);
        }
        Ok(NEXT) => println!("{}", unique_name()),
        _ => {}
    }
    Ok(())
}

#[test]
fn a_panic_leaves_nothing_behind() -> Result<()> {
    let mut part = Part::start()?;
    let before = traces(part.child.id());
    ensure!(before.len() >= 4, "no pins, cgroup, folder or daemon in {before:?}");
    let others = descendants(part.child.id());
    part.child.stdin.take().context("no input")?.write_all(b"\n")?;
    let (status, said) = part.end()?;
    ensure!(!status.success() && said.contains("on purpose"), "{status}: {said}");
    let left = traces(part.child.id());
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(others.iter().all(|pid| !runs(*pid)), "of {others:?}, some still run");
    Ok(())
}

#[test]
fn a_killed_test_leaves_nothing_behind_but_for_the_next_one_to_remove() -> Result<()> {
    let mut part = Part::start()?;
    let others = descendants(part.child.id());
    ensure!(!others.is_empty(), "no daemon");
    part.child.kill()?;
    part.end()?;
    eventually(Duration::from_secs(5), || {
        let running: Vec<_> = others.iter().filter(|pid| runs(**pid)).collect();
        ensure!(running.is_empty(), "still running: {running:?} of {others:?}");
        Ok(())
    })?;
    let status = play(NEXT)?.status()?;
    ensure!(status.success(), "the next one: {status}");
    let left = traces(part.child.id());
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// Another process with a cluster, a server and a daemon; it panics when it reads a line.
struct Part {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Part {
    fn start() -> Result<Self> {
        let mut child = play(CLUSTER)?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut part = Self { child, output };
        let mut said = String::new();
        while !said.ends_with(&format!("{UP}\n")) {
            ensure!(part.output.read_line(&mut said)? > 0, "no cluster: {said}");
        }
        Ok(part)
    }

    /// Waits for its end.
    fn end(&mut self) -> Result<(ExitStatus, String)> {
        let mut said = String::new();
        self.output.read_to_string(&mut said)?;
        Ok((self.child.wait()?, said))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This program once more, in a process that plays a part. Its panic's message goes where its output goes.
fn play(part: &str) -> Result<Command> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec \"$0\" \"$@\" 2>&1"]).arg(std::env::current_exe()?);
    command.args(["--exact", "another_process", "--ignored", "--nocapture", "--test-threads=1"]).env(PART, part);
    Ok(command)
}

/// What carries a process's name: pins, cgroups, folders, and command lines of processes.
fn traces(pid: u32) -> Vec<String> {
    let name = format!("sheave-test-{pid}-");
    let folders = [Some("/sys/fs/bpf".into()), cgroup::root().ok(), Some(std::env::temp_dir())];
    let entries = folders.into_iter().flatten().filter_map(|folder| folder.read_dir().ok()).flatten();
    let entries = entries.filter_map(|entry| Some(entry.ok()?.path().display().to_string()));
    let commands = processes().filter_map(|pid| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok());
    entries.chain(commands).filter(|trace| trace.contains(&name)).collect()
}

/// A process's children, and theirs.
fn descendants(pid: u32) -> Vec<u32> {
    let children: Vec<u32> = processes().filter(|child| parent(*child) == Some(pid)).collect();
    let theirs: Vec<u32> = children.iter().flat_map(|child| descendants(*child)).collect();
    [children, theirs].concat()
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // `pid (name) state parent …`, and the name may hold anything.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn runs(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}
