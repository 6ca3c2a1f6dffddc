//! What userspace writes into a map and what the programs read there are the same bytes, and people with bpftool see
//! the names of the fields.

mod btf;
mod shapes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sheave_common::names;

/// A wrong offset would have the programs read one field as another: wrong backends, or drops.
#[test]
fn map_types_equal_the_btf_of_the_built_object() -> Result<()> {
    let built = btf::maps(sheave::EBPF_OBJECT)?;
    let declared = shapes::maps();
    let known: BTreeSet<&str> = names::MAPS.iter().chain(names::PRIVATE).copied().collect();
    let of = |maps: &std::collections::BTreeMap<String, _>| maps.keys().cloned().collect::<Vec<_>>();
    ensure!(
        known.iter().eq(of(&built).iter()),
        "names::MAPS and PRIVATE are {known:?}, the object has {:?}",
        of(&built)
    );
    ensure!(
        known.iter().eq(of(&declared).iter()),
        "names::MAPS and PRIVATE are {known:?}, this test knows {:?}",
        of(&declared)
    );
    for (name, (key, value)) in &declared {
        let (built_key, built_value) = &built[name];
        assert_eq!(built_key, key, "key of {name}: the object's (left) is not common's (right)");
        assert_eq!(built_value, value, "value of {name}: the object's (left) is not common's (right)");
    }
    Ok(())
}

/// An operator who has nothing but bpftool can read the maps.
#[test]
fn bpftool_shows_the_names_of_the_fields() -> Result<()> {
    let scratch = Scratch::new()?;
    let object = scratch.files.join("sheave.o");
    std::fs::write(&object, sheave::EBPF_OBJECT)?;
    let types = bpftool(&["btf", "dump", "file"], &object)?;
    for (name, (key, value)) in shapes::maps() {
        for field in key.names().into_iter().chain(value.names()) {
            ensure!(types.contains(&format!("'{field}'")), "`bpftool btf dump file` lacks {field} of {name}");
        }
    }

    let mut loader = aya::EbpfLoader::new();
    for name in names::MAPS.iter().copied().filter(|name| !["config", "drop_counters", "reject_budget"].contains(name))
    {
        loader.map_max_entries(name, 64);
    }
    let mut programs = loader.load(sheave::EBPF_OBJECT)?;
    // A ring buffer has no elements to show.
    for (name, (key, value)) in shapes::maps().into_iter().filter(|(name, _)| name != names::EVENTS) {
        let pin = scratch.pins.join(&name);
        let map = programs.map_mut(&name).with_context(|| format!("no map {name}"))?;
        map.pin(&pin).with_context(|| format!("pinning {}", pin.display()))?;
        // Arrays have their elements; the others need one to show.
        insert_zeroes(&pin, key.size(), value.size())?;
        let shown = bpftool(&["map", "dump", "pinned"], &pin)?;
        for field in key.names().into_iter().chain(value.names()) {
            ensure!(
                shown.contains(&format!("\"{field}\"")),
                "`bpftool map dump pinned` of {name} lacks {field}: {shown}"
            );
        }
    }
    Ok(())
}

fn insert_zeroes(pin: &Path, key: usize, value: usize) -> Result<()> {
    let mut command = Command::new("bpftool");
    command.args(["map", "update", "pinned"]).arg(pin).arg("key").args(vec!["0"; key]);
    let output = command.arg("value").args(vec!["0"; value]).output().context("running bpftool")?;
    // bpftool wants the values of all CPUs for a per-CPU map; those are arrays, which need none.
    let per_cpu = ["service_counters", "drop_counters", "reject_budget"].iter().any(|name| pin.ends_with(name));
    ensure!(per_cpu || output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn bpftool(arguments: &[&str], path: &Path) -> Result<String> {
    let output = Command::new("bpftool").args(arguments).arg(path).output().context("bpftool; cargo xtask setup")?;
    ensure!(output.status.success(), "bpftool {arguments:?} {path:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// A directory for pins and one for files, both removed however the test ends.
struct Scratch {
    pins: PathBuf,
    files: PathBuf,
}

impl Scratch {
    fn new() -> Result<Self> {
        let name = sheave_tests::leftovers::unique_name();
        let scratch = Self { pins: Path::new("/sys/fs/bpf").join(&name), files: std::env::temp_dir().join(&name) };
        std::fs::create_dir_all(&scratch.files)?;
        std::fs::create_dir(&scratch.pins).with_context(|| {
            format!(
                "creating {}: needs root and a BPF file system (mount -t bpf bpf /sys/fs/bpf)",
                scratch.pins.display()
            )
        })?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Pins are files; what is missing was never made.
        let _missing = std::fs::remove_dir_all(&self.pins);
        let _missing = std::fs::remove_dir_all(&self.files);
    }
}
