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
/// IPT_SO_GET_ENTRIES and IP6T_SO_GET_ENTRIES.
const GET_ENTRIES: libc::c_int = 65;
/// Octets of `struct ipt_get_entries` before the entries, which are aligned to 8.
const ENTRIES_HEAD: usize = 40;

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

/// A table that exists: the family's name, domain and socket level, and the table's name.
struct Table {
    family: &'static str,
    domain: Domain,
    level: libc::c_int,
    name: String,
}

/// FORWARD chains with rules.
pub(super) fn forward_chains() -> io::Result<Vec<ForwardChain>> {
    let mut chains = Vec::new();
    for table in tables()? {
        let info = info(&table)?;
        let holds_rules = info.underflow[FORWARD] != info.hook_entry[FORWARD];
        if table.name != "nat" && info.valid_hooks & (1 << FORWARD) != 0 && holds_rules {
            let (name, chain) = (format!("{} (iptables-legacy)", table.name), "FORWARD".to_owned());
            chains.push(ForwardChain { family: table.family, table: name, chain, rules: None, drops: false });
        }
    }
    Ok(chains)
}

/// Tables with one of these chains: family and table.
pub(super) fn with_chains(chains: &[&str]) -> io::Result<Vec<(&'static str, String)>> {
    let mut found = Vec::new();
    for table in tables()? {
        // A chain begins with an entry that carries its name, and that ends with a zero.
        let entries = entries(&table)?;
        let holds = |name: String| entries.windows(name.len()).any(|window| window == name.as_bytes());
        if chains.iter().any(|chain| holds(format!("{chain}\0"))) {
            found.push((table.family, table.name));
        }
    }
    Ok(found)
}

/// Those of the tables that matter here which exist. Only they are asked, because asking makes one.
fn tables() -> io::Result<Vec<Table>> {
    let families = [
        ("ip", "ip_tables_names", Domain::IPV4, libc::SOL_IP),
        ("ip6", "ip6_tables_names", Domain::IPV6, libc::SOL_IPV6),
    ];
    let mut tables = Vec::new();
    for (family, names, domain, level) in families {
        let names = match fs::read_to_string(format!("/proc/thread-self/net/{names}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            names => names?,
        };
        let names = names.lines().filter(|name| matches!(*name, "nat" | "filter" | "mangle" | "security"));
        tables.extend(names.map(|name| Table { family, domain, level, name: name.to_owned() }));
    }
    Ok(tables)
}

fn info(table: &Table) -> io::Result<Info> {
    // Any socket of the family will do; a raw one would need CAP_NET_RAW.
    let socket = Socket::new(table.domain, Type::DGRAM, None)?;
    let mut info =
        Info { name: name(table), valid_hooks: 0, hook_entry: [0; 5], underflow: [0; 5], entries: 0, size: 0 };
    let mut length = size_of::<Info>() as libc::socklen_t;
    // SAFETY: the struct is as long as is said, and any bytes are a valid value of it.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), table.level, GET_INFO, (&raw mut info).cast(), &raw mut length) };
    if result == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// The table's entries as the kernel has them (`struct ipt_get_entries` without its head).
fn entries(table: &Table) -> io::Result<Vec<u8>> {
    let size = info(table)?.size;
    let mut buffer = vec![0_u8; ENTRIES_HEAD + size as usize];
    buffer[..32].copy_from_slice(&name(table));
    buffer[32..36].copy_from_slice(&size.to_ne_bytes());
    let mut length = buffer.len() as libc::socklen_t;
    let socket = Socket::new(table.domain, Type::DGRAM, None)?;
    // SAFETY: the buffer is as long as is said.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), table.level, GET_ENTRIES, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    if result == 0 { Ok(buffer.split_off(ENTRIES_HEAD)) } else { Err(io::Error::last_os_error()) }
}

fn name(table: &Table) -> [u8; 32] {
    let mut name = [0; 32];
    name[..table.name.len()].copy_from_slice(table.name.as_bytes());
    name
}
