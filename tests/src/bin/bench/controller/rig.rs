//! Model and dataplane without the rest of the agent, so that only they are timed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use sheave::config::{ConnectMode, RunConfig, SourceConfig};
use sheave::dataplane::{self, Applied, Audit, Dataplane, PinnedMaps};
use sheave::model::{Change, Model, ModelOptions};
use sheave_tests::leftovers::unique_name;

/// One node's. Its pins are removed on drop.
pub(crate) struct Rig {
    config: RunConfig,
    dataplane: Option<Dataplane>,
    model: Model,
}

/// What a step took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Time until the maps held it.
    pub(crate) elapsed: Duration,
    /// Writes until then.
    pub(crate) writes: usize,
}

impl Rig {
    /// With empty maps, in the calling thread's network namespace.
    pub(crate) fn new() -> Result<Self> {
        let mut config = RunConfig::new(SourceConfig::Manifests(PathBuf::from("/nonexistent")), "node".to_owned());
        config.pin_path = Path::new("/sys/fs/bpf").join(unique_name());
        config.connect = ConnectMode::Off;
        let model = Self::model(&config);
        let mut rig = Self { config, dataplane: None, model };
        rig.open()?;
        Ok(rig)
    }

    fn model(config: &RunConfig) -> Model {
        Model::new(ModelOptions {
            node_name: config.node_name.clone(),
            external_ips: config.external_ips.clone(),
            nodeport_addresses: config.nodeport_addresses.clone(),
            algorithm: config.algorithm,
        })
    }

    fn open(&mut self) -> Result<()> {
        self.dataplane = Some(Dataplane::open(&self.config).context("opening the dataplane")?);
        Ok(())
    }

    fn dataplane(&mut self) -> Result<&mut Dataplane> {
        self.dataplane.as_mut().context("the dataplane is open")
    }

    /// Takes all objects there are, from Kubernetes' types to the maps.
    pub(crate) fn sync(&mut self, services: &[Service], slices: &[EndpointSlice]) -> Result<Step> {
        let started = Instant::now();
        self.model.apply(Change::ServicesReplaced(services.iter().map(Into::into).collect()));
        self.model.apply(Change::SlicesReplaced(slices.iter().map(Into::into).collect()));
        let model = &self.model;
        let desired = model.services().flat_map(|key| model.desired(key)).collect();
        let applied = self.dataplane()?.apply_all(desired);
        finished(started, &applied)
    }

    /// The same after a restart: programs, pins and the maps' contents are taken over first.
    pub(crate) fn restart(&mut self, services: &[Service], slices: &[EndpointSlice]) -> Result<(Step, Duration)> {
        self.dataplane = None;
        let started = Instant::now();
        self.open()?;
        let opened = started.elapsed();
        self.model = Self::model(&self.config);
        let step = self.sync(services, slices)?;
        Ok((Step { elapsed: started.elapsed(), ..step }, opened))
    }

    /// Takes one change, from the model's types to the maps.
    pub(crate) fn change(&mut self, change: Change) -> Result<Step> {
        let started = Instant::now();
        let mut changed = BTreeMap::new();
        for key in self.model.apply(change) {
            changed.extend(self.model.desired(&key).into_iter().map(|(name, port)| (name, Some(port))));
        }
        let applied = self.dataplane()?.apply(changed);
        finished(started, &applied)
    }

    /// Frees what changes have given up, and says in how many writes.
    pub(crate) fn reclaim(&mut self) -> Result<usize> {
        let dataplane = self.dataplane()?;
        let Some(grace) = dataplane.begin_grace() else { return Ok(0) };
        dataplane::grace_period();
        Ok(dataplane.reclaim(grace)?.written)
    }

    /// Compares everything that the kernel holds with what was written, and returns what each slice of that took.
    pub(crate) fn audit(&mut self) -> Result<Vec<Duration>> {
        let dataplane = self.dataplane()?;
        let (mut audit, mut slices) = (Audit::default(), Vec::new());
        while !audit.is_done() {
            let started = Instant::now();
            dataplane.audit(&mut audit, &BTreeMap::new(), &BTreeSet::new())?;
            slices.push(started.elapsed());
        }
        ensure!(audit.findings.is_empty() && audit.troubles.is_empty(), "{:?} {:?}", audit.findings, audit.troubles);
        Ok(slices)
    }

    /// What the kernel holds.
    pub(crate) fn maps(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&self.config.pin_path)?)
    }

    /// Path of a map's pin.
    pub(crate) fn pin(&self, map: &str) -> PathBuf {
        self.config.pin_path.join(map)
    }
}

fn finished(started: Instant, applied: &Applied) -> Result<Step> {
    let elapsed = started.elapsed();
    if let Some((name, failure)) = applied.failed.first_key_value() {
        bail!("{name} could not be applied: {failure:?}");
    }
    Ok(Step { elapsed, writes: applied.written })
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.dataplane = None;
        if let Err(error) = dataplane::cleanup(&self.config.pin_path) {
            eprintln!("cannot remove {}: {error}", self.config.pin_path.display());
        }
    }
}
