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

/// A cgroup whose members can be short of memory.
#[derive(Debug)]
pub struct MemoryCgroup {
    group: Cgroup,
    /// The file that has the limit, and the one that tells what is used.
    files: [&'static str; 2],
}

impl MemoryCgroup {
    /// Makes one without a limit, in whichever hierarchy has the memory controller.
    ///
    /// # Errors
    /// If none has, or it is not writable.
    pub fn new() -> Result<Self> {
        let (root, files) = match memory_root()? {
            Some(root) => (root, ["memory.limit_in_bytes", "memory.usage_in_bytes"]),
            None => {
                let root = root()?;
                fs::write(root.join("cgroup.subtree_control"), "+memory").context("no memory controller")?;
                (root, ["memory.max", "memory.current"])
            }
        };
        Ok(Self { group: Cgroup::below(&root)?, files })
    }

    /// Makes the command's process a member before it starts.
    pub fn adopt(&self, command: &mut Command) {
        self.group.adopt(command);
    }

    /// What its members, and what they have made in the kernel, may take.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn limit(&self, octets: u64) -> Result<()> {
        Ok(fs::write(self.group.path.join(self.files[0]), octets.to_string())?)
    }

    /// What they take.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn used(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.group.path.join(self.files[1]))?.trim().parse()?)
    }
}

impl Cgroup {
    /// Makes one below the hierarchy's root.
    ///
    /// # Errors
    /// If cgroup v2 is not mounted or not writable.
    pub fn new() -> Result<Self> {
        Self::below(&root()?)
    }

    fn below(root: &Path) -> Result<Self> {
        let path = root.join(crate::leftovers::unique_name());
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
    let v2 = mounts()?.into_iter().find(|[kind, ..]| kind == "cgroup2");
    v2.map(|[_, place, _]| PathBuf::from(place)).context("cgroup v2 is not mounted")
}

/// Where cgroup v1's memory controller is mounted, if it is.
fn memory_root() -> Result<Option<PathBuf>> {
    let v1 = mounts()?.into_iter();
    let mut v1 =
        v1.filter(|[kind, _, options]| kind == "cgroup" && options.split(',').any(|option| option == "memory"));
    Ok(v1.next().map(|[_, place, _]| PathBuf::from(place)))
}

/// Wherever tests make cgroups.
pub(crate) fn roots() -> impl Iterator<Item = PathBuf> {
    root().ok().into_iter().chain(memory_root().ok().flatten())
}

/// Kind, place and options of each mounted file system.
fn mounts() -> Result<Vec<[String; 3]>> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let fields = fields.filter_map(|fields| match fields[..] {
        [_, place, kind, options, ..] => Some([kind, place, options].map(str::to_owned)),
        _ => None,
    });
    Ok(fields.collect())
}
