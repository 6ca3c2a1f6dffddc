//! Servers in a pod's namespace that say who they are and whom they see, on all addresses of both families.
//!
//! | port | protocol | answer |
//! | --- | --- | --- |
//! | [`WHO`] | TCP | one line `name client-address:port`, then the server closes |
//! | [`PATIENT`] | TCP | the same line, then the server waits for the client to close |
//! | [`ECHO`] | TCP | the same line, then every byte back until the client closes |
//! | [`UDP`] | UDP | `name client-address:port payload` |
//! | [`HTTP`] | HTTP | `name client-address:port`, if started with [`Server::start_http`] |

use std::convert::Infallible;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;

use crate::netns::Namespace;

/// Says who and closes.
pub const WHO: u16 = 8080;
/// Says who and lets the client close.
pub const PATIENT: u16 = 8082;
/// Says who and echoes.
pub const ECHO: u16 = 7070;
/// Says who and echoes, by UDP.
pub const UDP: u16 = 5353;
/// Says who, by HTTP.
pub const HTTP: u16 = 8081;

/// The servers of one pod; they stop on drop.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts the TCP and UDP servers on all addresses of a namespace.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let mut server = Self { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        server.listen(namespace, name, WHO, who)?;
        server.listen(namespace, name, PATIENT, patient)?;
        server.listen(namespace, name, ECHO, |name, connection| {
            let name = name.to_owned();
            std::thread::spawn(move || echo(&name, connection));
            Ok(())
        })?;
        server.answer_udp(namespace, name)?;
        Ok(server)
    }

    /// Starts an HTTP server on [`HTTP`] as well.
    ///
    /// # Errors
    /// If the port is taken.
    pub fn start_http(&mut self, namespace: &Namespace, name: &str) -> Result<()> {
        let listener =
            namespace.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, HTTP))).context("binding the HTTP server")?;
        listener.set_nonblocking(true)?;
        let (name, stop) = (name.to_owned(), Arc::clone(&self.stop));
        self.threads.push(namespace.spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(serve_http(listener, name, stop));
        }));
        Ok(())
    }

    fn listen(
        &mut self,
        namespace: &Namespace,
        name: &str,
        port: u16,
        answer: fn(&str, TcpStream) -> io::Result<()>,
    ) -> Result<()> {
        let listener = namespace.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)));
        let listener = listener.with_context(|| format!("binding TCP port {port} in {}", namespace.name()))?;
        listener.set_nonblocking(true)?;
        let (name, stop) = (name.to_owned(), Arc::clone(&self.stop));
        self.threads.push(std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((connection, _)) => {
                        // A client that has gone again is no concern of the server.
                        let _ = connection.set_nonblocking(false).and_then(|()| answer(&name, connection));
                    }
                    Err(_) => wait_readable(&listener),
                }
            }
        }));
        Ok(())
    }

    fn answer_udp(&mut self, namespace: &Namespace, name: &str) -> Result<()> {
        let socket = namespace.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, UDP)));
        let socket = socket.with_context(|| format!("binding UDP port {UDP} in {}", namespace.name()))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let (name, stop) = (name.to_owned(), Arc::clone(&self.stop));
        self.threads.push(std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stop.load(Ordering::Relaxed) {
                let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
                let mut answer = format!("{name} {} ", plain(client)).into_bytes();
                answer.extend_from_slice(&buffer[..length]);
                let _ = socket.send_to(&answer, client);
            }
        }));
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn who(name: &str, mut connection: TcpStream) -> io::Result<()> {
    let line = describe(name, connection.peer_addr()?);
    connection.write_all(line.as_bytes())
}

fn patient(name: &str, mut connection: TcpStream) -> io::Result<()> {
    connection.write_all(describe(name, connection.peer_addr()?).as_bytes())?;
    connection.set_read_timeout(Some(Duration::from_secs(1)))?;
    connection.read(&mut [0]).map(drop)
}

fn echo(name: &str, mut connection: TcpStream) -> io::Result<()> {
    connection.write_all(describe(name, connection.peer_addr()?).as_bytes())?;
    let mut buffer = vec![0; 65_536];
    loop {
        let length = connection.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        connection.write_all(&buffer[..length])?;
    }
}

async fn serve_http(listener: TcpListener, name: String, stop: Arc<AtomicBool>) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    while !stop.load(Ordering::Relaxed) {
        let accepted = tokio::time::timeout(Duration::from_millis(100), listener.accept()).await;
        let Ok(Ok((connection, client))) = accepted else { continue };
        let name = name.clone();
        let service = hyper::service::service_fn(move |_request| {
            let answer = describe(&name, client);
            async move { Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(answer)))) }
        });
        let connection = hyper_util::rt::TokioIo::new(connection);
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(connection, service));
    }
}

fn describe(name: &str, client: SocketAddr) -> String {
    format!("{name} {}\n", plain(client))
}

/// An IPv4 client's address as such: a socket of both families sees it as an IPv6 address.
fn plain(client: SocketAddr) -> SocketAddr {
    SocketAddr::new(client.ip().to_canonical(), client.port())
}

fn wait_readable(listener: &TcpListener) {
    use std::os::fd::AsRawFd as _;
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, which outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, 100) };
}

/// Sees the UDP packets that arrive in a namespace, headers and all.
#[derive(Debug)]
pub struct RawUdp {
    socket: UdpSocket,
}

/// Opens a raw socket in the calling thread's namespace.
///
/// # Errors
/// If the kernel refuses.
pub fn raw_udp() -> Result<RawUdp> {
    use std::os::fd::FromRawFd as _;
    // SAFETY: socket takes no pointers, and the new descriptor is owned by the value made from it and nowhere else. Only
    // recv is called on it, which a raw socket has as well.
    let socket = unsafe {
        let descriptor = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_UDP);
        anyhow::ensure!(descriptor >= 0, "opening a raw socket: {}", io::Error::last_os_error());
        UdpSocket::from_raw_fd(descriptor)
    };
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(RawUdp { socket })
}

impl RawUdp {
    /// The checksum field of the next packet with this source port.
    ///
    /// # Errors
    /// If none has arrived.
    pub fn checksum_from(&self, source_port: u16) -> Result<u16> {
        let mut packet = [0; 2_048];
        loop {
            let length = self.socket.recv(&mut packet).context("waiting for a raw packet")?;
            let header = usize::from(packet[0] & 0xf) * 4;
            let field = |offset: usize| u16::from_be_bytes([packet[header + offset], packet[header + offset + 1]]);
            if length >= header + 8 && field(0) == source_port {
                return Ok(field(6));
            }
        }
    }
}

/// Moves at least `bytes` with iperf3 from one namespace to `target`, which a server in the other answers; returns what
/// the server received.
///
/// # Errors
/// If iperf3 fails.
pub fn iperf(server: &Namespace, client: &Namespace, target: SocketAddr, bytes: u64) -> Result<u64> {
    let mut listener = crate::process::Process::start(
        "iperf3 -s",
        server.command("iperf3").args(["--server", "--one-off", "--forceflush", "--port", "5201"]),
    )?;
    listener.wait_for("Server listening", Duration::from_secs(5))?;
    let (address, port, bytes) = (target.ip().to_string(), target.port().to_string(), bytes.to_string());
    let report = client.output("iperf3", &["-c", &address, "-p", &port, "-n", &bytes, "--json"])?;
    let report: serde_json::Value = serde_json::from_str(&report).context("iperf3's report")?;
    report["end"]["sum_received"]["bytes"].as_u64().context("iperf3's report has no sum_received")
}
