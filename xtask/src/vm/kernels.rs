//! Kernels: Debian's, or any image.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use super::debian;

/// The supported kernels and the Debian release that has each.
const DEBIAN: [(&str, &str); 4] = [("5.10", "bullseye"), ("6.1", "bookworm"), ("6.12", "trixie"), ("7.2", "sid")];

/// A kernel on disk.
pub(super) struct Kernel {
    /// Version and flavour, as `uname -r` prints them.
    pub(super) release: String,
    /// The image.
    pub(super) image: PathBuf,
    /// `lib/modules/RELEASE`; none if everything is built in.
    pub(super) modules: Option<PathBuf>,
}

/// The kernels that a name stands for.
pub(super) fn chosen(name: &str, folder: &Path) -> Result<Vec<Kernel>> {
    if name == "all" {
        return DEBIAN.iter().map(|(version, suite)| of_debian(version, suite, folder)).collect();
    }
    if let Some((version, suite)) = DEBIAN.iter().find(|(version, _)| *version == name) {
        return Ok(vec![of_debian(version, suite, folder)?]);
    }
    let known = DEBIAN.map(|(version, _)| version).join(", ");
    let kernel = Kernel::at(Path::new(name));
    Ok(vec![kernel.with_context(|| format!("{name} is none of Debian's kernels ({known}), and no kernel of yours"))?])
}

impl Kernel {
    /// An image, or a folder with one called `vmlinuz`. Its modules are in `lib/modules/RELEASE` beside it, or beside its
    /// folder as those of `/boot/vmlinuz-…` are.
    fn at(path: &Path) -> Result<Self> {
        let image = if path.is_dir() { path.join("vmlinuz") } else { path.to_owned() };
        let image = image.canonicalize().with_context(|| image.display().to_string())?;
        let release = release(&fs::read(&image)?).with_context(|| format!("{} is no bzImage", image.display()))?;
        let places = image.ancestors().skip(1).take(2).map(|folder| folder.join("lib/modules").join(&release));
        let modules = places.into_iter().find(|modules| modules.join("modules.dep").is_file());
        Ok(Self { release, image, modules })
    }

    /// Its version's first two numbers: `6.12`.
    pub(super) fn name(&self) -> String {
        let (major, minor) = self.version();
        format!("{major}.{minor}")
    }

    /// Its version's first two numbers, by which kernels are compared.
    pub(super) fn version(&self) -> (u32, u32) {
        let mut numbers = self.release.split(['.', '-']).map_while(|number| number.parse().ok());
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }
}

/// What `uname -r` will say, as the image's header has it (Documentation/arch/x86/boot.rst: `HdrS` at 0x202, and at 0x20e
/// where the text is, less 0x200).
fn release(image: &[u8]) -> Option<String> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let at = usize::from(u16::from_le_bytes(image.get(0x20e..0x210)?.try_into().ok()?)) + 0x200;
    let word = image.get(at..)?.split(|byte| matches!(byte, 0 | b' ')).next()?;
    Some(String::from_utf8_lossy(word).into_owned()).filter(|release| !release.is_empty())
}

/// A kernel of Debian's, downloaded the first time.
fn of_debian(version: &str, suite: &str, folder: &Path) -> Result<Kernel> {
    let place = folder.join(version);
    if !place.exists() {
        let unfinished = folder.join(format!("{version}.part"));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished)?;
        }
        fs::create_dir_all(&unfinished)?;
        debian::download(version, suite, &unfinished)?;
        fs::rename(&unfinished, &place)?;
    }
    let kernel = Kernel::at(&place)?;
    ensure!(kernel.modules.is_some(), "{} has no modules; remove it to get it again", place.display());
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another kernel's modules would be loaded, or none.
    #[test]
    fn an_images_release_is_read_from_its_header() {
        let mut image = vec![0; 0x400];
        assert_eq!(release(&image), None);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x318].copy_from_slice(b"6.1.0-52-amd64 (builder)");
        let release = release(&image).expect("a release");
        assert_eq!(release, "6.1.0-52-amd64");
        assert_eq!(Kernel { release, image: PathBuf::new(), modules: None }.version(), (6, 1));
    }
}
