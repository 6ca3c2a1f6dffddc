//! From fuzz input to packets.

use std::net::SocketAddr;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use sheave_common::{PROTOCOL_TCP, PROTOCOL_UDP};
use sheave_ebpf_host::kernel::{Hook, Input, Output};
use sheave_ebpf_host::programs::Checksum;

use super::laws::{self, Sight};
use super::world::{
    BALANCED, BALANCER, CLIENT, CLIENT_POD, HAIRPIN, LOCAL, NEAR, NODE, NODE_PORT, POD, REMOTE, SERVED, SNAT_PORTS,
    TARGET, TUNNEL, UNSERVED, UPLINK, VIP,
};
use crate::packet::{self, Packet};

/// Who sends and who is sent to: those that the node knows, a stranger, an address in a ServiceCIDR that nobody has, and those
/// that no single host can have.
const PARTIES: [[&str; 2]; 14] = [
    CLIENT,
    VIP,
    NODE,
    BALANCER,
    CLIENT_POD,
    REMOTE,
    NEAR,
    HAIRPIN,
    ["198.51.100.8", "2001:db8:100::8"],
    ["10.96.0.77", "fd00:96::77"],
    ["127.0.0.1", "::1"],
    ["0.0.0.0", "::"],
    ["224.0.0.1", "ff02::1"],
    ["255.255.255.255", "fe80::1"],
];
const PORTS: [u16; 11] =
    [40_000, SERVED, NODE_PORT, BALANCED, UNSERVED, TARGET, SNAT_PORTS[0], SNAT_PORTS[1], 40_001, 0, u16::MAX];
const HOOKS: [(Hook, u32); 8] = [
    (Hook::UplinkIngress, UPLINK),
    (Hook::PodIngress, POD),
    (Hook::PodEgress, POD),
    (Hook::UplinkEgress, UPLINK),
    (Hook::UplinkIngressL3, TUNNEL),
    (Hook::UplinkEgressL3, TUNNEL),
    (Hook::PodIngress, LOCAL),
    (Hook::PodEgress, LOCAL),
];
/// ICMP and ICMPv6 types that the programs look at.
const ICMP: [[u8; 6]; 2] = [[8, 3, 11, 5, 12, 0], [128, 1, 2, 137, 3, 136]];
const EXTENSIONS: [u8; 6] = [
    packet::HOP_BY_HOP,
    packet::ROUTING,
    packet::DESTINATION_OPTIONS,
    packet::FRAGMENT,
    packet::AUTHENTICATION,
    packet::NO_NEXT_HEADER,
];

/// Whoever sends.
#[derive(Default)]
pub(super) struct Sender {
    /// The last packet that was built as it should be, for ICMP errors to quote.
    last: Vec<u8>,
}

impl Sender {
    /// The next packet.
    pub(super) fn packet(&mut self, input: &mut Unstructured<'_>, ipv6: bool) -> Result<Sight> {
        let (hook, ifindex) = HOOKS[input.arbitrary::<u8>()? as usize % HOOKS.len()];
        let manner: u8 = input.arbitrary()?;
        let answered = (manner & 0xc0 == 0xc0).then(|| input.arbitrary::<[u8; 2]>()).transpose()?;
        let mut bytes = match manner & 0x0f {
            _ if answered.is_some() => Vec::new(),
            0 => {
                let length = usize::from(input.arbitrary::<u8>()?).min(input.len());
                input.bytes(length)?.to_vec()
            }
            1..=3 => self.icmp(input, ipv6)?,
            _ => self.transport(input, ipv6)?,
        };
        if answered.is_none() && manner & 0x10 != 0 {
            spoil(input, &mut bytes)?;
        }
        let mut sight = Sight {
            hook,
            answered,
            pause: Duration::ZERO,
            random: 0,
            input: Input { linear: bytes.len(), bytes, ifindex, kind: 0, gso_size: 0, checksum: Checksum::Final },
        };
        if manner & 0x20 != 0 {
            circumstances(input, &mut sight)?;
        }
        if hook.network() == 0 && sight.answered.is_none() {
            let ethernet = sight.input.bytes.len().min(14);
            sight.input.bytes.drain(..ethernet);
            sight.input.linear = sight.input.linear.min(sight.input.bytes.len());
        }
        Ok(sight)
    }

    fn address(input: &mut Unstructured<'_>, ipv6: bool) -> Result<String> {
        let choice: [u8; 2] = input.arbitrary()?;
        let party = PARTIES[choice[0] as usize % PARTIES.len()][usize::from(ipv6)];
        let port = PORTS[choice[1] as usize % PORTS.len()];
        Ok(SocketAddr::new(party.parse().expect("an address"), port).to_string())
    }

    fn transport(&mut self, input: &mut Unstructured<'_>, ipv6: bool) -> Result<Vec<u8>> {
        let (source, destination) = (Self::address(input, ipv6)?, Self::address(input, ipv6)?);
        let [what, flags, shape] = input.arbitrary::<[u8; 3]>()?;
        let mut packet = match what % 5 {
            0 | 1 => Packet::tcp(&source, &destination, if what & 0x80 == 0 { packet::SYN } else { flags }),
            2 | 3 => Packet::udp(&source, &destination),
            _ => Packet::sctp(&source, &destination),
        };
        if what & 0x40 != 0 {
            packet = packet.without_checksum();
        }
        packet = packet.ttl(match shape & 3 {
            0 => 1,
            1 => 0,
            2 => 2,
            _ => 64,
        });
        if shape & 4 != 0 {
            packet = packet.fragment(input.arbitrary()?);
        }
        if shape & 8 != 0 && ipv6 {
            for _ in 0..input.arbitrary::<u8>()? % 8 {
                let [kind, length, word]: [u8; 3] = input.arbitrary()?;
                let body = [word; 6 + 8];
                let body = if length & 1 == 0 { &body[..6] } else { &body[..] };
                let kind = EXTENSIONS[kind as usize % EXTENSIONS.len()];
                packet = match length & 0x0e {
                    0 => packet.extension_claiming(kind, word, body),
                    _ => packet.extension(kind, body),
                };
            }
        } else if shape & 8 != 0 {
            packet = packet.options(&[1; 40][..usize::from(input.arbitrary::<u8>()? % 11) * 4]);
        }
        if shape & 16 != 0 {
            packet = packet.claiming_length(input.arbitrary()?);
        }
        if shape & 32 != 0 {
            let length = usize::from(input.arbitrary::<u16>()? % 1_600);
            packet = packet.payload(&vec![what; length]);
        }
        let frame = packet.build().to_vec();
        self.last.clone_from(&frame);
        Ok(frame)
    }

