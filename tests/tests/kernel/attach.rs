//! Every program on its hook: pods, uplinks with and without a link-layer header, XDP, and a cgroup.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use sheave::config::XdpMode;
use sheave::dataplane::{self, Dataplane, Features};
use sheave::interfaces::{Interface, Role};
use sheave_tests::cgroup::Cgroup;
use sheave_tests::config;
use sheave_tests::netns::Namespace;

/// Interfaces of every kind, and the programs that belong on each.
const INTERFACES: [(&str, Role, bool, [&str; 2]); 3] = [
    ("pod0", Role::Pod, true, ["pod_ingress", "pod_egress"]),
    ("up0", Role::Uplink, true, ["uplink_ingress", "uplink_egress"]),
    ("tun0", Role::Tunnel, false, ["uplink_ingress_l3", "uplink_egress_l3"]),
];

/// Connect-time programs, one link each.
const SOCKET_HOOKS: usize = 8;

/// Services would work for some traffic only, or not at all.
#[test]
fn every_program_attaches_with_what_this_kernel_has() -> Result<()> {
    attach(Features::detect())
}

/// Kernels before 6.6 would have no Services, because their way to attach is broken.
#[test]
fn every_program_attaches_without_tcx() -> Result<()> {
    let features = Features::detect();
    if !features.tcx {
        println!("left out: this kernel has no TCX, so it is what the other test does");
        return Ok(());
    }
    attach(Features { tcx: false, ..features })
}

fn attach(features: Features) -> Result<()> {
    let namespace = Namespace::new("kernel")?;
    namespace.ip(&[
        "link add pod0 type veth peer name peer0",
        "link add up0 type veth peer name peer1",
        "tuntap add tun0 mode tun",
    ])?;
    let cgroup = Cgroup::new()?;
    let mut config = config::small(cgroup.path());
    config.xdp = XdpMode::Native;
    let shown = namespace.run(|| -> Result<_> {
        let attached =
            Dataplane::open_with(&config, features).map_err(anyhow::Error::from).and_then(|mut dataplane| {
                for (name, role, ethernet, _) in INTERFACES {
                    let interface = interface(name, role, ethernet)?;
                    dataplane.attach(&interface).with_context(|| format!("attaching to {name}"))?;
                }
                Ok(())
            });
        let shown = attached.and_then(|()| {
            let links = std::fs::read_dir(config.pin_path.join("links"))?.count();
            let filters = INTERFACES.map(|(name, ..)| {
                ["ingress", "egress"].map(|hook| namespace.output("tc", &["filter", "show", "dev", name, hook]))
            });
            let xdp = namespace.output("ip", &["-details", "link", "show", "up0"])?;
            Ok((links, filters, xdp))
        });
        // However it went: pins outlive the process.
        dataplane::cleanup(&config.pin_path).context("removing the pins")?;
        shown
    });
    let (links, filters, xdp) = shown?;
    ensure!(xdp.contains("prog/xdp"), "no XDP program in the driver of up0:\n{xdp}");
    for ((name, _, _, programs), filters) in INTERFACES.iter().zip(filters) {
        for (program, filter) in programs.iter().zip(filters) {
            let filter = filter?;
            // The kernel keeps 15 octets of a name. TCX links are no filters; each is a pin instead.
            let program = &program[..program.len().min(15)];
            ensure!(filter.contains(program) != features.tcx, "{program} on {name}: {filter:?}");
        }
    }
    let classifiers = if features.tcx { INTERFACES.len() * 2 } else { 0 };
    ensure!(links == SOCKET_HOOKS + classifiers + 1, "{links} pinned links, one of them XDP's");
    Ok(())
}

fn interface(name: &str, role: Role, ethernet: bool) -> Result<Interface> {
    let c_name = std::ffi::CString::new(name)?;
    // SAFETY: the name is NUL-terminated.
    let index = unsafe { libc::if_nametoindex(c_name.as_ptr()) };
    ensure!(index != 0, "{name}: {}", std::io::Error::last_os_error());
    let source4 = Some(Ipv4Addr::new(192, 0, 2, 1));
    Ok(Interface { index, name: name.to_owned(), role, ethernet, physical: false, source4, source6: None })
}
