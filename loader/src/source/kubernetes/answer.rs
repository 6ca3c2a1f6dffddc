//! What an API server answers, as far as HTTP: never more than fits into memory, and how long it asks to be left alone.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use http::{Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, BodyStream, StreamBody};
use kube::client::Body;
use tower::BoxError;

/// The largest event of a watch, which is one line. etcd takes objects of 1.5 MiB unless it is told otherwise.
const LARGEST_EVENT: usize = 16 << 20;
/// The largest page of a list, which is read as a whole before it is understood.
const LARGEST_PAGE: usize = 128 << 20;
/// The longest that a server may ask to be left alone.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// A body that fails where it becomes too large.
pub(super) type LimitedBody = UnsyncBoxBody<Bytes, BoxError>;

/// The answer, which fails where it becomes larger than anything that an API server sends: it may be no API server at all.
/// `watch`: it is a stream of lines, each an event.
pub(super) fn limited(answer: Response<Body>, watch: bool) -> Response<LimitedBody> {
    let limit = if watch { LARGEST_EVENT } else { LARGEST_PAGE };
    answer.map(|body| {
        let mut length = 0;
        let frames = BodyStream::new(body).map(move |frame| {
            let frame = frame.map_err(BoxError::from)?;
            if let Some(data) = frame.data_ref() {
                length = grown(length, data, watch);
                if length > limit {
                    return Err(format!("an answer of more than {} MiB is no API server's", limit >> 20).into());
                }
            }
            Ok(frame)
        });
        StreamBody::new(frames).boxed_unsync()
    })
}

/// How long what is to be kept in memory has become: since the last line's end, or in all.
fn grown(length: usize, data: &[u8], watch: bool) -> usize {
    match data.iter().rposition(|octet| *octet == b'\n').filter(|_| watch) {
        Some(end) => data.len() - end - 1,
        None => length + data.len(),
    }
}

/// How long a server that has too much to do asks not to be asked.
pub(super) fn rest(answer: &Response<Body>) -> Option<Duration> {
    let busy = matches!(answer.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let seconds = answer.headers().get(header::RETRY_AFTER).filter(|_| busy)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_REST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_may_go_on_for_ever_and_its_events_may_not() {
        assert_eq!(grown(10, b"abc", true), 13);
        assert_eq!(grown(10, b"abc\nde\nf", true), 1);
        assert_eq!(grown(10, b"abc\n", true), 0);
        assert_eq!(grown(10, b"abc\nde\nf", false), 18);
    }

    #[test]
    fn a_busy_server_is_left_alone_but_not_for_ever() {
        let asks = |status: u16, seconds: &str| {
            let answer = Response::builder().status(status).header(header::RETRY_AFTER, seconds);
            rest(&answer.body(Body::empty()).expect("a sound response"))
        };
        assert_eq!(asks(429, "2"), Some(Duration::from_secs(2)));
        assert_eq!(asks(503, "86400"), Some(LONGEST_REST));
        assert_eq!(asks(429, "Fri, 31 Dec 1999 23:59:59 GMT"), None, "API servers give seconds");
        assert_eq!(asks(500, "2"), None);
    }
}
