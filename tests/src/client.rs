//! Clients: they connect, ask who answered, and count. The functions run in the calling thread's network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::family::Family;
use crate::patience::patient;

/// How long a connection or an answer may take. Long enough for one lost SYN.
pub const LIMIT: Duration = Duration::from_secs(5);

/// Who answered, as a server of [`crate::server`] says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The pod's name.
    pub backend: String,
    /// The client's address and port as the pod sees them.
    pub seen: SocketAddr,
}

/// Many answers, counted.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Answers {
    /// Answers of each backend.
    pub by_backend: BTreeMap<String, usize>,
    /// The client addresses that backends saw.
    pub seen: BTreeSet<IpAddr>,
    /// What went wrong, at most a few of each run.
    pub errors: Vec<String>,
    /// How often something went wrong.
    pub failed: usize,
}

impl Answer {
    fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace();
        let (backend, seen) = words.next().zip(words.next()).with_context(|| format!("a strange answer: {line:?}"))?;
        Ok(Self { backend: backend.into(), seen: seen.parse().with_context(|| format!("a strange answer: {line:?}"))? })
    }
}

impl Answers {
    /// Counts one.
    pub fn add(&mut self, answer: Result<Answer>) {
        match answer {
            Ok(answer) => {
                *self.by_backend.entry(answer.backend).or_default() += 1;
                self.seen.insert(answer.seen.ip());
            }
            Err(error) => {
                self.failed += 1;
                if self.errors.len() < 5 {
                    self.errors.push(format!("{error:#}"));
                }
            }
        }
    }

    /// Adds another count to this one.
    pub fn merge(&mut self, other: Self) {
        for (backend, count) in other.by_backend {
            *self.by_backend.entry(backend).or_default() += count;
        }
        self.seen.extend(other.seen);
        self.failed += other.failed;
        self.errors.extend(other.errors);
        self.errors.truncate(5);
    }

    /// Answers of all backends together.
    #[must_use]
    pub fn total(&self) -> usize {
        self.by_backend.values().sum()
    }

    /// Fails if a single one failed.
    ///
    /// # Errors
    /// With the first few errors.
    pub fn all_answered(&self) -> Result<()> {
        ensure!(self.failed == 0, "{} of {} failed: {:#?}", self.failed, self.failed + self.total(), self.errors);
        Ok(())
    }

    /// Fails unless exactly `backends` backends answered, each within `tolerance` (0.05 is 5 %) of an even share.
    ///
    /// # Errors
    /// With the counts.
    pub fn evenly_spread(&self, backends: usize, tolerance: f64) -> Result<()> {
        ensure!(self.by_backend.len() == backends, "not {backends} backends answered: {:?}", self.by_backend);
        #[expect(clippy::cast_precision_loss, reason = "counts of connections are far below 2^52")]
        let even = self.total() as f64 / backends as f64;
        #[expect(clippy::cast_precision_loss, reason = "counts of connections are far below 2^52")]
        let uneven = self.by_backend.values().any(|count| (*count as f64 - even).abs() > even * tolerance);
        ensure!(!uneven, "not within {} % of even: {:?}", tolerance * 100.0, self.by_backend);
        Ok(())
    }
}

/// Connects, reads who answers until the server closes.
///
/// # Errors
/// If it isn't connected and answered in time.
pub fn who(target: SocketAddr) -> Result<Answer> {
    who_within(target, LIMIT)
}

/// The same with this limit for connecting, and for the answer.
///
/// # Errors
/// If it isn't connected and answered in time.
pub fn who_within(target: SocketAddr, limit: Duration) -> Result<Answer> {
    let limit = patient(limit);
    let mut connection =
        TcpStream::connect_timeout(&target, limit).with_context(|| format!("connecting to {target}"))?;
    connection.set_read_timeout(Some(limit))?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).with_context(|| {
        let port = connection.local_addr().map_or(0, |own| own.port());
        format!("waiting for the answer of {target} at port {port}")
    })?;
    Answer::parse(&answer)
}

