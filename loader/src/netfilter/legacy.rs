//! The older iptables tables (ip_tables, ip6_tables).

use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd as _;

use socket2::{Domain, Socket, Type};

use super::ForwardChain;

/// Position of FORWARD among netfilter's hooks.
const FORWARD: usize = 2;
/// IPT_SO_GET_INFO and IP6T_SO_GET_INFO.
const GET_INFO: libc::c_int = 64;

/// `struct ipt_getinfo`; `struct ip6t_getinfo` is the same.
#[repr(C)]
struct Info {
    name: [u8; 32],
    valid_hooks: u32,
    hook_entry: [u32; 5],
    /// Where each chain's policy is: behind its rules.
    underflow: [u32; 5],
    entries: u32,
    size: u32,
}

/// FORWARD chains with rules. Only tables that exist are asked for, because asking makes one.
pub(super) fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let families = [
        ("ip", "ip_tables_names", Domain::IPV4, libc::SOL_IP),
        ("ip6", "ip6_tables_names", Domain::IPV6, libc::SOL_IPV6),
    ];
    let mut chains = Vec::new();
    for (family, names, domain, level) in families {
        let names = match fs::read_to_string(format!("/proc/thread-self/net/{names}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            names => names?,
        };
        for table in names.lines().filter(|table| matches!(*table, "filter" | "mangle" | "security")) {
            let info = info(table, domain, level)?;
            if info.valid_hooks & (1 << FORWARD) != 0 && info.underflow[FORWARD] != info.hook_entry[FORWARD] {
                let (table, chain) = (format!("{table} (iptables-legacy)"), "FORWARD".to_owned());
                chains.push(ForwardChain { family, table, chain, rules: None, drops: false });
            }
        }
    }
    Ok(chains)
}

fn info(table: &str, domain: Domain, level: libc::c_int) -> io::Result<Info> {
    // Any socket of the family will do; a raw one would need CAP_NET_RAW.
    let socket = Socket::new(domain, Type::DGRAM, None)?;
    let mut info = Info { name: [0; 32], valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], entries: 0, size: 0 };
    info.name[..table.len()].copy_from_slice(table.as_bytes());
    let mut length = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the struct is as long as is said, and any bytes are a valid value of it.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, GET_INFO, (&raw mut info).cast(), &raw mut length) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}
