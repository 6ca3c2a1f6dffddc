//! What stands before an API server and answers some of its requests itself, with whatever octets a test wants: garbage, half
//! an answer, a reset. The rest passes through.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;

/// How an answer ends.
#[derive(Clone, Debug)]
pub enum End {
    /// As it should.
    Close,
    /// The connection is reset.
    Reset,
    /// Never, and nothing more comes.
    Hang,
    /// Never, and this comes again and again.
    Endless(&'static [u8]),
}

/// An answer to one request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// A part of the request's path and query.
    request: &'static str,
    octets: Vec<u8>,
    end: End,
}

impl Answer {
    /// For a request whose path and query contain `request`: these lines, with status 200, as a watch has them.
    #[must_use]
    pub fn lines(request: &'static str, lines: &str, end: End) -> Self {
        Self::new(request, "200 OK", "", lines, end)
    }

    /// The same with another status, further header lines (each with its end) and any text.
    #[must_use]
    pub fn new(request: &'static str, status: &str, headers: &str, text: &str, end: End) -> Self {
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}\r\n");
        Self { request, octets: [head.as_bytes(), text.as_bytes()].concat(), end }
    }
}

#[derive(Debug, Default)]
struct Shared {
    answers: Mutex<VecDeque<Answer>>,
    /// Ends answers that never end.
    over: Notify,
    sent: AtomicU64,
}

impl Shared {
    fn take(&self, request: &str) -> Option<Answer> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let place = answers.iter().position(|answer| request.contains(answer.request))?;
        answers.remove(place)
    }
}

/// Stands before an API server until it is dropped.
#[derive(Debug)]
pub struct Liar {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl Liar {
    /// Stands before the server at this address.
    ///
    /// # Panics
    /// If there is no free port.
    #[must_use]
    pub fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a listener can be made non-blocking");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared::default());
        let serving = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a non-blocking listener");
            while let Ok((client, _)) = listener.accept().await {
                // How a connection ends is its client's affair.
                tokio::spawn(serve(client, server, Arc::clone(&serving)));
            }
        });
        Self { address, shared, task }
    }

    /// `http://address:port`
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Will answer the next request that this is for, after those that were given before.
    pub fn answer(&self, answer: Answer) {
        self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner).push_back(answer);
    }

    /// Answers that no request has met yet.
    #[must_use]
    pub fn unused(&self) -> usize {
        self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Forgets them.
    pub fn forget(&self) {
        self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Octets of its own answers that clients have taken.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.over.notify_waiters();
    }
}

/// Serves a client's requests, which have no bodies and come one after the other.
async fn serve(client: TcpStream, server: SocketAddr, shared: Arc<Shared>) -> io::Result<()> {
    let (mut requests, answers) = client.into_split();
    let answers = Arc::new(tokio::sync::Mutex::new(answers));
    let mut upstream: Option<OwnedWriteHalf> = None;
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(requests.read_u8().await?);
        }
        let text = String::from_utf8_lossy(&head);
        if let Some(answer) = shared.take(text.lines().next().unwrap_or_default()) {
            return lie(&mut *answers.lock().await, answer, &shared).await;
        }
        let upstream = match &mut upstream {
            Some(upstream) => upstream,
            None => {
                let (from, to) = TcpStream::connect(server).await?.into_split();
                tokio::spawn(pass(from, Arc::clone(&answers)));
                upstream.insert(to)
            }
        };
        upstream.write_all(&head).await?;
    }
}

/// Brings the server's answers to a client.
async fn pass(mut from: OwnedReadHalf, to: Arc<tokio::sync::Mutex<OwnedWriteHalf>>) -> io::Result<()> {
    let mut octets = vec![0; 65_536];
    loop {
        let length = from.read(&mut octets).await?;
        if length == 0 {
            return to.lock().await.shutdown().await;
        }
        to.lock().await.write_all(&octets[..length]).await?;
    }
}

async fn lie(client: &mut OwnedWriteHalf, answer: Answer, shared: &Shared) -> io::Result<()> {
    client.write_all(&answer.octets).await?;
    shared.sent.fetch_add(answer.octets.len() as u64, Ordering::Relaxed);
    match answer.end {
        End::Close => client.shutdown().await,
        End::Reset => SockRef::from(client.as_ref()).set_linger(Some(Duration::ZERO)),
        End::Hang => {
            shared.over.notified().await;
            Ok(())
        }
        End::Endless(octets) => loop {
            client.write_all(octets).await?;
            shared.sent.fetch_add(octets.len() as u64, Ordering::Relaxed);
        },
    }
}
