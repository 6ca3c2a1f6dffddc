//! Fragments of a frame's packet, and the packet of its fragments.

use super::{ETHERNET, FRAGMENT, IPV6, sum};

const MORE_FRAGMENTS: u16 = 0x2000;

/// Cuts a frame's packet into fragments with this identification and, but for the last, this much payload each (a multiple of
/// eight). The packet has neither options nor extension headers.
///
/// # Panics
/// If that can't be done.
#[must_use]
pub fn split(frame: &[u8], payload: usize, identification: u32) -> Vec<Vec<u8>> {
    assert_eq!(payload % 8, 0, "offsets count units of eight octets");
    let header = header_length(frame);
    let (headers, body) = frame.split_at(ETHERNET + header);
    let last = body.len().saturating_sub(1) / payload;
    let fragment = |(index, part): (usize, &[u8])| {
        let (units, more) = (u16::try_from(index * payload / 8).expect("fragment offset"), index != last);
        let mut fragment = headers.to_vec();
        if header == IPV6 {
            let [high, low] = (units << 3 | u16::from(more)).to_be_bytes();
            fragment.extend([headers[ETHERNET + 6], 0, high, low]);
            fragment.extend(identification.to_be_bytes());
            fragment[ETHERNET + 6] = FRAGMENT;
        } else {
            let field = units | if more { MORE_FRAGMENTS } else { 0 };
            let identification = u16::try_from(identification).expect("IPv4's identification has 16 bits");
            fragment[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&identification.to_be_bytes());
            fragment[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&field.to_be_bytes());
        }
        fragment.extend(part);
        finish(&mut fragment);
        fragment
    };
    body.chunks(payload).enumerate().map(fragment).collect()
}

/// Puts a packet together of its fragments, which come in order.
///
/// # Panics
/// If they don't fit together: one is missing, they are of different packets, or a header's checksum is wrong.
#[must_use]
pub fn join<'a>(fragments: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut fragments = fragments.into_iter().peekable();
    let first = *fragments.peek().expect("at least one fragment");
    let header = header_length(first);
    let mut whole = first[..ETHERNET + header].to_vec();
    while let Some(fragment) = fragments.next() {
        let (offset, more, identity) = position(fragment);
        assert_eq!(identity, position(first).2, "fragments of one packet");
        assert_eq!(offset, whole.len() - ETHERNET - header, "a fragment's offset");
        assert_eq!(more, fragments.peek().is_some(), "the last fragment, and no other, says that it is");
        let body = if header == IPV6 { header + 8 } else { header };
        whole.extend(&fragment[ETHERNET + body..]);
    }
    if header == IPV6 {
        whole[ETHERNET + 6] = first[ETHERNET + IPV6];
    } else {
        whole[ETHERNET + 6..ETHERNET + 8].fill(0);
    }
    finish(&mut whole);
    whole
}

fn header_length(frame: &[u8]) -> usize {
    if frame[ETHERNET] >> 4 == 6 { IPV6 } else { usize::from(frame[ETHERNET] & 0x0f) * 4 }
}

/// A fragment's offset in octets, whether more follow, and what it shares with the rest of its packet: addresses,
/// identification and protocol.
fn position(frame: &[u8]) -> (usize, bool, Vec<u8>) {
    let network = &frame[ETHERNET..];
    let word = |at: usize| u16::from_be_bytes([network[at], network[at + 1]]);
    if network[0] >> 4 == 6 {
        assert_eq!(network[6], FRAGMENT, "a fragment header");
        let field = word(IPV6 + 2);
        let identity = [&network[8..IPV6], &network[IPV6 + 4..IPV6 + 8], &network[IPV6..=IPV6]].concat();
        return (usize::from(field & !7), field & 1 != 0, identity);
    }
    assert_eq!(sum(&network[..header_length(frame)]), 0xffff, "IPv4 header checksum of a fragment");
    let identity = [&network[12..20], &network[4..6], &network[9..=9]].concat();
    (usize::from(word(6) & 0x1fff) * 8, word(6) & MORE_FRAGMENTS != 0, identity)
}

/// Length and header checksum of a frame whose payload has changed.
fn finish(frame: &mut [u8]) {
    let network = &mut frame[ETHERNET..];
    if network[0] >> 4 == 6 {
        let length = u16::try_from(network.len() - IPV6).expect("payload length");
        network[4..6].copy_from_slice(&length.to_be_bytes());
        return;
    }
    let length = u16::try_from(network.len()).expect("packet length");
    network[2..4].copy_from_slice(&length.to_be_bytes());
    network[10..12].fill(0);
    let checksum = !sum(&network[..20]);
    network[10..12].copy_from_slice(&checksum.to_be_bytes());
}
