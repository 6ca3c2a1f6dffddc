//! Connect-time programs on the cgroup v2 hierarchy: one pinned link each, whose program a restart swaps in place.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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

/// Attaches the connect-time programs to a cgroup, or swaps those that are there.
pub(super) fn attach(programs: &Programs, pins: &Path, cgroup: &Path) -> Result<(), DataplaneError> {
    let unusable = |source| DataplaneError::Cgroup { path: cgroup.to_owned(), source };
    let directory = File::open(cgroup).map_err(unusable)?;
    let id = directory.metadata().map_err(unusable)?.ino();
    for (pin, program, attach_type) in HOOKS {
        let pin = pins.join(pin);
        let fd = programs.fd(program)?;
        let error = |source| DataplaneError::Attach { program, target: format!("cgroup {}", cgroup.display()), source };
        if let Some(link) = links::open(&pin).map_err(error)? {
            let info = syscall::link_info(link.as_fd()).map_err(error)?;
            // The cgroup's id is its inode number; it reads 0 once the cgroup is gone.
            let attached_to = u64::from(info.target) | u64::from(info.target_high) << 32;
            if attached_to == id && syscall::link_update(link.as_fd(), fd).is_ok() {
                continue;
            }
            links::remove(&pin)?;
        }
        let link = syscall::link_cgroup(fd, directory.as_fd(), attach_type).map_err(error)?;
        syscall::pin(link.as_fd(), &pin).map_err(DataplaneError::file("pin", &pin))?;
    }
    Ok(())
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
