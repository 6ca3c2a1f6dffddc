//! HTTP: objects and lists as one document, watches as a stream of lines, failures as asked for.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Write as _;
use std::io;
use std::net::TcpListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{Method, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Collected, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::route::Route;
use super::selector::Selector;
use super::store::{Expired, Filter, Resource, Store};
use super::{Gone, Request, Verb, discovery, write};

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What is wrong with the server, and what it was asked.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) refuse: bool,
    pub(super) fail: Option<(Option<Resource>, u16)>,
    pub(super) gone: Gone,
    pub(super) end_watches: bool,
    pub(super) token: Option<String>,
    /// Bookmarks that every watch should have seen.
    pub(super) bookmarks: u64,
    pub(super) requests: Vec<Request>,
}

/// What the server and who steers it share.
pub(super) struct Shared {
    store: Mutex<Store>,
    faults: Mutex<Faults>,
    /// Something may be new for watches.
    news: watch::Sender<()>,
    /// How often connections were cut: those of an earlier generation have to end.
    generation: watch::Sender<u64>,
    /// Generations of the connections that live.
    living: Mutex<Vec<u64>>,
    ended: Condvar,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            store: Mutex::default(),
            faults: Mutex::default(),
            news: watch::Sender::new(()),
            generation: watch::Sender::new(0),
            living: Mutex::default(),
            ended: Condvar::new(),
        }
    }
}

impl Shared {
    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("no test has panicked inside")
    }

    pub(super) fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().expect("no test has panicked inside")
    }

    pub(super) fn wake(&self) {
        self.news.send_replace(());
    }

    /// Cuts every connection, and returns when none of them is left.
    pub(super) fn cut(&self) {
        let living = self.living.lock().expect("no test has panicked inside");
        self.generation.send_modify(|generation| *generation += 1);
        let generation = *self.generation.borrow();
        let older = |living: &mut Vec<u64>| living.iter().any(|birth| *birth < generation);
        let rest = self.ended.wait_timeout_while(living, Duration::from_secs(10), older);
        let rest = rest.expect("no test has panicked inside");
        assert!(!rest.1.timed_out(), "connections that were cut live on");
    }
}

/// A living connection.
struct Connection {
    shared: Arc<Shared>,
    birth: u64,
    generation: watch::Receiver<u64>,
}

impl Connection {
    fn new(shared: Arc<Shared>) -> Self {
        let mut living = shared.living.lock().expect("no test has panicked inside");
        let generation = shared.generation.subscribe();
        let birth = *generation.borrow();
        living.push(birth);
        drop(living);
        Self { shared, birth, generation }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut living = self.shared.living.lock().expect("no test has panicked inside");
        if let Some(position) = living.iter().position(|birth| *birth == self.birth) {
            living.swap_remove(position);
        }
        self.shared.ended.notify_all();
    }
}

/// Serves connections for ever.
pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a non-blocking listener");
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let mut life = Connection::new(Arc::clone(&shared));
        if shared.faults().refuse {
            continue;
        }
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // `life` is captured, so it ends after the connection, which is a local.
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, request).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // How a client ends its connection is its own affair.
                _ = connection => {}
                _ = life.generation.changed() => {}
            }
        });
    }
}

async fn answer(shared: &Arc<Shared>, request: http::Request<Incoming>) -> Response<Body> {
    let query = decode_query(request.uri().query().unwrap_or_default());
    let header =
        |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (authorization, content_type) = (header(header::AUTHORIZATION), header(header::CONTENT_TYPE));
    let path = request.uri().path();
    let Some(route) = Route::parse(path) else {
        return match discovery::document(path) {
            Some(document) => respond(StatusCode::OK, whole(&document)),
            None => failure(404, "NotFound", "the server could not find the requested resource"),
        };
    };
    let watches = query.get("watch").is_some_and(|watch| watch == "true" || watch == "1");
    let verb = match (request.method(), &route.name) {
        (&Method::GET, None) if watches => Verb::Watch,
        (&Method::GET, None) => Verb::List,
        (&Method::GET, Some(_)) => Verb::Get,
        (&Method::POST, None) => Verb::Create,
        (&Method::PUT, Some(_)) => Verb::Replace,
        (&Method::PATCH, Some(_)) => Verb::Patch,
        (&Method::DELETE, Some(_)) => Verb::Delete,
        _ => {
            return failure(405, "MethodNotAllowed", "the server does not allow this method on the requested resource");
        }
    };
    {
        let mut faults = shared.faults();
        faults.requests.push(Request { resource: route.resource, verb, query: query.clone() });
        if faults.token.as_ref().is_some_and(|token| authorization != format!("Bearer {token}")) {
            return failure(401, "Unauthorized", "Unauthorized");
        }
        let is_meant = |failing: &Option<Resource>| failing.is_none_or(|failing| failing == route.resource);
        if let Some((_, status)) = faults.fail.filter(|(failing, _)| is_meant(failing)) {
            return failure(status, "InternalError", "told to fail");
        }
    }
    let filter = Filter {
        resource: route.resource,
        namespace: route.namespace.clone(),
        labels: Selector::parse(query.get("labelSelector").map_or("", String::as_str)),
        name: query.get("fieldSelector").and_then(|fields| Some(fields.strip_prefix("metadata.name=")?.to_owned())),
    };
    let Ok(body) = request.into_body().collect().await.map(Collected::to_bytes) else {
        return failure(400, "BadRequest", "the request ended too early");
    };
    if !content_type.is_empty() && !content_type.contains("json") {
        return failure(415, "UnsupportedMediaType", &format!("{content_type} is not served here, only JSON"));
    }
    let answer = match verb {
        Verb::List => return list(shared, &filter, &query),
        Verb::Watch => return watch(shared, filter, &query),
        Verb::Get => write::get(&shared.store(), &route),
        Verb::Create => write::create(&mut shared.store(), &route, &body),
        Verb::Replace => write::replace(&mut shared.store(), &route, &body),
        Verb::Patch => write::patch(&mut shared.store(), &route, &content_type, &body),
        Verb::Delete => write::delete(&mut shared.store(), &route),
    };
    shared.wake();
    match answer {
        Ok((status, object)) => respond(status, whole(&object)),
        Err(refusal) => failure(refusal.status.as_u16(), refusal.reason, &refusal.message),
    }
}

