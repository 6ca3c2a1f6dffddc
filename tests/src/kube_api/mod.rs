//! An in-process Kubernetes API: Services, EndpointSlices, Nodes, Namespaces, Events and ServiceCIDRs over HTTP, and what
//! `deploy/` installs; as much of it as a controller meets (pages, selectors, watches with bookmarks, an end to history, servers that fail) and as
//! `kubectl` needs to create, get, patch, replace and delete them.
//!
//! It runs on a thread of its own, so everything here can be called from tests that are async and from those that are
//! not. [`store`] keeps objects and their history, [`selector`] reads selectors, [`serve`] speaks HTTP; [`route`] says
//! what a path is about, [`discovery`] tells kubectl what there is, [`write`](mod@write) takes objects in, [`defaults`]
//! fills them in and gives out addresses and node ports. Left out: authorisation, validation beyond what would clash,
//! server-side apply, OpenAPI (so kubectl needs `--validate=false` for files) and whatever controllers do.

mod defaults;
mod discovery;
mod patch;
mod route;
mod selector;
mod serve;
mod store;
mod write;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::Value;
use tokio::sync::oneshot;

use serve::Shared;
pub use store::Resource;

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// A list, or a page of one.
    List,
    /// A watch.
    Watch,
    /// One object.
    Get,
    /// POST
    Create,
    /// PUT
    Replace,
    /// PATCH
    Patch,
    /// DELETE
    Delete,
}

/// A request that was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The kind it asks for.
    pub resource: Resource,
    /// What is to be done.
    pub verb: Verb,
    /// Its query, decoded.
    pub query: std::collections::BTreeMap<String, String>,
}

/// How a watch from before the end of history is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gone {
    /// With status 410.
    Status,
    /// With an ERROR event in a stream that begins with status 200.
    #[default]
    Event,
}

/// A Kubernetes API that runs until it is dropped.
pub struct KubeApi {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl KubeApi {
    /// Serves on a free port of 127.0.0.1.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub async fn start() -> Self {
        Self::serve(TcpListener::bind("127.0.0.1:0").expect("a free port"))
    }

    /// Serves on a listener, which may live in another network namespace.
    ///
    /// # Panics
    ///
    /// If the listener can't be used.
    #[must_use]
    pub fn serve(listener: TcpListener) -> Self {
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared::default());
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                tokio::select! {
                    () = serve::accept(listener, served) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { shared, address, stop: Some(stop), thread: Some(thread) }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://address:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A kubeconfig's text that leads here.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url()}}],
            "users": [{"name": "test", "user": {"token": "secret"}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string()
    }

    /// Creates or updates an object, known by kind, namespace (`default` if absent) and name, as it is: nothing is
    /// filled in. Returns its resource version.
    ///
    /// # Panics
    ///
    /// If it is not of a kind that is served, or has no name.
    pub fn apply(&self, object: Value) -> u64 {
        let version = self.shared.store().apply(object);
        self.shared.wake();
        version
    }

    /// Deletes an object; one that isn't there stays gone. What lives in no namespace is in "".
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) {
        self.shared.store().delete(resource, namespace, name);
        self.shared.wake();
    }

    /// Every object of a kind.
    #[must_use]
    pub fn objects(&self, resource: Resource) -> Vec<Value> {
        self.shared.store().objects(resource).map(|(_, object)| object.clone()).collect()
    }

    /// Ends history here: who wants to watch from an earlier resource version gets 410.
    pub fn compact(&self, gone: Gone) {
        self.shared.store().compact();
        self.shared.faults().gone = gone;
    }

    /// Sends every watch that allows them a bookmark with the newest resource version.
    pub fn bookmark(&self) {
        self.shared.faults().bookmarks += 1;
        self.shared.wake();
    }

    /// Cuts every connection, in the middle of whatever it carries.
    pub fn disconnect(&self) {
        self.shared.cut();
    }

    /// From now on, connections are cut as soon as they are made (`true`), or served again (`false`).
    pub fn refuse(&self, refuse: bool) {
        self.shared.faults().refuse = refuse;
        self.shared.cut();
    }

    /// From now on, requests for a kind (all kinds if `None`) are answered with this status.
    pub fn fail(&self, resource: Option<Resource>, status: u16) {
        self.shared.faults().fail = Some((resource, status));
    }

    /// Ends [`fail`](Self::fail).
    pub fn heal(&self) {
        self.shared.faults().fail = None;
    }

    /// From now on, watches end as soon as they have begun (`true`), or last again (`false`).
    pub fn end_watches(&self, end: bool) {
        self.shared.faults().end_watches = end;
        self.shared.wake();
    }

    /// From now on, a request without this bearer token is answered with 401.
    pub fn require_token(&self, token: &str) {
        self.shared.faults().token = Some(token.to_owned());
    }

    /// Every request so far, failed ones too.
    #[must_use]
    pub fn requests(&self) -> Vec<Request> {
        self.shared.faults().requests.clone()
    }

    /// Number of requests so far for a kind.
    #[must_use]
    pub fn count(&self, resource: Resource, verb: Verb) -> usize {
        self.requests().iter().filter(|request| request.resource == resource && request.verb == verb).count()
    }
}

impl Drop for KubeApi {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _: Result<(), ()> = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _: std::thread::Result<()> = thread.join();
        }
    }
}
