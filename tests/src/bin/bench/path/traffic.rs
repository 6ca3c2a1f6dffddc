//! The client: a process of its own, because connect-time balancing looks at processes. It checks every answer.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use sheave_tests::client::LIMIT;

use super::server::{MESSAGE, answer};
use super::services::address;

/// Datagrams in one system call.
const BATCH: usize = 32;

/// What the client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Requests and answers on one TCP connection.
    Requests,
    /// A TCP connection for each request.
    Connections,
    /// Datagrams without answers.
    Datagrams,
}

/// The client's arguments.
#[derive(Clone, Debug, Args)]
pub(crate) struct Arguments {
    /// What it does
    kind: Kind,
    /// Whom it asks
    target: SocketAddr,
    /// Name of the backend that must answer
    backend: String,
    /// For how long
    milliseconds: u64,
    /// Ask so many services in random order, in place of the target's address
    #[arg(long)]
    services: Option<u32>,
}

/// What the client has seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    /// How many requests, connections or datagrams.
    pub(crate) events: u64,
    /// In which time.
    pub(crate) seconds: f64,
    /// How many events took so many nanoseconds.
    pub(crate) latencies: Vec<(u64, u64)>,
}

impl Arguments {
    /// As they are written on a command line.
    pub(crate) fn line(kind: Kind, target: SocketAddr, backend: &str, length: Duration) -> Vec<String> {
        let kind = kind.to_possible_value().map(|kind| kind.get_name().to_owned()).unwrap_or_default();
        vec!["traffic".into(), kind, target.to_string(), backend.into(), length.as_millis().to_string()]
    }
}

/// Runs the client and prints what it has seen.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let length = Duration::from_millis(arguments.milliseconds);
    let sample = match arguments.kind {
        Kind::Requests => {
            let mut connection = connect(arguments.target)?;
            timed(length, || ask(&mut connection, &arguments.backend))
        }
        Kind::Connections => timed(length, || {
            let mut target = arguments.target;
            if let Some(services) = arguments.services {
                target.set_ip(address(fastrand::u32(..services)).into());
            }
            ask(&mut connect(target)?, &arguments.backend)
        }),
        Kind::Datagrams => flood(arguments, length),
    }?;
    println!("{}", serde_json::to_string(&sample)?);
    Ok(())
}

/// Does something again and again; the first tenth of the time is not counted.
fn timed(length: Duration, mut event: impl FnMut() -> Result<()>) -> Result<Sample> {
    let warm = Instant::now();
    while warm.elapsed() < length / 10 {
        event()?;
    }
    let mut latencies = Histogram::<u64>::new(3)?;
    let started = Instant::now();
    while started.elapsed() < length {
        let before = Instant::now();
        event()?;
        latencies.record(u64::try_from(before.elapsed().as_nanos())?)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let counts = latencies.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())).collect();
    Ok(Sample { events: latencies.len(), seconds, latencies: counts })
}

fn connect(target: SocketAddr) -> Result<TcpStream> {
    let connection = TcpStream::connect_timeout(&target, LIMIT).with_context(|| format!("connecting to {target}"))?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(LIMIT))?;
    Ok(connection)
}

fn ask(connection: &mut TcpStream, backend: &str) -> Result<()> {
    let mut back = [0; MESSAGE];
    connection.write_all(&[b'?'; MESSAGE])?;
    connection.read_exact(&mut back).context("waiting for the answer")?;
    ensure!(back == answer(backend), "another backend than {backend} answered: {}", String::from_utf8_lossy(&back));
    Ok(())
}

/// One question that must be answered, then as many datagrams as go out.
fn flood(arguments: &Arguments, length: Duration) -> Result<Sample> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(arguments.target)?;
    socket.set_read_timeout(Some(LIMIT))?;
    let mut back = [0; MESSAGE];
    socket.send(&[b'?'; MESSAGE])?;
    socket.recv(&mut back).context("waiting for the answer to a datagram")?;
    if back != answer(&arguments.backend) {
        bail!("another backend than {} answered", arguments.backend);
    }
    let payload = [b'!'; MESSAGE];
    let mut vector = libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    // SAFETY: a mmsghdr of zeros is a valid one.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut vector;
        message.msg_hdr.msg_iovlen = 1;
    }
    let (started, mut events) = (Instant::now(), 0);
    while started.elapsed() < length {
        // SAFETY: so many messages are there, and what they point to outlives the call; the kernel only reads the payload.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as u32, 0) };
        events += u64::try_from(sent).map_err(|_| std::io::Error::last_os_error()).context("sending datagrams")?;
    }
    Ok(Sample { events, seconds: started.elapsed().as_secs_f64(), latencies: Vec::new() })
}
