//! Following a source as the controller does, in a test: what it reported, the model that follows from it, and bounded
//! waits.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use sheave::config::{ExternalIps, NodePortAddresses};
use sheave::model::desired::Algorithm;
use sheave::model::{Change, Model, ModelOptions};
use sheave::source::{SourceError, SourceEvent};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// More than anything a source does takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to have happened: several times any source's own pause.
pub const SILENCE: Duration = Duration::from_millis(300);
/// Name of the node that sources run on.
pub const HERE: &str = "here";

/// A temporary folder that goes with its value.
pub struct Folder(pub PathBuf);

impl Folder {
    /// `name` tells folders of one process apart.
    ///
    /// # Panics
    /// If it can't be made.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("sheave-source-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    /// Path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file in place.
    ///
    /// # Panics
    /// If that fails.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a file can be written");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A test may have removed it itself.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running source and a model that takes in what it reports.
pub struct Follower {
    /// Where the source sends.
    pub receiver: mpsc::Receiver<SourceEvent>,
    /// The source.
    pub task: JoinHandle<Result<(), SourceError>>,
    /// What follows from its changes.
    pub model: Model,
    /// How often it said that it has synced.
    pub synced: usize,
    /// Kinds of objects, and whether they are followed.
    pub followed: BTreeMap<&'static str, bool>,
    /// All its changes, in order.
    pub changes: Vec<Change>,
    _kept: Box<dyn Any + Send>,
}

impl Follower {
    /// Starts the source that `run` makes of a sender; `kept` lives as long as it does.
    pub fn start<F>(run: impl FnOnce(mpsc::Sender<SourceEvent>) -> F, kept: impl Any + Send) -> Self
    where
        F: Future<Output = Result<(), SourceError>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(16);
        let options = ModelOptions {
            node_name: HERE.to_owned(),
            external_ips: ExternalIps::All,
            nodeport_addresses: NodePortAddresses::Primary,
            algorithm: Algorithm::Random,
        };
        Self {
            receiver,
            task: tokio::spawn(run(sender)),
            model: Model::new(options),
            synced: 0,
            followed: BTreeMap::new(),
            changes: Vec::new(),
            _kept: Box::new(kept),
        }
    }

    /// Waits until the source has synced.
    ///
    /// # Panics
    /// If it doesn't.
    pub async fn synced(mut self) -> Self {
        self.until("synced", |follower| follower.synced == 1).await;
        self
    }

    /// Takes in one event.
    pub fn take(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Synced => self.synced += 1,
            SourceEvent::Followed { kind, followed } => drop(self.followed.insert(kind, followed)),
            SourceEvent::Changes(changes) => {
                for change in changes {
                    self.changes.push(change.clone());
                    self.model.apply(change);
                }
            }
        }
    }

    /// Waits until a condition holds.
    ///
    /// # Panics
    /// If it doesn't within [`PATIENCE`], or the source ends.
    pub async fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        self.until_within(PATIENCE, what, condition).await;
    }

    /// The same with another limit.
    ///
    /// # Panics
    /// As [`Self::until`].
    pub async fn until_within(&mut self, limit: Duration, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + limit;
        while !condition(self) {
            match tokio::time::timeout_at(deadline, self.receiver.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => panic!("the source ended while waiting for: {what}"),
                Err(_) => panic!("waited in vain for: {what}; services are {:?}", self.services()),
            }
        }
    }

    /// Waits until exactly these Services are known.
    ///
    /// # Panics
    /// As [`Self::until`].
    pub async fn until_services(&mut self, names: &[&str]) {
        let names: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.until(&format!("services {names:?}"), |follower| follower.services() == names).await;
    }

    /// Takes in whatever comes for a moment, and returns how many changes that was.
    pub async fn settle(&mut self) -> usize {
        let before = self.changes.len();
        while let Ok(Some(event)) = timeout(SILENCE, self.receiver.recv()).await {
            self.take(event);
        }
        self.changes.len() - before
    }

    /// Names of the Services that are known.
    #[must_use]
    pub fn services(&self) -> BTreeSet<String> {
        self.model.services().map(|key| key.name.to_string()).collect()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}
