//! A client's side, in a process of its own: some exchanges go on from beginning to end, and new ones are made all the time.
//!
//! It runs until its standard input ends, and says each second what has happened, as a line of JSON.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::exchange::{Direction, FRAME, Greeting, Hello};
use crate::family::Family;

/// Between two frames or datagrams of an exchange, and between two new exchanges.
const PAUSE: Duration = Duration::from_millis(100);
/// For a new connection, and for a frame. TCP sends again after 0.2, 0.6, 1.4, 3, 6.2, 12.6 s.
const LIMIT: Duration = Duration::from_secs(20);
/// For a datagram.
const ANSWER: Duration = Duration::from_secs(2);
/// Frames or datagrams of a new exchange.
const SHORT: u32 = 3;
/// Pods from this number on go away in the middle of it all, and their connections with them.
pub(super) const PASSING: u32 = 10_000;

/// What a client process does.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// Who it is, for messages.
    pub(super) name: String,
    pub(super) seed: u64,
    pub(super) targets: Vec<Target>,
}

/// Something to ask.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Target {
    pub(super) service: u32,
    pub(super) address: SocketAddr,
    pub(super) udp: bool,
    /// Exchanges that go on all the time.
    pub(super) long: u32,
    /// Whether it must answer: services that come and go need not, but never with another's bytes.
    pub(super) steady: bool,
    /// Whether all exchanges must reach the same pod.
    pub(super) sticky: bool,
}

/// What has happened in a second.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// Checked, both directions.
    pub(super) bytes: u64,
    /// Made, and failed to be made.
    pub(super) connections: u64,
    pub(super) failed: u64,
    /// Answered, and not answered in time.
    pub(super) datagrams: u64,
    pub(super) lost: u64,
    /// Connections that ended with their pod.
    pub(super) orphaned: u64,
    /// What failed, with the time in milliseconds since 1970.
    pub(super) failures: Vec<(u64, String)>,
    /// What must never happen, likewise.
    pub(super) wrong: Vec<(u64, String)>,
}

/// What the exchanges of a process share.
struct Client {
    name: String,
    random: RefCell<fastrand::Rng>,
    report: RefCell<Report>,
}

/// Runs a client process.
///
/// # Errors
/// If standard output is closed.
pub fn talk(job: Job) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let random = RefCell::new(fastrand::Rng::with_seed(job.seed));
        let client = Rc::new(Client { name: job.name, random, report: RefCell::default() });
        for target in job.targets {
            for _ in 0..target.long {
                tokio::task::spawn_local(Rc::clone(&client).go_on(target.clone()));
            }
            tokio::task::spawn_local(Rc::clone(&client).begin_anew(target));
        }
        let (ended, mut end) = tokio::sync::oneshot::channel();
        // Blocks, so it has a thread of its own.
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_line(&mut String::new());
            let _ = ended.send(());
        });
        loop {
            let over = timeout(Duration::from_secs(1), &mut end).await.is_ok();
            println!("{}", serde_json::to_string(&client.report.take())?);
            if over {
                return Ok(());
            }
        }
    })
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Why an exchange ended.
enum End {
    /// Other bytes than those that are due.
    Wrong(anyhow::Error),
    /// It could not begin.
    NotBegun(anyhow::Error),
    /// It broke off; with the pod.
    Broken(u32, anyhow::Error),
}

