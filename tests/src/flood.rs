//! Packets from made-up senders, as fast as a raw socket takes them.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sheave_common::checksum::{difference, update, update_udp};
use sheave_common::{PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP};
use socket2::Domain;

use crate::packet::{ETHERNET, FRAGMENT, View};
use crate::raw_packets;

/// How many packets one system call sends.
const BATCH: u32 = 256;

/// Sends copies of a frame's packet from the calling thread's network namespace, each from an address of its own, and from
/// another port if it has ports. Returns how long that took.
///
/// # Errors
/// If there is no route, or the kernel refuses.
pub fn send(frame: &[u8], count: u32) -> Result<Duration> {
    let started = Instant::now();
    send_while(frame, |sent| count - sent)?;
    Ok(started.elapsed())
}

/// The same for a time. Returns how many were sent.
///
/// # Errors
/// As [`send`].
pub fn send_for(frame: &[u8], length: Duration) -> Result<u32> {
    let started = Instant::now();
    send_while(frame, |_| if started.elapsed() < length { BATCH } else { 0 })
}

/// Sends batches until none are `left`, which is told how many were sent. Returns how many that were.
fn send_while(frame: &[u8], left: impl Fn(u32) -> u32) -> Result<u32> {
    let (packet, to) = (&frame[ETHERNET..], View(frame).destination().ip());
    let socket = raw_packets::socket(Domain::for_address(SocketAddr::new(to, 0))).context("a raw socket")?;
    socket.connect(&SocketAddr::new(to, 0).into()).with_context(|| format!("a route to {to}"))?;
    let mut packets = vec![packet.to_vec(); BATCH as usize];
    let mut vectors: Vec<libc::iovec> = packets
        .iter_mut()
        .map(|packet| libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = vectors
        .iter_mut()
        .map(|vector| {
            // SAFETY: all-zero bytes are a valid mmsghdr.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (vector, 1);
            message
        })
        .collect();
    let mut number = 0;
    loop {
        let batch = BATCH.min(left(number));
        if batch == 0 {
            return Ok(number);
        }
        for packet in &mut packets[..batch as usize] {
            disguise(packet, number);
            number += 1;
        }
        // SAFETY: messages, vectors and packets outlive the call, and are as many and as long as they say.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), batch, 0) };
        ensure!(sent > 0, "packet {number} to {to}: {}", io::Error::last_os_error());
        ensure!(sent as u32 == batch, "{sent} of {batch} packets to {to} were sent");
    }
}

/// Gives a packet the sender of this number; its checksums stay right. (The kernel computes IPv4's header checksum.)
fn disguise(packet: &mut [u8], number: u32) {
    let [_, high, middle, low] = number.to_be_bytes();
    let v6 = packet[0] >> 4 == 6;
    let (address, protocol, transport) = match (v6, packet[6]) {
        (false, _) => (12, packet[9], 20),
        (true, FRAGMENT) => (20, packet[40], 48),
        (true, protocol) => (20, protocol, 40),
    };
    let host = [packet[address], high | 0x80, middle, low];
    let mut change = replace(packet, address, host);
    let (ports, checksum) = match protocol {
        PROTOCOL_TCP => (true, 16),
        PROTOCOL_UDP => (true, 6),
        PROTOCOL_ICMPV6 => (false, 2),
        // No pseudo-header.
        PROTOCOL_ICMP => return,
        _ => unreachable!("a flood of protocol {protocol}"),
    };
    if ports {
        let [port_high, port_low] = (1_024 + (number % 60_000) as u16).to_be_bytes();
        let to = [packet[transport + 2], packet[transport + 3]];
        change += replace(packet, transport, [port_high, port_low, to[0], to[1]]);
    }
    let field = &mut packet[transport + checksum..transport + checksum + 2];
    let before = u16::from_ne_bytes([field[0], field[1]]);
    let after = if protocol == PROTOCOL_UDP { update_udp(before, change) } else { update(before, change) };
    field.copy_from_slice(&after.to_ne_bytes());
}

/// Replaces a word; returns what that adds to the packet's sum.
fn replace(packet: &mut [u8], at: usize, new: [u8; 4]) -> u64 {
    let old = [packet[at], packet[at + 1], packet[at + 2], packet[at + 3]];
    packet[at..at + 4].copy_from_slice(&new);
    difference(u32::from_ne_bytes(old), u32::from_ne_bytes(new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Packet, SYN};

    /// A flood that is dropped for its checksums would be withstood by anybody.
    #[test]
    fn every_packet_has_another_sender_and_right_checksums() {
        let echo = [0_u8; 8];
        for frame in [
            Packet::tcp("10.0.0.1:1", "192.0.2.1:80", SYN).build(),
            Packet::tcp("[fd00::1]:1", "[fd00::2]:80", SYN).build(),
            Packet::udp("10.0.0.1:1", "192.0.2.1:80").build(),
            Packet::udp("[fd00::1]:1", "[fd00::2]:80").build(),
            Packet::icmp_message("fd00::1", "fd00::2", 128, 0, &echo).build(),
        ] {
            let mut senders = std::collections::HashSet::new();
            let mut packet = frame.to_vec();
            for number in [0, 1, 255, 256, 65_535, 65_536, 999_999] {
                disguise(&mut packet[ETHERNET..], number);
                if packet[ETHERNET] >> 4 == 4 {
                    // As the kernel does when it sends it.
                    packet[ETHERNET + 10..ETHERNET + 12].fill(0);
                    let words = packet[ETHERNET..ETHERNET + 20].chunks(2);
                    let sum = words.map(|word| u64::from(u16::from_ne_bytes([word[0], word[1]]))).sum();
                    let checksum = !sheave_common::checksum::fold(sum);
                    packet[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&checksum.to_ne_bytes());
                }
                View(&packet).assert_checksums();
                assert!(senders.insert(View(&packet).source()), "{number}");
            }
        }
    }
}
