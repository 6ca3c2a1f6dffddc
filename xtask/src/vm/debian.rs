//! Debian's kernels, taken out of their packages without installing them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::existing;
use crate::process::{self, output, say};

/// The release whose kernel changes.
const NEWEST: &str = "sid";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Drivers and file systems that no test needs, most of a kernel's 400 MB.
const LEFT_OUT: &[&str] = &[
    "*/kernel/drivers/[!nv]*",
    "*/kernel/drivers/net/ethernet",
    "*/kernel/drivers/net/wireless",
    "*/kernel/fs/[!9fno]*",
    "*/kernel/sound",
    "*/usr/share",
];

/// Fills a folder with `vmlinuz` and `lib/modules`.
pub(super) fn download(version: &str, suite: &str, place: &Path) -> Result<()> {
    say(&format!("getting kernel {version} from Debian's {suite} (about 100 MB; nothing is installed)"));
    let apt = Apt::new(suite, place)?;
    apt.update(suite)?;
    let start = format!("linux-image-{version}.");
    let meta = apt.dependencies("linux-image-amd64")?;
    let image = meta.iter().find(|package| package.starts_with(&start)).or_else(|| {
        // What is newest moves on, and what the mirror still has is worth testing as well.
        let newer = meta.iter().find(|package| suite == NEWEST && package.starts_with("linux-image-"))?;
        say(&format!("Debian's {suite} has {newer} now"));
        Some(newer)
    });
    let image = image.with_context(|| {
        format!("Debian's {suite} has another kernel now ({}); name one that is at hand", meta.join(", "))
    })?;
    // Newer packages are split.
    let mut packages: Vec<String> = apt.dependencies(image)?;
    packages.retain(|package| package.starts_with("linux-binary-") || package.starts_with("linux-modules-"));
    if packages.is_empty() {
        packages.push(image.clone());
    }
    process::run(apt.command("apt-get").args(["download", "-q"]).args(&packages).current_dir(place))
        .with_context(|| format!("the mirror did not give {}", packages.join(", ")))?;
    let files = place.join("files");
    fs::create_dir(&files)?;
    for package in fs::read_dir(place)?.collect::<Result<Vec<_>, _>>()? {
        let path = package.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            unpack(&path, &files)?;
            fs::remove_file(path)?;
        }
    }
    arrange(&files, place)?;
    fs::remove_dir_all(files)?;
    Ok(fs::remove_dir_all(apt.folder)?)
}

/// apt with a source list and a state of its own.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    fn new(suite: &str, place: &Path) -> Result<Self> {
        let folder = place.join("apt");
        fs::create_dir_all(folder.join("lists/partial"))?;
        fs::create_dir_all(folder.join("cache/archives/partial"))?;
        let mirror = mirror()?;
        let signed = if Path::new(KEYRING).exists() { format!(" signed-by={KEYRING}") } else { String::new() };
        fs::write(folder.join("sources.list"), format!("deb [arch=amd64{signed}] {mirror} {suite} main\n"))?;
        Ok(Self { folder: folder.canonicalize()? })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", self.folder.join("sources.list")),
            ("Dir::Etc::sourceparts", "-".into()),
            ("Dir::State::lists", self.folder.join("lists")),
            ("Dir::Cache", self.folder.join("cache")),
            ("Acquire::Languages", "none".into()),
            ("Acquire::GzipIndexes", "true".into()),
            ("Acquire::Retries", "3".into()),
            ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".into()),
            ("APT::Architecture", "amd64".into()),
            // apt's own user can't read this folder.
            ("APT::Sandbox::User", "root".into()),
        ] {
            command.arg("-o").arg(format!("{option}={}", value.display()));
        }
        command
    }

    /// Reads the mirror's index.
    fn update(&self, suite: &str) -> Result<()> {
        // By itself, apt is content with an index that it could not get.
        let updated = self.command("apt-get").args(["update", "-q", "--error-on=any"]).output()?;
        if !updated.status.success() {
            bail!(
                "Debian's {suite} is out of reach, and kernels come from there; `--kernel` takes one that is at hand:\n{}",
                String::from_utf8_lossy(&updated.stderr).trim()
            );
        }
        Ok(())
    }

    /// Names of the packages that one depends on.
    fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let found = self.command("apt-cache").args(["depends", "--important", package]).output()?;
        let text = String::from_utf8_lossy(&found.stdout).into_owned();
        let names = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned);
        Ok(names.collect())
    }
}

/// The mirror of Debian that this machine uses.
fn mirror() -> Result<String> {
    let format = "$(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)";
    let targets = output("apt-get", &["indextargets", "--format", format, "Created-By: Packages"])
        .context("apt does not say where it gets packages; name a kernel that is at hand")?;
    let mut targets = targets.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mirror = targets.find_map(|fields| match fields[..] {
        ["Debian", "main", suite, mirror] if !suite.ends_with("-security") => Some(mirror.to_owned()),
        _ => None,
    });
    mirror.context("no mirror of Debian among apt's sources; name a kernel that is at hand")
}

/// Unpacks what tests need of a package.
fn unpack(package: &Path, place: &Path) -> Result<()> {
    let mut archive = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(Stdio::piped()).spawn()?;
    let mut tar = Command::new("tar");
    tar.arg("-x").arg("-C").arg(place).args(LEFT_OUT.iter().map(|pattern| format!("--exclude={pattern}")));
    tar.stdin(archive.stdout.take().context("dpkg-deb's output was not piped")?);
    process::run(&mut tar)?;
    if !archive.wait()?.success() {
        bail!("dpkg-deb could not read {}", package.display());
    }
    Ok(())
}

/// Brings an unpacked kernel into one shape, with modules that need no decompression, and their index.
fn arrange(files: &Path, place: &Path) -> Result<()> {
    let modules = existing(files, "usr/lib/modules").or_else(|| existing(files, "lib/modules"));
    let modules = modules.context("the kernel's packages have no modules")?;
    let release = fs::read_dir(&modules)?.next().context("the kernel's packages have no modules")??.file_name();
    let release = release.to_string_lossy().into_owned();
    let images = [files.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
    let image = images.iter().find(|image| image.exists()).context("the kernel's packages have no vmlinuz")?;
    fs::rename(image, place.join("vmlinuz"))?;
    fs::create_dir_all(place.join("lib"))?;
    fs::rename(&modules, place.join("lib/modules"))?;
    let mut compressed = Vec::new();
    find(&place.join("lib/modules"), "xz", &mut compressed)?;
    for files in compressed.chunks(200) {
        process::run(Command::new("busybox").arg("unxz").args(files))?;
    }
    process::run(Command::new("busybox").args(["depmod", "-b"]).arg(place.canonicalize()?).arg(release))
}

/// Files with this extension, at any depth.
fn find(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), extension, found)?;
        } else if entry.path().extension().is_some_and(|known| known == extension) {
            found.push(entry.path());
        }
    }
    Ok(())
}
