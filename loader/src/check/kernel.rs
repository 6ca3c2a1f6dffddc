//! What the programs need of the kernel and of this process.

use std::fs;
use std::path::Path;

use super::{Finding, Findings, fail, pass, sysctl, warn};
use crate::config::{ConnectMode, RunConfig};
use crate::dataplane::{self, Features};

const BTF: &str = "/sys/kernel/btf/vmlinux";

pub(super) fn findings(config: &RunConfig) -> Findings {
    let mut findings = version();
    findings.extend([btf(Path::new(BTF)), jit(sysctl("net/core/bpf_jit_enable").as_deref()), bpf_file_system(config)]);
    if config.connect != ConnectMode::Off {
        findings.push(cgroup(config));
    }
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    findings.push(capabilities(&status));
    findings.extend(locked_memory(&status));
    findings
}

fn version() -> Findings {
    let release = sysctl("kernel/osrelease").unwrap_or_default();
    if !dataplane::is_supported() {
        return vec![fail("kernel", format!("Linux {release}"), "use Linux 5.10 or newer")];
    }
    let lacking = Features::detect().lacking();
    let features = if lacking.is_empty() {
        pass("features", "everything that the programs can make use of")
    } else {
        warn(
            "features",
            format!("does without {}", lacking.join(", ")),
            "nothing has to be done; a newer kernel does these better",
        )
    };
    vec![pass("kernel", format!("Linux {release}")), features]
}

fn btf(path: &Path) -> Finding {
    match path.exists() {
        true => pass("btf", format!("{} is there", path.display())),
        false => fail("btf", format!("there is no {}", path.display()), "use a kernel with CONFIG_DEBUG_INFO_BTF=y"),
    }
}

fn jit(enabled: Option<&str>) -> Finding {
    match enabled {
        Some("0") => warn(
            "jit",
            "net.core.bpf_jit_enable is 0: programs are interpreted, several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        Some(_) => pass("jit", "the kernel compiles programs"),
        // The setting is shown in the first network namespace alone.
        None => pass("jit", "not to be seen from this network namespace"),
    }
}

fn bpf_file_system(config: &RunConfig) -> Finding {
    match dataplane::check_pin_path(&config.pin_path) {
        Ok(()) => pass("bpffs", format!("{} is on a BPF file system", config.pin_path.display())),
        Err(error) => fail("bpffs", error.to_string(), "mount -t bpf bpf /sys/fs/bpf, or give another --pin-path"),
    }
}

fn cgroup(config: &RunConfig) -> Finding {
    match dataplane::check_cgroup(config.cgroup.as_deref()) {
        Ok(path) => pass("cgroup", format!("{} is a cgroup v2 directory", path.display())),
        Err(error) => fail(
            "cgroup",
            error.to_string(),
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup, or name one with --cgroup; --connect off does without",
        ),
    }
}

const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const SYS_RESOURCE: u32 = 24;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Whether the process whose /proc/…/status this is has a capability.
fn has(status: &str, capability: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0);
    effective >> capability & 1 == 1
}

fn capabilities(status: &str) -> Finding {
    let needed = [(NET_ADMIN, "CAP_NET_ADMIN"), (BPF, "CAP_BPF"), (PERFMON, "CAP_PERFMON")];
    let missing: Vec<&str> = needed
        .iter()
        // CAP_SYS_ADMIN stands for what was a part of it once.
        .filter(|(number, _)| !(has(status, *number) || *number > SYS_ADMIN && has(status, SYS_ADMIN)))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        pass("capabilities", "this process has those that Sheave needs")
    } else {
        fail("capabilities", format!("{} is missing", missing.join(", ")), "run as root, or add it to the container's")
    }
}

/// Kernels before 5.11 count maps as locked memory.
fn locked_memory(status: &str) -> Option<Finding> {
    if Features::detect().coarse_clock {
        return None;
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the limit outlives the call.
    let read = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } == 0;
    let unlimited = read && limit.rlim_max == libc::RLIM_INFINITY;
    Some(if unlimited || has(status, SYS_RESOURCE) {
        pass("memlock", "the limit on locked memory can be raised")
    } else {
        let remedy = "add CAP_SYS_RESOURCE, or raise it (ulimit -l unlimited, LimitMEMLOCK=infinity)";
        fail("memlock", "the limit on locked memory is too low for the maps, which kernels before 5.11 count", remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn what_is_missing_is_named() {
        let finding = capabilities("CapEff:\t0000000000001000\n");
        assert_eq!((finding.verdict, finding.found.as_str()), (Verdict::Fail, "CAP_BPF, CAP_PERFMON is missing"));
        assert_eq!(capabilities("CapEff:\t0000000000201000\n").verdict, Verdict::Pass, "CAP_SYS_ADMIN");
        assert_eq!(capabilities("CapEff:\t000000c000001000\n").verdict, Verdict::Pass);
        assert_eq!(jit(Some("0")).verdict, Verdict::Warn);
        assert_eq!(btf(Path::new("/nowhere")).verdict, Verdict::Fail);
    }
}
