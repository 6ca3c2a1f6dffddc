//! Servers that others wrote, in a pod's namespace: nginx and dnsmasq. Each runs in one process, so that it ends with its
//! guard, and says in its answers which pod it is.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::client::at;
use crate::leftovers::unique_name;
use crate::netns::Namespace;
use crate::process::{Process, eventually};
use crate::topology::Pod;

/// More than either needs to start on a busy machine.
const START: Duration = Duration::from_secs(10);

/// Name that every [`dns`] server knows, with its own pod's address.
pub const DNS_SELF: &str = "self.cluster.local";
/// Name whose TXT record, [`DNS_LARGE_LENGTH`] bytes, fits in no datagram that clients allow by default.
pub const DNS_LARGE: &str = "large.cluster.local";
/// Bytes of [`DNS_LARGE`]'s text.
pub const DNS_LARGE_LENGTH: usize = 20 * 200;

/// A running server; killed on drop.
#[derive(Debug)]
pub struct RealServer {
    // First: it reads the folder.
    _process: Process,
    _folder: Folder,
}

/// A temporary folder, removed on drop.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let folder = std::env::temp_dir().join(unique_name());
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self(folder))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An nginx that answers `POD CLIENT-ADDRESS:PORT`, then what an ingress said of itself (see [`ingress`]), if one asked.
///
/// # Errors
/// If it doesn't start.
pub fn web(pod: &Pod, ports: &[u16]) -> Result<RealServer> {
    let answer = format!(
        "default_type text/plain; return 200 \"{} $remote_addr:$remote_port $http_x_ingress $http_x_real_ip\\n\";",
        pod.name
    );
    nginx(pod, ports, &answer)
}

/// An nginx that passes requests on to `upstream`, and says there which pod it is and whom it sees.
///
/// # Errors
/// If it doesn't start.
pub fn ingress(pod: &Pod, ports: &[u16], upstream: &str) -> Result<RealServer> {
    let headers =
        format!("proxy_set_header X-Ingress {}; proxy_set_header X-Real-IP $remote_addr:$remote_port;", pod.name);
    nginx(pod, ports, &format!("proxy_pass http://{upstream}; {headers}"))
}

fn nginx(pod: &Pod, ports: &[u16], location: &str) -> Result<RealServer> {
    let folder = Folder::new()?;
    let mut listen = String::new();
    for port in ports {
        let _ = write!(listen, "listen {port}; ");
    }
    let mut temporary = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = write!(temporary, "{kind}_temp_path {kind}; ");
    }
    let configuration = format!(
        "daemon off; master_process off; pid nginx.pid; error_log stderr; events {{ }}\n\
         http {{ access_log off; {temporary}\n  server {{ {listen}\n    location / {{ {location} }}\n  }}\n}}\n"
    );
    let file = folder.0.join("nginx.conf");
    fs::write(&file, configuration).context("writing nginx.conf")?;
    let mut command = pod.namespace.command(program("nginx"));
    command.arg("-p").arg(&folder.0).arg("-c").arg(&file).args(["-e", "stderr"]);
    let process = Process::start(&format!("nginx in {}", pod.name), &mut command)?;
    wait_for(process, folder, &pod.namespace, ports)
}

/// A DNS server that answers [`DNS_SELF`] and [`DNS_LARGE`] by UDP and by TCP.
///
/// # Errors
/// If it doesn't start.
pub fn dns(pod: &Pod, port: u16) -> Result<RealServer> {
    let folder = Folder::new()?;
    let text = vec!["x".repeat(200); DNS_LARGE_LENGTH / 200].join(",");
    let mut command = pod.namespace.command(program("dnsmasq"));
    // It must not look for the machine's own files. Its debug mode is the one that handles TCP without another process.
    command.args(["--no-daemon", "--conf-file=/dev/null", "--pid-file", "--no-resolv", "--no-hosts"]);
    command.args(["--edns-packet-max=4096", &format!("--port={port}")]);
    command.arg(format!("--host-record={DNS_SELF},{}", pod.address));
    command.arg(format!("--txt-record={DNS_LARGE},{text}"));
    let process = Process::start(&format!("dnsmasq in {}", pod.name), &mut command)?;
    wait_for(process, folder, &pod.namespace, &[port])
}

/// Servers' programs are where only root's $PATH leads.
fn program(name: &str) -> PathBuf {
    let found = ["/usr/sbin", "/usr/local/sbin", "/usr/bin"].iter().map(|folder| Path::new(folder).join(name));
    found.into_iter().find(|path| path.is_file()).unwrap_or_else(|| name.into())
}

/// Waits until it accepts connections.
fn wait_for(mut process: Process, folder: Folder, namespace: &Namespace, ports: &[u16]) -> Result<RealServer> {
    for port in ports {
        let connected = eventually(START, || {
            let target = at(Ipv4Addr::LOCALHOST, *port);
            Ok(namespace.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(1))).map(drop)?)
        });
        if let Err(error) = connected {
            process.check_alive()?;
            return Err(error.context(process.log()));
        }
    }
    Ok(RealServer { _process: process, _folder: folder })
}
