//! Loaded programs on their shelf: pinned as `programs/<key>/<name>`, so that the next start need not have the kernel verify
//! them again.
//!
//! The key stands for everything that makes a loaded program what it is: the object, the constants that were set in it, and
//! the maps that it uses. So what is found there is what this build would load; any other key's folder is another build's.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::error::DataplaneError;
use super::pins::Pins;
use super::programs;
use super::syscall;

const SCHED_CLS: u32 = 3;
const XDP: u32 = 6;
const CGROUP_SOCK_ADDR: u32 = 18;
/// Octets of a program's name that the kernel keeps.
const NAME: usize = 15;

/// A folder of pinned programs.
#[derive(Debug)]
pub(super) struct Shelf {
    /// That of all shelves.
    parent: PathBuf,
    folder: PathBuf,
}

impl fmt::Display for Shelf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.folder.display().fmt(f)
    }
}

impl Shelf {
    /// This build's, for the maps of these ids in the order of their definitions. The kernel gives an id to one map only.
    pub(super) fn new(pins: &Pins, maps: &[u32], constants: u32) -> Self {
        let mut hasher = DefaultHasher::new();
        (crate::EBPF_OBJECT, constants, maps).hash(&mut hasher);
        let parent = pins.programs();
        Self { folder: parent.join(format!("{:016x}", hasher.finish())), parent }
    }

    /// Where a program is pinned.
    pub(super) fn pin(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The one that [`Self::keep`] has made in a folder.
    pub(super) fn kept(folder: &Path) -> Self {
        Self { parent: folder.to_owned(), folder: folder.to_owned() }
    }

    /// Pins the programs that are on a shelf in another folder, too, where they stay while others take their place here.
    pub(super) fn keep(pins: &Pins, folder: &Path) -> Result<(), DataplaneError> {
        let parent = pins.programs();
        let Ok(shelves) = fs::read_dir(&parent) else { return Ok(()) };
        for shelf in shelves {
            let shelf = shelf.map_err(DataplaneError::file("list", &parent))?.path();
            // Two are there only if a start was killed that had not filled one yet, or not removed the other.
            if let Some(programs) = (Self { parent: parent.clone(), folder: shelf }).take() {
                return pin_all(&programs, folder);
            }
        }
        Ok(())
    }

    /// Every program, or `None` if one is missing or is something else.
    pub(super) fn take(&self) -> Option<BTreeMap<&'static str, OwnedFd>> {
        if !self.folder.is_dir() {
            return None;
        }
        let mut programs = BTreeMap::new();
        for name in programs::names() {
            let pin = self.pin(name);
            match open(&pin, name) {
                Ok(program) => drop(programs.insert(name, program)),
                Err(error) => {
                    warn!(pin = %pin.display(), %error, "not the program that belongs here; loading all of them anew");
                    return None;
                }
            }
        }
        Some(programs)
    }

    /// Pins the programs here.
    pub(super) fn fill(&self, programs: &BTreeMap<&'static str, OwnedFd>) -> Result<(), DataplaneError> {
        pin_all(programs, &self.folder)
    }

    /// Removes those of other builds: what of them is attached works until it is replaced.
    pub(super) fn remove_others(&self) -> Result<(), DataplaneError> {
        let others = fs::read_dir(&self.parent).map_err(DataplaneError::file("list", &self.parent))?;
        for other in others {
            let other = other.map_err(DataplaneError::file("list", &self.parent))?.path();
            if other != self.folder {
                info!(shelf = %other.display(), "removing the programs of another version, or with other options");
                remove(&other)?;
            }
        }
        Ok(())
    }
}

/// Pins programs in a folder of their own.
fn pin_all(programs: &BTreeMap<&'static str, OwnedFd>, folder: &Path) -> Result<(), DataplaneError> {
    remove(folder)?;
    fs::create_dir_all(folder).map_err(DataplaneError::file("create", folder))?;
    for (name, program) in programs {
        let pin = folder.join(name);
        syscall::pin(program.as_fd(), &pin).map_err(DataplaneError::file("pin", &pin))?;
    }
    Ok(())
}

/// Opens a pin that must be this program.
fn open(pin: &Path, name: &str) -> io::Result<OwnedFd> {
    let object = syscall::open_pin(pin, false)?;
    let kind = fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    if kind.as_os_str() != "anon_inode:bpf-prog" {
        return Err(io::Error::other(format!("it is {}", kind.display())));
    }
    let info = syscall::program_info(object.as_fd())?;
    let end = info.name.iter().position(|octet| *octet == 0).unwrap_or(info.name.len());
    let expected = &name.as_bytes()[..name.len().min(NAME)];
    if (info.program_type, &info.name[..end]) != (program_type(name), expected) {
        let found = String::from_utf8_lossy(&info.name[..end]);
        return Err(io::Error::other(format!("it is the program {found:?} of type {}", info.program_type)));
    }
    Ok(object)
}

fn program_type(name: &str) -> u32 {
    if programs::CLASSIFIERS.contains(&name) {
        SCHED_CLS
    } else if name == programs::XDP {
        XDP
    } else {
        CGROUP_SOCK_ADDR
    }
}

/// Removes a shelf with what is on it; it need not be there.
fn remove(folder: &Path) -> Result<(), DataplaneError> {
    let removed = if folder.is_dir() { fs::remove_dir_all(folder) } else { fs::remove_file(folder) };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(DataplaneError::file("remove", folder)),
    }
}
