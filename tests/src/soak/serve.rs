//! A pod's side: a TCP and a UDP server for every service, each of which expects what is meant for this service only.

use std::net::{Ipv6Addr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use super::exchange::{Direction, FRAME, Greeting, Hello};
use crate::netns::Namespace;

/// Where a service listens in every pod.
pub(super) fn port(service: u32) -> u16 {
    9_000 + u16::try_from(service).unwrap_or(0)
}

/// What servers have received that was not for them.
pub(super) type Findings = Arc<Mutex<Vec<String>>>;

/// The servers of a pod; they stop on drop.
#[derive(Debug)]
pub(super) struct Servers {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// One server.
#[derive(Clone)]
struct Identity {
    pod: u32,
    service: u32,
    findings: Findings,
}

impl Servers {
    /// Starts a pod's servers for these services.
    pub(super) fn start(namespace: &Namespace, pod: u32, services: &[u32], findings: &Findings) -> Result<Self> {
        let bind = |service: u32| -> Result<_> {
            let place = (Ipv6Addr::UNSPECIFIED, port(service));
            let bound = namespace.run(|| std::io::Result::Ok((TcpListener::bind(place)?, UdpSocket::bind(place)?)));
            let (tcp, udp) = bound.with_context(|| format!("binding port {} in {}", place.1, namespace.name()))?;
            tcp.set_nonblocking(true)?;
            udp.set_nonblocking(true)?;
            Ok((Identity { pod, service, findings: Arc::clone(findings) }, tcp, udp))
        };
        let bound = services.iter().map(|service| bind(*service)).collect::<Result<Vec<_>>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                for (identity, tcp, udp) in bound {
                    tokio::spawn(accept(identity.clone(), tcp));
                    tokio::spawn(answer(identity, udp));
                }
                let _ = stopped.await;
            });
        });
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Identity {
    fn found(&self, what: &str) {
        let text = format!("pod {}, service {}: {what}", self.pod, self.service);
        self.findings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// The greeting for a client that means this service.
    fn greet(&self, hello: Hello) -> Option<Greeting> {
        if hello.service != self.service {
            self.found(&format!("a client means service {}", hello.service));
            return None;
        }
        Some(Greeting { hello, pod: self.pod })
    }
}

async fn accept(identity: Identity, listener: TcpListener) -> Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        // A client that has gone again is no concern of the server.
        if let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(converse(identity.clone(), connection));
        }
    }
}

/// Takes frames and returns one for each, until the client closes.
async fn converse(identity: Identity, mut connection: TcpStream) -> Result<()> {
    let mut opening = [0; Hello::SIZE];
    connection.read_exact(&mut opening).await?;
    let Some(greeting) = Hello::from_bytes(&opening).and_then(|hello| identity.greet(hello)) else { return Ok(()) };
    connection.write_all(&greeting.to_bytes()).await?;
    let mut frame = [0; FRAME];
    for number in 0.. {
        connection.read_exact(&mut frame).await?;
        if !greeting.hello.expects(Direction::Up, number, &frame) {
            identity.found(&format!("frame {number} of {:?} holds other bytes", greeting.hello));
            return Ok(());
        }
        greeting.hello.fill(Direction::Down(identity.pod), number, &mut frame);
        connection.write_all(&frame).await?;
    }
    Ok(())
}

async fn answer(identity: Identity, socket: UdpSocket) -> Result<()> {
    let socket = tokio::net::UdpSocket::from_std(socket)?;
    let mut datagram = vec![0; 65_536];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut datagram).await else { continue };
        // A flood's datagrams are no exchange.
        let Some(hello) = Hello::from_bytes(&datagram[..length]) else { continue };
        let Some(greeting) = identity.greet(hello) else { continue };
        let payload = &datagram[Hello::SIZE..length];
        if payload.len() != hello.payload() || !hello.expects(Direction::Up, hello.number, payload) {
            identity.found(&format!("datagram {hello:?} of {client} holds other bytes"));
            continue;
        }
        let mut reply = vec![0; hello.payload()];
        hello.fill(Direction::Down(identity.pod), hello.number, &mut reply);
        let _ = socket.send_to(&[&greeting.to_bytes()[..], &reply].concat(), client).await;
    }
}
