//! The kernel's side: loads the programs, owns maps, pins and links, and makes every write. Knows nothing of Kubernetes.
//!
//! Everything is pinned, so the dataplane outlives the controller: a restart reads the maps back, swaps programs that are
//! of another version under their links, and writes only what differs. [`PinnedMaps`] reads the pins, with or without a daemon.

mod attached;
mod audit;
mod census;
mod cgroup;
mod cleanup;
mod definitions;
mod elements;
mod error;
mod handover;
mod links;
mod listener;
mod loads;
mod map;
mod maps;
mod networks;
mod pins;
mod preflight;
mod programs;
mod resize;
mod settings;
mod shelf;
mod sockets;
mod sweep;
mod syscall;
mod tc;
#[cfg(feature = "packet-trace")]
mod trace;
mod trial;
mod usage;
mod views;
mod worker;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use sheave_common::interface::{self, flags};
use tracing::{debug, info};

pub use attached::attached;
pub use audit::{Audit, Finding, Kind as FindingKind};
pub use census::{Census, Fullness};
pub use cleanup::cleanup;
pub use elements::read_name;
pub use error::{DataplaneError, MapError};
pub use handover::{Handover, Open};
pub use listener::{ListenError, Listener};
pub use preflight::{check_cgroup, check_pin_path, foreign_program, foreign_programs, is_own_program, is_supported};
pub use programs::{Features, object};
pub use syscall::{grace_period, monotonic_seconds};
pub use trial::{Outcome as TrialOutcome, Trial, TrialError, TrialFlow};
pub use usage::Usage;
pub use views::PinnedMaps;

use crate::config::{ConnectMode, RunConfig, XdpMode};
use crate::interfaces::{Interface, Role};
use crate::model::desired::{ServicePort, ServicePortName};
use crate::model::network::Network;
use crate::plan::{Batch, Grace, Outcome, Planner};
use links::Links;
use maps::Maps;
use pins::Pins;
use programs::Programs;
use sockets::Closer;
use worker::Worker;
use writer::Writer;

/// What became of a batch of changes.
pub type Applied = Outcome<MapError>;

/// The dataplane of one instance. There is one per pin directory at a time.
pub struct Dataplane {
    programs: Programs,
    writer: Writer,
    planner: Planner,
    links: Links,
    /// Connect-time programs, unless they are off.
    cgroup: Option<cgroup::Attached>,
    /// Every map, with where it is pinned: also those that only programs use.
    kept: Vec<(PathBuf, OwnedFd)>,
    sockets: Closer,
    _loads: Worker,
    xdp: XdpMode,
    /// Service ports that a full map refused, by map, each time that it was tried.
    refused: BTreeMap<&'static str, u64>,
    /// Pod interfaces that went away and whose flows are still there.
    unswept: BTreeSet<u32>,
    /// Last, so that the pin directory is free only when everything else is done with.
    pins: Pins,
}

impl Dataplane {
    /// Takes the pin directory, takes over or loads the programs on the maps pinned there, and reads back what they hold.
    ///
    /// # Errors
    ///
    /// Each says what to do about it: no BPF file system, another instance, incompatible pins, missing capabilities, an old
    /// kernel, no cgroup v2.
    pub fn open(config: &RunConfig) -> Result<Self, DataplaneError> {
        Self::open_with(config, Features::detect())
    }

