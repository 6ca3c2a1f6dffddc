//! The Kubernetes source against API servers that lie, stutter and flap: what is known stays, nothing is listed in a storm, and
//! soon after the fault is over everything is as the server says.
//!
//! Nothing here needs root. Every wait is bounded by [`PATIENCE`].

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use sheave::model::desired::ServiceKey;
use sheave::source;
use sheave_tests::follower::{Folder, Follower, HERE, PATIENCE};
use sheave_tests::kube_api::{KubeApi, Resource, Verb};
use sheave_tests::leftovers::unique_name;
use sheave_tests::liar::{Answer, End, Liar};
use sheave_tests::log::Log;
use tokio::time::Instant;

/// Longer than the longest wait between two attempts, on a busy machine.
const LONG: Duration = Duration::from_secs(60);

const LIST: &str = "/services?&labelSelector=";
const WATCH: &str = "/services?&watch=true";

fn start(servers: &[String]) -> Follower {
    start_with(servers, "secret").0
}

/// With the token in a file, whose path this returns as well.
fn start_with(servers: &[String], token: &str) -> (Follower, PathBuf) {
    let folder = Folder::new(&unique_name());
    let servers = servers.to_vec();
    folder.write("token", token);
    let token = folder.path("token");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": servers[0]}}],
        "users": [{"name": "test", "user": {"tokenFile": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    });
    folder.write("config", &config.to_string());
    let path = folder.path("config");
    let follower = Follower::start(
        |sender| source::kubernetes::run(Some(path), servers, BTreeSet::new(), HERE.to_owned(), sender),
        folder,
    );
    (follower, token)
}

/// A server with a Service `web` and its endpoint, a liar before it, and a source that follows both and has synced.
async fn followed() -> (KubeApi, Liar, Follower) {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.apply(slice("web"));
    let liar = Liar::start(api.address());
    let running = start(&[liar.url()]).synced().await;
    eventually("a watch", || api.count(Resource::Services, Verb::Watch) >= 1).await;
    (api, liar, running)
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// With a ClusterIP that it shares with none that is called otherwise.
fn service(name: &str) -> Value {
    let number = name.bytes().fold(0_u16, |number, octet| number.wrapping_mul(31).wrapping_add(octet.into()));
    let [high, low] = number.to_be_bytes();
    json!({"kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": format!("10.96.{high}.{low}"), "ports": [{"port": 80}]}})
}

fn slice(service: &str) -> Value {
    json!({"kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-1"), "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": "", "port": 8080}], "endpoints": [{"addresses": ["10.1.0.1"]}]})
}

/// A line of a watch of Services, with resource version `version`.
fn event(change: &str, name: &str, version: &str) -> String {
    let mut object = service(name);
    object["apiVersion"] = "v1".into();
    object["metadata"]["namespace"] = "default".into();
    object["metadata"]["resourceVersion"] = version.into();
    format!("{{\"type\":\"{change}\",\"object\":{object}}}\n")
}

fn endpoints(follower: &Follower, service: &str) -> usize {
    let key = ServiceKey { namespace: "default".into(), name: service.into() };
    follower.model.desired(&key).values().map(|port| port.endpoints4.cluster.len()).sum()
}

fn gone() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "too old resource version", "reason": "Expired", "code": 410})
}

/// Has the next watch be followed by a list.
fn expired() -> Answer {
    Answer::new(WATCH, "410 Gone", "", &gone().to_string(), End::Close)
}

/// Takes connections away, so that the watches that come next can be answered.
async fn interrupted(api: &KubeApi, liar: &Liar) {
    api.disconnect();
    eventually("all the lies are told", || liar.unused() == 0).await;
}

/// Otherwise an event of which half had come would be missing until the next list.
#[tokio::test]
async fn half_an_event_is_asked_for_again() {
    let (api, liar, mut running) = followed().await;
    let version = api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
    let whole = event("DELETED", "other", &(version + 1).to_string());
    for (cut, end) in [(10, End::Close), (whole.len() / 2, End::Reset), (whole.len() - 2, End::Close)] {
        liar.answer(Answer::lines(WATCH, &whole[..cut], end));
    }
    interrupted(&api, &liar).await;
    api.delete(Resource::Services, "default", "other");
    running.until_services(&["web"]).await;
    assert_eq!(endpoints(&running, "web"), 1);
    assert_eq!(api.count(Resource::Services, Verb::List), 1, "the watch went on where it was");
}

