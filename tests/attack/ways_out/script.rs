//! The actions of backends, by the header `x-client-request-id`, which gateways forward.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use weir_tests::scripted::{
    Asked, Scripted, Wire, answer, chunk, completion, delta, event, head, json_answer, stream_end,
};

/// All actions of a backend.
pub(super) const ACTS: [&str; 24] = [
    "good",
    "good",
    "good",
    "good",
    "good",
    "good",
    "good",
    "slow",
    "slower",
    "reset",
    "closed",
    "hang",
    "hang-after-head",
    "hang-midway",
    "reset-midway",
    "close-midway",
    "garbage",
    "endless",
    "absurd",
    "busy",
    "away",
    "wrong",
    "blames-client",
    "error",
];
const USAGE: &str = r#"{"prompt_tokens":9,"completion_tokens":3,"total_tokens":12}"#;
/// More tokens than possible.
const ABSURD: &str =
    r#"{"prompt_tokens":1000000000000000,"completion_tokens":1000000000000000,"total_tokens":7}"#;
const JSON: (&str, &str) = ("content-type", "application/json");
/// The chunk of an endless answer.
const BURST_BYTES: usize = 16 << 10;

/// Three backends. The second and the third work normally if only the first one must fail.
pub(super) struct Backends {
    all: [Scripted; 3],
    asked: Arc<AtomicU64>,
    poured: Arc<AtomicU64>,
}

impl Backends {
    pub(super) async fn start(end: &CancellationToken) -> Self {
        let (asked, poured) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let one = async |number: u32| {
            let (count, poured) = (asked.clone(), poured.clone());
            Scripted::start(end, move |asked, wire| {
                if !asked.head.starts_with("GET ") {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                perform(asked, wire, number, poured.clone())
            })
            .await
        };
        Self { all: [one(0).await, one(1).await, one(2).await], asked: asked.clone(), poured: poured.clone() }
    }

    pub(super) fn addresses(&self) -> [SocketAddr; 3] {
        [self.all[0].address, self.all[1].address, self.all[2].address]
    }

    /// The number of requests, without health checks.
    pub(super) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// The bytes of endless answers that were sent.
    pub(super) fn poured(&self) -> u64 {
        self.poured.load(Ordering::Relaxed)
    }
}

async fn perform(asked: Asked, mut wire: Wire, number: u32, poured: Arc<AtomicU64>) -> Option<Wire> {
    if asked.head.starts_with("GET ") {
        let list = r#"{"object":"list","data":[{"id":"gpt-4.1"},{"id":"passing"}]}"#;
        wire.send(answer(200, &[JSON], list)).await;
        return Some(wire);
    }
    let act = asked.header("x-client-request-id").unwrap_or("good");
    let act = match act.strip_prefix("first-") {
        Some(_) if number > 0 => "good",
        Some(act) => act,
        None => act,
    };
    let is_stream = String::from_utf8_lossy(&asked.body).contains(r#""stream":true"#);
    let begin = || match is_stream {
        true => head(200, &[("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]),
        false => head(200, &[JSON, ("content-length", "100000")]),
    };
    let begun = if is_stream { chunk(delta("hello")) } else { b"{\"id\":\"c\",".to_vec() };
    match act {
        "slow" | "slower" => {
            let pause = Duration::from_millis(if act == "slow" { 20 } else { 100 });
            if !is_stream {
                tokio::time::sleep(pause * 5).await;
                wire.send(json_answer("hello", USAGE)).await;
                return Some(wire);
            }
            wire.send(begin()).await;
            for _ in 0..5 {
                tokio::time::sleep(pause).await;
                if !wire.send(chunk(delta("hello"))).await {
                    return None;
                }
            }
            wire.send([chunk(stream_end(USAGE)), chunk("")].concat()).await;
            Some(wire)
        }
        "reset" => wire.reset(),
        "closed" => None,
        "hang" => {
            wire.until_closed().await;
            None
        }
        "hang-after-head" => {
            wire.send(begin()).await;
            wire.until_closed().await;
            None
        }
        "hang-midway" | "reset-midway" | "close-midway" => {
            wire.send([begin(), begun].concat()).await;
            match act {
                "hang-midway" => wire.until_closed().await,
                // A pause, so that the earlier bytes have arrived or not by then.
                _ => tokio::time::sleep(Duration::from_millis(asked.number % 50)).await,
            }
            if act == "reset-midway" { wire.reset() } else { None }
        }
        "garbage" => {
            wire.send(b"\0\xff\x01 what? \r\n\r\n\r\n").await;
            None
        }
        "endless" => {
            let one = delta(&"a".repeat(1000));
            let burst = one.repeat(BURST_BYTES / one.len());
            wire.send(match is_stream {
                true => begin(),
                false => head(200, &[JSON, ("transfer-encoding", "chunked")]),
            })
            .await;
            let burst = chunk(burst);
            while wire.send(&burst).await {
                poured.fetch_add(burst.len() as u64, Ordering::Relaxed);
                // Not as fast as the machine, so that the other draws get their turn.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            None
        }
        "busy" => {
            wire.send(answer(429, &[JSON, ("retry-after", "1")], "{}")).await;
            Some(wire)
        }
        "away" => {
            wire.send(answer(503, &[JSON], "{}")).await;
            Some(wire)
        }
        "wrong" => {
            wire.send(answer(500, &[JSON], "{}")).await;
            Some(wire)
        }
        "blames-client" => {
            wire.send(answer(400, &[JSON], r#"{"error":{"message":"no","code":"no"}}"#)).await;
            Some(wire)
        }
        "error" if is_stream => {
            let error = event(r#"{"error":{"message":"no","code":"no"}}"#);
            let events = if asked.number.is_multiple_of(2) { error } else { delta("hello") + &error };
            wire.send([begin(), chunk(events), chunk("")].concat()).await;
            Some(wire)
        }
        "error" => {
            wire.send(answer(200, &[JSON], r#"{"error":{"message":"no","code":"no"}}"#)).await;
            Some(wire)
        }
        act => {
            let usage = if act == "absurd" { ABSURD } else { USAGE };
            let whole = match is_stream {
                true => [begin(), chunk(delta("hello")), chunk(stream_end(usage)), chunk("")].concat(),
                false => answer(200, &[JSON], completion("hello", usage)),
            };
            wire.send(whole).await;
            Some(wire)
        }
    }
}
