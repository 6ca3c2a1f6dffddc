//! A `sheave` that runs on a node of the test's cluster.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::cgroup::{Cgroup, MemoryCgroup};
use crate::gate::{Gate, Write};
use crate::leftovers::unique_name;
use crate::manifests::Manifests;
use crate::netns::Namespace;
use crate::patience::patient;
use crate::process::{Process, built, eventually};
use crate::topology::Node;

/// Long enough for a debug build on a busy machine to load its programs.
const START: Duration = Duration::from_secs(120);

/// What an agent holds beside its process: pins and a cgroup of its own. Survives kill and restart; removed on drop.
#[derive(Debug)]
pub struct Agent {
    namespace: Namespace,
    node_name: String,
    /// `--manifests DIR` or `--kubeconfig FILE`.
    source: [PathBuf; 2],
    pins: PathBuf,
    cgroup: Cgroup,
    /// Where its memory counts, if somewhere else than the test's.
    memory: Option<MemoryCgroup>,
    arguments: Vec<String>,
    /// The program; the one that is built beside the test if absent.
    program: Option<PathBuf>,
    process: Option<Process>,
}

impl Agent {
    /// Starts `sheave run` on a node with a folder of manifests and, if wanted, more arguments, and waits until it serves.
    ///
    /// # Errors
    /// If it ends or isn't ready in time; with its log.
    pub fn start(node: &Node, manifests: &Manifests, arguments: &[&str]) -> Result<Self> {
        Self::start_from(node, &node.name, ["--manifests".into(), manifests.path().to_owned()], arguments)
    }

    /// The same with an API server, which knows the node by this name.
    ///
    /// # Errors
    /// If it ends or isn't ready in time; with its log.
    pub fn start_with_kubeconfig(node: &Node, name: &str, kubeconfig: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_from(node, name, ["--kubeconfig".into(), kubeconfig.to_owned()], arguments)
    }

    fn start_from(node: &Node, name: &str, source: [PathBuf; 2], arguments: &[&str]) -> Result<Self> {
        let mut agent = Self {
            namespace: node.namespace.clone(),
            node_name: name.to_owned(),
            source,
            pins: Path::new("/sys/fs/bpf").join(unique_name()),
            cgroup: Cgroup::new()?,
            memory: None,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            program: None,
            process: None,
        };
        agent.restart()?;
        Ok(agent)
    }

    /// Starts it (again) with the pins that are there, and waits until it serves.
    ///
    /// # Errors
    /// If it ends or isn't ready in time; with its log.
    pub fn restart(&mut self) -> Result<()> {
        self.process = None;
        let mut process = self.begin(|_| ())?;
        process.wait_for(READY, START)?;
        self.process = Some(process);
        Ok(())
    }

    /// Starts it, by a command of which `more` makes what it likes.
    fn begin(&self, more: impl FnOnce(&mut Command)) -> Result<Process> {
        let mut command = self.namespace.command(self.program.clone().map_or_else(|| built("sheave"), Ok)?);
        command.arg("run").args(&self.source).arg("--node-name").arg(&self.node_name);
        command.arg("--pin-path").arg(&self.pins).arg("--cgroup").arg(self.cgroup.path());
        command.args(["--log-format", "text"]);
        if !self.arguments.iter().any(|argument| argument == "--xdp") {
            command.args(["--xdp", "off"]);
        }
        command.args(&self.arguments).env("RUST_BACKTRACE", "1").env("NO_COLOR", "1");
        if let Some(memory) = &self.memory {
            memory.adopt(&mut command);
        }
        more(&mut command);
        Process::start(&format!("sheave on {}", self.node_name), &mut command)
    }

    /// Has its memory, and that of the maps that it makes, count in this cgroup from the next start on.
    pub fn confine(&mut self, memory: MemoryCgroup) {
        self.memory = Some(memory);
    }

    /// Where its memory counts.
    ///
    /// # Panics
    /// If that is nowhere in particular.
    #[must_use]
    pub fn memory(&self) -> &MemoryCgroup {
        self.memory.as_ref().expect("it is confined")
    }

    /// Starts it again with other arguments.
    ///
    /// # Errors
    /// As [`Self::restart`].
    pub fn restart_with(&mut self, arguments: &[&str]) -> Result<()> {
        self.set_arguments(arguments);
        self.restart()
    }

    /// Gives other arguments to every further start.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    /// Has another build of the program run from the next start on.
    pub fn set_program(&mut self, program: &Path) {
        self.program = Some(program.to_owned());
    }

    /// Starts it again as another build of the program.
    ///
    /// # Errors
    /// As [`Self::restart`].
    pub fn restart_as(&mut self, program: &Path) -> Result<()> {
        self.set_program(program);
        self.restart()
    }

    /// Starts it again with other arguments, and kills it as soon as its pins are in some state, or else when it serves. The
    /// next start has these arguments, too.
    ///
    /// # Errors
    /// If it ends by itself, or neither comes in time; with its log.
    pub fn kill_when(&mut self, arguments: &[&str], state: impl Fn(&Path) -> bool) -> Result<()> {
        self.process = None;
        self.set_arguments(arguments);
        let mut process = self.begin(|_| ())?;
        let started = Instant::now();
        // No pause: such states last for less than a millisecond.
        while !state(&self.pins) && !process.log().contains(READY) {
            process.check_alive()?;
            ensure!(started.elapsed() < patient(START), "neither killed nor ready:\n{}", process.log());
        }
        process.kill();
        Ok(())
    }

