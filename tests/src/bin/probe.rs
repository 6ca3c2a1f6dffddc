//! A client that is a process of its own, because connect-time balancing looks at processes: their cgroup and their
//! network namespace. Asks a server of `sheave_tests::server` and prints the counted answers as JSON.
//!
//! `probe tcp|tcp-bound|udp|udp-named|udp-unconnected ADDRESS:PORT[,ADDRESS:PORT] COUNT [PAUSE]`
//!
//! An IPv4-mapped address ([::ffff:10.96.0.10]:80) is asked by an AF_INET6 socket. Connected sockets must show the address
//! that was asked as their peer. `tcp-bound` binds to the address that it asks. `udp-named` names that address with every datagram of one connected socket. With several
//! targets, the one socket of `udp-unconnected` asks them in turn. PAUSE is in milliseconds.
//!
//! `probe hold ADDRESS:PORT` connects a UDP socket, and then does what `sheave_tests::held` asks for on standard input.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use sheave_tests::client::{self, Answers};
use sheave_tests::family::Family;
use sheave_tests::held;
use sheave_tests::patience::patient;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [protocol, targets, rest @ ..] = arguments.as_slice() else {
        bail!(
            "usage: probe tcp|tcp-bound|udp|udp-named|udp-unconnected|hold ADDRESS:PORT[,ADDRESS:PORT] [COUNT [PAUSE]]"
        );
    };
    let targets: Result<Vec<SocketAddr>, _> = targets.split(',').map(str::parse).collect();
    let targets = targets.context("a target is an ADDRESS:PORT")?;
    let target = targets[0];
    let number = |index: usize, default| rest.get(index).map_or(Ok(default), |number| number.parse::<u32>());
    let count = number(0, 1).context("the count is a number")? as usize;
    let pause = Duration::from_millis(number(1, 0).context("the pause is a number")?.into());
    let answers = match protocol.as_str() {
        "tcp" => {
            let mut answers = client::who_many(None, target, count, 2);
            if answers.failed == 0
                && let Err(error) = shown_by_tcp(target)
            {
                answers.add(Err(error));
            }
            answers
        }
        "tcp-bound" => repeat(count, || client::who_from((target.ip(), 0), target)),
        "udp" => repeat(count, || client::ask_udp_with(&connected(target)?, "ping")),
        "udp-named" => {
            let socket = connected(target)?;
            repeat(count, || ask(&socket, target))
        }
        "udp-unconnected" => {
            let any = Family::of(target.ip()).pick(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED);
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(patient(client::LIMIT)))?;
            let mut turn = targets.iter().cycle();
            repeat(count, || {
                std::thread::sleep(pause);
                ask(&socket, turn.next().copied().unwrap_or(target))
            })
        }
        "hold" => return held::serve(&client::udp_to(target)?, target),
        other => bail!("{other}: not a protocol"),
    };
    println!("{}", serde_json::to_string(&answers)?);
    Ok(())
}

fn repeat(count: usize, mut ask: impl FnMut() -> Result<client::Answer>) -> Answers {
    let mut answers = Answers::default();
    for _ in 0..count {
        answers.add(ask());
    }
    answers
}

fn shown_by_tcp(target: SocketAddr) -> Result<()> {
    let connection = TcpStream::connect_timeout(&target, patient(client::LIMIT));
    shows(connection.with_context(|| format!("connecting to {target}"))?.peer_addr()?, target)
}

fn connected(target: SocketAddr) -> Result<UdpSocket> {
    let socket = client::udp_to(target).with_context(|| format!("connecting to {target}"))?;
    socket.set_read_timeout(Some(patient(client::LIMIT)))?;
    shows(socket.peer_addr()?, target)?;
    Ok(socket)
}

fn shows(peer: SocketAddr, target: SocketAddr) -> Result<()> {
    ensure!(peer == target, "the socket is connected to {target}, and shows {peer}");
    Ok(())
}

/// The answer must come from the address that was asked, or a resolver would throw it away.
fn ask(socket: &UdpSocket, target: SocketAddr) -> Result<client::Answer> {
    socket.send_to(b"ping", target).context("sending")?;
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer).context("waiting for the answer")?;
    ensure!(from == target, "the answer came from {from}, not from {target}");
    client::parse_answer(&buffer[..length])
}
