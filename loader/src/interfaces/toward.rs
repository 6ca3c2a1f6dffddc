//! Which link leads to an address, asked once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::pin;

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteAttribute, RouteType};

use super::discover::Link;
use super::message;
use super::watch::InterfaceError;

/// The links of this network namespace, and how it reaches an address.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// All links.
    pub links: Vec<Link>,
    /// ifindex of the link that leads there, if one does.
    pub index: Option<u32>,
    /// The address is one of this machine's own.
    pub own: bool,
}

/// Looks around in the calling thread's network namespace. To be called in a tokio runtime.
///
/// # Errors
///
/// If the kernel can't be asked.
pub async fn toward(address: IpAddr) -> Result<Surroundings, InterfaceError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(InterfaceError::Socket)?;
    let connection = tokio::spawn(connection);
    let links = handle.link().get().execute().try_collect::<Vec<_>>().await;
    let links = links.map_err(|error| InterfaceError::List { what: "links", error })?;
    let links = links.iter().filter_map(message::link).collect();
    let request = match address {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, 32).build(),
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, 128).build(),
    };
    let mut surroundings = Surroundings { links, ..Surroundings::default() };
    // An error says that there is no route.
    if let Some(Ok(route)) = pin!(handle.route().get(request).execute()).next().await {
        surroundings.own = route.header.kind == RouteType::Local;
        surroundings.index = route.attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
    }
    connection.abort();
    Ok(surroundings)
}
