//! Builds the BPF programs of `ebpf` and hands their object file to the loader as `SHEAVE_EBPF_OBJECT`.
//!
//! Two compilers will do, and whichever is there is used: Debian's `rustc-web` with its ready-made BPF `core`
//! (`libstd-rust-web-dev-bpf`), or rustup's nightly with `rust-src`. `SHEAVE_BPF_TOOLCHAIN=debian|nightly` chooses.
//! `cargo xtask setup` installs what is missing.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The oldest BPF-capable compiler flags both toolchains share; BTF is made from full debug information.
const RUSTFLAGS: &[&str] = &["-Cdebuginfo=2", "-Clink-arg=--btf", "-Clinker=bpf-linker"];
const TARGET: &str = "bpfel-unknown-none";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";

enum Toolchain {
    Debian,
    Nightly,
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..").canonicalize()?;
    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("bpf");
    for part in ["ebpf/src", "ebpf/Cargo.toml", "common/src", "common/Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", root.join(part).display());
    }
    for variable in ["SHEAVE_BPF_TOOLCHAIN", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let toolchain = find_toolchain()?;
    let mut cargo = match toolchain {
        Toolchain::Debian => {
            let mut cargo = Command::new(env::var("CARGO")?);
            cargo.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            cargo
        }
        Toolchain::Nightly => {
            let mut cargo = Command::new("rustup");
            cargo.args(["run", "nightly", "cargo"]).env_remove("RUSTC");
            cargo
        }
    };
    cargo.args(["build", "--package", "sheave-ebpf", "--profile", "bpf", "--target", TARGET, "--target-dir"]);
    cargo.arg(&target_dir).current_dir(&root);
    if matches!(toolchain, Toolchain::Nightly) {
        cargo.args(["-Z", "build-std=core"]);
    }
    if env::var_os("CARGO_FEATURE_PACKET_TRACE").is_some() {
        cargo.args(["--features", "packet-trace"]);
    }
    let architecture = env::var("CARGO_CFG_TARGET_ARCH")?;
    let flags = [RUSTFLAGS.join("\x1f"), format!("--cfg=bpf_target_arch=\"{architecture}\"")].join("\x1f");
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags);
    for inherited in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN"] {
        cargo.env_remove(inherited);
    }
    let status = cargo.status().map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !status.success() {
        return Err("building the BPF programs failed; if a tool is missing, `cargo xtask setup` installs it".into());
    }
    let object = target_dir.join(TARGET).join("bpf/sheave-ebpf");
    println!("cargo:rustc-env=SHEAVE_EBPF_OBJECT={}", object.display());
    Ok(())
}

/// Whichever compiler is there, Debian's first: it needs no standard library to be built.
fn find_toolchain() -> Result<Toolchain, Box<dyn Error>> {
    match env::var("SHEAVE_BPF_TOOLCHAIN").as_deref() {
        Ok("debian") => return Ok(Toolchain::Debian),
        Ok("nightly") => return Ok(Toolchain::Nightly),
        Ok(other) => return Err(format!("SHEAVE_BPF_TOOLCHAIN={other}: neither `debian` nor `nightly`").into()),
        Err(_) => {}
    }
    if Path::new(DEBIAN_CORE).is_dir() && Path::new(DEBIAN_RUSTC).is_file() {
        return Ok(Toolchain::Debian);
    }
    let sysroot = Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]).output();
    if let Ok(output) = sysroot
        && output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim())
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .is_file()
    {
        return Ok(Toolchain::Nightly);
    }
    Err("no compiler for BPF programs was found: neither Debian's libstd-rust-web-dev-bpf nor rustup's nightly with \
         rust-src; run `cargo xtask setup`"
        .into())
}