/// Connects, reads a line, and closes before the server does ([`crate::server::PATIENT`]).
///
/// # Errors
/// If it isn't connected and answered in time.
pub fn who_and_close(target: SocketAddr) -> Result<Answer> {
    let connection =
        TcpStream::connect_timeout(&target, patient(LIMIT)).with_context(|| format!("connecting to {target}"))?;
    connection.set_read_timeout(Some(patient(LIMIT)))?;
    let mut line = String::new();
    io::BufReader::new(connection).read_line(&mut line).with_context(|| format!("waiting for {target}"))?;
    Answer::parse(&line)
}

/// The same from a given source address and port.
///
/// # Errors
/// If it isn't connected and answered, or the port is taken.
pub fn who_from(source: impl Into<SocketAddr>, target: impl Into<SocketAddr>) -> Result<Answer> {
    let target = target.into();
    let mut connection = connect_from(source.into(), target)?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).with_context(|| format!("waiting for the answer of {target}"))?;
    Answer::parse(&answer)
}

/// Reads an answer that a server has sent.
///
/// # Errors
/// If it isn't one.
pub fn parse_answer(answer: &[u8]) -> Result<Answer> {
    Answer::parse(&String::from_utf8_lossy(answer))
}

/// Asks `count` times, `parallel` at once.
#[must_use]
pub fn who_many(
    namespace: Option<&crate::netns::Namespace>,
    target: SocketAddr,
    count: usize,
    parallel: usize,
) -> Answers {
    many(namespace, count, parallel, &|| who(target))
}

/// Asks `count` times in any way, `parallel` at once.
#[must_use]
pub fn many(
    namespace: Option<&crate::netns::Namespace>,
    count: usize,
    parallel: usize,
    ask: &(dyn Fn() -> Result<Answer> + Sync),
) -> Answers {
    let left = AtomicUsize::new(count);
    let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
    in_parallel(namespace, parallel, &|| {
        let mut answers = Answers::default();
        while take() {
            answers.add(ask());
        }
        answers
    })
}

/// Asks again and again until told to stop.
#[must_use]
pub fn until(
    namespace: Option<&crate::netns::Namespace>,
    stop: &AtomicBool,
    parallel: usize,
    ask: &(dyn Fn() -> Result<Answer> + Sync),
) -> Answers {
    in_parallel(namespace, parallel, &|| {
        let mut answers = Answers::default();
        while !stop.load(Ordering::Relaxed) {
            answers.add(ask());
        }
        answers
    })
}

