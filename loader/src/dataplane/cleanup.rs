//! Removes every trace: attached programs, pinned maps, directories.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use sheave_common::interface::Interface;
use sheave_common::names;

use super::error::DataplaneError;
use super::links;
use super::map::Map;
use super::pins::Pins;
use super::syscall;

/// Detaches and removes everything below a pin directory. Works without a daemon, and is refused while one runs. Doing
/// it again, or where nothing was, is no error.
///
/// # Errors
///
/// If a daemon runs, or something can't be removed.
pub fn cleanup(pin_path: &Path) -> Result<(), DataplaneError> {
    let Some(pins) = Pins::take_existing(pin_path)? else { return Ok(()) };
    if pins.directory().join(names::INTERFACES).exists()
        && let Ok(map) = Map::<u32, Interface>::open(pins.directory(), names::INTERFACES, true)
    {
        for (index, _) in map.dump()? {
            links::remove_filters(index);
        }
    }
    let directory = pins.links();
    if directory.is_dir() {
        for entry in fs::read_dir(&directory).map_err(DataplaneError::file("list", &directory))? {
            let pin = entry.map_err(DataplaneError::file("list", &directory))?.path();
            // A link that something else holds open is detached all the same; older kernels only unpin.
            if let Ok(Some(link)) = links::open(&pin)
                && let Err(error) = syscall::link_detach(link.as_fd())
            {
                tracing::debug!(pin = %pin.display(), %error, "cannot detach; removing its pin does");
            }
            links::remove(&pin)?;
        }
        fs::remove_dir(&directory).map_err(DataplaneError::file("remove", &directory))?;
    }
    for entry in fs::read_dir(pin_path).map_err(DataplaneError::file("list", pin_path))? {
        links::remove(&entry.map_err(DataplaneError::file("list", pin_path))?.path())?;
    }
    fs::remove_dir(pin_path).map_err(DataplaneError::file("remove", pin_path))
}
