//! Manifests as people, programs and editors leave them, in YAML and JSON: a file that can't be read is a complaint, what can
//! comes to something that the plan can write, and neither changes what another file says.

use std::ffi::OsStr;

use sheave::model::Change;
use sheave::source::manifests::Catalogue;

use super::objects;

/// Runs one input: its first byte says how the file is written, and whether sound objects are there.
///
/// # Panics
/// If the file disturbs objects of another, or gives something that is not the same when it is read again.
pub fn run(input: &[u8]) {
    let Some((first, text)) = input.split_first() else { return };
    let Ok(text) = str::from_utf8(text) else { return };
    let name = OsStr::new(if first & 1 == 0 { "file.yaml" } else { "file.json" });
    let mut catalogue = Catalogue::new("here".to_owned());
    catalogue.see(name, Ok(text.to_owned()));
    let given = catalogue.take_changes();
    catalogue.see(name, Ok(text.to_owned()));
    assert!(catalogue.take_changes().is_empty(), "the same file again is no change");
    let sound = objects::sound_beside(first >> 1);
    let changes: Vec<Change> = given.into_iter().filter(|change| !concerns_sound(change)).collect();
    let changes = [&sound.changes[..], &changes].concat();
    objects::check(&changes, &sound.alone, objects::room(&changes));
}

/// Whether an object may rightly change what the sound ones come to: it is one of them, or this Node, or wants their addresses.
fn concerns_sound(change: &Change) -> bool {
    match change {
        Change::Service(service) => {
            let addresses = [&service.cluster_ips, &service.external_ips, &service.load_balancer_ips];
            let theirs = ["10.96.200.1", "fd00:96::c8:1", "203.0.113.200", "192.0.2.1"]
                .map(|ip| ip.parse().expect("an address"));
            &*service.key.namespace == "sound"
                || addresses.into_iter().flatten().any(|address| theirs.contains(address))
                || service.ports.iter().any(|port| port.node_port == Some(32_000))
        }
        Change::Slice(slice) => &*slice.key.namespace == "sound",
        _ => true,
    }
}
