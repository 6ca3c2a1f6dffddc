//! Where a client's packets come in.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::TraceError;
use crate::dataplane::PinnedMaps;
use crate::interfaces::discover::Link;
use crate::interfaces::toward::{Surroundings, toward};

/// An interface with programs.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) name: String,
    pub(super) index: u32,
    /// Its own link-layer address.
    pub(super) hardware_address: [u8; 6],
    /// How it was found, if it wasn't given.
    pub(super) guess: Option<String>,
}

/// The interface that was given, or else the one that the client is routed to, or a port of that bridge.
pub(super) async fn find(maps: &PinnedMaps, client: IpAddr, given: Option<&str>) -> Result<Place, TraceError> {
    let attached: BTreeSet<u32> = maps.interfaces()?.into_iter().map(|(index, _)| index).collect();
    let around = toward(client).await?;
    let links: Vec<&Link> = around.links.iter().filter(|link| attached.contains(&link.index)).collect();
    let unattached = |wanted: String| {
        let known: Vec<&str> = links.iter().map(|link| link.name.as_str()).collect();
        TraceError::Interface { wanted, known: known.join(", ") }
    };
    let (link, guess) = match given {
        Some(name) => {
            let link = links.iter().find(|link| link.name == name);
            (link.ok_or_else(|| unattached(format!("interface {name}")))?, None)
        }
        None if around.own => return Err(TraceError::Own(client)),
        None => guess(&links, &around, client).ok_or_else(|| unattached(format!("the way to {client}")))?,
    };
    let hardware_address = link.hardware_address.as_slice().try_into().unwrap_or_default();
    Ok(Place { name: link.name.clone(), index: link.index, hardware_address, guess })
}

fn guess<'a, 'l>(
    links: &'a [&'l Link],
    around: &Surroundings,
    client: IpAddr,
) -> Option<(&'a &'l Link, Option<String>)> {
    let out = around.index?;
    if let Some(link) = links.iter().find(|link| link.index == out) {
        return Some((link, Some(format!("the route to {client}"))));
    }
    let port = links.iter().find(|link| link.controller == Some(out))?;
    let bridge = around.links.iter().find(|link| link.index == out).map_or("a bridge", |link| link.name.as_str());
    Some((port, Some(format!("a port of {bridge}, which leads to {client}; new connections fare the same on each"))))
}
