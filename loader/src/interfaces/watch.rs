//! Listens to rtnetlink and reports [`Event`]s: subscribe, list everything, then follow.
//!
//! Notifications that arrive during the listing are applied after it. That may repeat what is known, and always ends
//! at the present: the last message about an object is its state. When the kernel had to drop notifications
//! (ENOBUFS), everything is listed again.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{Stream, StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::proto::sys::{AsyncSocket, SocketAddr};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::message;
use super::state::{Change, Listing, State};
use super::{Event, Interface};
use crate::config::InterfaceRules;

/// Why interfaces can't be followed.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The netlink socket could not be opened or bound.
    #[error("cannot open a netlink route socket with its multicast groups: {0}; is this process in a sandbox?")]
    Socket(io::Error),
    /// A listing failed.
    #[error("cannot list {what} by netlink: {error}")]
    List {
        /// `links`, `addresses` or `routes`.
        what: &'static str,
        /// netlink's answer.
        error: rtnetlink::Error,
    },
    /// A device can't be removed.
    #[error("cannot remove interface {name} by netlink: {error}")]
    Remove {
        /// Its name.
        name: String,
        /// netlink's answer.
        error: rtnetlink::Error,
    },
    /// The socket was closed.
    #[error("the netlink socket was closed")]
    Closed,
}

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

const GROUPS: &[MulticastGroup] = &[
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];
/// Room for a few thousand notifications while the controller is busy.
const RECEIVE_BUFFER: libc::c_int = 8 << 20;
/// How long to wait before a lost socket is opened again.
const RETRY: Duration = Duration::from_secs(1);
/// How many notifications are taken before what they changed is reported.
const BATCH: usize = 1024;

/// Reports the interfaces that have a role, and every change, until the receiver of `events` is dropped.
///
/// Follows the network namespace of the calling thread. `node_addresses` holds the addresses of this node's Node
/// object, the primary ones first, and may change at any time; empty while unknown.
///
/// # Errors
///
/// If the socket can't be opened or the first listing fails. Later trouble is retried.
pub async fn run(
    rules: InterfaceRules,
    mut node_addresses: watch::Receiver<Vec<std::net::IpAddr>>,
    events: mpsc::Sender<Event>,
) -> Result<(), InterfaceError> {
    let mut state = State::default();
    let mut socket = Socket::open()?;
    state.replace(socket.list().await?);
    let mut reporter = Reporter { rules, events };
    let mut alive = reporter.report(&mut state, &node_addresses).await && reporter.send(Event::Synced).await;
    while alive {
        let followed = tokio::select! {
            message = socket.messages.next() => match message {
                Some((message, _)) => socket.follow(&mut state, message).await,
                None => Err(InterfaceError::Closed),
            },
            changed = node_addresses.changed() => {
                if changed.is_err() {
                    // Nobody can change the addresses any more; the interfaces still do.
                    let last = node_addresses.borrow().clone();
                    node_addresses = constant(last);
                }
                Ok(())
            }
            () = reporter.events.closed() => return Ok(()),
        };
        if let Err(error) = followed {
            warn!(%error, "interfaces can't be followed; trying again");
            tokio::time::sleep(RETRY).await;
            match reopen(&mut state).await {
                Ok(reopened) => socket = reopened,
                Err(error) => warn!(%error, "interfaces still can't be followed"),
            }
        }
        alive = reporter.report(&mut state, &node_addresses).await;
    }
    Ok(())
}

/// Every link, address and default route of the calling thread's network namespace.
///
/// # Errors
///
/// If the socket can't be opened, or the listing fails.
pub async fn list() -> Result<Listing, InterfaceError> {
    Socket::open()?.list().await
}

/// Removes a network device, and says whether it was there.
///
/// # Errors
///
/// If the kernel refuses.
pub async fn remove(name: &str) -> Result<bool, InterfaceError> {
    let mut socket = Socket::open()?;
    let Some(link) = socket.list().await?.links.into_iter().find(|link| link.name == name) else { return Ok(false) };
    let removed = socket.handle.link().del(link.index).execute().await;
    removed.map(|()| true).map_err(|error| InterfaceError::Remove { name: link.name, error })
}

/// A receiver whose value never changes and whose sender is never dropped.
fn constant(value: Vec<std::net::IpAddr>) -> watch::Receiver<Vec<std::net::IpAddr>> {
    let (sender, receiver) = watch::channel(value);
    tokio::spawn(async move { sender.closed().await });
    receiver
}

async fn reopen(state: &mut State) -> Result<Socket, InterfaceError> {
    let mut socket = Socket::open()?;
    state.replace(socket.list().await?);
    Ok(socket)
}

