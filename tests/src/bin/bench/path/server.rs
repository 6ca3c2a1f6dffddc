//! The backend: answers with its name, counts datagrams, and drains what iperf3 sends.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sheave_tests::netns::Namespace;
use sheave_tests::process::Process;

/// Where it answers TCP.
pub(crate) const TCP: u16 = 7001;
/// Where it takes datagrams.
pub(crate) const UDP: u16 = 7002;
/// Where iperf3 listens.
pub(crate) const BULK: u16 = 5201;
/// Bytes of every request, answer and datagram.
pub(crate) const MESSAGE: usize = 32;
/// Datagrams in one system call.
const BATCH: usize = 64;

/// The answer of a backend.
pub(crate) fn answer(name: &str) -> [u8; MESSAGE] {
    let mut answer = [b'.'; MESSAGE];
    for (to, from) in answer.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    answer
}

/// The servers of one backend; they stop on drop.
#[derive(Debug)]
pub(crate) struct Server {
    stop: Arc<AtomicBool>,
    datagrams: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
    _iperf: Process,
}

impl Server {
    /// Starts them in a namespace.
    pub(crate) fn start(namespace: &Namespace, name: &str) -> Result<Self> {
        let (stop, datagrams) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (listener, socket) = namespace.run(|| -> Result<_> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, UDP))?;
            Ok((TcpListener::bind((Ipv4Addr::UNSPECIFIED, TCP))?, socket))
        })?;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let answer = answer(name);
        let stopped = Arc::clone(&stop);
        let accepting = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A client that has gone again is no concern of the server.
                    Ok((connection, _)) => drop(converse(connection, &answer, &stopped)),
                    Err(_) => wait_readable(&listener),
                }
            }
        });
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&datagrams));
        let counting = std::thread::spawn(move || count(&socket, &answer, &counter, &stopped));
        let mut iperf = Process::start(
            "iperf3 -s",
            namespace.command("iperf3").args(["--server", "--forceflush", "--port", &BULK.to_string()]),
        )?;
        iperf.wait_for("Server listening", Duration::from_secs(10)).context("the iperf3 server")?;
        Ok(Self { stop, datagrams, threads: vec![accepting, counting], _iperf: iperf })
    }

    /// Datagrams that have arrived so far.
    pub(crate) fn datagrams(&self) -> u64 {
        self.datagrams.load(Ordering::Relaxed)
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

/// One client at a time: there is only one.
fn converse(mut connection: TcpStream, answer: &[u8; MESSAGE], stop: &AtomicBool) -> std::io::Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut question = [0; MESSAGE];
    while !stop.load(Ordering::Relaxed) {
        connection.read_exact(&mut question)?;
        connection.write_all(answer)?;
    }
    Ok(())
}

/// Counts datagrams, and answers those that ask.
fn count(socket: &UdpSocket, answer: &[u8; MESSAGE], counter: &AtomicU64, stop: &AtomicBool) {
    let mut buffers = [[0_u8; MESSAGE]; BATCH];
    let mut vectors =
        buffers.each_mut().map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: MESSAGE });
    // SAFETY: a mmsghdr of zeros is a valid one.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    for (message, vector) in messages.iter_mut().zip(&mut vectors) {
        message.msg_hdr.msg_iov = vector;
        message.msg_hdr.msg_iovlen = 1;
    }
    let mut first = [0; MESSAGE];
    while !stop.load(Ordering::Relaxed) {
        let Ok((_, client)) = socket.recv_from(&mut first) else { continue };
        counter.fetch_add(1, Ordering::Relaxed);
        if first[0] == b'?' {
            let _ = socket.send_to(answer, client);
        }
        // SAFETY: so many messages are there, and their buffers outlive the call.
        let more = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        counter.fetch_add(u64::try_from(more).unwrap_or_default(), Ordering::Relaxed);
    }
}

fn wait_readable(listener: &TcpListener) {
    let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid pollfd, which outlives the call.
    unsafe { libc::poll(&raw mut poll, 1, 100) };
}
