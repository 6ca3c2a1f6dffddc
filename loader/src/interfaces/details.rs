//! What is to be known of interfaces besides their role, once and for people: nothing of it is followed.

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkXdp};
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcOption};

use super::InterfaceError;

/// An interface's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// ifindex
    pub index: u32,
    /// Octets of the largest packet.
    pub mtu: u32,
    /// Id of the XDP program.
    pub xdp: Option<u32>,
    /// Names of the BPF programs that are filters below its clsact qdisc.
    pub filters: Vec<String>,
}

/// Of each of these interfaces that is there.
///
/// # Errors
///
/// If they can't be listed.
pub async fn details(indexes: &[u32]) -> Result<Vec<Details>, InterfaceError> {
    let failed = |what| move |error| InterfaceError::List { what, error };
    let (connection, handle, _) = rtnetlink::new_connection().map_err(InterfaceError::Socket)?;
    let connection = tokio::spawn(connection);
    let links = handle.link().get().execute().try_collect::<Vec<_>>().await.map_err(failed("links"))?;
    let mut all = Vec::new();
    for link in links.iter().filter(|link| indexes.contains(&link.header.index)) {
        let mut details = Details { index: link.header.index, ..Details::default() };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => details.mtu = *mtu,
                LinkAttribute::Xdp(attributes) => details.xdp = attributes.iter().find_map(program),
                _ => {}
            }
        }
        let mut filter = handle.traffic_filter(details.index as i32);
        for request in [filter.get().ingress(), filter.get().egress()] {
            // Without such a qdisc there are none.
            let filters = request.execute().try_collect::<Vec<_>>().await.unwrap_or_default();
            let attributes = filters.iter().flat_map(|filter| &filter.attributes);
            let options = attributes.filter_map(|attribute| match attribute {
                TcAttribute::Options(options) => Some(options),
                _ => None,
            });
            details.filters.extend(options.flatten().filter_map(name));
        }
        all.push(details);
    }
    connection.abort();
    Ok(all)
}

fn program(attribute: &LinkXdp) -> Option<u32> {
    match attribute {
        LinkXdp::ProgId(id) => Some(*id),
        _ => None,
    }
}

fn name(option: &TcOption) -> Option<String> {
    match option {
        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => Some(name.clone()),
        _ => None,
    }
}
