//! One kind of object, listed and watched for ever.
//!
//! A list is reported as a replacement, so objects that vanished while nobody watched go as well. kube's watcher
//! resumes, pages and takes bookmarks; what it leaves to its user is here: waiting, saying what is wrong, and a list
//! from scratch when the server answers 410 to the start of a watch (the watcher would ask the same again for ever).

use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::Sender;
use tokio::time::Instant;

use super::super::{SourceEvent, convert};
use super::backoff::Backoff;
use super::servers::{Servers, chain};
use super::trouble::{Trouble, is_expired, is_unreadable, needs_list};
use crate::model::{Change, objects};

/// A kind of object that is followed.
pub(super) trait Followed:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static
{
    /// Its name, for people.
    const NAME: &'static str;
    /// What is lost if the account may not read it, or the server has no such kind; `None` if there is nothing to do without
    /// it.
    const WITHOUT: Option<&'static str> = None;
    /// What is kept of it.
    type Trimmed: Send;

    fn trim(&self) -> Self::Trimmed;
    fn present(object: Self::Trimmed) -> Change;
    fn gone(&self) -> Change;
    fn listed(objects: Vec<Self::Trimmed>) -> Change;
}

/// Ends of history that are further apart than this have nothing to do with each other.
const CALM: Duration = Duration::from_secs(60);

/// Number of kinds that there is nothing to do without: when each has been listed once, the source has synced.
const KINDS: usize = 3;

impl Followed for core::Service {
    const NAME: &'static str = "Services";
    type Trimmed = objects::Service;

    fn trim(&self) -> objects::Service {
        self.into()
    }

    fn present(object: objects::Service) -> Change {
        Change::Service(object)
    }

    fn gone(&self) -> Change {
        Change::ServiceGone(convert::service_key(self))
    }

    fn listed(objects: Vec<objects::Service>) -> Change {
        Change::ServicesReplaced(objects)
    }
}

impl Followed for discovery::EndpointSlice {
    const NAME: &'static str = "EndpointSlices";
    type Trimmed = objects::EndpointSlice;

    fn trim(&self) -> objects::EndpointSlice {
        self.into()
    }

    fn present(object: objects::EndpointSlice) -> Change {
        Change::Slice(object)
    }

    fn gone(&self) -> Change {
        Change::SliceGone(convert::slice_key(self))
    }

    fn listed(objects: Vec<objects::EndpointSlice>) -> Change {
        Change::SlicesReplaced(objects)
    }
}

impl Followed for core::Node {
    const NAME: &'static str = "this Node";
    type Trimmed = objects::Node;

    fn trim(&self) -> objects::Node {
        self.into()
    }

    fn present(object: objects::Node) -> Change {
        Change::Node(object)
    }

    fn gone(&self) -> Change {
        Change::NodeGone
    }

    /// The field selector lets one through at most.
    fn listed(objects: Vec<objects::Node>) -> Change {
        objects.into_iter().next().map_or(Change::NodeGone, Change::Node)
    }
}

impl Followed for networking::ServiceCIDR {
    const NAME: &'static str = "ServiceCIDRs";
    const WITHOUT: Option<&'static str> = Some("packets to service addresses that no Service has are not dropped");
    type Trimmed = objects::ServiceCidr;

    fn trim(&self) -> objects::ServiceCidr {
        self.into()
    }

    fn present(object: objects::ServiceCidr) -> Change {
        Change::ServiceCidr(object)
    }

    fn gone(&self) -> Change {
        Change::ServiceCidrGone(self.metadata.name.clone().unwrap_or_default())
    }

    fn listed(objects: Vec<objects::ServiceCidr>) -> Change {
        Change::ServiceCidrsReplaced(objects)
    }
}

/// Where the objects go.
pub(super) struct Follower {
    servers: Arc<Servers>,
    client: Client,
    sender: Sender<SourceEvent>,
    /// Kinds that have been listed once.
    listed: AtomicUsize,
}

impl Follower {
    pub(super) fn new(servers: Arc<Servers>, sender: Sender<SourceEvent>) -> Self {
        let client = servers.client();
        Self { servers, client, sender, listed: AtomicUsize::new(0) }
    }

