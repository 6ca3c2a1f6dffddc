//! Asking a running Sheave on this node.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::config::BindAddresses;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(2);

/// GETs a path from the first of these addresses that answers.
///
/// # Errors
///
/// What the last one said, if none does.
pub(super) fn get(addresses: &BindAddresses, path: &str) -> io::Result<(StatusCode, String)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut answer = Err(io::Error::other("no address is given"));
    for address in &addresses.0 {
        let timed_out = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
        let asked =
            async { tokio::time::timeout(LIMIT, ask(reachable(*address), path)).await.unwrap_or_else(timed_out) };
        answer = runtime.block_on(asked);
        if answer.is_ok() {
            break;
        }
    }
    answer
}

async fn ask(address: SocketAddr, path: &str) -> io::Result<(StatusCode, String)> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, address.to_string()).body(Empty::<Bytes>::new());
    let answer = sender.send_request(request.map_err(io::Error::other)?).await.map_err(io::Error::other)?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(io::Error::other)?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

/// Where a server that listens on this address is reached from its own machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    let loopback: IpAddr = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    SocketAddr::new(if address.ip().is_unspecified() { loopback } else { address.ip() }, address.port())
}
