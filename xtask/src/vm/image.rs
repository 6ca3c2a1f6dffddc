//! The first file system of a virtual machine: busybox, `init.sh`, and the modules that it takes to reach the host's files.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::kernels::Kernel;
use crate::process::find;

/// Modules for the host's files and for writing over them; each is loaded after what it needs. What is not among a kernel's
/// modules is built in.
const NEEDED: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// Makes the archive for a kernel, with a script for `init.sh` to run, and says where it is.
pub(super) fn make(kernel: &Kernel, script: &str, folder: &Path) -> Result<PathBuf> {
    let root = folder.join("initramfs");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for directory in ["bin", "sbin", "modules"] {
        fs::create_dir_all(root.join(directory))?;
    }
    let busybox = find("busybox").context("no busybox; cargo xtask vm installs busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    symlink("../bin/busybox", root.join("sbin/modprobe"))?;
    fs::write(root.join("init"), include_str!("init.sh"))?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    fs::write(root.join("run.sh"), script)?;
    let mut names = Vec::new();
    for module in kernel.modules.as_deref().map(order).transpose()?.unwrap_or_default() {
        let name = module.file_name().context("a module is a file")?.to_owned();
        fs::copy(&module, root.join("modules").join(&name))?;
        names.push(name.to_string_lossy().into_owned());
    }
    fs::write(root.join("modules/order"), names.join("\n"))?;
    archive(&root, &folder.join("initramfs.cpio"))
}

/// The needed modules' files in the order in which they can be loaded.
fn order(modules: &Path) -> Result<Vec<PathBuf>> {
    let index = modules.join("modules.dep");
    let text = fs::read_to_string(&index).with_context(|| index.display().to_string())?;
    let needs: BTreeMap<&str, Vec<&str>> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_whitespace().collect()))
        .collect();
    let mut order = Vec::new();
    for name in NEEDED {
        let file = format!("/{name}.ko");
        if let Some(module) = needs.keys().find(|module| module.ends_with(&file)) {
            add(module, &needs, &mut order);
        }
    }
    Ok(order.into_iter().map(|module| modules.join(module)).collect())
}

fn add<'a>(module: &'a str, needs: &BTreeMap<&'a str, Vec<&'a str>>, order: &mut Vec<&'a str>) {
    if order.contains(&module) {
        return;
    }
    for needed in needs.get(module).into_iter().flatten() {
        add(needed, needs, order);
    }
    order.push(module);
}

/// Packs a folder as the kernel wants it.
fn archive(root: &Path, file: &Path) -> Result<PathBuf> {
    let mut names = vec![".".to_owned()];
    list(root, "", &mut names)?;
    let mut cpio = Command::new("busybox");
    cpio.args(["cpio", "-o", "-H", "newc"]).current_dir(root).stderr(Stdio::null());
    let mut child = cpio.stdin(Stdio::piped()).stdout(fs::File::create(file)?).spawn().context("cannot run busybox")?;
    child.stdin.take().context("busybox's input was not piped")?.write_all(names.join("\n").as_bytes())?;
    if !child.wait()?.success() {
        bail!("busybox cpio could not make {}", file.display());
    }
    Ok(file.to_owned())
}

fn list(root: &Path, below: &str, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let name = format!("{below}{}", entry.file_name().to_string_lossy());
        names.push(name.clone());
        if entry.file_type()?.is_dir() {
            list(root, &format!("{name}/"), names)?;
        }
    }
    Ok(())
}
