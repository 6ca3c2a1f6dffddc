//! What can be found out about a node before the dataplane is opened there.

use std::path::{Path, PathBuf};

use aya::programs::tc::TcAttachType;
use aya::programs::{SchedClassifier, loaded_programs};

use super::cgroup;
use super::error::DataplaneError;
use super::pins;
use super::programs::{self, Features, at_least};

/// Octets of a program's name that the kernel keeps.
const NAME: usize = 15;

/// Whether the running kernel is one that the programs load on.
#[must_use]
pub fn is_supported() -> bool {
    at_least(5, 10)
}

impl Features {
    /// What it lacks, in words.
    #[must_use]
    pub fn lacking(self) -> Vec<&'static str> {
        [
            (self.coarse_clock, "a fast clock (5.11)"),
            (self.fib_mtu, "the MTU of routes (5.12)"),
            (self.set_retval, "ECONNREFUSED for refused connects (5.18)"),
            (self.xdp_frags, "XDP with large MTUs (5.18)"),
            (self.tcx, "TCX links (6.6)"),
            (self.fib_lookup_source, "the preferred source of routes (6.7)"),
        ]
        .into_iter()
        .filter(|(has, _)| !has)
        .map(|(_, what)| what)
        .collect()
    }
}

/// Makes sure that pins can be made in a directory, which need not be there.
///
/// # Errors
///
/// If it is not on a BPF file system.
pub fn check_pin_path(directory: &Path) -> Result<(), DataplaneError> {
    pins::check_file_system(directory)
}

/// The cgroup v2 directory that connect-time programs go to: this one, or the hierarchy's root.
///
/// # Errors
///
/// If it is none, or there is none.
pub fn check_cgroup(given: Option<&Path>) -> Result<PathBuf, DataplaneError> {
    let directory = given.map(Path::to_owned).map_or_else(cgroup::root, Ok)?;
    cgroup::check(&directory)?;
    Ok(directory)
}

/// Whether a program of this name, as the kernel shows it, is Sheave's.
#[must_use]
pub fn is_own_program(name: &str) -> bool {
    programs::names().any(|own| own == name || own.get(..NAME) == Some(name))
}

/// Names of the tc programs on an interface (TCX) that are others'; none where that can't be found out.
#[must_use]
pub fn foreign_programs(interface: &str) -> Vec<String> {
    let hooks = [TcAttachType::Ingress, TcAttachType::Egress];
    let found = hooks.into_iter().filter_map(|hook| SchedClassifier::query_tcx(interface, hook).ok());
    let names = found.flat_map(|(_, programs)| programs).map(|program| name(program.name_as_str(), program.id()));
    names.filter(|name| !is_own_program(name)).collect()
}

/// The name of a program that is not Sheave's; `None` if it is.
#[must_use]
pub fn foreign_program(id: u32) -> Option<String> {
    let program = loaded_programs().filter_map(Result::ok).find(|program| program.id() == id);
    let name = name(program.as_ref().and_then(|program| program.name_as_str()), id);
    (!is_own_program(&name)).then_some(name)
}

fn name(name: Option<&str>, id: u32) -> String {
    name.filter(|name| !name.is_empty()).map_or_else(|| format!("with id {id}"), str::to_owned)
}