    /// Like [`Self::open`], as if the kernel had these features.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_with(config: &RunConfig, features: Features) -> Result<Self, DataplaneError> {
        let pins = Pins::take(&config.pin_path)?;
        let constants = |old| features.bits() | settings::constants(old, config);
        let definitions = loop {
            let mut definitions = definitions::definitions(&config.sizes);
            pins.adopt_sizes(&mut definitions)?;
            pins.verify(&definitions)?;
            if !resize::prepare(&pins, &mut definitions, features.tcx)? {
                break definitions;
            }
            resize::carry_out(&pins, &definitions, constants(Maps::config(pins.directory())?))?;
        };
        let old = Maps::config(pins.directory())?;
        let programs = Programs::open(&pins, &definitions, constants(old))?;
        let maps = Maps::open(pins.directory(), false)?;
        let element = settings::element(old, config)?;
        let mut links = Links::new(pins.links(), features.tcx);
        let moved =
            old.is_some_and(|old| old.host_netns_cookie != 0 && old.host_netns_cookie != element.host_netns_cookie);
        if moved {
            info!("the pins are another network namespace's: removing their links and flows");
            for index in links.indexes()? {
                links.detach(index)?;
            }
            for (index, _) in maps.interfaces.dump()? {
                maps.interfaces.delete(&index)?;
            }
            sweep::all_flows(&maps)?;
        }
        let writer = Writer::new(maps, old, element)?;
        let planner = Planner::restore(writer.dump()?);
        let cgroup = if config.connect == ConnectMode::Off {
            cgroup::detach(&pins.links())?;
            None
        } else {
            let cgroup = config.cgroup.clone().map_or_else(cgroup::root, Ok)?;
            Some(cgroup::Attached::attach(&programs, pins.links(), cgroup)?)
        };
        let kept = definitions.iter().map(|definition| pins.open_map(definition)).collect::<Result<_, _>>()?;
        let sockets = Closer::start(pins.directory())?;
        let loads = loads::start(pins.directory())?;
        Ok(Self {
            programs,
            writer,
            planner,
            links,
            cgroup,
            kept,
            sockets,
            _loads: loads,
            xdp: config.xdp,
            refused: BTreeMap::new(),
            unswept: BTreeSet::new(),
            pins,
        })
    }

    /// Makes the service ports that changed as desired; `None` means that it should not be there. Those that failed
    /// before are tried again.
    pub fn apply(&mut self, changed: BTreeMap<ServicePortName, Option<ServicePort>>) -> Applied {
        let batch = self.planner.plan(changed);
        self.execute(batch)
    }

    /// Makes everything as desired, and removes whatever is not. Only for a list that is known to be complete.
    pub fn apply_all(&mut self, desired: BTreeMap<ServicePortName, ServicePort>) -> Applied {
        let batch = self.planner.plan_all(desired);
        let applied = self.execute(batch);
        // What went before this daemon started concerns sockets that are still open.
        self.sockets.look();
        applied
    }

    fn execute(&mut self, batch: Batch) -> Applied {
        let concerned = sockets::concerned(&batch);
        let applied = self.planner.execute_in(batch, &mut self.writer);
        for map in applied.failed.values().filter_map(usage::full_map) {
            *self.refused.entry(map).or_default() += 1;
        }
        if concerned {
            self.sockets.look();
        }
        applied
    }

    /// Whether some service port is not as desired because a write failed. [`Self::apply`] tries again.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        self.planner.is_unfinished()
    }

    /// Marks what was given up so far; `None` if there is nothing. After [`grace_period`] (which blocks), call
    /// [`Self::reclaim`]. Changes may be applied in between.
    pub fn begin_grace(&mut self) -> Option<Grace> {
        self.planner.begin_grace()
    }

    /// Frees what was given up before a grace period, and sweeps flows of interfaces that are gone and of service ids
    /// that are to be used again.
    ///
    /// # Errors
    ///
    /// If the flow maps can't be read or written; the sweep is tried again by the next call.
    pub fn reclaim(&mut self, grace: Grace) -> Result<Applied, DataplaneError> {
        let batch = self.planner.reclaim(grace);
        let applied = self.execute(batch);
        self.sweep()?;
        Ok(applied)
    }

    /// Sweeps flows of interfaces that are gone, and of service ids that are to be used again. Ids that open connections carry
    /// wait until those have ended.
    ///
    /// # Errors
    ///
    /// If the flow maps can't be read or written; the sweep is tried again by the next call.
    pub fn sweep(&mut self) -> Result<(), DataplaneError> {
        self.sweep_edges()?;
        let mut service_ids = self.planner.service_ids_to_sweep();
        if service_ids.is_empty() {
            return Ok(());
        }
        let maps = &self.writer.maps;
        let mut in_use = BTreeSet::new();
        // Where no id is left, a Service that is to be served counts for more than connections to one that is gone.
        if !self.planner.is_short_of_service_ids() {
            let timeouts = &self.writer.config().timeouts;
            in_use = sweep::in_use(maps, &service_ids, timeouts, monotonic_seconds())?;
            service_ids.retain(|id| !in_use.contains(id));
        }
        let swept = sweep::services(maps, &service_ids)?;
        debug!(swept, service_ids = service_ids.len(), in_use = in_use.len(), "swept flows of services that are gone");
        self.planner.swept(&service_ids, in_use);
        Ok(())
    }

    fn sweep_edges(&mut self) -> Result<(), DataplaneError> {
        if self.unswept.is_empty() {
            return Ok(());
        }
        let swept = sweep::edges(&self.writer.maps, &self.unswept)?;
        debug!(swept, interfaces = self.unswept.len(), "swept flows of interfaces that are gone");
        while let Some(index) = self.unswept.pop_first() {
            self.writer.delete_interface(index)?;
        }
        Ok(())
    }

    /// Puts the programs of an interface's role on it, or swaps those that are there.
    ///
    /// # Errors
    ///
    /// If the kernel refuses; the interface may have gone away in the meantime.
    pub fn attach(&mut self, interface: &Interface) -> Result<(), DataplaneError> {
        self.attach_or_renew(interface, false)
    }

    /// As [`Self::attach`]. Unless it is only renewed, flows of an interface without programs are another device's.
    fn attach_or_renew(&mut self, interface: &Interface, renewed: bool) -> Result<(), DataplaneError> {
        let index = interface.index;
        let role = if interface.role == Role::Pod { flags::POD } else { flags::UPLINK };
        if self.unswept.contains(&index) {
            self.sweep_edges()?;
        }
        let old = self.writer.maps.interfaces.get(&index)?;
        let element = |xdp: bool| interface::Interface {
            source4: interface.source4.unwrap_or(Ipv4Addr::UNSPECIFIED).into(),
            source6: interface.source6.unwrap_or(Ipv6Addr::UNSPECIFIED).into(),
            flags: role | if xdp { flags::XDP } else { 0 },
        };
        // The element comes before the programs, which need it, and says XDP only once that is attached.
        let had_xdp = old.is_some_and(|old| old.flags & flags::XDP != 0);
        self.writer.put_interface(index, element(had_xdp))?;
        let maps = &self.writer.maps;
        self.links.attach(&self.programs, interface, || {
            // An element without programs is another device's that had this index.
            if !renewed && old.is_some_and(|old| old.flags & flags::POD != 0) {
                let swept = sweep::edges(maps, &BTreeSet::from([index]))?;
                debug!(index, swept, "swept flows of the interface that had this index before");
            }
            Ok(())
        })?;
        let xdp = self.links.attach_xdp(&self.programs, interface, self.xdp)?;
        self.writer.put_interface(index, element(xdp))?;
        Ok(())
    }

    /// Takes the programs off an interface, or removes what is left of it if it is gone. Its flows are swept by the next
    /// [`Self::sweep`], and in any case before its index is attached again.
    ///
    /// # Errors
    ///
    /// If a pin can't be removed.
    pub fn detach(&mut self, index: u32) -> Result<(), DataplaneError> {
        self.links.detach(index)?;
        match self.writer.maps.interfaces.get(&index)? {
            // The element stays until the flows are swept: it is what a restart sweeps by.
            Some(old) if old.flags & flags::POD != 0 => drop(self.unswept.insert(index)),
            _ => self.writer.delete_interface(index)?,
        }
        Ok(())
    }

    /// Detaches from every interface that is not among these. Only once all interfaces that exist are known.
    ///
    /// # Errors
    ///
    /// If a pin can't be removed.
    pub fn prune_interfaces(&mut self, existing: &BTreeSet<u32>) -> Result<(), DataplaneError> {
        let mut known = self.links.indexes()?;
        known.extend(self.writer.maps.interfaces.dump()?.into_iter().map(|(index, _)| index));
        known.difference(existing).try_for_each(|index| self.detach(*index))
    }

    /// Tells the programs this node's primary addresses.
    ///
    /// # Errors
    ///
    /// If the write fails.
    pub fn set_node_addresses(
        &mut self,
        node4: Option<Ipv4Addr>,
        node6: Option<Ipv6Addr>,
    ) -> Result<(), DataplaneError> {
        let config = settings::with_node(*self.writer.config(), node4, node6);
        Ok(self.writer.set_config(config)?)
    }

    /// Tells the programs that no other proxy translates connections to frontends any more: what belongs to no flow is reset.
    ///
    /// # Errors
    ///
    /// If the write fails.
    pub fn end_foreign(&mut self) -> Result<(), DataplaneError> {
        let config = settings::without_foreign(*self.writer.config());
        Ok(self.writer.set_config(config)?)
    }

    /// Tells the programs where ClusterIPs come from: what goes to an address there that no Service has is dropped.
    ///
    /// # Errors
    ///
    /// If a read or write fails; some of the networks may be known then.
    pub fn set_service_cidrs(&mut self, networks: &BTreeSet<Network>) -> Result<(), DataplaneError> {
        Ok(self.writer.set_service_cidrs(networks)?)
    }

    /// How full the maps are that services fill.
    #[must_use]
    pub fn usage(&self) -> Vec<Usage> {
        usage::of(&self.planner.counts(), &self.writer.maps, &self.refused)
    }

    /// Map writes since [`Self::open`]: 0 after a restart that found everything as desired.
    #[must_use]
    pub const fn map_writes(&self) -> u64 {
        self.writer.writes()
    }
}
