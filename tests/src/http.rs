//! One HTTP request and its answer, in the calling thread's network namespace.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::client::LIMIT;
use crate::patience::patient;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// Headers, their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// If it isn't.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {self:?}"))
    }
}

/// GETs a path.
///
/// # Errors
/// If nobody answers, or not in HTTP.
pub fn get(address: SocketAddr, path: &str) -> Result<Answer> {
    let mut stream =
        TcpStream::connect_timeout(&address, patient(LIMIT)).with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(patient(LIMIT)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text).with_context(|| format!("an answer from {address}{path}"))?;
    let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no HTTP: {text:?}"))?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
    Ok(Answer { status: status.with_context(|| format!("no HTTP: {text:?}"))?, headers, body: body.to_owned() })
}
