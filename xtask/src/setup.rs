//! Finds what building, the tests and the demo need, and installs what is missing.
//!
//! There are two ways to a compiler for BPF, and `loader/build.rs` takes whichever is there: Debian's packages, or
//! rustup's nightly with rust-src. Setup prefers the first where apt offers it, because its `core` is ready made.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt;
use crate::process::{self, find, output, say};

/// What the machine is made ready for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// `cargo build`.
    Building,
    /// Also the tests and the demo.
    Everything,
    /// Also other kernels.
    VirtualMachines,
}

/// Programs that the tests and the demo call, the packages they are in (Debian, Fedora, Arch), and what for.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", packages: ["iproute2", "iproute", "iproute2"], purpose: "builds network namespaces" },
    Tool { program: "bpftool", packages: ["bpftool", "bpftool", "bpf"], purpose: "dumps maps" },
    Tool { program: "iperf3", packages: ["iperf3", "iperf3", "iperf3"], purpose: "moves gigabytes" },
    Tool { program: "nft", packages: ["nftables", "nftables", "nftables"], purpose: "plays a CNI's firewall" },
    Tool {
        program: "iptables",
        packages: ["iptables", "iptables-nft", "iptables-nft"],
        purpose: "plays a CNI's firewall",
    },
    Tool {
        program: "conntrack",
        packages: ["conntrack", "conntrack-tools", "conntrack-tools"],
        purpose: "shows what netfilter tracked",
    },
    Tool { program: "dig", packages: ["bind9-dnsutils", "bind-utils", "bind"], purpose: "asks DNS" },
    Tool { program: "dnsmasq", packages: ["dnsmasq-base", "dnsmasq", "dnsmasq"], purpose: "answers DNS" },
    Tool { program: "nginx", packages: ["nginx", "nginx", "nginx"], purpose: "answers HTTP as an ingress does" },
    Tool { program: "curl", packages: ["curl", "curl", "curl"], purpose: "asks HTTP" },
    Tool {
        program: "kubectl",
        packages: ["kubernetes-client", "kubernetes-client", "kubectl"],
        purpose: "makes a Service as people do",
    },
    Tool { program: "crun", packages: ["crun", "crun", "crun"], purpose: "runs the container image" },
];

/// Programs that only `cargo xtask vm` calls. busybox is the static one: it runs where there is no C library.
const VIRTUAL_MACHINE_TOOLS: &[Tool] = &[
    Tool {
        program: "qemu-system-x86_64",
        packages: ["qemu-system-x86", "qemu-system-x86-core", "qemu-system-x86"],
        purpose: "runs other kernels in virtual machines",
    },
    Tool { program: "busybox", packages: ["busybox-static", "busybox", "busybox"], purpose: "is their first program" },
];