/// Otherwise an event that nobody could read would be missing for ever, because the watch goes on behind it.
#[tokio::test]
async fn an_event_that_cannot_be_read_is_made_up_for_by_a_list() {
    let log = Log::default();
    let guard = log.follow();
    let (api, liar, mut running) = followed().await;
    let version = api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
    let after = event("MODIFIED", "web", &(version + 2).to_string());
    for unreadable in [
        "<html>busy</html>\n",
        "{\"type\":\"DELETED\",\"object\":{\"kind\":\"Service\",\"apiVersion\":\"v1\",\"metadata\":{\"name\":7}}}\n",
        "{\"type\":\"TURNED\",\"object\":{}}\n",
        "\u{1}\u{2}\u{3}\n",
    ] {
        let before = api.count(Resource::Services, Verb::List);
        liar.answer(Answer::lines(WATCH, &format!("{unreadable}{after}"), End::Hang));
        interrupted(&api, &liar).await;
        eventually("a list", || api.count(Resource::Services, Verb::List) > before).await;
    }
    api.delete(Resource::Services, "default", "other");
    running.until_services(&["web"]).await;
    assert_eq!(running.synced, 1);
    running.until("followed", |running| running.followed["Services"]).await;
    let warnings = log.lines_with("can't follow").len();
    assert!((1..=8).contains(&warnings), "{warnings} warnings: {:?}", log.lines_with(""));
    drop(guard);
}

/// Otherwise one odd object would end what all the others rest on.
#[tokio::test]
async fn objects_that_lack_what_every_object_has_change_nothing_for_others() {
    let (api, liar, mut running) = followed().await;
    let object = |text: &str| {
        format!("{{\"type\":\"ADDED\",\"object\":{{\"kind\":\"Service\",\"apiVersion\":\"v1\",{text}}}}}\n")
    };
    for odd in [
        object("\"metadata\":{\"resourceVersion\":\"2\"}"),
        object("\"metadata\":{\"name\":\"x\",\"resourceVersion\":\"2\"},\"spec\":null"),
        object(
            "\"metadata\":{\"name\":\"x\",\"namespace\":\"default\",\"resourceVersion\":\"2\"},\"spec\":{\"ports\":[{}]}",
        ),
        object("\"metadata\":{\"name\":\"no-version\"}"),
        object("\"metadata\":{\"name\":\"x\",\"resourceVersion\":\"no number\"}"),
    ] {
        liar.answer(Answer::lines(WATCH, &odd, End::Close));
    }
    interrupted(&api, &liar).await;
    api.apply(service("other"));
    running
        .until("the rest", |running| {
            running.services().is_superset(&BTreeSet::from(["other".to_owned(), "web".to_owned()]))
        })
        .await;
    assert_eq!(endpoints(&running, "web"), 1);
}

/// Otherwise a hiccup that the server tells within a watch would make every node list the cluster again.
#[tokio::test]
async fn an_error_within_a_watch_is_waited_out() {
    let (api, liar, mut running) = followed().await;
    for code in [500, 504, 429] {
        let error = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "message": "etcdserver: no leader", "reason": "Unknown", "code": code}});
        liar.answer(Answer::lines(WATCH, &format!("{error}\n"), End::Close));
    }
    interrupted(&api, &liar).await;
    running.until("noticed", |running| running.followed.get("Services") == Some(&false)).await;
    api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
    running.until("followed", |running| running.followed["Services"]).await;
    assert_eq!(api.count(Resource::Services, Verb::List), 1);
}

/// Otherwise what a watch repeats, or tells in another order, would stay.
#[tokio::test]
async fn events_that_come_twice_or_out_of_order_end_where_the_last_one_says() {
    let (api, liar, mut running) = followed().await;
    let version = api.apply(service("last"));
    running.until_services(&["last", "web"]).await;
    let story: String = [
        ("DELETED", "never"),
        ("MODIFIED", "early"),
        ("ADDED", "early"),
        ("ADDED", "early"),
        ("DELETED", "early"),
        ("DELETED", "early"),
        ("ADDED", "last"),
        ("DELETED", "last"),
        ("MODIFIED", "last"),
        ("ADDED", "web"),
    ]
    .map(|(change, name)| event(change, name, &version.to_string()))
    .concat();
    // Then older ones than those.
    let older = event("ADDED", "early", "1")
        + &event("DELETED", "early", "1")
        + &event("MODIFIED", "web", &version.to_string());
    liar.answer(Answer::lines(WATCH, &(story + &older), End::Close));
    interrupted(&api, &liar).await;
    api.apply(service("end"));
    running.until_services(&["end", "last", "web"]).await;
    assert_eq!(endpoints(&running, "web"), 1);
}