impl Client {
    /// Exchanges that last, one after the other where one ends.
    async fn go_on(self: Rc<Self>, target: Target) {
        loop {
            let end = if target.udp {
                self.datagrams(&target, u32::MAX).await
            } else {
                self.connection(&target, u32::MAX).await
            };
            self.judge(&target, end.map(drop), "that goes on");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Short exchanges, one after the other.
    async fn begin_anew(self: Rc<Self>, target: Target) {
        let mut last = None;
        loop {
            tokio::time::sleep(PAUSE).await;
            let end =
                if target.udp { self.datagrams(&target, SHORT).await } else { self.connection(&target, SHORT).await };
            if let (true, Ok(pod)) = (target.sticky, &end)
                && let Some(before) = last.replace(*pod)
                && before != *pod
            {
                self.wrong(&target, &format!("affinity led to pod {before}, and now to {pod}"));
            }
            self.judge(&target, end.map(drop), "that is new");
        }
    }

    fn judge(&self, target: &Target, end: Result<(), End>, which: &str) {
        let Err(end) = end else { return };
        match end {
            End::Wrong(error) => self.wrong(target, &format!("{which}: {error:#}")),
            End::NotBegun(_) if !target.steady => {}
            End::NotBegun(error) => {
                let text = format!("{} to {} (service {}): {error:#}", self.name, target.address, target.service);
                let mut report = self.report.borrow_mut();
                report.failed += 1;
                report.failures.push((now(), text));
            }
            End::Broken(pod, _) if pod >= PASSING => self.report.borrow_mut().orphaned += 1,
            End::Broken(pod, error) => self.wrong(target, &format!("{which}, with pod {pod}: lost: {error:#}")),
        }
    }

    fn wrong(&self, target: &Target, what: &str) {
        let text = format!("{} to {} (service {}), {what}", self.name, target.address, target.service);
        self.report.borrow_mut().wrong.push((now(), text));
    }

    fn hello(&self, target: &Target) -> Hello {
        Hello { nonce: self.random.borrow_mut().u64(..), service: target.service, number: 0 }
    }

    /// A connection with this many frames; says which pod it was with.
    async fn connection(&self, target: &Target, frames: u32) -> Result<u32, End> {
        let hello = self.hello(target);
        let begun = timeout(LIMIT, async {
            let mut connection = TcpStream::connect(target.address).await.context("connecting")?;
            connection.write_all(&hello.to_bytes()).await.context("sending a hello")?;
            let mut greeting = [0; Greeting::SIZE];
            connection.read_exact(&mut greeting).await.context("waiting for the greeting")?;
            anyhow::Ok((connection, greeting))
        });
        let begun = begun.await.context("no connection in time").and_then(|begun| begun).map_err(End::NotBegun)?;
        let (mut connection, greeting) = begun;
        let pod = greeted(hello, &greeting).map_err(End::Wrong)?;
        self.report.borrow_mut().connections += 1;
        let mut frame = [0; FRAME];
        for number in 0..frames {
            hello.fill(Direction::Up, number, &mut frame);
            let exchanged = timeout(LIMIT, async {
                connection.write_all(&frame).await.context("sending")?;
                connection.read_exact(&mut frame).await.context("receiving")
            });
            let exchanged = exchanged.await.context("it stands still").and_then(|exchanged| exchanged);
            exchanged.with_context(|| format!("frame {number}")).map_err(|error| End::Broken(pod, error))?;
            if !hello.expects(Direction::Down(pod), number, &frame) {
                return Err(End::Wrong(anyhow::anyhow!("pod {pod}, frame {number} of {hello:?} holds other bytes")));
            }
            self.report.borrow_mut().bytes += 2 * FRAME as u64;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(pod)
    }

    /// A socket with this many datagrams; says which pod answered last.
    async fn datagrams(&self, target: &Target, count: u32) -> Result<u32, End> {
        let first = self.hello(target);
        let any =
            Family::of(target.address.ip()).pick(std::net::Ipv4Addr::UNSPECIFIED, std::net::Ipv6Addr::UNSPECIFIED);
        let socket = async {
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(target.address).await?;
            std::io::Result::Ok(socket)
        };
        let socket = socket.await.context("connecting").map_err(End::NotBegun)?;
        let mut last = 0;
        for number in 0..count {
            let hello = Hello { number, ..first };
            match timeout(ANSWER, self.datagram(&socket, hello)).await {
                Ok(Ok(pod)) => last = pod,
                Ok(Err(End::Wrong(error))) => return Err(End::Wrong(error)),
                // Refused, or the socket was closed with its endpoint: another one asks on.
                Ok(Err(_)) => {
                    self.report.borrow_mut().lost += u64::from(target.steady);
                    return Ok(last);
                }
                Err(_) => self.report.borrow_mut().lost += u64::from(target.steady),
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(last)
    }

    /// A datagram there and back.
    async fn datagram(&self, socket: &UdpSocket, hello: Hello) -> Result<u32, End> {
        let mut payload = vec![0; hello.payload()];
        hello.fill(Direction::Up, hello.number, &mut payload);
        let sent = socket.send(&[&hello.to_bytes()[..], &payload].concat()).await;
        sent.context("sending").map_err(End::NotBegun)?;
        let mut answer = vec![0; 65_536];
        loop {
            let length = socket.recv(&mut answer).await.context("receiving").map_err(End::NotBegun)?;
            let answer = &answer[..length];
            // One that comes too late is checked as well.
            let late = Greeting::from_bytes(answer).map(|greeting| greeting.hello.number);
            let of = Hello { number: late.unwrap_or(hello.number).min(hello.number), ..hello };
            let checked = (|| {
                let pod = greeted(of, answer)?;
                let payload = &answer[Greeting::SIZE..];
                ensure!(payload.len() == of.payload(), "{} bytes in place of {}", payload.len(), of.payload());
                ensure!(
                    of.expects(Direction::Down(pod), of.number, payload),
                    "pod {pod} answers other bytes to {of:?}"
                );
                Ok(pod)
            })();
            let pod = checked.map_err(End::Wrong)?;
            if of.number == hello.number {
                let mut report = self.report.borrow_mut();
                report.datagrams += 1;
                report.bytes += (payload.len() * 2) as u64;
                return Ok(pod);
            }
        }
    }
}

/// Which pod has answered this hello.
fn greeted(hello: Hello, greeting: &[u8]) -> Result<u32> {
    let Some(greeting) = Greeting::from_bytes(greeting) else { bail!("{} bytes are no greeting", greeting.len()) };
    ensure!(greeting.hello == hello, "{greeting:?} answers {hello:?}");
    Ok(greeting.pod)
}
