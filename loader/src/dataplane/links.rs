//! Programs on interfaces. Each has a link of its own, pinned as `links/<ifindex>_<hook>`: it outlives this process, and
//! the next one swaps its program in place. This process holds it as well, so that programs stay where they are if somebody
//! removes the pins.
//!
//! A pinned link outlives its device too, and then attaches nothing (its interface index reads 0). The index may be
//! another device's by then, so a link is used again only if it says that it still belongs there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::programs::tc::TcAttachType;
use tracing::{debug, info, warn};

use super::error::DataplaneError;
use super::programs::{self, Programs};
use super::syscall::{self, AttachType};
use super::tc;
use crate::config::XdpMode;
use crate::interfaces::{Interface, Role};

const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// Where on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Hook {
    Ingress,
    Egress,
    XdpNative,
    XdpGeneric,
}

impl Hook {
    /// In the order of hooks.
    pub(super) const FIRST: Self = Self::Ingress;
    const ALL: [Self; 4] = [Self::Ingress, Self::Egress, Self::XdpNative, Self::XdpGeneric];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::XdpNative => "xdp_native",
            Self::XdpGeneric => "xdp_generic",
        }
    }

    /// Interface and hook of a pinned link, by the pin's name.
    pub(super) fn of_pin(name: &str) -> Option<(u32, Self)> {
        let (index, hook) = name.split_once('_')?;
        Some((index.parse().ok()?, Self::ALL.into_iter().find(|one| one.name() == hook)?))
    }

    /// Whether it is tc's, which can hold several programs.
    pub(super) const fn is_tc(self) -> bool {
        matches!(self, Self::Ingress | Self::Egress)
    }

    /// The tc direction, unless it is XDP.
    pub(super) const fn direction(self) -> Option<TcAttachType> {
        match self {
            Self::Ingress => Some(TcAttachType::Ingress),
            Self::Egress => Some(TcAttachType::Egress),
            Self::XdpNative | Self::XdpGeneric => None,
        }
    }

    pub(super) const fn attach_type(self) -> (AttachType, u32) {
        match self {
            Self::Ingress => (AttachType::TcxIngress, 0),
            Self::Egress => (AttachType::TcxEgress, 0),
            Self::XdpNative => (AttachType::Xdp, XDP_FLAGS_DRV_MODE),
            Self::XdpGeneric => (AttachType::Xdp, XDP_FLAGS_SKB_MODE),
        }
    }
}

/// The tc programs that belong on an interface.
pub(super) fn classifiers(interface: &Interface) -> [(Hook, &'static str); 2] {
    let (ingress, egress) = match (interface.role, interface.ethernet) {
        (Role::Pod, _) => ("pod_ingress", "pod_egress"),
        (Role::Uplink | Role::Tunnel, true) => ("uplink_ingress", "uplink_egress"),
        (Role::Uplink | Role::Tunnel, false) => ("uplink_ingress_l3", "uplink_egress_l3"),
    };
    [(Hook::Ingress, ingress), (Hook::Egress, egress)]
}

/// How XDP belongs on an interface, and whether it must succeed.
fn xdp(interface: &Interface, mode: XdpMode) -> Option<(Hook, bool)> {
    match (interface.role, mode) {
        (Role::Pod | Role::Tunnel, _) | (_, XdpMode::Off) => None,
        (Role::Uplink, XdpMode::Auto) => interface.physical.then_some((Hook::XdpNative, false)),
        (Role::Uplink, XdpMode::Native) => Some((Hook::XdpNative, true)),
        (Role::Uplink, XdpMode::Generic) => Some((Hook::XdpGeneric, true)),
    }
}

/// The links, pinned and held.
#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
    pub(super) tcx: bool,
    pub(super) held: BTreeMap<(u32, Hook), OwnedFd>,
}

impl Links {
    pub(super) const fn new(directory: PathBuf, tcx: bool) -> Self {
        Self { directory, tcx, held: BTreeMap::new() }
    }

    pub(super) fn pin(&self, index: u32, hook: Hook) -> PathBuf {
        self.directory.join(format!("{index}_{}", hook.name()))
    }

    /// Attaches the tc programs that belong on an interface. `fresh` is called before the first one is attached to a
    /// device that had none of ours.
    pub(super) fn attach(
        &mut self,
        programs: &Programs,
        interface: &Interface,
        fresh: impl FnOnce() -> Result<(), DataplaneError>,
    ) -> Result<(), DataplaneError> {
        let mut fresh = Some(fresh);
        for (hook, program) in classifiers(interface) {
            let attach_error = |source| attach_error(program, interface, source);
            let replaced = match hook.direction().filter(|_| !self.tcx) {
                Some(direction) => tc::replace(&mut programs.classifier(program)?, &interface.name, direction),
                None => self.update(programs, interface.index, hook, program),
            };
            if replaced.map_err(attach_error)? {
                continue;
            }
            if let Some(fresh) = fresh.take() {
                fresh()?;
            }
            match hook.direction().filter(|_| !self.tcx) {
                Some(direction) => tc::create(&mut programs.classifier(program)?, &interface.name, direction),
                None => self.create(programs, interface.index, hook, program),
            }
            .map_err(attach_error)?;
            debug!(interface.name, interface.index, program, "attached");
        }
        Ok(())
    }

