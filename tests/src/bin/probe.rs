//! A client that is a process of its own, because connect-time balancing looks at processes: their cgroup and their
//! network namespace. Asks a server of `sheave_tests::server` and prints the counted answers as JSON.
//!
//! `probe tcp|udp|udp-unconnected ADDRESS:PORT[,ADDRESS:PORT] COUNT [PAUSE]`
//!
//! With several targets, the one socket of `udp-unconnected` asks them in turn. PAUSE is in milliseconds.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use sheave_tests::client::{self, Answers};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [protocol, targets, count, pause @ ..] = arguments.as_slice() else {
        bail!("usage: probe tcp|udp|udp-unconnected ADDRESS:PORT[,ADDRESS:PORT] COUNT [PAUSE]");
    };
    let targets: Result<Vec<SocketAddr>, _> = targets.split(',').map(str::parse).collect();
    let targets = targets.context("a target is an ADDRESS:PORT")?;
    let target = targets[0];
    let pause = pause.first().map_or(Ok(0), |pause| pause.parse()).context("the pause is a number")?;
    let count: usize = count.parse().context("the count is a number")?;
    let answers = match protocol.as_str() {
        "tcp" => client::who_many(None, target, count, 2),
        "udp" => repeat(count, || client::ask_udp(target, "ping")),
        "udp-unconnected" => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(client::LIMIT))?;
            let mut turn = targets.iter().cycle();
            repeat(count, || {
                std::thread::sleep(Duration::from_millis(pause));
                unconnected(&socket, turn.next().copied().unwrap_or(target))
            })
        }
        other => bail!("{other}: neither tcp nor udp nor udp-unconnected"),
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

/// The answer must come from the address that was asked, or a resolver would throw it away.
fn unconnected(socket: &UdpSocket, target: SocketAddr) -> Result<client::Answer> {
    socket.send_to(b"ping", target).context("sending")?;
    let mut buffer = [0; 1500];
    let (length, from) = socket.recv_from(&mut buffer).context("waiting for the answer")?;
    ensure!(from == target, "the answer came from {from}, not from {target}");
    client::parse_answer(&buffer[..length])
}
