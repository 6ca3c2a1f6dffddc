//! The pin directory: that it is on a BPF file system, that nobody else uses it, and that what is pinned there is what
//! this program would have made.
//!
//! Maps are pinned in the directory itself, links in its folder `links`, programs in `programs` ([`super::shelf`]), and what
//! belongs to a change of size in `resizing` ([`super::resize`]). The directory carries an flock while a daemon or a cleanup
//! works on it; the kernel lets go of it when the process ends, however it ends.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sheave_common::config::Config;
use sheave_common::{LAYOUT_VERSION, names};

use super::definitions::Definition;
use super::error::DataplaneError;
use super::map::Map;
use super::syscall::{self, MapInfo};

const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
const LINKS: &str = "links";
const PROGRAMS: &str = "programs";
const RESIZING: &str = "resizing";
const MAPS: &str = "maps";

/// A pin directory that is ours for as long as this value lives.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    lock: File,
}

impl Pins {
    /// Creates the directory if need be, and takes it.
    pub(super) fn take(directory: &Path) -> Result<Self, DataplaneError> {
        check_file_system(directory)?;
        loop {
            fs::create_dir_all(directory).map_err(DataplaneError::file("create", directory))?;
            if let Some(pins) = Self::lock(directory)? {
                let links = pins.links();
                fs::create_dir_all(&links).map_err(DataplaneError::file("create", &links))?;
                return Ok(pins);
            }
        }
    }

    /// Takes the directory if it is there.
    pub(super) fn take_existing(directory: &Path) -> Result<Option<Self>, DataplaneError> {
        match fs::metadata(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(DataplaneError::file("read", directory)(error)),
            Ok(_) => {
                check_file_system(directory)?;
                Self::lock(directory)
            }
        }
    }

    /// `None` if the directory went away in the meantime.
    fn lock(directory: &Path) -> Result<Option<Self>, DataplaneError> {
        let lock = match File::open(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(DataplaneError::file("open", directory))?,
        };
        // SAFETY: the descriptor is open; flock(2) takes no addresses.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            let error = io::Error::last_os_error();
            return Err(match error.kind() {
                io::ErrorKind::WouldBlock => DataplaneError::Busy { path: directory.to_owned() },
                _ => DataplaneError::file("lock", directory)(error),
            });
        }
        // A cleanup may have removed the directory between open and flock: then the lock is on a dead inode.
        Ok(is_there(&lock, directory)?.then(|| Self { directory: directory.to_owned(), lock }))
    }

    /// Makes sure that the directory is there and still ours: somebody may have removed it, or unmounted its file system.
    pub(super) fn retake(&mut self) -> Result<(), DataplaneError> {
        check_file_system(&self.directory)?;
        if !is_there(&self.lock, &self.directory)? {
            *self = Self::take(&self.directory)?;
        }
        Ok(())
    }

    /// Where the maps are pinned.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where the links are pinned.
    pub(super) fn links(&self) -> PathBuf {
        links_of(&self.directory)
    }

    /// Where the programs are pinned.
    pub(super) fn programs(&self) -> PathBuf {
        self.directory.join(PROGRAMS)
    }

    /// Where everything is that a change of size needs.
    pub(super) fn resizing(&self) -> PathBuf {
        self.directory.join(RESIZING)
    }

    /// Where maps are pinned that are to take the place of others.
    pub(super) fn resized_maps(&self) -> PathBuf {
        self.resizing().join(MAPS)
    }

    /// Where a map is pinned, or to be.
    pub(super) fn map(&self, definition: &Definition) -> PathBuf {
        let folder = if definition.resized { self.resized_maps() } else { self.directory.clone() };
        folder.join(definition.name)
    }

    /// The kernel's ids of the pinned maps, in the order of their definitions; `None` if one is not pinned.
    pub(super) fn map_ids(&self, definitions: &[Definition]) -> Result<Option<Vec<u32>>, DataplaneError> {
        let pinned = definitions.iter().map(|definition| self.pinned(definition));
        pinned.map(|info| Ok(info?.map(|info| info.id))).collect()
    }

    /// The pin of a definition's map, and the map.
    pub(super) fn open_map(&self, definition: &Definition) -> Result<(PathBuf, OwnedFd), DataplaneError> {
        let pin = self.map(definition);
        let map = syscall::open_pin(&pin, false).map_err(DataplaneError::file("open the pin", &pin))?;
        Ok((pin, map))
    }

    /// The kernel's map for a definition; `None` if none is pinned.
    pub(super) fn pinned(&self, definition: &Definition) -> Result<Option<MapInfo>, DataplaneError> {
        let pin = self.map(definition);
        let map = match syscall::open_pin(&pin, true) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(DataplaneError::file("open the pin", &pin))?,
        };
        syscall::map_info(map.as_fd()).map(Some).map_err(DataplaneError::file("inspect the pin", &pin))
    }

    /// Gives definitions whose size nobody asked for that of the map that is pinned.
    pub(super) fn adopt_sizes(&self, definitions: &mut [Definition]) -> Result<(), DataplaneError> {
        for definition in definitions {
            if let Some(info) = self.pinned(definition)? {
                definition.adopt(&info);
            }
        }
        Ok(())
    }

    /// Compares every map that is pinned with its definition, and the pinned config's layout version with this
    /// program's.
    pub(super) fn verify(&self, definitions: &[Definition]) -> Result<(), DataplaneError> {
        for definition in definitions {
            let Some(info) = self.pinned(definition)? else { continue };
            if let Some(difference) = definition.difference(&info) {
                let pin = self.directory.join(definition.name);
                return Err(DataplaneError::IncompatiblePin { pin, difference });
            }
        }
        if !self.directory.join(names::CONFIG).exists() {
            return Ok(());
        }
        let config: Map<u32, Config> = Map::open(&self.directory, names::CONFIG, true)?;
        match config.get(&0)?.map(|config| config.layout_version) {
            // A start that got no further than pinning the map wrote nothing.
            None | Some(0 | LAYOUT_VERSION) => Ok(()),
            Some(found) => {
                let path = self.directory.clone();
                Err(DataplaneError::IncompatibleLayout { path, found, expected: LAYOUT_VERSION })
            }
        }
    }
}

