//! Listening to the programs' events (`events`), of which there are some only while somebody does (`listener`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::{Map as AyaMap, MapData, RingBuf};
use sheave_common::event::{Event, LOST, UNTIL};
use sheave_common::names;

use super::error::MapError;
use super::map::Map;
use super::pins;
use super::syscall::monotonic_seconds;

/// For how long programs go on after the listener last asked for more: longer than it ever waits.
const AHEAD: u32 = 3;
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Why nobody can listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Nothing is pinned, or by a version that has no events.
    #[error("no events of Sheave at {}: start `sheave run` of this version on this node, or give its --pin-path", path.display())]
    NoEvents {
        /// --pin-path
        path: PathBuf,
    },
    /// EPERM, EACCES.
    #[error("not permitted to open {}: run as root, or with CAP_BPF and access to the directory", pin.display())]
    NotPermitted {
        /// The pin.
        pin: PathBuf,
    },
    /// A ring buffer has one reader.
    #[error("somebody else listens already: there can be one `sheave monitor` at a time")]
    Busy,
    /// The ring buffer can't be used.
    #[error("cannot read the ring buffer {}", pin.display())]
    Ring {
        /// Its pin.
        pin: PathBuf,
        /// What the kernel said.
        source: Box<aya::maps::MapError>,
    },
    /// Another map can't be used.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Waiting, or a lock, failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// The system call's error.
        source: io::Error,
    },
}

/// The one listener of a pin directory. When it is dropped, the programs fall silent.
pub struct Listener {
    ring: RingBuf<MapData>,
    listener: Map<u32, u64>,
    /// What was lost before.
    lost: u64,
    /// The folder of links, which nobody else locks.
    _lock: File,
}

impl Listener {
    /// Has the programs tell from now on.
    ///
    /// # Errors
    ///
    /// Each says what to do about it.
    pub fn open(directory: &Path) -> Result<Self, ListenError> {
        let pin = directory.join(names::EVENTS);
        let listener = Map::open(directory, names::LISTENER, false).map_err(|error| explain(directory, error))?;
        let lock = lock(&pins::links_of(directory))?;
        let unusable = |source| ListenError::Ring { pin: pin.clone(), source: Box::new(source) };
        let data = MapData::from_pin(&pin).map_err(unusable)?;
        let mut ring = RingBuf::try_from(AyaMap::RingBuf(data)).map_err(unusable)?;
        // What a listener that was killed has left.
        while ring.next().is_some() {}
        let lost = listener.get(&LOST)?.unwrap_or_default();
        let this = Self { ring, listener, lost, _lock: lock };
        this.renew()?;
        Ok(this)
    }

    /// Waits for events for `limit` at most (no longer than a second), and hands on those that are there. Returns how many were lost since the last time.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn wait(&mut self, limit: Duration, mut take: impl FnMut(Event)) -> Result<u64, ListenError> {
        self.renew()?;
        poll(&self.ring, limit.min(LONGEST_WAIT))?;
        while let Some(item) = self.ring.next() {
            if item.len() >= size_of::<Event>() {
                // SAFETY: there are as many octets as an event has, and any octets are one.
                take(unsafe { std::ptr::read_unaligned(item.as_ptr().cast()) });
            }
        }
        let lost = self.listener.get(&LOST)?.unwrap_or_default();
        Ok(lost.saturating_sub(std::mem::replace(&mut self.lost, lost)))
    }

    fn renew(&self) -> Result<(), MapError> {
        self.listener.put(&UNTIL, &u64::from(monotonic_seconds() + AHEAD))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // If that fails, they fall silent a moment later.
        let _ = self.listener.put(&UNTIL, &0);
    }
}

fn explain(directory: &Path, error: MapError) -> ListenError {
    match error {
        MapError::Open { pin, source } => match source.kind() {
            io::ErrorKind::NotFound => ListenError::NoEvents { path: directory.to_owned() },
            io::ErrorKind::PermissionDenied => ListenError::NotPermitted { pin },
            _ => MapError::Open { pin, source }.into(),
        },
        error => error.into(),
    }
}

fn lock(directory: &Path) -> Result<File, ListenError> {
    let failed = |source| ListenError::System { action: "lock the folder of links", source };
    let file = File::open(directory).map_err(failed)?;
    // SAFETY: the descriptor is open; flock(2) takes no addresses.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let error = io::Error::last_os_error();
    Err(if error.kind() == io::ErrorKind::WouldBlock { ListenError::Busy } else { failed(error) })
}

fn poll(ring: &RingBuf<MapData>, limit: Duration) -> Result<(), ListenError> {
    let mut descriptor = libc::pollfd { fd: ring.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: there is one pollfd, which outlives the call.
    if unsafe { libc::poll(&raw mut descriptor, 1, milliseconds) } >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        return Ok(());
    }
    Err(ListenError::System { action: "wait for events", source: error })
}