    /// Starts it (again), and has it stand still when it has made so many writes to the kernel, or when it serves.
    ///
    /// # Errors
    /// If it ends by itself, or neither comes in time; with its log.
    pub fn restart_halfway(&mut self, writes: usize) -> Result<Halfway> {
        self.process = None;
        let mut process = self.begin(Gate::install)?;
        let gate = Gate::of(process.id())?;
        let (mut made, started) = (0, Instant::now());
        let next = loop {
            match gate.next(Duration::from_millis(20))? {
                Some(write) if made == writes => break Some(write),
                Some(write) => {
                    gate.pass(&write)?;
                    made += 1;
                }
                None if process.log().contains(READY) => break None,
                None => process.check_alive()?,
            }
            ensure!(started.elapsed() < patient(START), "neither halfway nor ready:\n{}", process.log());
        };
        self.process = Some(process);
        Ok(Halfway { made, next, _gate: gate })
    }

    /// Ends it by SIGTERM. Programs and maps stay.
    ///
    /// # Errors
    /// If it fails or doesn't end in time; with its log.
    pub fn stop(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |process| process.stop(Duration::from_secs(10)).map(drop))
    }

    /// Ends it as `kill -9` does. Programs and maps stay.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Its log so far; empty if it isn't running.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// The running process.
    pub fn process(&mut self) -> Option<&mut Process> {
        self.process.as_mut()
    }

    /// The directory of its pins.
    #[must_use]
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// A command that runs in the node's network namespace and in the agent's cgroup, as a host process.
    #[must_use]
    pub fn host_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.namespace.command(program);
        self.cgroup.adopt(&mut command);
        command
    }

    /// A command in another namespace and in the agent's cgroup, as a pod's process.
    #[must_use]
    pub fn bystander_command(&self, namespace: &Namespace, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = namespace.command(program);
        self.cgroup.adopt(&mut command);
        command
    }

    /// A command in the caller's own network namespace and in the agent's cgroup.
    #[must_use]
    pub fn member_command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.cgroup.adopt(&mut command);
        command
    }

    /// What one of the views (`services`, `backends`, `conntrack`, `affinity`) prints.
    ///
    /// # Errors
    /// If it fails; with what it said.
    pub fn view(&self, view: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.namespace.command(built("sheave")?);
        command.arg(view).arg("--pin-path").arg(&self.pins).args(arguments);
        let output = command.output().with_context(|| format!("cannot run sheave {view}"))?;
        ensure!(output.status.success(), "sheave {view}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `sheave services -o json`.
    ///
    /// # Errors
    /// If it fails or isn't JSON.
    pub fn services(&self) -> Result<serde_json::Value> {
        let text = self.view("services", &["-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Waits until `sheave services` shows something.
    ///
    /// # Errors
    /// If it doesn't in a few seconds; with what it shows instead.
    pub fn wait_for_services(&self, what: &str, shown: impl Fn(&serde_json::Value) -> bool) -> Result<()> {
        let waited = eventually(Duration::from_secs(5), || {
            let services = self.services()?;
            ensure!(shown(&services), "sheave services does not show {what}: {services:#}");
            Ok(())
        });
        waited.with_context(|| format!("log of sheave:\n{}", self.log()))
    }

    /// How often one of its programs has run, on all interfaces together, while the kernel's statistics were on
    /// ([`aya::sys::enable_stats`]).
    ///
    /// # Errors
    /// If there is no such program.
    pub fn runs(&self, program: &str) -> Result<u64> {
        let shelf = std::fs::read_dir(self.pins.join("programs"))?.next().context("no program is pinned")??;
        let pin = shelf.path().join(program);
        let shown = self.namespace.output("bpftool", &["-j", "prog", "show", "pinned", &pin.to_string_lossy()])?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        // Absent while it is 0.
        Ok(shown["run_cnt"].as_u64().unwrap_or(0))
    }

    /// Runs `sheave cleanup`.
    ///
    /// # Errors
    /// If it fails.
    pub fn clean_up(&self) -> Result<String> {
        self.clean_up_with(&[])
    }

    /// Runs `sheave cleanup` with more arguments.
    ///
    /// # Errors
    /// If it fails.
    pub fn clean_up_with(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.namespace.command(built("sheave")?);
        command.arg("cleanup").arg("--pin-path").arg(&self.pins).args(arguments);
        Process::start("sheave cleanup", &mut command)?.finish(Duration::from_secs(10))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process = None;
        if let Err(error) = std::fs::remove_dir_all(&self.pins)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("cannot remove the pins in {}: {error}", self.pins.display());
        }
    }
}

/// A start that stands still as long as this is there.
#[derive(Debug)]
pub struct Halfway {
    /// Writes made so far.
    pub made: usize,
    /// The one that would be next; `None` if it serves.
    pub next: Option<Write>,
    /// Whatever it writes waits here.
    _gate: Gate,
}

/// What `sheave run` logs once every source has synced and the maps hold what they say.
const READY: &str = "ready services";
