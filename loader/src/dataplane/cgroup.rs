//! Connect-time programs on the cgroup v2 hierarchy: one link each, pinned and held, whose program a restart swaps in place.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::error::DataplaneError;
use super::links;
use super::pins;
use super::programs::Programs;
use super::syscall::{self, AttachType};

const HOOKS: [(&str, &str, AttachType); 8] = [
    ("cgroup_connect4", "sock_connect4", AttachType::Connect4),
    ("cgroup_sendmsg4", "sock_sendmsg4", AttachType::Sendmsg4),
    ("cgroup_recvmsg4", "sock_recvmsg4", AttachType::Recvmsg4),
    ("cgroup_getpeername4", "sock_getpeername4", AttachType::Getpeername4),
    ("cgroup_connect6", "sock_connect6", AttachType::Connect6),
    ("cgroup_sendmsg6", "sock_sendmsg6", AttachType::Sendmsg6),
    ("cgroup_recvmsg6", "sock_recvmsg6", AttachType::Recvmsg6),
    ("cgroup_getpeername6", "sock_getpeername6", AttachType::Getpeername6),
];

/// The connect-time programs' links on a cgroup, pinned and held.
#[derive(Debug)]
pub(super) struct Attached {
    cgroup: PathBuf,
    pins: PathBuf,
    held: BTreeMap<&'static str, OwnedFd>,
}

impl Attached {
    /// Attaches the programs to a cgroup, or swaps those that are there.
    pub(super) fn attach(programs: &Programs, pins: PathBuf, cgroup: PathBuf) -> Result<Self, DataplaneError> {
        let mut attached = Self { cgroup, pins, held: BTreeMap::new() };
        attached.renew(programs)?;
        Ok(attached)
    }

    /// Makes sure that every hook of the cgroup has its program. Returns the pins of hooks that had none, or another one.
    pub(super) fn renew(&mut self, programs: &Programs) -> Result<Vec<&'static str>, DataplaneError> {
        let cgroup = &self.cgroup;
        let unusable = |source| DataplaneError::Cgroup { path: cgroup.clone(), source };
        let directory = File::open(cgroup).map_err(unusable)?;
        let id = directory.metadata().map_err(unusable)?.ino();
        let mut renewed = Vec::new();
        for (name, program, attach_type) in HOOKS {
            let pin = self.pins.join(name);
            let fd = programs.fd(program)?;
            let target = || format!("cgroup {}", cgroup.display());
            let error = |source| DataplaneError::Attach { program, target: target(), source };
            let held = self.held.remove(name);
            if let Some(link) = held.map_or_else(|| links::open(&pin), |link| Ok(Some(link))).map_err(error)? {
                let info = syscall::link_info(link.as_fd()).map_err(error)?;
                // The cgroup's id is its inode number; it reads 0 once the cgroup is gone.
                let attached_to = u64::from(info.target) | u64::from(info.target_high) << 32;
                let is_ours = syscall::object_id(fd).is_ok_and(|id| id == info.program_id);
                if attached_to == id && (is_ours || syscall::link_update(link.as_fd(), fd).is_ok()) {
                    self.held.insert(name, link);
                    if !is_ours {
                        renewed.push(name);
                    }
                    continue;
                }
                links::remove(&pin)?;
            }
            let link = syscall::link_cgroup(fd, directory.as_fd(), attach_type).map_err(error)?;
            if let Err(error) = syscall::pin(link.as_fd(), &pin) {
                warn!(pin = %pin.display(), %error, "attached, but the link can't be pinned: it would not outlive this daemon");
            }
            self.held.insert(name, link);
            renewed.push(name);
        }
        Ok(renewed)
    }

    /// The links, with where they are to be pinned.
    pub(super) fn links(&self) -> impl Iterator<Item = (PathBuf, BorrowedFd<'_>)> {
        self.held.iter().map(|(name, link)| (self.pins.join(name), link.as_fd()))
    }
}

/// Detaches them.
pub(super) fn detach(pins: &Path) -> Result<(), DataplaneError> {
    HOOKS.iter().try_for_each(|(pin, ..)| links::remove(&pins.join(pin)))
}

/// Makes sure that a directory is one of a cgroup v2 hierarchy.
pub(super) fn check(directory: &Path) -> Result<(), DataplaneError> {
    const CGROUP2_MAGIC: u32 = 0x6367_7270;
    if pins::file_system(directory)? == CGROUP2_MAGIC {
        return Ok(());
    }
    let source = io::Error::other("it is not on a cgroup v2 file system");
    Err(DataplaneError::Cgroup { path: directory.to_owned(), source })
}

/// The root of the cgroup v2 hierarchy.
pub(super) fn root() -> Result<PathBuf, DataplaneError> {
    let mounts = fs::read_to_string("/proc/mounts").map_err(DataplaneError::file("read", "/proc/mounts"))?;
    mount_point(&mounts).ok_or(DataplaneError::NoCgroup)
}

fn mount_point(mounts: &str) -> Option<PathBuf> {
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields.get(2) == Some(&"cgroup2")).find_map(|fields| fields.get(1).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_found_in_a_hybrid_setup() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_point(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_point("proc /proc proc rw 0 0\n"), None);
    }
}
