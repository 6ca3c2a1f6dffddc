//! Maps of another size in the place of pinned ones, when a `--max-…` flag asks for it: no connection, no service and no packet is
//! lost.
//!
//! The kernel can't change a map's size, nor which maps a loaded program uses. So there are new maps, pinned in
//! `resizing/maps`, and new programs on them; links are handed over from the old programs to the new ones ([`handover`]); and
//! what the old maps hold is brought over before and after ([`contents`]). At last the new maps' pins replace the old ones, each
//! by one rename. While it lasts, mid-flow TCP that one program doesn't know is left for the other instead of being reset.
//!
//! A process that is killed anywhere leaves hooks that still know every flow. The next start finds the new maps and finishes
//! what was begun, with the sizes that were asked for then; only after that it looks at its own flags. A step that was done
//! already does no harm when it is done again.

mod contents;
mod handover;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use sheave_common::config::{Config, flags};
use sheave_common::names;
use tracing::info;

use super::definitions::Definition;
use super::error::{DataplaneError, MapError};
use super::links;
use super::map::Map;
use super::maps::Maps;
use super::pins::Pins;
use super::programs::Programs;
use super::shelf::Shelf;
use super::syscall;
use handover::Handover;

/// The old programs, in the folder of the change: by them links are known.
const OLD_PROGRAMS: &str = "programs";
/// Links that hooks have besides their own meanwhile.
const LINKS: &str = "links";
/// A folder that is there once new programs may make flows: from then on the new maps hold what the old ones don't.
const BEGUN: &str = "begun";

/// Marks the definitions whose pinned map is to be replaced by one of another size: those of a change that was begun and not
/// finished, with its sizes, or else those for which a flag asks. Returns whether there are any. `tcx`: hooks can hold several
/// of our programs.
pub(super) fn prepare(pins: &Pins, definitions: &mut [Definition], tcx: bool) -> Result<bool, DataplaneError> {
    let begun = pins.resized_maps();
    let mut any = false;
    for definition in definitions.iter_mut().filter(|definition| begun.join(definition.name).exists()) {
        definition.resized = true;
        if let Some(info) = pins.pinned(definition)? {
            definition.max_entries = info.max_entries;
        }
        any = true;
    }
    if any {
        return Ok(true);
    }
    // Of a change that was finished but for this, or that has made no map yet.
    remove(pins)?;
    for definition in definitions {
        let Some(info) = pins.pinned(definition)?.filter(|info| definition.is_resized(info)) else { continue };
        let pin = pins.map(definition);
        let (flag, unit) = (definition.size_flag.unwrap_or_default(), definition.flag_unit());
        let asked = definition.max_entries * unit;
        if !tcx {
            return Err(DataplaneError::CannotResize { pin, pinned: info.max_entries * unit, flag, asked });
        }
        let held = contents::count(definition.name, pins.directory())? * unit as usize;
        if held > asked as usize {
            return Err(DataplaneError::TooSmall { pin, held, flag, asked });
        }
        definition.resized = true;
        any = true;
    }
    Ok(any)
}

/// Replaces the maps that [`prepare`] marked. `constants` as for [`Programs::open`].
pub(super) fn carry_out(pins: &Pins, definitions: &[Definition], constants: u32) -> Result<(), DataplaneError> {
    let resized: Vec<&Definition> = definitions.iter().filter(|definition| definition.resized).collect();
    let (folder, new_maps) = (pins.resizing(), pins.resized_maps());
    for definition in &resized {
        info!(map = definition.name, entries = definition.max_entries, "giving the map another size");
    }
    fs::create_dir_all(&new_maps).map_err(DataplaneError::file("create", &new_maps))?;
    let old_programs = folder.join(OLD_PROGRAMS);
    if Shelf::kept(&old_programs).take().is_none() {
        Shelf::keep(pins, &old_programs)?;
    }
    let new = Programs::open(pins, definitions, constants)?.into_fds();
    let old = Shelf::kept(&old_programs).take().unwrap_or_default();
    let here = Maps::config(pins.directory())?.map_or(0, |config| config.host_netns_cookie)
        == syscall::netns_cookie().map_err(DataplaneError::NetnsCookie)?.unwrap_or(0);
    // Without the old programs, or in another network namespace, no link can be handed over; all are then swapped or removed as at
    // any start.
    let none = BTreeMap::new();
    let (old, new) = if here && !old.is_empty() { (&old, &new) } else { (&none, &none) };
    let handover = Handover::new(&pins.links(), folder.join(LINKS), old, new)?;
    let each = |bring: fn(&'static str, &Path, &Path) -> Result<(), MapError>| {
        resized.iter().try_for_each(|definition| bring(definition.name, pins.directory(), &new_maps))
    };
    let mark = folder.join(BEGUN);
    let begun = mark.is_dir();
    if !begun {
        each(contents::copy)?;
    }
    leave_unknown_to_others(pins)?;
    handover.look_into_both()?;
    if !begun {
        // What has changed since is little, and so is what is left for afterwards.
        each(contents::copy)?;
        each(contents::catch_up)?;
        fs::create_dir(&mark).map_err(DataplaneError::file("create", &mark))?;
    }
    handover.swap()?;
    syscall::grace_period();
    each(contents::catch_up)?;
    handover.finish()?;
    for definition in &resized {
        let (from, to) = (new_maps.join(definition.name), pins.directory().join(definition.name));
        fs::rename(&from, &to).map_err(DataplaneError::file("move", &from))?;
    }
    remove(pins)
}

/// Has programs pass mid-flow TCP that they don't know, since another one on the same hook may. The start that follows writes
/// `config` as it has to be.
fn leave_unknown_to_others(pins: &Pins) -> Result<(), DataplaneError> {
    let map: Map<u32, Config> = Map::open(pins.directory(), names::CONFIG, false)?;
    if let Some(config) = map.get(&0)? {
        map.put(&0, &Config { flags: config.flags | flags::DRAIN_FOREIGN, ..config })?;
    }
    Ok(())
}

/// Removes what a change of size needed; there need not be anything.
pub(super) fn remove(pins: &Pins) -> Result<(), DataplaneError> {
    let folder = pins.resizing();
    let links = folder.join(LINKS);
    if links.is_dir() {
        for pin in fs::read_dir(&links).map_err(DataplaneError::file("list", &links))? {
            links::detach(&pin.map_err(DataplaneError::file("list", &links))?.path())?;
        }
    }
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(DataplaneError::file("remove", &folder)),
    }
}