/// Whether an open directory is the one of this path.
fn is_there(open: &File, directory: &Path) -> Result<bool, DataplaneError> {
    let ours = open.metadata().map_err(DataplaneError::file("read", directory))?;
    Ok(fs::metadata(directory).is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())))
}

/// Where the links are pinned.
pub(super) fn links_of(directory: &Path) -> PathBuf {
    directory.join(LINKS)
}

/// The directory, or the nearest one above it that exists, must be on a BPF file system.
pub(super) fn check_file_system(directory: &Path) -> Result<(), DataplaneError> {
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(directory);
    if file_system(existing)? == BPF_FS_MAGIC {
        Ok(())
    } else {
        Err(DataplaneError::NotBpfFileSystem { path: directory.to_owned() })
    }
}

/// The kernel's number for the kind of file system that something is on.
pub(super) fn file_system(existing: &Path) -> Result<u32, DataplaneError> {
    let path = CString::new(existing.as_os_str().as_bytes())
        .map_err(|error| DataplaneError::file("inspect", existing)(error.into()))?;
    let mut statistics = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path is NUL-terminated, and the buffer is a statfs.
    if unsafe { libc::statfs(path.as_ptr(), statistics.as_mut_ptr()) } != 0 {
        return Err(DataplaneError::file("inspect", existing)(io::Error::last_os_error()));
    }
    // SAFETY: statfs(2) succeeded, and all-zeroes was a valid value before.
    Ok(unsafe { statistics.assume_init() }.f_type as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_path_off_the_bpf_file_system_is_refused_with_the_command_that_mounts_one() {
        let error = Pins::take(Path::new("/tmp/sheave-no-bpffs")).expect_err("/tmp is no BPF file system");
        assert!(error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"), "{error}");
    }
}
