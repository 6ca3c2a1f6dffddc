//! nfnetlink: what nf_tables and connection tracking are asked and told by (linux/netfilter/nfnetlink.h).

use std::io;
use std::os::fd::AsRawFd as _;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

/// nf_tables' messages.
pub(super) const NF_TABLES: u16 = 10 << 8;
/// Connection tracking's messages.
pub(super) const CONNTRACK: u16 = 1 << 8;

const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
/// Octets of `struct nlmsghdr` and of `struct nfgenmsg` behind it.
const HEADER: usize = 16;
const GENERIC: usize = 4;
/// Octets that the kernel may put into one answer.
const ROOM: usize = 64 * 1024;
const NESTED: u16 = 1 << 15;

/// Asks for all objects of a kind, of every family, and hands on each one's family and attributes. Where the kernel has no such
/// subsystem there are none.
pub(super) fn dump(request: u16, answer: u16, mut each: impl FnMut(u8, &[u8])) -> io::Result<()> {
    let socket = open()?;
    let mut message = Vec::new();
    put_message(&mut message, request, libc::NLM_F_DUMP, 0, 0, 0, &[]);
    socket.send_to(&message, &SocketAddr::new(0, 0), 0)?;
    loop {
        let mut received = bytes::BytesMut::with_capacity(ROOM);
        socket.recv(&mut received, 0)?;
        for message in Messages(&received) {
            let (kind, _, body) = message?;
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(()),
                libc::NLMSG_ERROR => {
                    return match errno(body) {
                        // There is no such subsystem.
                        0 | libc::EINVAL | libc::EOPNOTSUPP => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(errno)),
                    };
                }
                _ if kind == answer && body.len() >= GENERIC => each(body[0], &body[GENERIC..]),
                _ => {}
            }
        }
    }
}

/// Changes of nf_tables that the kernel makes together, or not at all.
#[derive(Debug, Default)]
pub(super) struct Batch {
    octets: Vec<u8>,
    messages: u32,
}

impl Batch {
    /// Adds a change: message type, flags, family and attributes.
    pub(super) fn add(&mut self, kind: u16, flags: i32, family: u8, attributes: &[u8]) {
        self.messages += 1;
        put_message(&mut self.octets, NF_TABLES | kind, flags, self.messages, family, 0, attributes);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Makes the changes.
    pub(super) fn commit(mut self) -> io::Result<()> {
        let socket = open()?;
        let mut octets = Vec::with_capacity(self.octets.len() + 3 * (HEADER + GENERIC));
        put_message(&mut octets, BATCH_BEGIN, 0, 0, 0, NF_TABLES >> 8, &[]);
        // The kernel answers when it has made the changes, and only to messages that ask for it.
        self.acknowledge_last();
        octets.append(&mut self.octets);
        put_message(&mut octets, BATCH_END, 0, 0, 0, NF_TABLES >> 8, &[]);
        make_room(&socket, octets.len())?;
        socket.send_to(&octets, &SocketAddr::new(0, 0), 0)?;
        loop {
            let mut received = bytes::BytesMut::with_capacity(ROOM);
            socket.recv(&mut received, 0)?;
            for message in Messages(&received) {
                let (kind, sequence, body) = message?;
                match (i32::from(kind), errno(body)) {
                    (libc::NLMSG_ERROR, 0) if sequence == self.messages => return Ok(()),
                    (libc::NLMSG_ERROR, errno) if errno != 0 => return Err(io::Error::from_raw_os_error(errno)),
                    _ => {}
                }
            }
        }
    }

    fn acknowledge_last(&mut self) {
        let mut at = 0;
        for _ in 1..self.messages {
            let length =
                u32::from_ne_bytes([self.octets[at], self.octets[at + 1], self.octets[at + 2], self.octets[at + 3]]);
            at += length as usize;
        }
        self.octets[at + 6] |= libc::NLM_F_ACK as u8;
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// A batch is one datagram, however long.
fn make_room(socket: &Socket, octets: usize) -> io::Result<()> {
    let size = libc::c_int::try_from(octets).unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is open, and the value is a c_int of the given size.
    let result = unsafe {
        let (value, length) = ((&raw const size).cast(), size_of::<libc::c_int>() as libc::socklen_t);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, value, length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn put_message(into: &mut Vec<u8>, kind: u16, flags: i32, sequence: u32, family: u8, resource: u16, attributes: &[u8]) {
    // Attributes are padded, so the next message is aligned.
    into.extend(((HEADER + GENERIC + attributes.len()) as u32).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    into.extend(sequence.to_ne_bytes());
    // Port 0: the kernel's choice. Then the family and the version.
    into.extend([0, 0, 0, 0, family, 0]);
    into.extend(resource.to_be_bytes());
    into.extend(attributes);
}

/// Appends an attribute.
pub(super) fn put(into: &mut Vec<u8>, kind: u16, content: &[u8]) {
    into.extend(((4 + content.len()) as u16).to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(content);
    into.resize(aligned(into.len()), 0);
}

/// Appends a string, which ends with a zero.
pub(super) fn put_text(into: &mut Vec<u8>, kind: u16, text: &str) {
    put(into, kind, format!("{text}\0").as_bytes());
}

/// Appends an attribute that holds others.
pub(super) fn put_nested(into: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    put(into, kind | NESTED, &inner);
}

/// The messages of a datagram: type, sequence number and what follows the header.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = io::Result<(u16, u32, &'a [u8])>;

    fn next(&mut self) -> Option<Self::Item> {
        let header: [u8; HEADER] = *self.0.first_chunk()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let Some(body) = self.0.get(HEADER..length) else {
            self.0 = &[];
            return Some(Err(io::ErrorKind::InvalidData.into()));
        };
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        Some(Ok((u16::from_ne_bytes([header[4], header[5]]), sequence, body)))
    }
}

/// Of an error message; 0 is an acknowledgement.
fn errno(body: &[u8]) -> i32 {
    body.first_chunk().map_or(0, |code| -i32::from_ne_bytes(*code))
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Netlink attributes: type and content.
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        const HEADER: usize = 4;
        /// Without the bits that say "nested" and "network order".
        const TYPE: u16 = 0x3fff;
        let [low, high, kind_low, kind_high] = *self.0.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([low, high]));
        let content = self.0.get(HEADER..length)?;
        self.0 = self.0.get(aligned(length)..).unwrap_or_default();
        Some((u16::from_ne_bytes([kind_low, kind_high]) & TYPE, content))
    }
}

/// The content of the first attribute of a type.
pub(super) fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    Attributes(attributes).find(|(kind, _)| *kind == wanted).map(|(_, content)| content)
}

/// The content of an attribute within others, by the way there.
pub(super) fn find_in<'a>(attributes: &'a [u8], way: &[u16]) -> Option<&'a [u8]> {
    way.iter().try_fold(attributes, |attributes, kind| find(attributes, *kind))
}

/// A number in network order.
pub(super) fn number(content: &[u8]) -> Option<u32> {
    content.first_chunk().map(|octets| u32::from_be_bytes(*octets))
}

/// A string that ends with a zero.
pub(super) fn text(content: &[u8]) -> String {
    String::from_utf8_lossy(content.strip_suffix(&[0]).unwrap_or(content)).into_owned()
}
