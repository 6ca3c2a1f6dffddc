//! What a report says of the machine and of the running daemon.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use flate2::read::GzDecoder;

use crate::interfaces::toward::toward;

/// Settings that Sheave's behaviour depends on.
const SETTINGS: [&str; 12] = [
    "kernel/unprivileged_bpf_disabled",
    "net/core/bpf_jit_enable",
    "net/core/bpf_jit_harden",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv6/conf/all/forwarding",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
];
/// Beginnings of the build options that matter.
const OPTIONS: [&str; 12] = [
    "CONFIG_BPF",
    "CONFIG_BRIDGE_NETFILTER",
    "CONFIG_CGROUP_BPF",
    "CONFIG_DEBUG_INFO_BTF",
    "CONFIG_FTRACE_SYSCALLS",
    "CONFIG_HZ",
    "CONFIG_NET_CLS_ACT",
    "CONFIG_NET_CLS_BPF",
    "CONFIG_NET_SCH_INGRESS",
    "CONFIG_NETKIT",
    "CONFIG_NF_CONNTRACK",
    "CONFIG_XDP_SOCKETS",
];

/// Kernel, settings, mounts, modules.
pub(super) fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| format!("({error})")).trim().to_owned();
    let mut text = format!("{}\n{}\n", read("/proc/version"), std::env::consts::ARCH);
    let memory = read("/proc/meminfo");
    memory.lines().take(3).for_each(|line| line_of(&mut text, line));
    line_of(&mut text, &format!("CPUs: {}", std::thread::available_parallelism().map_or(0, usize::from)));
    for setting in SETTINGS {
        line_of(&mut text, &format!("{setting} = {}", read(&format!("/proc/sys/{setting}"))));
    }
    let mounts = read("/proc/mounts");
    let wanted = |line: &&str| matches!(line.split(' ').nth(2), Some("bpf" | "cgroup2"));
    mounts.lines().filter(wanted).for_each(|line| line_of(&mut text, line));
    let modules = read("/proc/modules");
    let modules: Vec<&str> = modules.lines().filter_map(|line| line.split(' ').next()).collect();
    line_of(&mut text, &format!("modules: {}", modules.join(" ")));
    text
}

fn line_of(text: &mut String, line: &str) {
    let _infallible = writeln!(text, "{line}");
}

/// How the kernel was built.
pub(super) fn kernel_config() -> io::Result<String> {
    let mut config = String::new();
    match fs::File::open("/proc/config.gz") {
        Ok(file) => drop(GzDecoder::new(file).read_to_string(&mut config)?),
        Err(_) => {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
            config = fs::read_to_string(format!("/boot/config-{}", release.trim()))?;
        }
    }
    let wanted = |line: &&str| OPTIONS.iter().any(|option| line.starts_with(option));
    Ok(config.lines().filter(wanted).map(|line| format!("{line}\n")).collect())
}

/// Links of this network namespace.
pub(super) fn interfaces() -> io::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let around = runtime.block_on(toward(Ipv4Addr::LOCALHOST.into())).map_err(io::Error::other)?;
    Ok(around.links.iter().map(|link| format!("{link:?}\n")).collect())
}

/// Flags and SHEAVE_ variables of the process that has locked the pin directory.
pub(super) fn daemon(pins: &Path) -> io::Result<String> {
    let directory = fs::metadata(pins)?;
    let (major, minor) = (libc::major(directory.dev()), libc::minor(directory.dev()));
    let inode = format!("{major:02x}:{minor:02x}:{}", directory.ino());
    let locks = fs::read_to_string("/proc/locks")?;
    let holder = locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&inode.as_str())).then(|| fields[4].to_owned())
    });
    let Some(process) = holder else { return Ok("no process has locked the pin directory\n".to_owned()) };
    let words = |file: &str| -> io::Result<Vec<String>> {
        let text = fs::read(format!("/proc/{process}/{file}"))?;
        let words = text.split(|octet| *octet == 0).filter(|word| !word.is_empty());
        Ok(words.map(|word| without_password(&String::from_utf8_lossy(word))).collect())
    };
    let mut text = format!("process {process}\n{}\n", words("cmdline")?.join(" "));
    words("environ")?.iter().filter(|word| word.starts_with("SHEAVE_")).for_each(|word| line_of(&mut text, word));
    Ok(text)
}

/// A word without the user and password of an address in it.
fn without_password(word: &str) -> String {
    let mut parts = word.split("://");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(['/', ',', '?']).unwrap_or(part.len());
        let start = part[..end].rfind('@').map_or(0, |at| at + 1);
        text += "://";
        text += &part[start..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_in_addresses_are_left_out() {
        for (word, expected) in [
            ("--api-server=https://me:secret@192.0.2.1:6443/path@x", "--api-server=https://192.0.2.1:6443/path@x"),
            ("https://a:b@one:1,https://two:2,https://c@three", "https://one:1,https://two:2,https://three"),
            ("--node-name=a@b", "--node-name=a@b"),
        ] {
            assert_eq!(without_password(word), expected);
        }
    }
}