/// Otherwise a server whose history always ends would be asked for whole lists as fast as it answers, by every node.
#[tokio::test]
async fn a_history_that_always_ends_is_not_listed_in_a_storm() {
    let (api, liar, mut running) = followed().await;
    for round in 0..40 {
        liar.answer(if round % 2 == 0 {
            expired()
        } else {
            Answer::lines(WATCH, &format!("{}\n", json!({"type": "ERROR", "object": gone()})), End::Close)
        });
    }
    let before = api.count(Resource::Services, Verb::List);
    api.disconnect();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let lists = api.count(Resource::Services, Verb::List) - before;
    assert!((2..=6).contains(&lists), "{lists} lists in 4 s");
    api.apply(service("other"));
    running.until("the other Service", |running| running.services().contains("other")).await;
    liar.forget();
    api.delete(Resource::Services, "default", "other");
    running.until_services(&["web"]).await;
    assert_eq!(endpoints(&running, "web"), 1);
}

/// Otherwise a server that has too much to do would get even more.
#[tokio::test]
async fn a_server_that_asks_to_be_left_alone_is() {
    let (api, liar, mut running) = followed().await;
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let (busy, headers) = (json!({"kind": "Status", "status": "Failure", "code": 429}), "Retry-After: 2\r\n");
        liar.answer(Answer::new(WATCH, status, headers, &busy.to_string(), End::Close));
        interrupted(&api, &liar).await;
        let (asked, at) = (api.count(Resource::Services, Verb::Watch), Instant::now());
        eventually("another attempt", || api.count(Resource::Services, Verb::Watch) > asked).await;
        assert!(at.elapsed() > Duration::from_millis(1_900), "asked again after {:?}", at.elapsed());
    }
    api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
}

/// Otherwise Services of the part that had not come would be pruned.
#[tokio::test]
async fn a_list_that_breaks_off_prunes_nothing() {
    let (api, liar, mut running) = followed().await;
    let list = json!({"kind": "ServiceList", "apiVersion": "v1", "metadata": {"resourceVersion": "9"}, "items": []});
    let list = list.to_string();
    let length = format!("Content-Length: {}\r\n", list.len());
    liar.answer(expired());
    for end in [End::Reset, End::Close] {
        liar.answer(Answer::new(LIST, "200 OK", &length, &list[..list.len() / 2], end));
    }
    liar.answer(Answer::new(LIST, "200 OK", "", "[]", End::Close));
    liar.answer(Answer::new(LIST, "200 OK", "", "", End::Close));
    liar.answer(Answer::new(LIST, "302 Found", "Location: /login\r\n", "<html>", End::Close));
    api.apply(service("other"));
    interrupted(&api, &liar).await;
    running.until_services(&["other", "web"]).await;
    let pruned = |change: &sheave::model::Change| matches!(change, sheave::model::Change::ServicesReplaced(services) if services.is_empty());
    assert!(!running.changes.iter().any(pruned), "{:?}", running.changes);
    assert_eq!((endpoints(&running, "web"), running.synced), (1, 1));
}

/// Otherwise a huge object would cut a node off from its cluster.
#[tokio::test]
async fn an_object_of_ten_megabytes_is_read() {
    let (api, liar, mut running) = followed().await;
    let mut large = service("large");
    large["metadata"]["annotations"]["note"] = "x".repeat(10 << 20).into();
    api.apply(large);
    running.until_services(&["large", "web"]).await;
    // In a list, too.
    liar.answer(expired());
    interrupted(&api, &liar).await;
    api.apply(service("other"));
    eventually("a list", || api.count(Resource::Services, Verb::List) == 2).await;
    running.until_services(&["large", "other", "web"]).await;
}