    /// Follows a kind until the receiver is gone.
    pub(super) async fn follow<K: Followed>(&self, config: watcher::Config) {
        let mut trouble = Trouble::new(K::NAME);
        // Apart, because the list that each end of history leads to is no trouble.
        let (mut ends, mut last_end) = (Backoff::new(), Instant::now());
        let path = K::url_path(&(), None);
        let mut unreadable = None;
        let mut synced = K::WITHOUT.is_some();
        loop {
            let mut events = pin!(watcher::watcher(Api::<K>::all(self.client.clone()), config.clone()));
            let mut listing = Vec::new();
            // The watcher's stream has no end of its own.
            loop {
                let event = tokio::select! {
                    event = events.next() => event,
                    () = self.servers.steady(&path, trouble.since), if trouble.is_on() => {
                        trouble.over(&self.servers.current());
                        if !self.tell(trouble.news(true)).await {
                            return;
                        }
                        continue;
                    }
                };
                let Some(event) = event else { break };
                let change = match event {
                    Ok(Event::Init) => {
                        listing = Vec::new();
                        continue;
                    }
                    Ok(Event::InitApply(object)) => {
                        listing.push(object.trim());
                        continue;
                    }
                    Ok(Event::InitDone) => K::listed(std::mem::take(&mut listing)),
                    Ok(Event::Apply(object)) => K::present(object.trim()),
                    Ok(Event::Delete(object)) => object.gone(),
                    Err(error) if is_expired(&error) => {
                        tracing::debug!(kind = K::NAME, %error, "the server no longer knows where the watch was");
                        if last_end.elapsed() > CALM {
                            ends.reset();
                        }
                        tokio::time::sleep(ends.next()).await;
                        last_end = Instant::now();
                        if matches!(error, watcher::Error::WatchStartFailed(_)) {
                            break;
                        }
                        continue;
                    }
                    Err(error) if K::WITHOUT.is_some() && is_unreadable(&error) => {
                        if !self.do_without::<K>(&mut unreadable, &error).await {
                            return;
                        }
                        break;
                    }
                    Err(error) => {
                        if !self.tell(trouble.news(false)).await {
                            return;
                        }
                        tokio::time::sleep(trouble.report(&self.servers.current(), &error)).await;
                        if needs_list(&error) {
                            break;
                        }
                        continue;
                    }
                };
                trouble.over(&self.servers.current());
                if !self.tell(trouble.news(true)).await {
                    return;
                }
                if unreadable.take().is_some() {
                    tracing::info!(kind = K::NAME, server = self.servers.current(), "may be read after all");
                }
                self.servers.learn(&change);
                let listed = matches!(
                    change,
                    Change::ServicesReplaced(_) | Change::SlicesReplaced(_) | Change::Node(_) | Change::NodeGone
                );
                if self.sender.send(SourceEvent::Changes(vec![change])).await.is_err() {
                    return;
                }
                if listed && !synced {
                    synced = true;
                    // Every kind has sent its list before it counts itself, so the last one may say it for all.
                    if self.listed.fetch_add(1, Ordering::AcqRel) + 1 == KINDS
                        && self.sender.send(SourceEvent::Synced).await.is_err()
                    {
                        return;
                    }
                }
            }
        }
    }

    /// Passes on what is new about a kind. False if the receiver is gone.
    async fn tell(&self, news: Option<SourceEvent>) -> bool {
        match news {
            Some(news) => self.sender.send(news).await.is_ok(),
            None => true,
        }
    }

    /// Reports once that there are none of a kind that may not be read, says so, and waits until it is time to look again.
    /// False if the receiver is gone.
    async fn do_without<K: Followed>(&self, unreadable: &mut Option<Backoff>, error: &watcher::Error) -> bool {
        if unreadable.is_none() {
            tracing::info!(
                kind = K::NAME,
                server = self.servers.current(),
                error = chain(error),
                without = K::WITHOUT,
                "may not be read here; will look again now and then"
            );
            let none = SourceEvent::Changes(vec![K::listed(Vec::new())]);
            if self.sender.send(none).await.is_err() {
                return false;
            }
        }
        tokio::time::sleep(unreadable.get_or_insert_with(Backoff::patient).next()).await;
        true
    }
}
