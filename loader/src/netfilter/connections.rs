//! Connections that netfilter translates to another destination (linux/netfilter/nfnetlink_conntrack.h).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::netlink::{self, find, find_in, number};

const NEW: u16 = 0;
const GET: u16 = 1;

const ORIGINAL: u16 = 1;
const STATUS: u16 = 3;
const ADDRESSES: u16 = 1;
const PROTOCOL: u16 = 2;
const DESTINATION4: u16 = 2;
const DESTINATION6: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const DESTINATION_PORT: u16 = 3;

/// IPS_DST_NAT
const DESTINATION_TRANSLATED: u32 = 1 << 5;

/// Whom a client asked whose connection is translated: the address and port, and the protocol's number.
pub type Asked = (SocketAddr, u8);

/// Whom the clients of this network namespace's translated connections asked, once for each connection.
///
/// # Errors
///
/// If the kernel refuses. Where it tracks no connections there are none.
pub fn translated() -> io::Result<Vec<Asked>> {
    let mut asked = Vec::new();
    netlink::dump(netlink::CONNTRACK | GET, netlink::CONNTRACK | NEW, |_, attributes| {
        let status = find(attributes, STATUS).and_then(number).unwrap_or(0);
        if status & DESTINATION_TRANSLATED != 0 {
            asked.extend(find(attributes, ORIGINAL).and_then(destination));
        }
    })?;
    Ok(asked)
}

fn destination(tuple: &[u8]) -> Option<Asked> {
    let address4 = find_in(tuple, &[ADDRESSES, DESTINATION4]).and_then(|octets| octets.first_chunk::<4>());
    let address6 = find_in(tuple, &[ADDRESSES, DESTINATION6]).and_then(|octets| octets.first_chunk::<16>());
    let address: IpAddr = match (address4, address6) {
        (Some(octets), _) => Ipv4Addr::from(*octets).into(),
        (None, octets) => Ipv6Addr::from(*octets?).into(),
    };
    let protocol = *find_in(tuple, &[PROTOCOL, PROTOCOL_NUMBER])?.first()?;
    let port = find_in(tuple, &[PROTOCOL, DESTINATION_PORT])?.first_chunk()?;
    Some((SocketAddr::new(address, u16::from_be_bytes(*port)), protocol))
}