    /// Attaches or detaches XDP. Returns whether it is attached.
    pub(super) fn attach_xdp(
        &mut self,
        programs: &Programs,
        interface: &Interface,
        mode: XdpMode,
    ) -> Result<bool, DataplaneError> {
        let wanted = xdp(interface, mode);
        for hook in [Hook::XdpNative, Hook::XdpGeneric] {
            if wanted.is_none_or(|(wanted, _)| wanted != hook) {
                self.held.remove(&(interface.index, hook));
                detach(&self.pin(interface.index, hook))?;
            }
        }
        let Some((hook, required)) = wanted else { return Ok(false) };
        let mut attach = || -> io::Result<()> {
            if !self.update(programs, interface.index, hook, programs::XDP)? {
                self.create(programs, interface.index, hook, programs::XDP)?;
            }
            Ok(())
        };
        match attach() {
            Ok(()) => Ok(true),
            Err(error) if required => Err(attach_error(programs::XDP, interface, error)),
            Err(error) => {
                info!(interface.name, %error, "no native XDP here; the tc programs do its work");
                Ok(false)
            }
        }
    }

    /// Swaps the program of a link that is alive. A dead one's pin is removed.
    fn update(&mut self, programs: &Programs, index: u32, hook: Hook, program: &'static str) -> io::Result<bool> {
        let pin = self.pin(index, hook);
        let held = self.held.remove(&(index, hook));
        let Some(link) = held.map_or_else(|| open(&pin), |link| Ok(Some(link)))? else { return Ok(false) };
        if !is_on(&link, index)? {
            return remove_file(&pin).map(|()| false);
        }
        let program = programs.fd(program).map_err(io::Error::other)?;
        match syscall::link_update(link.as_fd(), program) {
            Ok(()) => {
                self.held.insert((index, hook), link);
                Ok(true)
            }
            // The device went away just now.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => remove_file(&pin).map(|()| false),
            Err(error) => Err(error),
        }
    }

    fn create(&mut self, programs: &Programs, index: u32, hook: Hook, program: &'static str) -> io::Result<()> {
        let (attach_type, flags) = hook.attach_type();
        let program = programs.fd(program).map_err(io::Error::other)?;
        let link = syscall::link_interface(program, index, attach_type, flags)?;
        let pin = self.pin(index, hook);
        if let Err(error) = syscall::pin(link.as_fd(), &pin) {
            // It works for as long as this process holds it; the audit pins it when that is possible.
            warn!(pin = %pin.display(), %error, "attached, but the link can't be pinned: it would not outlive this daemon");
        }
        self.held.insert((index, hook), link);
        Ok(())
    }

    /// Detaches everything from an interface, or removes what is left of it if it is gone.
    pub(super) fn detach(&mut self, index: u32) -> Result<(), DataplaneError> {
        for hook in Hook::ALL {
            self.held.remove(&(index, hook));
            remove(&self.pin(index, hook))?;
        }
        if !self.tcx {
            remove_filters(index);
        }
        Ok(())
    }

    /// Interface indexes with a link.
    pub(super) fn indexes(&self) -> Result<BTreeSet<u32>, DataplaneError> {
        let mut indexes: BTreeSet<u32> = pinned(&self.directory)?.into_keys().collect();
        indexes.extend(self.held.keys().map(|(index, _)| index));
        Ok(indexes)
    }
}

/// Pins of interface links in a directory, by interface index.
pub(super) fn pinned(directory: &Path) -> Result<BTreeMap<u32, Vec<PathBuf>>, DataplaneError> {
    let mut pins: BTreeMap<u32, Vec<PathBuf>> = BTreeMap::new();
    let entries = fs::read_dir(directory).map_err(DataplaneError::file("list", directory))?;
    for entry in entries {
        let path = entry.map_err(DataplaneError::file("list", directory))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let index = name.and_then(|name| name.split_once('_')).and_then(|(index, _)| index.parse().ok());
        if let Some(index) = index {
            pins.entry(index).or_default().push(path);
        }
    }
    Ok(pins)
}

/// Removes clsact filters of ours from an interface, if it is there.
pub(super) fn remove_filters(index: u32) {
    let Some(name) = interface_name(index) else { return };
    for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
        if let Err(error) = tc::remove(&name, direction) {
            debug!(name, %error, "no tc filter to remove");
        }
    }
}

fn interface_name(index: u32) -> Option<String> {
    let mut name = [0_u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has the size that if_indextoname(3) asks for.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) };
    if found.is_null() {
        return None;
    }
    let name = std::ffi::CStr::from_bytes_until_nul(&name).ok()?;
    name.to_str().ok().map(str::to_owned)
}

/// Opens a pinned link; `None` if there is no such pin.
pub(super) fn open(pin: &Path) -> io::Result<Option<OwnedFd>> {
    match syscall::open_pin(pin, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

fn is_on(link: &OwnedFd, index: u32) -> io::Result<bool> {
    Ok(syscall::link_info(link.as_fd())?.target == index)
}

/// Detaches a pinned link at once, also if something else holds it open, and removes its pin; it need not be there. Without
/// that the kernel detaches a moment after the last holder is gone, and has no place for native XDP beside generic until then.
pub(super) fn detach(pin: &Path) -> Result<(), DataplaneError> {
    if let Ok(Some(link)) = open(pin)
        && let Err(error) = syscall::link_detach(link.as_fd())
    {
        debug!(pin = %pin.display(), %error, "cannot detach; removing its pin does");
    }
    remove(pin)
}

/// Removes a pin; a link that nobody holds goes with it, and detaches. It need not be there.
pub(super) fn remove(pin: &Path) -> Result<(), DataplaneError> {
    remove_file(pin).map_err(DataplaneError::file("remove the pin", pin))
}

fn remove_file(pin: &Path) -> io::Result<()> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn attach_error(program: &'static str, interface: &Interface, source: io::Error) -> DataplaneError {
    let target = format!("interface {} (index {})", interface.name, interface.index);
    DataplaneError::Attach { program, target, source }
}
