//! A process whose writes to the kernel wait, one by one, until the test lets them through, lets them fail, or kills the
//! process instead: what `kill -9` meets between any two of them.
//!
//! A seccomp filter of the process tells of each such system call before it is made (seccomp_unotify(2)), so the program under
//! test is the one that people run, without a word about faults in it.

use std::fmt;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use libc::{c_int, c_long, c_ulong, pid_t, sock_filter};

/// Where a gated process keeps the descriptor by which its calls are told, for the test to take a copy.
const LISTENER: c_int = 900;

/// How long a process may take from one write to the next, or to its end.
const STUCK: Duration = Duration::from_secs(60);

/// bpf(2)'s commands that change what another process can see, and their names.
const COMMANDS: [(u32, &str); 9] = [
    (2, "BPF_MAP_UPDATE_ELEM"),
    (3, "BPF_MAP_DELETE_ELEM"),
    (6, "BPF_OBJ_PIN"),
    (8, "BPF_PROG_ATTACH"),
    (UPDATE_BATCH, "BPF_MAP_UPDATE_BATCH"),
    (27, "BPF_MAP_DELETE_BATCH"),
    (28, "BPF_LINK_CREATE"),
    (29, "BPF_LINK_UPDATE"),
    (34, "BPF_LINK_DETACH"),
];
const UPDATE_BATCH: u32 = 26;

/// Calls that change the folders of pins.
const FILES: &[(c_long, &str)] = &[
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_renameat2, "renameat2"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "rmdir"),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename"),
];

/// Tells of the writes of a process, all of its threads', and holds them.
#[derive(Debug)]
pub struct Gate {
    listener: OwnedFd,
}

/// A write that a process is about to make. It waits for [`Gate::pass`] or [`Gate::fail`].
#[derive(Debug)]
pub struct Write {
    id: u64,
    call: c_long,
    command: u32,
}

impl Write {
    /// It is many writes to one map, in one call.
    #[must_use]
    pub const fn is_batch(&self) -> bool {
        self.call == libc::SYS_bpf && self.command == UPDATE_BATCH
    }
}

impl fmt::Display for Write {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = if self.call == libc::SYS_bpf {
            COMMANDS.iter().find(|(command, _)| *command == self.command).map(|(_, name)| *name)
        } else {
            FILES.iter().find(|(call, _)| *call == self.call).map(|(_, name)| *name)
        };
        formatter.write_str(named.unwrap_or("another call"))
    }
}

impl Gate {
    /// Has a command's process ask before each write, once it is started; [`Self::of`] hears it.
    pub fn install(command: &mut Command) {
        // SAFETY: `hold_writes` makes system calls and touches no memory but its own.
        unsafe { command.pre_exec(hold_writes) };
    }

    /// The gate of a process, this one's child, that was started with one.
    ///
    /// # Errors
    /// If it ended or has none.
    pub fn of(process: u32) -> Result<Self> {
        let process = pid_t::try_from(process)?;
        // SAFETY: the call takes no addresses, and what it returns is a new descriptor.
        let handle = unsafe { owned(libc::syscall(libc::SYS_pidfd_open, process, 0)) }.context("pidfd_open")?;
        let started = Instant::now();
        loop {
            // SAFETY: as above.
            match unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, handle.as_raw_fd(), LISTENER, 0)) } {
                Ok(listener) => return Ok(Self { listener }),
                // A copy of this process that has not come so far.
                Err(error) if error.raw_os_error() == Some(libc::EBADF) && started.elapsed() < STUCK => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error).context("taking a gate"),
            }
        }
    }

    /// The next write, which waits; `None` if the process has ended, or `limit` has passed without one.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn next(&self, limit: Duration) -> Result<Option<Write>> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor is given, and it is alive.
            let ready = unsafe { libc::poll(&raw mut poll, 1, c_int::try_from(left)?) };
            if ready == 0 || (poll.revents & libc::POLLHUP != 0 && poll.revents & libc::POLLIN == 0) {
                return Ok(None);
            }
            // SAFETY: all zeroes is a valid value, and the one that the kernel asks for.
            let mut told: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel fills in the structure that this request is made for.
            let told_now =
                unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut told) };
            if told_now == 0 {
                let command = u32::try_from(told.data.args[0] & u64::from(u32::MAX))?;
                return Ok(Some(Write { id: told.id, call: told.data.nr.into(), command }));
            }
            let error = io::Error::last_os_error();
            // It was killed, or a signal came, in between.
            if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) {
                return Err(error).context("hearing of a write");
            }
        }
    }

    /// Lets a write be made.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn pass(&self, write: &Write) -> Result<()> {
        const CONTINUE: u32 = 1;
        self.answer(libc::seccomp_notif_resp { id: write.id, val: 0, error: 0, flags: CONTINUE })
    }

    /// Has a write fail with this error number.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn fail(&self, write: &Write, error: i32) -> Result<()> {
        self.answer(libc::seccomp_notif_resp { id: write.id, val: 0, error: -error, flags: 0 })
    }

    fn answer(&self, mut answer: libc::seccomp_notif_resp) -> Result<()> {
        // SAFETY: the kernel reads the structure that this request is made for.
        let sent = unsafe { libc::ioctl(self.listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("letting a write go on") }
    }
}