struct Reporter {
    rules: InterfaceRules,
    events: mpsc::Sender<Event>,
}

impl Reporter {
    /// Sends what changed; false when nobody listens any more.
    async fn report(&mut self, state: &mut State, node_addresses: &watch::Receiver<Vec<std::net::IpAddr>>) -> bool {
        let known = node_addresses.borrow().clone();
        for event in state.events(&known, &self.rules) {
            match &event {
                Event::Present(Interface { index, name, role, .. }) => info!(index, name, ?role, "interface"),
                Event::Gone { index } => info!(index, "interface gone"),
                Event::Addresses(addresses) => debug!(?addresses, "local addresses"),
                Event::Synced => {}
            }
            if !self.send(event).await {
                return false;
            }
        }
        true
    }

    async fn send(&mut self, event: Event) -> bool {
        self.events.send(event).await.is_ok()
    }
}

/// A netlink socket that is subscribed to [`GROUPS`], and the task that serves it.
struct Socket {
    handle: Handle,
    messages: Messages,
    connection: JoinHandle<()>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Socket {
    fn open() -> Result<Self, InterfaceError> {
        let (mut connection, handle, messages) =
            rtnetlink::new_multicast_connection(GROUPS).map_err(InterfaceError::Socket)?;
        widen(connection.socket_mut().socket_mut());
        Ok(Self { handle, messages, connection: tokio::spawn(connection) })
    }

    /// Applies what the kernel had queued before it dropped something: after the listing that would be history.
    async fn drain(&mut self, state: &mut State) {
        let mut dropped = true;
        while dropped {
            // Any answer, even an error, comes after all that was queued before the question. 1 is the loopback device.
            let _answer = std::pin::pin!(self.handle.link().get().match_index(1).execute()).next().await;
            dropped = false;
            while let Ok((message, _)) = self.messages.try_recv() {
                dropped |= apply(state, message);
            }
        }
    }

    async fn list(&mut self) -> Result<Listing, InterfaceError> {
        let failed = |what| move |error| InterfaceError::List { what, error };
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await.map_err(failed("links"))?;
        let addresses = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        Ok(Listing {
            links: links.iter().filter_map(message::link).collect(),
            addresses: addresses.map_err(failed("addresses"))?.iter().filter_map(message::address).collect(),
            routes: self.list_routes().await?,
        })
    }

    async fn list_routes(&mut self) -> Result<Vec<super::discover::DefaultRoute>, InterfaceError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let mut answers = std::pin::pin!(self.handle.route().get(request).execute());
            while let Some(route) =
                next(&mut answers).await.map_err(|error| InterfaceError::List { what: "routes", error })?
            {
                routes.extend(message::default_routes(&route));
            }
        }
        Ok(routes)
    }

    /// Applies a notification and those that wait behind it, and reads again what they don't tell.
    async fn follow(
        &mut self,
        state: &mut State,
        first: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<(), InterfaceError> {
        let mut overrun = apply(state, first);
        for _ in 1..BATCH {
            let Ok((message, _)) = self.messages.try_recv() else { break };
            overrun |= apply(state, message);
        }
        if overrun {
            warn!("the kernel dropped interface notifications (ENOBUFS); listing everything again");
            self.drain(state).await;
            state.replace(self.list().await?);
        }
        for index in state.take_stale_links() {
            let mut answers = std::pin::pin!(self.handle.link().get().match_index(index).execute());
            // A link that is gone has told so, or will.
            if let Some(link) = answers.next().await.and_then(Result::ok).as_ref().and_then(message::link) {
                state.apply(Change::Link(link));
            }
        }
        if state.routes_stale() {
            let routes = self.list_routes().await?;
            state.replace_routes(routes);
        }
        Ok(())
    }
}

/// Applies one notification; whether it says that others were dropped.
fn apply(state: &mut State, message: NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match message.payload {
        NetlinkPayload::InnerMessage(message) => {
            if let Some(change) = message::change(&message) {
                state.apply(change);
            }
            false
        }
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// The next item of a listing.
async fn next<T>(
    answers: &mut (impl Stream<Item = Result<T, rtnetlink::Error>> + Unpin),
) -> Result<Option<T>, rtnetlink::Error> {
    answers.next().await.transpose()
}

/// Asks for a large receive buffer; the limit of the machine holds without CAP_NET_ADMIN, and that is no error.
fn widen(socket: &impl AsRawFd) {
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and the value is a c_int of the given size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            std::ptr::from_ref(&RECEIVE_BUFFER).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result != 0 {
        debug!(error = %io::Error::last_os_error(), "setsockopt(SO_RCVBUFFORCE) on the netlink socket");
    }
}