/// Otherwise whatever answers in an API server's place could take all of a node's memory.
#[tokio::test]
async fn an_answer_without_end_is_given_up_before_it_fills_the_memory() {
    const GARBAGE: &[u8] = &[b'x'; 65_536];
    let log = Log::default();
    let guard = log.follow();
    let (api, liar, mut running) = followed().await;
    for (request, most) in [(WATCH, 24 << 20), (LIST, 160 << 20)] {
        let before = liar.sent();
        if request == LIST {
            liar.answer(expired());
        }
        liar.answer(Answer::lines(request, "", End::Endless(GARBAGE)));
        interrupted(&api, &liar).await;
        let name = if request == LIST { "second" } else { "first" };
        api.apply(service(name));
        running.until_within(LONG, "the new one", |running| running.services().contains(name)).await;
        let sent = liar.sent() - before;
        assert!(sent < most, "{sent} octets were taken");
    }
    running.until_services(&["first", "second", "web"]).await;
    assert!(log.lines_with("MiB").len() <= 2, "{:?}", log.lines_with("MiB"));
    drop(guard);
}

/// Otherwise a server that comes and goes would leave some changes out, or fill the log.
#[tokio::test]
async fn a_server_that_comes_and_goes_is_followed_whenever_it_is_there() {
    let log = Log::default();
    let guard = log.follow();
    let (api, _liar, mut running) = followed().await;
    for round in 0..12 {
        match round % 3 {
            0 => api.refuse(true),
            1 => api.fail(None, [500, 503, 429][round / 3 % 3]),
            _ => {
                api.refuse(false);
                api.heal();
            }
        }
        api.apply(service(&format!("web-{round}")));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A server that has failed for long is asked twice a minute.
    running.until_within(LONG, "everything", |running| running.services().len() == 13).await;
    running.until_within(LONG, "followed", |running| running.followed.values().all(|followed| *followed)).await;
    assert_eq!(endpoints(&running, "web"), 1);
    let lines = log.lines_with("").len();
    assert!(lines < 60, "{lines} lines in the log");
    drop(guard);
}

/// Otherwise a node would trust its memory more than its cluster, whose older state may be all that is left (a restored etcd), or
/// would stay behind with a server that lags.
#[tokio::test]
async fn an_older_state_of_another_server_is_taken_over_and_so_is_what_it_learns() {
    let (ahead, lagging) = (KubeApi::start().await, KubeApi::start().await);
    for api in [&ahead, &lagging] {
        api.apply(service("web"));
        api.apply(slice("web"));
        api.apply(service("old"));
    }
    for name in ["new", "newer"] {
        ahead.apply(service(name));
    }
    ahead.delete(Resource::Services, "default", "old");
    let mut running = start(&[ahead.url(), lagging.url()]).synced().await;
    running.until_services(&["new", "newer", "web"]).await;
    eventually("a watch", || ahead.count(Resource::Services, Verb::Watch) >= 1).await;
    ahead.refuse(true);
    // Its history is shorter than where the watch was, so it is listed.
    running.until_services(&["old", "web"]).await;
    for name in ["new", "newer"] {
        lagging.apply(service(name));
    }
    lagging.delete(Resource::Services, "default", "old");
    running.until_services(&["new", "newer", "web"]).await;
    assert_eq!((endpoints(&running, "web"), running.synced), (1, 1));
}

/// Otherwise a node whose clock was set back would show a token of long ago until the clock has caught up: tokens are read again
/// by the wall clock, and here it is as far from that as it ever is.
#[tokio::test]
async fn a_token_that_is_refused_is_read_again_whatever_the_clock_says() {
    let api = KubeApi::start().await;
    api.apply(service("web"));
    api.require_token("old");
    let (running, token) = start_with(&[api.url()], "old");
    let mut running = running.synced().await;
    std::fs::write(token, "new").expect("written");
    api.require_token("new");
    api.disconnect();
    api.apply(service("other"));
    running.until_services(&["other", "web"]).await;
}

/// Otherwise a server that takes connections and says nothing any more would leave a node without changes.
#[tokio::test]
#[ignore = "slow: waits for the end of a silent watch, five and a half minutes"]
async fn a_watch_that_hangs_without_bookmarks_is_begun_anew() {
    let (api, liar, mut running) = followed().await;
    liar.answer(Answer::lines(WATCH, "", End::Hang));
    interrupted(&api, &liar).await;
    let at = Instant::now();
    api.apply(service("other"));
    while !running.services().contains("other") {
        assert!(at.elapsed() < Duration::from_secs(340), "nothing for {:?}", at.elapsed());
        running.settle().await;
    }
    assert_eq!(api.count(Resource::Services, Verb::List), 1);
}
