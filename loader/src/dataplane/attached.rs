//! What is attached, as far as pins and maps tell.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use sheave_common::interface::Interface;
use sheave_common::names;

use super::map::Map;
use super::pins;
use super::programs::Features;

/// Programs that are attached to each hook: `tc` (ingress and egress of each interface), `xdp`, `cgroup`. Below Linux 6.6, tc
/// programs have no pins: there every interface counts that Sheave knows.
///
/// # Errors
///
/// If the pins or the map of interfaces can't be read.
pub fn attached(directory: &Path) -> io::Result<BTreeMap<&'static str, i64>> {
    let mut programs = BTreeMap::from([("tc", 0), ("xdp", 0), ("cgroup", 0)]);
    for entry in std::fs::read_dir(pins::links_of(directory))? {
        let name = entry?.file_name();
        let hook = match name.to_string_lossy().split_once('_') {
            Some((_, "ingress" | "egress")) => "tc",
            Some((_, "xdp_native" | "xdp_generic")) => "xdp",
            Some(("cgroup", _)) => "cgroup",
            _ => continue,
        };
        *programs.entry(hook).or_default() += 1;
    }
    if !Features::detect().tcx {
        let interfaces = Map::<u32, Interface>::open(directory, names::INTERFACES, true).and_then(|map| map.dump());
        let interfaces = interfaces.map_err(io::Error::other)?.len();
        programs.insert("tc", 2 * i64::try_from(interfaces).unwrap_or(i64::MAX));
    }
    Ok(programs)
}
