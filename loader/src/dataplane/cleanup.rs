//! Removes every trace: attached programs, pinned maps, directories.

use std::fs;
use std::path::Path;

use sheave_common::config::Config;
use sheave_common::interface::Interface;
use sheave_common::names;

use super::error::DataplaneError;
use super::links;
use super::map::Map;
use super::pins::Pins;
use super::resize;
use super::syscall;

/// Detaches and removes everything below a pin directory. Works without a daemon, and is refused while one runs. Doing
/// it again, or where nothing was, is no error.
///
/// # Errors
///
/// If a daemon runs, or something can't be removed.
pub fn cleanup(pin_path: &Path) -> Result<(), DataplaneError> {
    let Some(pins) = Pins::take_existing(pin_path)? else { return Ok(()) };
    remove_filters(&pins)?;
    let directory = pins.links();
    if directory.is_dir() {
        for entry in fs::read_dir(&directory).map_err(DataplaneError::file("list", &directory))? {
            let pin = entry.map_err(DataplaneError::file("list", &directory))?.path();
            links::detach(&pin)?;
        }
        fs::remove_dir(&directory).map_err(DataplaneError::file("remove", &directory))?;
    }
    let programs = pins.programs();
    if programs.is_dir() {
        fs::remove_dir_all(&programs).map_err(DataplaneError::file("remove", &programs))?;
    }
    resize::remove(&pins)?;
    for entry in fs::read_dir(pin_path).map_err(DataplaneError::file("list", pin_path))? {
        links::remove(&entry.map_err(DataplaneError::file("list", pin_path))?.path())?;
    }
    fs::remove_dir(pin_path).map_err(DataplaneError::file("remove", pin_path))
}

/// Removes clsact filters, which no pin holds. They are found by interface index, so only in the network namespace that
/// the pins belong to.
fn remove_filters(pins: &Pins) -> Result<(), DataplaneError> {
    let open = |name: &'static str| pins.directory().join(name).exists().then_some(name);
    let (Some(config), Some(interfaces)) = (open(names::CONFIG), open(names::INTERFACES)) else { return Ok(()) };
    let config = Map::<u32, Config>::open(pins.directory(), config, true);
    let interfaces = Map::<u32, Interface>::open(pins.directory(), interfaces, true);
    let (Ok(config), Ok(interfaces)) = (config, interfaces) else {
        tracing::warn!("the pins are another version's; if the kernel is older than 6.6, its tc filters stay attached");
        return Ok(());
    };
    let cookie = config.get(&0)?.map_or(0, |config| config.host_netns_cookie);
    if cookie != syscall::netns_cookie().map_err(DataplaneError::NetnsCookie)?.unwrap_or(0) {
        tracing::warn!("the pins belong to another network namespace; tc filters of older kernels stay there");
        return Ok(());
    }
    interfaces.dump()?.into_iter().for_each(|(index, _)| links::remove_filters(index));
    Ok(())
}