    /// An ICMP message: about the last packet, as it was sent or as it was answered, or about nothing.
    fn icmp(&mut self, input: &mut Unstructured<'_>, ipv6: bool) -> Result<Vec<u8>> {
        let [choice, manner, from, to] = input.arbitrary::<[u8; 4]>()?;
        let party = |choice: u8| PARTIES[choice as usize % PARTIES.len()][usize::from(ipv6)];
        let kind = ICMP[usize::from(ipv6)][choice as usize % 6];
        let mut quoted = self.last.clone();
        if manner & 1 != 0 {
            laws::turn(&mut quoted, 14);
        }
        if manner & 2 != 0 {
            spoil(input, &mut quoted)?;
        }
        let quoted = quoted.get(14..).unwrap_or_default();
        let body = match (ipv6, kind) {
            // A redirect: reserved, target and destination; then options, of which the last has the packet.
            (true, 137) => [&[0; 36][..], &[4, (quoted.len() / 8 + 1) as u8, 0, 0, 0, 0, 0, 0], quoted].concat(),
            _ => [&[0; 4][..], &quoted[..quoted.len().min(if manner & 4 != 0 { 28 } else { 1_200 })]].concat(),
        };
        let mut packet = Packet::icmp_message(party(from), party(to), kind, manner >> 6, &body);
        if manner & 8 != 0 {
            packet = packet.ttl(1);
        }
        if manner & 16 != 0 {
            packet = packet.fragment(input.arbitrary()?);
        }
        Ok(packet.build().to_vec())
    }

    /// A packet as it is sent: an answer is what came out earlier, turned round.
    pub(super) fn resolve(&mut self, sight: &Sight, outputs: &[Output]) -> Sight {
        let mut sight = sight.clone();
        let Some([which, flags]) = sight.answered else { return sight };
        let Some(output) = outputs.len().checked_sub(1 + usize::from(which & 7)).map(|index| &outputs[index]) else {
            return sight;
        };
        let mut bytes = output.bytes.clone();
        let network = laws::network_of(&bytes);
        // From a device with a link layer to one without, and the other way.
        match (network, sight.hook.network()) {
            (Some(14), 0) => drop(bytes.drain(..14)),
            (Some(0), 14) => bytes = [&link_header(&bytes)[..], &bytes].concat(),
            _ => {}
        }
        if which & 8 == 0 {
            laws::turn(&mut bytes, sight.hook.network() as usize);
        }
        if which & 16 != 0 {
            laws::set_tcp_flags(&mut bytes, sight.hook.network() as usize, flags);
        }
        if which & 32 == 0 && bytes.len() > 14 && sight.hook.network() == 14 {
            // To whoever takes it, whatever the answer's own link addresses were.
            bytes[0] &= !1;
        }
        sight.input.linear = bytes.len();
        sight.input.bytes = bytes;
        sight
    }
}

fn link_header(packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [8, 0] };
    [&packet::NODE_MAC[..], &packet::CLIENT_MAC, &kind].concat()
}

/// Overwrites, truncates or extends a frame.
fn spoil(input: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    let how: u8 = input.arbitrary()?;
    for _ in 0..how & 3 {
        let [at, value]: [u8; 2] = input.arbitrary()?;
        if let Some(byte) = bytes.get_mut(usize::from(at)) {
            *byte = value;
        }
    }
    if how & 4 != 0 {
        bytes.truncate(usize::from(input.arbitrary::<u8>()?));
    }
    if how & 8 != 0 {
        bytes.resize(bytes.len() + usize::from(input.arbitrary::<u8>()? % 64), 0);
    }
    Ok(())
}

/// Time, chance, and what the kernel knows of a packet besides its bytes.
fn circumstances(input: &mut Unstructured<'_>, sight: &mut Sight) -> Result<()> {
    let [what, linear, pause]: [u8; 3] = input.arbitrary()?;
    sight.random = u32::from(what);
    if what & 1 != 0 {
        sight.input.linear = usize::from(linear);
    }
    if what & 2 != 0 {
        // From within the patience of a client that hears nothing to beyond every timeout.
        sight.pause = Duration::from_millis(u64::from(pause).pow(3));
    }
    sight.input.kind = match what & 0x1c {
        0x1c => 3,
        0x18 => 2,
        _ => 0,
    };
    sight.input.gso_size = if what & 0xe0 == 0xe0 { u32::from(linear) * 257 } else { 0 };
    match what & 0x60 {
        0x20 => sight.input.checksum = laws::complete(&sight.input.bytes, 14),
        0x40 => laws::leave_checksum(sight, &[(PROTOCOL_TCP, 16), (PROTOCOL_UDP, 6)]),
        _ => {}
    }
    Ok(())
}
