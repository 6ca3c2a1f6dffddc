//! Frames with a VLAN tag: they are another network's, whose device has programs of its own. (A tag that the device took out
//! of the frame can't be given to a test run; see `e2e_fragments`.)

use sheave_common::PROTOCOL_UDP;
use sheave_common::frontend::flags;
use sheave_tests::packet::{Packet, View};
use sheave_tests::program::{NEXT, REDIRECT, XDP_PASS};

use crate::node::{Addresses, at, on_a_node, service, uplink};

/// Other networks may use the same addresses.
#[test]
fn tagged_frames_are_left_alone() {
    for of in &Addresses::BOTH {
        let (client, frontend, backend) = (at(of.client, 40_000), at(of.node, 30_053), at(of.remote, 5_353));
        let dns = service(1, PROTOCOL_UDP, (&frontend, flags::NODE_PORT), &[(&backend, false)]);
        on_a_node(&[dns], |programs, ifindex| {
            let plain = Packet::udp(&client, &frontend).build();
            for tag in [[0x81, 0, 0, 7], [0x88, 0xa8, 0, 7]] {
                let tagged = [&plain[..12], &tag, &plain[12..]].concat();
                let up = programs.xdp(&tagged, ifindex).unwrap();
                assert_eq!((up.action, &up.packet), (XDP_PASS, &tagged));
                for program in ["pod_ingress", "pod_egress", "uplink_ingress", "uplink_egress"] {
                    let out = uplink(programs, program, &tagged, ifindex);
                    assert_eq!((out.action, &out.packet), (NEXT, &tagged), "{program}");
                }
            }
            let out = uplink(programs, "uplink_ingress", &plain, ifindex);
            assert_eq!((out.action, View(&out.packet).destination().to_string()), (REDIRECT, backend.clone()));
        });
    }
}
