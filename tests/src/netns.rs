//! Network namespaces: made, entered by threads and by child processes, and gone with the last thing that uses them.
//!
//! They have no name in the file system, only a descriptor, so a killed run leaves none behind. Only the network
//! namespace is entered: mounts stay the machine's own, and the BPF file system stays visible (`ip netns exec` hides it).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, bail};

/// A network namespace. Clones are the same namespace.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    file: Arc<File>,
}

impl Namespace {
    /// Makes a namespace whose loopback interface is up. The name is for messages only.
    ///
    /// # Errors
    /// Without the right to make one (CAP_SYS_ADMIN).
    pub fn new(name: &str) -> Result<Self> {
        let made = std::thread::spawn(|| {
            // SAFETY: unshare takes no pointers; it changes this new thread only, which ends with this closure.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().map_err(|_| anyhow::anyhow!("the thread that makes a namespace panicked"))?;
        let file = file.context("making a network namespace (this needs root)")?;
        let namespace = Self { name: name.into(), file: Arc::new(file) };
        namespace.ip(&["link set lo up"])?;
        Ok(namespace)
    }

    /// The name that it was made with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path that `ip link set … netns PATH` and `nsenter --net=PATH` accept while this process lives.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Runs a function inside, in a thread of its own, and returns what it returns.
    ///
    /// # Panics
    /// If the function does, or if the namespace can't be entered.
    pub fn run<T: Send>(&self, function: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                function()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside.
    pub fn spawn<T: Send + 'static>(&self, function: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = self.clone();
        std::thread::spawn(move || {
            namespace.enter();
            function()
        })
    }

    /// Moves the calling thread inside, for good.
    ///
    /// # Panics
    /// If that fails: going on would touch the machine's own network.
    pub fn enter(&self) {
        // SAFETY: setns takes no pointers, and the descriptor is open as long as `self` lives.
        let entered = unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(entered, 0, "cannot enter namespace {}: {}", self.name, io::Error::last_os_error());
    }

    /// A command that will run inside, and that the kernel kills when the calling thread ends.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let file = Arc::clone(&self.file);
        // SAFETY: between fork and exec the closure only makes system calls without pointers, on a descriptor that it owns.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0
                    || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command
    }

    /// Runs `ip` commands (each without the word `ip`) inside, in order.
    ///
    /// # Errors
    /// The first that fails, with what `ip` said.
    pub fn ip(&self, commands: &[impl AsRef<str>]) -> Result<()> {
        self.batch("ip", commands)
    }

    /// Runs `bridge` commands inside, in order.
    ///
    /// # Errors
    /// The first that fails, with what `bridge` said.
    pub fn bridge(&self, commands: &[impl AsRef<str>]) -> Result<()> {
        self.batch("bridge", commands)
    }

    fn batch(&self, program: &str, commands: &[impl AsRef<str>]) -> Result<()> {
        use std::io::Write as _;
        let mut child = self
            .command(program)
            .args(["-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {program}"))?;
        let lines: Vec<&str> = commands.iter().map(AsRef::as_ref).collect();
        if let Some(mut input) = child.stdin.take() {
            input.write_all((lines.join("\n") + "\n").as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{program} in namespace {}: {}\n{}",
                self.name,
                String::from_utf8_lossy(&output.stderr).trim(),
                lines.join("\n")
            );
        }
        Ok(())
    }

    /// Runs a command inside to its end and returns its standard output.
    ///
    /// # Errors
    /// If it can't be run or fails; with its standard error.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self.command(program).args(arguments).stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {program}"))?;
        if !output.status.success() {
            bail!(
                "{program} {} in namespace {}: {}{}",
                arguments.join(" "),
                self.name,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sets a sysctl below /proc/sys/net; `key` like `ipv4/ip_forward`.
    ///
    /// # Errors
    /// If there is no such key.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.run(|| std::fs::write(&path, value)).with_context(|| format!("{}: {path} = {value}", self.name))
    }

    /// Packets that this namespace's stack found to have a wrong checksum, all protocols of both families together.
    ///
    /// # Errors
    /// If the counters can't be read.
    pub fn checksum_errors(&self) -> Result<u64> {
        let read = |file: &str| {
            let path = format!("/proc/thread-self/net/{file}");
            self.run(|| std::fs::read_to_string(&path)).with_context(|| format!("reading {path}"))
        };
        // A line of names, then a line of numbers; TCP's are those of both families.
        let text = read("snmp")?;
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let pairs =
            lines.chunks(2).flat_map(|pair| pair[0].iter().copied().zip(pair.get(1).into_iter().flatten().copied()));
        // A name and a number in each line.
        let text6 = read("snmp6")?;
        let pairs6 = text6.lines().filter_map(|line| line.split_once(char::is_whitespace));
        Ok(pairs
            .chain(pairs6)
            .filter(|(name, _)| name.ends_with("InCsumErrors"))
            .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
            .sum())
    }
}
