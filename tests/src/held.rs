//! A UDP socket that a process of its own keeps open, as resolvers and log shippers do, and that answers to a test.
//!
//! The process is `probe hold`; each line on its standard input is one thing to do, each line that it prints is what came
//! of it.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result};

use crate::client;
use crate::process::{built, eventually};

const ASK: &str = "ask";
const CONNECT: &str = "connect";
const PEER: &str = "peer";
const DONE: &str = "done";
const ANSWER: &str = "answer";
const ERROR: &str = "error";

/// A held socket; its process ends on drop.
#[derive(Debug)]
pub struct Held {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Held {
    /// Connects a socket to a target. `command` makes the process, such as [`crate::agent::Agent::host_command`] with
    /// [`probe`].
    ///
    /// # Errors
    /// If it is not connected.
    pub fn connect(mut command: Command, target: SocketAddr) -> Result<Self> {
        let child = command.args(["hold", &target.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.context("cannot start the probe")?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut held = Self { child, input, output };
        held.answer().with_context(|| format!("holding a socket to {target}"))?;
        Ok(held)
    }

    /// Sends a datagram and returns who answers.
    ///
    /// # Errors
    /// The kernel's, or that there is no answer.
    pub fn ask(&mut self) -> Result<String> {
        self.request(ASK)
    }

    /// Connects the same socket again, to the same target.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reconnect(&mut self) -> Result<()> {
        self.request(CONNECT).map(drop)
    }

    /// Connects the same socket to another target.
    ///
    /// # Errors
    /// The kernel's.
    pub fn connect_to(&mut self, target: SocketAddr) -> Result<()> {
        self.request(&format!("{CONNECT} {target}")).map(drop)
    }

    /// Whom the socket shows as its peer.
    ///
    /// # Errors
    /// If it is not connected.
    pub fn peer(&mut self) -> Result<SocketAddr> {
        Ok(self.request(PEER)?.parse()?)
    }

    /// Asks until the kernel says that the socket was closed (ECONNABORTED), which is told once.
    ///
    /// # Errors
    /// If it isn't closed within a few seconds.
    pub fn wait_until_closed(&mut self) -> Result<()> {
        let aborted = io::Error::from_raw_os_error(libc::ECONNABORTED).to_string();
        eventually(std::time::Duration::from_secs(5), || match self.ask() {
            Ok(backend) => anyhow::bail!("the socket still talks to {backend}"),
            Err(error) if error.to_string().contains(&aborted) => Ok(()),
            Err(error) => Err(error),
        })
    }

    fn request(&mut self, request: &str) -> Result<String> {
        writeln!(self.input, "{request}").context("the probe has ended")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("the probe has ended")?;
        let (kind, text) = line.trim_end().split_once(' ').with_context(|| format!("the probe said {line:?}"))?;
        anyhow::ensure!(kind == ANSWER, "{text}");
        Ok(text.to_owned())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program that holds a socket.
///
/// # Errors
/// If it is not built.
pub fn probe() -> Result<std::path::PathBuf> {
    built("probe")
}

/// The probe's side: does what standard input asks for with a connected socket.
///
/// # Errors
/// If standard output is closed.
pub fn serve(socket: &UdpSocket, target: SocketAddr) -> Result<()> {
    socket.set_read_timeout(Some(std::time::Duration::from_millis(500)))?;
    let mut output = io::stdout();
    writeln!(output, "{ANSWER} {DONE}")?;
    for line in io::stdin().lines() {
        let line = line?;
        let outcome = match line.split_once(' ').unwrap_or((&line, "")) {
            (CONNECT, "") => connect(socket, target),
            (CONNECT, other) => connect(socket, other.parse()?),
            (PEER, _) => socket.peer_addr().map(|peer| peer.to_string()).context("getpeername"),
            _ => ask(socket),
        };
        match outcome {
            Ok(text) => writeln!(output, "{ANSWER} {text}")?,
            Err(error) => writeln!(output, "{ERROR} {error:#}")?,
        }
    }
    Ok(())
}

fn connect(socket: &UdpSocket, target: SocketAddr) -> Result<String> {
    socket.connect(target).map(|()| DONE.to_owned()).context("connecting")
}

fn ask(socket: &UdpSocket) -> Result<String> {
    // Of a socket that was closed, a send only says that it is not connected; why is the socket's pending error.
    socket.send(b"ping").or_else(|error| Err(socket.take_error()?.unwrap_or(error))).context("sending")?;
    let mut buffer = [0; 1500];
    let length = socket.recv(&mut buffer).context("waiting for the answer")?;
    Ok(client::parse_answer(&buffer[..length])?.backend)
}
