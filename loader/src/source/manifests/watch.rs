//! Which files of the folder to look at again: inotify, with a pause for writers to finish, and a way back when the
//! folder itself goes and comes.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use futures::StreamExt;
use inotify::{Event, EventMask, EventStream, Inotify, WatchDescriptor, WatchMask};
use tokio::time::Instant;

use super::super::SourceError;

/// Silence that must follow the last event.
const QUIET: Duration = Duration::from_millis(50);
/// How long the first event waits at most, however busy the folder is.
const PATIENCE: Duration = Duration::from_millis(500);
/// How often a folder that isn't there is looked for.
const RETRY: Duration = Duration::from_millis(500);

/// How often to make sure that the watched folder is still the one at its path, which events don't tell when a link
/// on the way to it was turned.
const CHECK: Duration = Duration::from_secs(2);

/// What to look at again.
#[derive(Debug)]
pub(super) enum Touched {
    /// These files.
    Files(BTreeSet<OsString>),
    /// All of them: the start, a new folder, an overflow of the queue, or a swapped `..data` link.
    Everything,
}

/// A folder that is watched.
pub(super) struct Watch {
    directory: PathBuf,
    events: EventStream<[u8; 4096]>,
    /// The folder's watch; without one, it has to be found (again).
    descriptor: Option<WatchDescriptor>,
    /// Device and inode of the folder that is watched.
    identity: Option<(u64, u64)>,
    /// That it is missing has been said.
    said: bool,
}

impl Watch {
    pub(super) fn new(directory: PathBuf) -> Result<Self, SourceError> {
        let events = Inotify::init().and_then(|inotify| inotify.into_event_stream([0; 4096]));
        match events {
            Ok(events) => Ok(Self { directory, events, descriptor: None, identity: None, said: false }),
            Err(source) => Err(SourceError::Inotify { directory, source }),
        }
    }

    /// Waits until something was touched and its writers had time to finish.
    pub(super) async fn next(&mut self) -> Result<Touched, SourceError> {
        if self.descriptor.is_none() {
            self.find().await;
            return Ok(Touched::Everything);
        }
        let mut files = BTreeSet::new();
        let mut everything = false;
        let mut deadline: Option<(Instant, Instant)> = None;
        loop {
            let event = match deadline {
                None => match tokio::time::timeout(CHECK, self.events.next()).await {
                    Ok(event) => event,
                    Err(_) if self.is_in_place() => continue,
                    Err(_) => {
                        self.forget();
                        self.find().await;
                        return Ok(Touched::Everything);
                    }
                },
                Some((quiet, last)) => match tokio::time::timeout_at(quiet.min(last), self.events.next()).await {
                    Ok(event) => event,
                    Err(_) if everything => return Ok(Touched::Everything),
                    Err(_) => return Ok(Touched::Files(files)),
                },
            };
            let event = match event {
                Some(Ok(event)) => event,
                Some(Err(source)) => {
                    return Err(SourceError::Inotify { directory: self.directory.clone(), source });
                }
                None => {
                    let source = io::ErrorKind::UnexpectedEof.into();
                    return Err(SourceError::Inotify { directory: self.directory.clone(), source });
                }
            };
            if self.is_of_a_former_folder(&event) {
                continue;
            }
            if event.mask.intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED) {
                self.forget();
                self.find().await;
                everything = true;
            } else if event.mask.contains(EventMask::Q_OVERFLOW) {
                everything = true;
            } else if let Some(name) = event.name {
                if event.mask.contains(EventMask::CREATE) && !self.is_complete_at_birth(&name) {
                    continue;
                }
                everything |= name.as_bytes().starts_with(b"..");
                files.insert(name);
            }
            let now = Instant::now();
            let last = deadline.map_or(now + PATIENCE, |(_, last)| last);
            deadline = Some((now + QUIET, last));
        }
    }

    /// The folder could not be read: say so once, and look for it again.
    pub(super) fn lost(&mut self, error: &io::Error) {
        self.forget();
        if !std::mem::replace(&mut self.said, true) {
            tracing::warn!(directory = %self.directory.display(), %error,
                "the folder of manifests can't be read: what it last held stays in place, and it will be read when it \
                 is there");
        }
    }

    fn forget(&mut self) {
        if let Some(descriptor) = self.descriptor.take() {
            // Fails if the kernel has dropped the watch together with the folder; both ways it is gone.
            let _: io::Result<()> = self.events.watches().remove(descriptor);
        }
    }

    /// Waits until the folder is there and watched.
    async fn find(&mut self) {
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        loop {
            // Before the watch: if the folder is exchanged in between, that shows as a difference.
            self.identity = self.look();
            match self.events.watches().add(&self.directory, mask) {
                Ok(descriptor) => {
                    self.descriptor = Some(descriptor);
                    if std::mem::take(&mut self.said) {
                        tracing::info!(directory = %self.directory.display(), "the folder of manifests is there");
                    }
                    return;
                }
                Err(error) => self.lost(&error),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn look(&self) -> Option<(u64, u64)> {
        let metadata = std::fs::metadata(&self.directory).ok()?;
        Some((metadata.dev(), metadata.ino()))
    }

    fn is_in_place(&self) -> bool {
        self.look() == self.identity
    }

    fn is_of_a_former_folder<S>(&self, event: &Event<S>) -> bool {
        !event.mask.contains(EventMask::Q_OVERFLOW) && self.descriptor.as_ref() != Some(&event.wd)
    }

    /// A link is whole when it appears; a file that was created is still being written, and is announced again when
    /// its writer closes it.
    fn is_complete_at_birth(&self, name: &OsStr) -> bool {
        let metadata = std::fs::symlink_metadata(self.directory.join(name));
        metadata.is_ok_and(|metadata| metadata.is_symlink() || metadata.nlink() > 1)
    }
}