/// A copy of this process (fork), whose only thread makes gated writes. Killed on drop.
#[derive(Debug)]
pub struct Copy {
    process: pid_t,
    ended: bool,
}

impl Copy {
    /// Runs a function in a copy of this process, behind a gate. The copy ends with the function.
    ///
    /// # Errors
    /// If there can't be another process.
    pub fn start(work: impl FnOnce()) -> Result<(Self, Gate)> {
        // Work without a write would be over, and the copy gone, before its gate is taken. It begins at the end of this pipe.
        let (mut begin, until) = io::pipe().context("a pipe")?;
        // SAFETY: the child makes no use of other threads' locks but the allocator's, which fork(2) takes care of.
        let process = unsafe { libc::fork() };
        if process < 0 {
            return Err(io::Error::last_os_error()).context("fork");
        }
        if process == 0 {
            drop(until);
            std::panic::set_hook(Box::new(|panic| {
                // Past the test harness, whose memory of it ends with this copy.
                let _ = io::Write::write_fmt(&mut io::stderr(), format_args!("{panic}\n"));
            }));
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                hold_writes().expect("a gate");
                begin.read_to_end(&mut Vec::new()).expect("the end of a pipe");
                work();
            }));
            // SAFETY: the call takes no addresses. What the copy has in memory is the original's to tidy up.
            unsafe { libc::_exit(i32::from(worked.is_err())) };
        }
        let copy = Self { process, ended: false };
        let gate = Gate::of(process.unsigned_abs())?;
        drop(until);
        Ok((copy, gate))
    }

    /// Waits for the end of the function.
    ///
    /// # Errors
    /// If it panicked.
    pub fn finish(mut self) -> Result<()> {
        let status = self.wait()?;
        if status == 0 { Ok(()) } else { bail!("the copy ended with wait status {status:#x}") }
    }

    /// Kills it, as `kill -9` does, and waits until it is gone.
    pub fn kill(self) {
        drop(self);
    }

    fn wait(&mut self) -> Result<c_int> {
        let mut status = 0;
        // SAFETY: the kernel writes one integer.
        if unsafe { libc::waitpid(self.process, &raw mut status, 0) } != self.process {
            return Err(io::Error::last_os_error()).context("waitpid");
        }
        self.ended = true;
        Ok(status)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: the call takes no addresses, and the child has not been waited for, so the number is its own.
            unsafe { libc::kill(self.process, libc::SIGKILL) };
            let _ = self.wait();
        }
    }
}

/// Has the calling process ask before each write from now on, and end with the thread that made it.
fn hold_writes() -> io::Result<()> {
    let mut program = filter();
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the filter is alive during the call; descriptors are this process's own.
    unsafe {
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong) != 0 {
            return Err(io::Error::last_os_error());
        }
        let listener = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        );
        // It outlives exec, and closing it would let every later write fail.
        if listener < 0 || libc::dup2(listener as c_int, LISTENER) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::close(listener as c_int);
    }
    Ok(())
}

/// The filter, in classic BPF.
fn filter() -> Vec<sock_filter> {
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const NUMBER: u32 = 0;
    /// Lower half of the first argument (little endian).
    const FIRST_ARGUMENT: u32 = 16;
    let instruction = |code, jt, k| sock_filter { code, jt, jf: 0, k };
    let tell = instruction(RETURN, 0, libc::SECCOMP_RET_USER_NOTIF);
    let allow = instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW);
    // Each group ends with "allow, tell", and a match jumps over what is left of it.
    let group = |values: &[u32]| {
        let each = values.iter().enumerate().map(|(n, value)| {
            let to_tell = u8::try_from(values.len() - n).expect("a short list");
            instruction(JUMP_IF_EQUAL, to_tell, *value)
        });
        each.chain([allow, tell]).collect::<Vec<_>>()
    };
    let commands = group(&COMMANDS.map(|(command, _)| command));
    let files = group(&FILES.iter().map(|(call, _)| *call as u32).collect::<Vec<_>>());
    let skip = u8::try_from(files.len()).expect("a short list");
    let mut program = vec![instruction(LOAD, 0, NUMBER), instruction(JUMP_IF_EQUAL, skip, libc::SYS_bpf as u32)];
    program.extend(files);
    program.push(instruction(LOAD, 0, FIRST_ARGUMENT));
    program.extend(commands);
    program
}

/// What a system call returned, as a descriptor.
///
/// # Safety
/// It must be the result of a call that makes one.
unsafe fn owned(result: c_long) -> io::Result<OwnedFd> {
    match c_int::try_from(result) {
        // SAFETY: by this function's contract nobody else owns it.
        Ok(descriptor) if descriptor >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::Error::last_os_error()),
    }
}
