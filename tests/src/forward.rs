//! A road out of a network namespace to one TCP server: Sheave on a test's node reaches a real API server by it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::netns::Namespace;

/// Listens inside a namespace and passes every connection on to a server outside, until it is dropped.
#[derive(Debug)]
pub struct Forwarder {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Listens on 127.0.0.1 inside the namespace; `server` is a HOST:PORT as seen from the machine's own network.
    ///
    /// # Errors
    /// If it can't listen.
    pub fn start(namespace: &Namespace, server: &str) -> Result<Self> {
        let listener =
            namespace.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).context("a forwarder's listener")?;
        listener.set_nonblocking(true).context("a forwarder's listener")?;
        let address = listener.local_addr().context("a forwarder's listener")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("a runtime")?;
        let (stop, stopped) = oneshot::channel();
        let server = server.to_owned();
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, server) => {}
                    _ = stopped => {}
                }
            });
        });
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// How the two sides end is their own affair: a connection that fails is closed on both.
async fn accept(listener: TcpListener, server: String) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    loop {
        let Ok((mut inside, _)) = listener.accept().await else { continue };
        let server = server.clone();
        tokio::spawn(async move {
            if let Ok(mut outside) = TcpStream::connect(server).await {
                let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
            }
        });
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _: Result<(), ()> = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _: std::thread::Result<()> = thread.join();
        }
    }
}
