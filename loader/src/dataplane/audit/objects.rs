//! Pins and links.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::super::error::DataplaneError;
use super::super::links::{Hook, Links, classifiers};
use super::super::programs::{self, Programs};
use super::super::{syscall, tc};
use super::{Audit, Dataplane, Kind};
use crate::interfaces::Interface;

const LINKS: &str = "links";
const PINS: &str = "pins";

impl Dataplane {
    /// Pins of maps, programs and the cgroup's links.
    pub(super) fn audit_pins(&mut self, audit: &mut Audit) {
        if let Err(error) = self.pins.retake() {
            audit.unpinnable = true;
            audit.troubles.push(format!(
                "the pins are gone, and can't be made again: {error}; traffic goes on, but what a restart finds is lost"
            ));
            return;
        }
        let maps = self.kept.iter().map(|(pin, map)| (pin.clone(), map.as_fd()));
        let objects = maps.chain(self.programs.pins()).chain(self.cgroup.iter().flat_map(|cgroup| cgroup.links()));
        for (pin, object) in objects {
            audit.ensure_pinned(pin, object);
        }
    }

    /// Connect-time programs.
    pub(super) fn audit_cgroup(&mut self, audit: &mut Audit) {
        let Some(cgroup) = &mut self.cgroup else { return };
        match cgroup.renew(&self.programs) {
            Ok(renewed) => renewed.into_iter().for_each(|hook| audit.found(LINKS, Kind::Detached, || hook.to_owned())),
            Err(error) => audit.troubles.push(trouble(&error)),
        }
    }

    /// An interface's links: their pins, and whether they are alive.
    pub(super) fn audit_interface(&self, audit: &mut Audit, interface: &Interface) {
        let held = self.links.held.range((interface.index, Hook::FIRST)..);
        for ((index, hook), link) in held.take_while(|((index, _), _)| *index == interface.index) {
            audit.ensure_pinned(self.links.pin(*index, *hook), link.as_fd());
        }
        if self.links.dead(&self.programs, interface).next().is_some() {
            audit.suspects.insert(interface.index);
            audit.suspected = Some(Instant::now());
        }
    }

    /// An interface on which some link seemed dead.
    pub(super) fn audit_suspect(&mut self, audit: &mut Audit, interface: &Interface) {
        let dead: Vec<_> = self.links.dead(&self.programs, interface).collect();
        if dead.is_empty() {
            return;
        }
        for hook in dead {
            audit.found(LINKS, Kind::Detached, || format!("{} on {}", hook.name(), interface.name));
        }
        // The flows are this interface's, and its connections go on by them.
        if let Err(error) = self.attach_or_renew(interface, true) {
            audit.troubles.push(trouble(&error));
            audit.unattached.insert(interface.index);
        }
    }
}

impl Links {
    /// Hooks of an interface that don't have the program that was attached there.
    fn dead<'a>(&'a self, programs: &'a Programs, interface: &'a Interface) -> impl Iterator<Item = Hook> + 'a {
        let xdp = [Hook::XdpNative, Hook::XdpGeneric].map(|hook| (hook, programs::XDP));
        let xdp = xdp.into_iter().filter(|(hook, _)| self.held.contains_key(&(interface.index, *hook)));
        let expected = classifiers(interface).into_iter().chain(xdp);
        expected.filter(|(hook, program)| !self.is_alive(programs, interface, *hook, program)).map(|(hook, _)| hook)
    }

    fn is_alive(&self, programs: &Programs, interface: &Interface, hook: Hook, program: &'static str) -> bool {
        if let Some(direction) = hook.direction().filter(|_| !self.tcx) {
            // Replacing the program in its filter is how to see that the filter is there.
            let replaced = programs.classifier(program).map_err(io::Error::other);
            return replaced
                .and_then(|mut program| tc::replace(&mut program, &interface.name, direction))
                .unwrap_or(false);
        }
        let Some(link) = self.held.get(&(interface.index, hook)) else { return false };
        let id = programs.fd(program).ok().and_then(|program| syscall::object_id(program).ok());
        let info = syscall::link_info(link.as_fd());
        info.is_ok_and(|info| info.target == interface.index && Some(info.program_id) == id)
    }
}

impl Audit {
    fn ensure_pinned(&mut self, pin: PathBuf, object: BorrowedFd<'_>) {
        if self.unpinnable {
            return;
        }
        match ensure_pinned(&pin, object) {
            Ok(true) => {}
            Ok(false) => self.found(PINS, Kind::Unpinned, || pin.display().to_string()),
            Err(error) => self.troubles.push(format!("cannot pin {}: {error}", pin.display())),
        }
    }
}

/// Pins an object unless it is pinned there. Returns whether it was.
fn ensure_pinned(pin: &Path, object: BorrowedFd<'_>) -> io::Result<bool> {
    match syscall::open_pin(pin, false) {
        Ok(found) if is_same(found.as_fd(), object)? => return Ok(true),
        Ok(_) => fs::remove_file(pin)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            pin.parent().map_or(Ok(()), fs::create_dir_all)?;
        }
        Err(error) => return Err(error),
    }
    syscall::pin(object, pin).map(|()| false)
}

/// Whether two descriptors are of one map, program or link.
fn is_same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<bool> {
    let kind = |object: BorrowedFd<'_>| -> io::Result<String> {
        let target = fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
        // A link's descriptor is a bpf_link when it was made, and a bpf-link when its pin was opened.
        Ok(target.to_string_lossy().replace('_', "-"))
    };
    Ok(syscall::object_id(one)? == syscall::object_id(other)? && kind(one)? == kind(other)?)
}

fn trouble(error: &DataplaneError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
