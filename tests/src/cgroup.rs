//! A cgroup v2 directory of one's own, so that connect-time programs never reach the machine's other processes.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

/// A cgroup that is removed on drop.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes one below the hierarchy's root.
    ///
    /// # Errors
    /// If cgroup v2 is not mounted or not writable.
    pub fn new() -> Result<Self> {
        let path = root()?.join(crate::leftovers::unique_name());
        fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the command's process a member before it starts.
    pub fn adopt(&self, command: &mut Command) {
        let file = self.path.join("cgroup.procs");
        let file = std::ffi::CString::new(file.into_os_string().into_encoded_bytes()).unwrap_or_default();
        // SAFETY: between fork and exec the closure only makes system calls, on memory that the closure owns.
        unsafe {
            command.pre_exec(move || {
                let descriptor = libc::open(file.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                if descriptor < 0 || libc::write(descriptor, c"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                libc::close(descriptor);
                Ok(())
            });
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Members that have just been killed leave a moment later.
        for _ in 0..50 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        eprintln!("cannot remove the cgroup {}", self.path.display());
    }
}

/// Where cgroup v2 is mounted; on hybrid systems that is not /sys/fs/cgroup.
///
/// # Errors
/// If it isn't mounted.
pub fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .map(|fields| PathBuf::from(fields[1]))
        .context("cgroup v2 is not mounted")
}
