//! Panics: a request that panics ends alone, and everything that it held is given back.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::AsyncWriteExt as _;
use tokio_util::sync::CancellationToken;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_tests::client::Client;
use weir_tests::cluster::gateway_over;
use weir_tests::redis::Redis;

use super::script::Backends;
use super::{at_rest, leases, left_over, page, resources, sum};
use crate::lab::http1::{self, End};
use crate::lab::http2::{self, DATA, END_STREAM, Ended, HEADERS, Http2, Next, RST_STREAM};
use crate::lab::{SOON, connect};

/// A log that panics at every line with this text.
struct Bug {
    text: &'static str,
    panicked: &'static AtomicU32,
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl Subscriber for Bug {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("weir") && metadata.is_event()
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        if message.0 == self.text {
            self.panicked.fetch_add(1, Ordering::Relaxed);
            panic!("a bug at the line '{}'", self.text);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The place at which a request panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// While its backend is asked.
    Answer,
    /// At the end of its stream, when its answer is dropped.
    End,
}

/// Panics happen only on the thread of the test, which is the gateway's only thread.
#[tokio::test]
async fn a_panic_costs_one_request_and_gives_everything_back() {
    for (at, text, act) in [
        (At::Answer, "no answer", "closed"),
        (
            At::End,
            "usage reported by the backend cannot be true; tokens were counted by the gateway",
            "absurd",
        ),
    ] {
        let panicked: &'static AtomicU32 = Box::leak(Box::default());
        let _log = tracing::subscriber::set_default(Bug { text, panicked });
        for is_http2 in [false, true] {
            let before = panicked.load(Ordering::Relaxed);
            let end = CancellationToken::new();
            let _guard = end.clone().drop_guard();
            let (backends, redis) = (Backends::start(&end).await, Redis::start().await);
            let limiter =
                RedisLimiter::connect(&redis.url(), RedisOptions::default()).await.expect("a Redis");
            let gateway = gateway_over(&resources(&backends), limiter.into()).await;
            let clients = gateway.running.address;
            // Another test may have come to the line first, just while this one set its log: then it is taken for one that nobody
            // reads, until it is looked at again.
            tracing::callsite::rebuild_interest_cache();
            match is_http2 {
                false => old(clients, at, act).await,
                true => new(clients, at, act).await,
            }
            assert_eq!(panicked.load(Ordering::Relaxed), before + 1, "{at:?}, HTTP/2: {is_http2}");
            // Others are served.
            let heard = http1::exchange(clients, http1::chat("gpt-4.1", "ok", true)).await;
            assert_eq!(heard.statuses(), [200], "{at:?}, HTTP/2: {is_http2}: {heard:?}");
            let ops = Client::new(gateway.running.ops_address, "");
            at_rest(&format!("{at:?}, HTTP/2: {is_http2}"), || async {
                let mut left = left_over(&ops).await;
                left.extend(leases(&redis).await);
                left
            })
            .await;
            let page = page(&ops).await;
            let internal = sum(&page, "weir_requests_total", "status=\"500\"");
            assert_eq!(internal, if at == At::Answer { 1.0 } else { 0.0 }, "{at:?}, HTTP/2: {is_http2}");
        }
    }
}

async fn old(clients: SocketAddr, at: At, act: &str) {
    let mut socket = connect(clients).await;
    socket.write_all(&http1::chat("gpt-4.1", act, false)).await.expect("sent");
    if at == At::Answer {
        // Its connection continues with the next request.
        socket.write_all(&http1::chat("gpt-4.1", "ok", true)).await.expect("sent");
        let heard = http1::listen(&mut socket, SOON).await;
        assert_eq!((heard.statuses(), heard.end), (vec![500, 200], End::Closed), "{heard:?}");
        let text = String::from_utf8_lossy(&heard.replies()[0].body).into_owned();
        assert!(text.contains("\"error\"") && !text.contains("bug"), "{text}");
    } else {
        let heard = http1::listen(&mut socket, SOON).await;
        // The head may be written with the end of a short answer.
        assert!(matches!(heard.statuses()[..], [] | [200]), "{heard:?}");
        assert_ne!(heard.end, End::Open, "a connection in doubt is closed: {heard:?}");
    }
}

async fn new(clients: SocketAddr, at: At, act: &str) {
    let mut connection = Http2::connect(clients, &[]).await;
    assert!(connection.send(&http2::chat(1, "gpt-4.1", "slower")).await);
    assert!(connection.send(&http2::chat(3, "gpt-4.1", act)).await);
    let ended = ends(&mut connection, [1, 3]).await;
    match at {
        At::Answer => assert_eq!(ended[&3], Ended::Answer(500)),
        At::End => assert!(matches!(ended[&3], Ended::Answer(200) | Ended::Reset(_)), "{ended:?}"),
    }
    assert_eq!(ended[&1], Ended::Answer(200), "{at:?}: the other stream of its connection");
    assert!(connection.send(&http2::models(5)).await);
    assert_eq!(connection.ended(5).await, Ended::Answer(200), "{at:?}: the next stream of its connection");
}

/// The ends of these streams, in any order.
async fn ends(connection: &mut Http2, streams: [u32; 2]) -> BTreeMap<u32, Ended> {
    let (mut statuses, mut ended) = (BTreeMap::new(), BTreeMap::new());
    while ended.len() < streams.len() {
        let Next::Frame(frame) = connection.next(SOON).await else { panic!("{statuses:?}, {ended:?}") };
        if let Some(status) = frame.status() {
            statuses.insert(frame.stream, status);
        }
        let is_end = matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0;
        if frame.kind == RST_STREAM {
            ended.entry(frame.stream).or_insert(Ended::Reset(frame.error().unwrap_or(u32::MAX)));
        } else if is_end && let Some(status) = statuses.get(&frame.stream) {
            ended.insert(frame.stream, Ended::Answer(*status));
        }
    }
    ended
}
