//! From programs on old maps to programs on new ones, under the same links and without a moment in which a flow is known
//! to one half of its hooks only.
//!
//! A tc hook can hold several programs, and each passes what it does not know. So first every hook gets a new program behind
//! the old one: old programs still make the flows, and whatever is made by a new one will be found everywhere. Then, one by
//! one, ingress hooks get the new program before the old one: new programs make the flows, and those that only the old maps
//! hold are found by the old ones. At last the links of new programs take the pins of those of old ones. All of them are
//! pinned meanwhile, so nothing of this depends on the process that does it. (The kernel holds no program twice on one hook:
//! to get it before the old one it is taken from behind, and for these microseconds that hook finds old flows only.)
//!
//! What a program does not know, and passes, is mid-flow TCP; the first datagrams of a UDP flow that came in these milliseconds
//! may be balanced anew. XDP holds one program, and what it does not know goes up to tc. Connect-time programs are swapped alone, too:
//! until the new maps have caught up, a socket that was pointed at its backend in these milliseconds shows the backend as its peer.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::super::error::DataplaneError;
use super::super::links::{self, Hook};
use super::super::syscall;

/// Ends of the names of pins: links with new programs behind the old one's link, and before it.
const BEHIND: &str = "_behind";
const BEFORE: &str = "_before";

/// Programs by name.
pub(super) type Programs = BTreeMap<&'static str, OwnedFd>;

/// A pinned link whose program is one of ours.
#[derive(Debug)]
struct Held {
    pin: PathBuf,
    link: OwnedFd,
    /// Interface and hook, for tc.
    hook: Option<(u32, Hook)>,
    program: &'static str,
    /// The program is a new one already.
    done: bool,
}

/// Links on their way from old programs to new ones.
#[derive(Debug)]
pub(super) struct Handover<'a> {
    new: &'a Programs,
    links: Vec<Held>,
    /// Where the further links of hooks are pinned.
    folder: PathBuf,
}

impl<'a> Handover<'a> {
    /// Finds the pinned links that have one of these programs. Whatever else is attached is swapped later, as at any start.
    pub(super) fn new(pins: &Path, folder: PathBuf, old: &Programs, new: &'a Programs) -> Result<Self, DataplaneError> {
        fs::create_dir_all(&folder).map_err(DataplaneError::file("create", &folder))?;
        let (old_ids, new_ids) = (ids(old)?, ids(new)?);
        let mut links = Vec::new();
        for entry in fs::read_dir(pins).map_err(DataplaneError::file("list", pins))? {
            let pin = entry.map_err(DataplaneError::file("list", pins))?.path();
            let error = || DataplaneError::file("inspect the pin", &pin);
            let Some(link) = links::open(&pin).map_err(error())? else { continue };
            let info = syscall::link_info(link.as_fd()).map_err(error())?;
            let program = old_ids.get(&info.program_id).or_else(|| new_ids.get(&info.program_id));
            // A link reads 0 when what it was on is gone.
            let Some(program) = program.filter(|_| info.target != 0 || info.target_high != 0) else { continue };
            let hook = pin.file_name().and_then(|name| Hook::of_pin(name.to_str()?)).filter(|(_, hook)| hook.is_tc());
            links.push(Held { link, hook, program, done: new_ids.contains_key(&info.program_id), pin });
        }
        // An interface's XDP after its tc, which then finds what XDP leaves to it.
        links.sort_by_key(|held| held.hook.is_none());
        Ok(Self { new, links, folder })
    }

    /// Has every hook find what the new maps hold, too.
    pub(super) fn look_into_both(&self) -> Result<(), DataplaneError> {
        for (held, hook) in self.waiting() {
            if !self.beside(held, BEFORE).exists() {
                self.put(held, hook, BEHIND)?;
            }
        }
        Ok(())
    }

    /// Has new programs make the flows, while every hook finds what the old maps hold, too.
    pub(super) fn swap(&self) -> Result<(), DataplaneError> {
        for (held, hook) in self.waiting().filter(|(_, (_, hook))| *hook == Hook::Ingress) {
            links::detach(&self.beside(held, BEHIND))?;
            self.put(held, hook, BEFORE)?;
        }
        for held in self.links.iter().filter(|held| held.hook.is_none()) {
            let swapped = syscall::link_update(held.link.as_fd(), program(self.new, held.program)?);
            swapped.map_err(|source| held.error(source))?;
        }
        Ok(())
    }

    /// Leaves hooks to the new programs alone.
    pub(super) fn finish(&self) -> Result<(), DataplaneError> {
        for (held, (_, hook)) in self.waiting() {
            let pin = self.beside(held, if hook == Hook::Ingress { BEFORE } else { BEHIND });
            fs::rename(&pin, &held.pin).map_err(DataplaneError::file("move", &pin))?;
            syscall::link_detach(held.link.as_fd()).map_err(|source| held.error(source))?;
        }
        Ok(())
    }

    /// The tc links of old programs.
    fn waiting(&self) -> impl Iterator<Item = (&Held, (u32, Hook))> {
        self.links.iter().filter(|held| !held.done).filter_map(|held| Some((held, held.hook?)))
    }

    /// The pin of a further link on the same hook.
    fn beside(&self, held: &Held, place: &str) -> PathBuf {
        let name = held.pin.file_name().unwrap_or_default().to_string_lossy();
        self.folder.join(format!("{name}{place}"))
    }

    /// Puts the new program beside the old one; a link that an earlier start has put there stays.
    fn put(&self, held: &Held, (index, hook): (u32, Hook), place: &str) -> Result<(), DataplaneError> {
        let pin = self.beside(held, place);
        let program = program(self.new, held.program)?;
        if let Some(link) = links::open(&pin).map_err(|source| held.error(source))? {
            match syscall::link_update(link.as_fd(), program) {
                // One that was taken from its hook by a start that was killed before it had removed the pin.
                Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => links::remove(&pin)?,
                result => return result.map_err(|source| held.error(source)),
            }
        }
        let (attach_type, _) = hook.attach_type();
        let link = syscall::link_beside(program, index, attach_type, held.link.as_fd(), place == BEFORE);
        let link = link.map_err(|source| held.error(source))?;
        syscall::pin(link.as_fd(), &pin).map_err(DataplaneError::file("pin", &pin))
    }
}

impl Held {
    fn error(&self, source: io::Error) -> DataplaneError {
        DataplaneError::Attach { program: self.program, target: format!("the hook of {}", self.pin.display()), source }
    }
}

fn ids(programs: &Programs) -> Result<BTreeMap<u32, &'static str>, DataplaneError> {
    let id = |fd: &OwnedFd| syscall::program_info(fd.as_fd()).map(|info| info.id);
    let ids = programs.iter().map(|(name, fd)| Ok((id(fd).map_err(DataplaneError::file("inspect", *name))?, *name)));
    ids.collect()
}

fn program<'a>(programs: &'a Programs, name: &'static str) -> Result<BorrowedFd<'a>, DataplaneError> {
    programs.get(name).map(AsFd::as_fd).ok_or(DataplaneError::NoProgram { program: name })
}
