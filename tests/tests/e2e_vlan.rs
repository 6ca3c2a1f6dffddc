//! Frames of a VLAN that reach a node's uplink: the kernel takes the tag out of the frame before tc sees it.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sheave_tests::client;
use sheave_tests::family::Family;
use sheave_tests::manifests::Service;
use sheave_tests::netns::Namespace;
use sheave_tests::packet::Packet;
use sheave_tests::process::eventually;
use sheave_tests::scenario::Scenario;
use sheave_tests::server;
use sheave_tests::topology::{Shape, client_address};

const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const WEB6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x10);
const NODE_PORT: u16 = 30_053;

/// The tag of VLAN 7, IEEE 802.1Q.
const TAG: [u8; 4] = [0x81, 0, 0, 7];

/// Hosts of another network, which may use the same addresses, would talk to this one's pods.
#[test]
fn a_vlans_frames_are_not_the_uplinks() -> Result<()> {
    let scenario = Scenario::start(Shape { pod_counts: [1, 1], ..Shape::default() }, &["--xdp", "off"])?;
    let service = Service::new("web", WEB).and(WEB6).udp("udp", 53, server::UDP).node_port(NODE_PORT);
    scenario.publish(&service, [scenario.pod(1, 1)])?;
    let mac = mac(&scenario.node().namespace)?;
    for family in Family::BOTH {
        let client_at = |port: u16| client::at(client_address(family), port).to_string();
        let node = scenario.at(scenario.node().address_of(family), NODE_PORT).to_string();
        let frame = |port: u16| Packet::udp(&client_at(port), &node).to_mac(mac).build();
        let plain = frame(40_001);
        let tagged = [&plain[..12], &TAG, &plain[12..]].concat();
        scenario.cluster.client.run(|| send(&tagged).and_then(|()| send(&frame(40_002))))?;
        eventually(Duration::from_secs(10), || {
            let flows = scenario.agent.view("conntrack", &["-o", "json"])?;
            ensure!(flows.contains(&client_at(40_002)), "the untagged frame has no flow: {flows}");
            Ok(())
        })?;
        // It was on its way before the other.
        let flows = scenario.agent.view("conntrack", &["-o", "json"])?;
        ensure!(!flows.contains(&client_at(40_001)), "the VLAN's frame has a flow: {flows}");
    }
    Ok(())
}

/// The MAC address of a namespace's `eth0`.
fn mac(namespace: &Namespace) -> Result<[u8; 6]> {
    let shown: serde_json::Value =
        serde_json::from_str(&namespace.output("ip", &["-j", "link", "show", "dev", "eth0"])?)?;
    let text = shown[0]["address"].as_str().context("ip showed no address")?;
    let octets: Result<Vec<u8>, _> = text.split(':').map(|octet| u8::from_str_radix(octet, 16)).collect();
    octets?.try_into().ok().context("a MAC address of another length")
}

/// Sends a frame as it is from the calling thread's `eth0`.
fn send(frame: &[u8]) -> Result<()> {
    // SAFETY: the calls get a C string, and a socket address and a frame of the lengths that are said; the new descriptor is
    // owned here and nowhere else.
    let sent = unsafe {
        let descriptor = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        ensure!(descriptor >= 0, "a packet socket: {}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(descriptor);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = libc::if_nametoindex(c"eth0".as_ptr()) as i32;
        let (to, length) = ((&raw const address).cast(), size_of_val(&address) as u32);
        libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, to, length)
    };
    ensure!(sent == frame.len() as isize, "sending a frame: {}", std::io::Error::last_os_error());
    Ok(())
}