fn in_parallel(
    namespace: Option<&crate::netns::Namespace>,
    parallel: usize,
    work: &(dyn Fn() -> Answers + Sync),
) -> Answers {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..parallel)
            .map(|_| {
                scope.spawn(|| {
                    if let Some(namespace) = namespace {
                        namespace.enter();
                    }
                    work()
                })
            })
            .collect();
        let mut all = Answers::default();
        for thread in threads {
            match thread.join() {
                Ok(answers) => all.merge(answers),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

/// A connection to an echo server that stays open.
#[derive(Debug)]
pub struct Conversation {
    connection: TcpStream,
    /// Who is at the other end.
    pub answer: Answer,
}

impl Conversation {
    /// Connects and reads who answers.
    ///
    /// # Errors
    /// If it isn't connected and answered in time.
    pub fn open(target: SocketAddr) -> Result<Self> {
        let connection =
            TcpStream::connect_timeout(&target, patient(LIMIT)).with_context(|| format!("connecting to {target}"))?;
        Self::over(connection)
    }

    /// The same from a given source address and port.
    ///
    /// # Errors
    /// If it isn't connected and answered in time.
    pub fn open_from(source: impl Into<SocketAddr>, target: impl Into<SocketAddr>) -> Result<Self> {
        Self::over(connect_from(source.into(), target.into())?)
    }

    fn over(mut connection: TcpStream) -> Result<Self> {
        connection.set_read_timeout(Some(patient(LIMIT)))?;
        connection.set_write_timeout(Some(patient(LIMIT)))?;
        let mut line = Vec::new();
        let mut byte = [0];
        while byte != *b"\n" {
            connection.read_exact(&mut byte).context("waiting for the greeting")?;
            line.extend(byte);
        }
        let answer = Answer::parse(&String::from_utf8_lossy(&line))?;
        Ok(Self { connection, answer })
    }

    /// Sends something and waits until it has come back.
    ///
    /// # Errors
    /// If it doesn't come back whole and in time.
    pub fn say(&mut self, words: &[u8]) -> Result<()> {
        self.connection.write_all(words).context("sending")?;
        let mut back = vec![0; words.len()];
        self.connection.read_exact(&mut back).context("waiting for the echo")?;
        ensure!(back == words, "the echo differs from what was said");
        Ok(())
    }

    /// Ends it with a RST.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn reset(self) -> Result<()> {
        use std::os::fd::AsRawFd as _;
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        let (value, size) = ((&raw const linger).cast(), size_of_val(&linger) as u32);
        // SAFETY: the option's value is a struct linger that outlives the call.
        let set =
            unsafe { libc::setsockopt(self.connection.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, size) };
        ensure!(set == 0, "SO_LINGER: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Sends many bytes and reads them back at the same time.
    ///
    /// # Errors
    /// If they don't come back whole, or stand still for [`LIMIT`].
    pub fn transfer(&mut self, length: usize) -> Result<()> {
        let pattern: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
        let mut writer = self.connection.try_clone()?;
        std::thread::scope(|scope| {
            let sent = scope.spawn(|| writer.write_all(&pattern));
            let mut back = vec![0; length];
            let read = self.connection.read_exact(&mut back).context("reading the transfer back");
            if read.is_err() {
                let _ = self.connection.shutdown(std::net::Shutdown::Both);
            }
            sent.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("sending the transfer")?;
            read?;
            ensure!(back == pattern, "the transfer came back changed");
            Ok(())
        })
    }
}

/// Sends one datagram and waits for the answer.
///
/// # Errors
/// If none comes in time, from the address that was asked, with the payload that was sent.
pub fn ask_udp(target: SocketAddr, payload: &str) -> Result<Answer> {
    let socket = udp_to(target)?;
    ask_udp_with(&socket, payload)
}

/// A UDP socket that is connected to a target.
///
/// # Errors
/// If the kernel refuses.
pub fn udp_to(target: SocketAddr) -> Result<UdpSocket> {
    let any = Family::of(target.ip()).pick(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(target)?;
    Ok(socket)
}

/// The same with a socket that is connected already.
///
/// # Errors
/// If no answer comes in time, or not the payload that was sent.
pub fn ask_udp_with(socket: &UdpSocket, payload: &str) -> Result<Answer> {
    socket.set_read_timeout(Some(patient(LIMIT)))?;
    socket.send(payload.as_bytes()).context("sending a datagram")?;
    let mut buffer = vec![0; 65_536];
    let length = socket.recv(&mut buffer).context("waiting for a datagram")?;
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    if !text.ends_with(payload) {
        bail!("the payload came back changed: {text:?}");
    }
    Answer::parse(&text)
}

/// A UDP socket that sends checksum 0, as IPv4 allows.
///
/// # Errors
/// If the kernel refuses.
pub fn udp_without_checksum() -> Result<UdpSocket> {
    use std::os::fd::AsRawFd as _;
    /// Of linux/socket.h.
    const SO_NO_CHECK: i32 = 11;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let one: libc::c_int = 1;
    // SAFETY: the option's value is a C int that outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NO_CHECK,
            (&raw const one).cast(),
            size_of_val(&one) as u32,
        )
    };
    ensure!(set == 0, "SO_NO_CHECK: {}", io::Error::last_os_error());
    Ok(socket)
}

/// Connects from a given source address and port; the time limit is for connecting and for each read. While the last
/// connection between the two is not over on this side, the kernel refuses the address, and it is tried again.
fn connect_from(source: SocketAddr, target: SocketAddr) -> Result<TcpStream> {
    let started = Instant::now();
    loop {
        match try_connect_from(source, target) {
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && started.elapsed() < patient(LIMIT) => {
                std::thread::sleep(Duration::from_millis(1));
            }
            outcome => return outcome.with_context(|| format!("connecting {source} to {target}")),
        }
    }
}

fn try_connect_from(source: SocketAddr, target: SocketAddr) -> io::Result<TcpStream> {
    use std::os::fd::AsRawFd as _;
    let checked = |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let family = if source.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: socket takes no pointers, and the new descriptor is owned here and nowhere else.
    let socket =
        unsafe { OwnedFd::from_raw_fd(checked(libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?) };
    let connection = TcpStream::from(socket);
    connection.set_write_timeout(Some(patient(LIMIT)))?;
    connection.set_read_timeout(Some(patient(LIMIT)))?;
    let one: libc::c_int = 1;
    let ((own, own_size), (other, other_size)) = (to_c(source), to_c(target));
    // SAFETY: the option's value and both addresses are of the sizes given and outlive the calls.
    unsafe {
        let descriptor = connection.as_raw_fd();
        let reuse = (&raw const one).cast();
        checked(libc::setsockopt(descriptor, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse, size_of_val(&one) as u32))?;
        checked(libc::bind(descriptor, (&raw const own).cast(), own_size))?;
        checked(libc::connect(descriptor, (&raw const other).cast(), other_size))?;
    }
    Ok(connection)
}

/// An address as system calls take it, and its size.
fn to_c(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero bytes are a valid sockaddr_storage.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let size = match address {
        SocketAddr::V4(address) => {
            let value = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room for, and the alignment of, an address of any family.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(value) };
            size_of_val(&value)
        }
        SocketAddr::V6(address) => {
            let value = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(value) };
            size_of_val(&value)
        }
    };
    (storage, size as libc::socklen_t)
}

/// Shorthand for a socket address.
#[must_use]
pub fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

/// The same target as an IPv4-mapped IPv6 address, which AF_INET6 sockets ask; an IPv6 target as it is.
#[must_use]
pub fn mapped(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(target) => at(target.ip().to_ipv6_mapped(), target.port()),
        SocketAddr::V6(_) => target,
    }
}