fn list(shared: &Shared, filter: &Filter, query: &BTreeMap<String, String>) -> Response<Body> {
    let limit = query.get("limit").and_then(|limit| limit.parse().ok()).filter(|limit| *limit > 0);
    let token = query.get("continue").map(String::as_str);
    let Ok(page) = shared.store().list(filter, limit.unwrap_or(usize::MAX), token) else {
        return failure(410, "Expired", "The provided continue parameter is too old");
    };
    let mut metadata = json!({"resourceVersion": page.version.to_string()});
    if let Some(next) = page.next {
        metadata["continue"] = next.into();
        metadata["remainingItemCount"] = page.remaining.into();
    }
    let list = json!({
        "kind": format!("{}List", filter.resource.kind()),
        "apiVersion": filter.resource.api_version(),
        "metadata": metadata,
        "items": page.items,
    });
    respond(StatusCode::OK, whole(&list))
}

fn watch(shared: &Arc<Shared>, filter: Filter, query: &BTreeMap<String, String>) -> Response<Body> {
    let version = match query.get("resourceVersion").map(|version| version.parse()) {
        None => shared.store().version(),
        Some(Ok(version)) => version,
        Some(Err(_)) => return failure(400, "BadRequest", "resourceVersion: Invalid value: not a number"),
    };
    let is_expired = shared.store().events_after(version, &filter).is_err();
    let gone = shared.faults().gone;
    if is_expired && gone == Gone::Status {
        return failure(410, "Expired", "too old resource version");
    }
    let seconds = query.get("timeoutSeconds").and_then(|seconds| seconds.parse().ok()).unwrap_or(1800);
    let watcher = Watcher {
        news: shared.news.subscribe(),
        bookmarks: shared.faults().bookmarks,
        shared: Arc::clone(shared),
        filter,
        version,
        wants_bookmarks: query.get("allowWatchBookmarks").is_some_and(|allow| allow == "true"),
        deadline: Instant::now() + Duration::from_secs(seconds),
        ended: false,
    };
    let frames = watcher.lines().map(|lines| Ok(Frame::data(lines)));
    respond(StatusCode::OK, StreamBody::new(frames).boxed_unsync())
}

/// One watch, and how far it has come.
struct Watcher {
    shared: Arc<Shared>,
    news: watch::Receiver<()>,
    filter: Filter,
    version: u64,
    wants_bookmarks: bool,
    bookmarks: u64,
    deadline: Instant,
    ended: bool,
}

impl Watcher {
    /// Lines of JSON, one an event, until the watch's time is over.
    fn lines(self) -> impl Stream<Item = Bytes> + Send {
        futures::stream::unfold(self, |mut watcher| async move {
            loop {
                if watcher.ended {
                    return None;
                }
                watcher.news.mark_unchanged();
                let lines = watcher.due();
                if watcher.shared.faults().end_watches {
                    return None;
                }
                if !lines.is_empty() {
                    return Some((Bytes::from(lines), watcher));
                }
                tokio::time::timeout_at(watcher.deadline, watcher.news.changed()).await.ok()?.ok()?;
            }
        })
    }

    fn due(&mut self) -> String {
        let mut lines = String::new();
        let mut line = |change: &str, object: &Value| {
            // In this order, as API servers write it: a reader that knows the type first needs to look at the object only once.
            let _ = writeln!(lines, "{{\"type\":\"{change}\",\"object\":{object}}}");
        };
        let store = self.shared.store();
        match store.events_after(self.version, &self.filter) {
            Ok(events) => {
                for event in events {
                    line(event.change, &event.object);
                }
                self.version = store.version();
            }
            Err(Expired) => {
                line("ERROR", &status(410, "Expired", "too old resource version"));
                self.ended = true;
            }
        }
        let bookmarks = self.shared.faults().bookmarks;
        if self.wants_bookmarks && std::mem::replace(&mut self.bookmarks, bookmarks) < bookmarks {
            let (kind, api_version) = (self.filter.resource.kind(), self.filter.resource.api_version());
            let metadata = json!({"resourceVersion": self.version.to_string(), "creationTimestamp": null});
            line("BOOKMARK", &json!({"kind": kind, "apiVersion": api_version, "metadata": metadata}));
        }
        lines
    }
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason, "code": code})
}

fn failure(code: u16, reason: &str, message: &str) -> Response<Body> {
    respond(StatusCode::from_u16(code).expect("a status"), whole(&status(code, reason, message)))
}

/// A body that is there at once.
fn whole(document: &Value) -> Body {
    Full::from(document.to_string()).map_err(|never| match never {}).boxed_unsync()
}

fn respond(status: StatusCode, body: Body) -> Response<Body> {
    let response = Response::builder().status(status).header(header::CONTENT_TYPE, "application/json");
    response.body(body).expect("a sound response")
}

/// A query's parameters, percent-encoding undone.
fn decode_query(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decode(key), decode(value))).collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let hex = tail.get(..2).filter(|_| *first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        if let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(if *first == b'+' { b' ' } else { *first });
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