struct Tool {
    program: &'static str,
    packages: [&'static str; 3],
    purpose: &'static str,
}

const DEBIAN_COMPILER: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf"];
/// To build bpf-linker against the same LLVM as Debian's compiler.
const DEBIAN_LINKER: &[&str] = &["llvm-22-dev", "libzstd-dev", "zlib1g-dev", "gcc", "g++", "libc6-dev"];
const LINKER_VERSION: &str = "0.13.0";
/// The last version that links with the LLVM of the compiler that calls it, so that any nightly will do and no LLVM has to
/// be installed.
const PROXY_LINKER_VERSION: &str = "0.10.3";
const BPFFS: &str = "/sys/fs/bpf";

/// Installs what is missing, saying what and why.
pub(crate) fn run(need: Need) -> Result<()> {
    let compiler = compiler();
    let linker = linker_runs();
    let wanted = match need {
        Need::Building => [[].as_slice(), &[]],
        Need::Everything => [TOOLS, &[]],
        Need::VirtualMachines => [TOOLS, VIRTUAL_MACHINE_TOOLS],
    };
    let tools: Vec<&Tool> = wanted.into_iter().flatten().filter(|tool| find(tool.program).is_none()).collect();

    if compiler.is_none() || !linker || !tools.is_empty() {
        say("this machine lacks something; installing it:");
        if compiler.is_none() {
            say("- a Rust compiler for BPF, with its core library");
        }
        if !linker {
            say("- bpf-linker, which links the BPF programs");
        }
        for tool in &tools {
            say(&format!("- {} ({})", tool.program, tool.purpose));
        }
        let apt = find("apt-get").is_some();
        if apt {
            apt::update()?;
        }
        let compiler = match compiler {
            Some(compiler) => compiler,
            None => install_compiler(apt)?,
        };
        if !linker {
            install_linker(compiler, apt)?;
        }
        install_tools(&tools, apt)?;
        say("everything that was missing is there now");
    }
    if need != Need::Building {
        mount_bpffs()?;
        check_cgroup2()?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compiler {
    Debian,
    Nightly,
}

/// The compiler that `loader/build.rs` will find.
fn compiler() -> Option<Compiler> {
    let debian = Path::new("/usr/lib/rustlib/bpfel-unknown-none").is_dir() && Path::new("/usr/bin/rustc").is_file();
    match std::env::var("SHEAVE_BPF_TOOLCHAIN").as_deref() {
        Ok("debian") => return debian.then_some(Compiler::Debian),
        Ok("nightly") => return nightly_with_source().then_some(Compiler::Nightly),
        _ => {}
    }
    if debian { Some(Compiler::Debian) } else { nightly_with_source().then_some(Compiler::Nightly) }
}

fn nightly_with_source() -> bool {
    output("rustup", &["run", "nightly", "rustc", "--print", "sysroot"])
        .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file())
}

/// Present is not enough: a linker built against an LLVM that has since been removed doesn't start.
fn linker_runs() -> bool {
    output("bpf-linker", &["--version"]).is_some()
}

fn install_compiler(apt: bool) -> Result<Compiler> {
    if apt && std::env::var("SHEAVE_BPF_TOOLCHAIN").as_deref() != Ok("nightly") && apt::offered(DEBIAN_COMPILER) {
        say("installing Debian's compiler and its ready-made BPF core library");
        apt::install(DEBIAN_COMPILER)?;
        if compiler() == Some(Compiler::Debian) {
            return Ok(Compiler::Debian);
        }
        bail!("{} are installed, but hold no core library for bpfel-unknown-none", DEBIAN_COMPILER.join(" and "));
    }
    if find("rustup").is_none() {
        bail!(
            "no compiler for BPF programs: this system's packages have none, and rustup is not installed; \
             get rustup (https://rustup.rs), then run `cargo xtask setup` again"
        );
    }
    say("installing rustup's nightly with rust-src (the stable compiler stays your default)");
    process::run(Command::new("rustup").args([
        "toolchain",
        "install",
        "nightly",
        "--profile",
        "minimal",
        "--component",
        "rust-src",
    ]))
    .context("rustup could not install the nightly compiler with rust-src")?;
    if !nightly_with_source() {
        bail!("rustup's nightly has no rust-src; try `rustup component add rust-src --toolchain nightly`");
    }
    Ok(Compiler::Nightly)
}

fn install_linker(compiler: Compiler, apt: bool) -> Result<()> {
    match compiler {
        Compiler::Debian => {
            if !apt || !apt::offered(&["llvm-22-dev"]) {
                bail!("bpf-linker needs llvm-22-dev to match Debian's compiler, and apt does not offer it");
            }
            say("installing LLVM's libraries, then building bpf-linker with them (about a minute)");
            apt::install(DEBIAN_LINKER)?;
            let libraries = output("llvm-config-22", &["--libdir"])
                .or_else(|| output("/usr/lib/llvm-22/bin/llvm-config", &["--libdir"]))
                .context("llvm-config-22 did not say where LLVM's libraries are; is llvm-22-dev whole?")?;
            let mut cargo = process::cargo(&["install", "--locked", "bpf-linker", "--force", "--version"]);
            cargo.args([LINKER_VERSION, "--no-default-features", "--features", "llvm-22"]);
            cargo.env("RUSTFLAGS", format!("-L {libraries}")).env("LLVM_PREFIX", "/usr/lib/llvm-22");
            process::run(&mut cargo)?;
        }
        Compiler::Nightly => {
            say("building bpf-linker (about a minute)");
            let version = PROXY_LINKER_VERSION;
            process::run(&mut process::cargo(&["install", "--locked", "bpf-linker", "--force", "--version", version]))
                .context("see https://github.com/aya-rs/bpf-linker for other ways to install it")?;
        }
    }
    if !linker_runs() {
        bail!(
            "bpf-linker was installed but does not run as `bpf-linker`; is cargo's bin folder (usually ~/.cargo/bin) on \
             $PATH?"
        );
    }
    Ok(())
}

fn install_tools(tools: &[&Tool], apt: bool) -> Result<()> {
    if tools.is_empty() {
        return Ok(());
    }
    let packages = |distribution: usize| tools.iter().map(|tool| tool.packages[distribution]).collect::<Vec<_>>();
    if apt {
        let mut packages = packages(0);
        // Ubuntu has bpftool in the packages of its kernel's tools.
        if packages.contains(&"bpftool") && !apt::offered(&["bpftool"]) {
            packages.retain(|package| *package != "bpftool");
            packages.extend(["linux-tools-common", "linux-tools-generic"]);
        }
        // Ubuntu has kubectl as a snap only.
        if packages.contains(&"kubernetes-client") && !apt::offered(&["kubernetes-client"]) {
            packages.retain(|package| *package != "kubernetes-client");
            say("apt does not offer kubectl; one test needs it: https://kubernetes.io/docs/tasks/tools/");
        }
        return if packages.is_empty() { Ok(()) } else { apt::install(&packages) };
    }
    let command = if find("dnf").is_some() {
        format!("dnf install {}", packages(1).join(" "))
    } else if find("pacman").is_some() {
        format!("pacman -S {}", packages(2).join(" "))
    } else {
        format!("install the packages that hold {}", packages(0).join(", "))
    };
    bail!("the tests and the demo need tools that are missing; as root: {command}")
}

fn mount_bpffs() -> Result<()> {
    let mounted = mounts()?.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(BPFFS) && fields.next() == Some("bpf")
    });
    if !mounted {
        say(&format!("mounting the BPF file system at {BPFFS}, where maps and programs are pinned"));
        process::run(process::root("mount").args(["-t", "bpf", "bpf", BPFFS]))?;
    }
    Ok(())
}

fn check_cgroup2() -> Result<()> {
    if mounts()?.lines().any(|line| line.split(' ').nth(2) == Some("cgroup2")) {
        return Ok(());
    }
    bail!("cgroup v2 is not mounted, and the tests balance processes of a cgroup; mount it: mount -t cgroup2 none /mnt")
}

fn mounts() -> Result<String> {
    std::fs::read_to_string("/proc/mounts").context("cannot read /proc/mounts")
}