/// Sends an echo request with a payload of this length; whether it is answered within a second. Needs the namespace's
/// `net.ipv4.ping_group_range`.
///
/// # Errors
/// If the kernel refuses, or the answer has another payload.
pub fn ping(target: IpAddr, length: usize) -> Result<bool> {
    let (family, protocol, request) = match target {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP, 8),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128),
    };
    // SAFETY: socket takes no pointers; the new descriptor is owned here and nowhere else. The kernel's ping sockets are
    // datagram sockets, so UdpSocket's calls fit.
    let socket = unsafe {
        let descriptor = libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol);
        ensure!(descriptor >= 0, "a socket for pings: {}", io::Error::last_os_error());
        UdpSocket::from(OwnedFd::from_raw_fd(descriptor))
    };
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.connect(SocketAddr::new(target, 0)).with_context(|| format!("pinging {target}"))?;
    let payload: Vec<u8> = (0..length).map(|index| (index % 251) as u8).collect();
    // The kernel fills in identifier and checksum.
    socket.send(&[&[request, 0, 0, 0, 0, 0, 0, 1], &payload[..]].concat()).context("sending an echo request")?;
    let mut answer = vec![0; length + 100];
    match socket.recv(&mut answer) {
        Ok(received) => {
            ensure!(received >= 8 && answer[8..received] == payload, "the echo of {target} differs from what was sent");
            Ok(true)
        }
        Err(_) => Ok(false),
    }
}
