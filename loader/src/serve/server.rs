//! The HTTP servers that all of Sheave's answers go through: small answers to short requests, and nobody who holds many
//! connections, or sends slowly, can use this process up.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

pub(super) type Request = http::Request<Incoming>;
pub(super) type Answer = Response<Full<Bytes>>;

/// How long a server waits before it tries again to get its address and port.
pub(super) const RETRY: Duration = Duration::from_secs(2);
/// How long a client may take to send a request, and may keep a connection without one.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections of one server at a time; for more, the oldest go. Whoever sends a request at once has its answer by then, so
/// it is those who only hold a connection that lose it.
const CONNECTIONS: usize = 128;
const BACKLOG: i32 = 128;
/// The pause after a connection could not be accepted, which is mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Raises this process's limit of file descriptors as far as it may: every health check of a Service is a socket on
/// each address, and a thousand of them are the usual limit. (Go raises it for kube-proxy, unasked.)
pub(super) fn allow_many_sockets() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a writable rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is a sound rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A listener on one address. It need not be an address of this machine (yet): it will answer once it is.
pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // Connections of a predecessor that linger do not count.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves on an address for as long as it is polled; an address that can't be had is tried again and again.
pub(super) async fn serve_at<F, A>(name: &'static str, address: SocketAddr, answer: F)
where
    F: Fn(Request) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send,
{
    let mut said = None;
    loop {
        match listen(address) {
            Ok(listener) => {
                info!(server = name, %address, "serving");
                serve(listener, answer).await;
                return;
            }
            // A kernel without IPv6 won't get it.
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
                info!(server = name, %address, "not served: this kernel doesn't have this family of addresses");
                return;
            }
            Err(error) => {
                let text = error.to_string();
                if said.as_ref() != Some(&text) {
                    warn!(server = name, %address, error = text, "cannot serve; will try again, all else goes on");
                    said = Some(text);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Serves connections for as long as it is polled. Its end is theirs.
pub(super) async fn serve<F, A>(listener: TcpListener, answer: F)
where
    F: Fn(Request) -> A + Clone + Send + 'static,
    A: Future<Output = Answer> + Send,
{
    let mut connections = JoinSet::new();
    // The oldest first.
    let mut open: VecDeque<AbortHandle> = VecDeque::with_capacity(CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(_) => {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        open.retain(|connection| !connection.is_finished());
        if open.len() == CONNECTIONS
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        let answer = answer.clone();
        open.push_back(connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT);
            // How a client ends its connection is its own affair.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        }));
    }
}

/// A document in JSON, as health checks get it.
pub(super) fn json(status: StatusCode, document: &impl serde::Serialize) -> Answer {
    let body = serde_json::to_vec(document).unwrap_or_default();
    let mut answer = with_type(status, HeaderValue::from_static("application/json"), body);
    answer.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

/// Any body of a type.
pub(super) fn with_type(status: StatusCode, content_type: HeaderValue, body: impl Into<Bytes>) -> Answer {
    let mut answer = Answer::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
    answer
}

/// There is nothing of this name.
pub(super) fn not_found(paths: &str) -> Answer {
    let text = format!("not here; there is {paths}\n");
    with_type(StatusCode::NOT_FOUND, HeaderValue::from_static("text/plain; charset=utf-8"), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_descriptors_is_raised_to_what_is_allowed() {
        let limit = || {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: `limit` is a writable rlimit.
            assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) }, 0);
            limit
        };
        let lower = libc::rlimit { rlim_cur: 500, rlim_max: limit().rlim_max };
        // SAFETY: `lower` is a sound rlimit.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const lower) }, 0);
        allow_many_sockets().unwrap();
        assert_eq!(limit().rlim_cur, lower.rlim_max);
    }

    #[tokio::test]
    async fn an_address_is_served_before_the_machine_has_it_and_a_taken_port_is_an_error() {
        let absent = listen("192.0.2.77:0".parse().unwrap()).unwrap();
        assert_eq!(absent.local_addr().unwrap().ip().to_string(), "192.0.2.77");
        let first = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let again = listen(first.local_addr().unwrap()).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
    }
}
