//! `cargo xtask image`: the container image, without a container engine.
//!
//! The binary is linked statically against glibc (`crt-static`), which the toolchain's own target can do: musl would be another
//! target to install and, for `ring`'s C code, another C compiler. glibc's resolver for names works in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::oci::Image;
use crate::process::{self, say};

/// Where the binary is in the image.
const PROGRAM: &str = "/usr/bin/sheave";
/// Targets that images are made for, and what Go calls their architectures.
const TARGETS: [(&str, &str); 2] = [("x86_64-unknown-linux-gnu", "amd64"), ("aarch64-unknown-linux-gnu", "arm64")];

#[derive(Args)]
pub(crate) struct Options {
    /// For another architecture: aarch64-unknown-linux-gnu or x86_64-unknown-linux-gnu. Needs rustup's target and a C compiler
    /// for it, whose name cargo takes from CARGO_TARGET_…_LINKER
    #[arg(long)]
    target: Option<String>,
    /// Not optimised
    #[arg(long)]
    debug: bool,
    /// Only the binary, for a Dockerfile to copy
    #[arg(long)]
    binary: bool,
}

/// Builds the image, or only its binary, in target/image.
pub(crate) fn run(options: &Options) -> Result<()> {
    let folder = process::target_directory()?.join("image");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let architecture = architecture(options.target.as_deref())?;
    let built = build(options)?;
    if options.binary {
        let binary = folder.join("sheave");
        fs::copy(&built, &binary).with_context(|| format!("copying {} to {}", built.display(), binary.display()))?;
        say(&format!("the binary is {}", binary.display()));
        return Ok(());
    }
    let archive = folder.join(name(architecture, options.debug));
    let program = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
    let image = Image { program: &program, path: PROGRAM, architecture, version: env!("CARGO_PKG_VERSION") };
    fs::write(&archive, image.archive()?).with_context(|| format!("writing {}", archive.display()))?;
    say(&format!("the image is {}", archive.display()));
    Ok(())
}

/// The image that tests run.
pub(crate) fn build_for_tests() -> Result<()> {
    run(&Options { target: None, debug: true, binary: false })
}

fn name(architecture: &str, debug: bool) -> String {
    format!("sheave-{architecture}{}.tar", if debug { "-debug" } else { "" })
}

fn architecture(target: Option<&str>) -> Result<&'static str> {
    let known = |target: &str| TARGETS.into_iter().find(|(known, _)| *known == target);
    let Some(target) = target else {
        return match std::env::consts::ARCH {
            "x86_64" => Ok("amd64"),
            "aarch64" => Ok("arm64"),
            other => bail!("no images are made on {other}; give --target {}", TARGETS[0].0),
        };
    };
    let (_, architecture) = known(target)
        .with_context(|| format!("no images are made for {target}, only for {} and {}", TARGETS[0].0, TARGETS[1].0))?;
    Ok(architecture)
}

/// Links the binary statically, and says where it is.
fn build(options: &Options) -> Result<PathBuf> {
    let mut cargo = process::cargo(&["rustc", "--package", "sheave", "--bin", "sheave"]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    if !options.debug {
        cargo.arg("--release");
    }
    if let Some(target) = &options.target {
        cargo.args(["--target", target]);
    }
    // Panics keep their lines without debug information, and backtraces their names.
    cargo.args(["--", "-C", "target-feature=+crt-static", "-C", "strip=debuginfo"]).stderr(Stdio::inherit());
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("{} failed", process::show(&cargo));
    }
    let messages = String::from_utf8(output.stdout).context("cargo printed something else than text")?;
    let executable = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let is_ours = message["reason"] == "compiler-artifact" && message["target"]["name"] == "sheave";
        is_ours.then(|| message["executable"].as_str().map(PathBuf::from)).flatten()
    });
    let executable = executable.context("cargo built no binary called sheave")?;
    is_static(&executable)?;
    Ok(executable)
}

/// A binary that asks for a dynamic loader could not start where nothing else is.
fn is_static(program: &Path) -> Result<()> {
    let elf = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    if interpreters(&elf).context("not a 64-bit little-endian ELF file")? > 0 {
        bail!("{} is linked dynamically although crt-static was asked for", program.display());
    }
    Ok(())
}

/// Number of program headers that name a dynamic loader (PT_INTERP) in a 64-bit little-endian ELF file.
fn interpreters(elf: &[u8]) -> Option<usize> {
    const PT_INTERP: u32 = 3;
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let half = |at: usize| Some(usize::from(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?)));
    let headers = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (half(54)?, half(56)?);
    let kind = |index: usize| {
        let at = headers + index * size;
        Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?))
    };
    (0..count)
        .map(kind)
        .collect::<Option<Vec<_>>>()
        .map(|kinds| kinds.iter().filter(|kind| **kind == PT_INTERP).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_the_names_that_registries_use() {
        assert_eq!(architecture(Some("aarch64-unknown-linux-gnu")).unwrap(), "arm64");
        let error = architecture(Some("riscv64gc-unknown-linux-gnu")).unwrap_err().to_string();
        assert!(error.contains("riscv64gc") && error.contains("aarch64-unknown-linux-gnu"), "{error}");
        assert_eq!(name("amd64", false), "sheave-amd64.tar");
    }

    #[test]
    fn a_dynamic_binary_is_recognised() {
        // This test is one, with cargo's defaults.
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(interpreters(&own), Some(1));
        assert_eq!(interpreters(b"#!/bin/sh"), None);
    }

    /// The two ways to an image would make different ones.
    #[test]
    fn the_dockerfile_makes_the_same_image() {
        let text = include_str!("../../deploy/Dockerfile");
        let last = text.rsplit("\nFROM ").next().unwrap();
        let lines: Vec<&str> = last.lines().collect();
        let expected = [
            "scratch".to_owned(),
            format!("COPY --from=build /sheave/target/image/sheave {PROGRAM}"),
            "ENV PATH=/usr/bin".to_owned(),
            format!("ENTRYPOINT [\"{PROGRAM}\"]"),
        ];
        assert_eq!(lines, expected);
    }
}
