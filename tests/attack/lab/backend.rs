//! A backend that does what the header `x-client-request-id` of a request says; gateways forward that header.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use weir_tests::scripted::{Asked, Scripted, Wire, answer, chunk, head};

/// An answer that is not streamed.
const ANSWER: &str = r#"{"id":"x","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;
const JSON: (&str, &str) = ("content-type", "application/json");
const DONE: &str = "data: [DONE]\n\n";
/// The pause between two events of `slow`.
pub(crate) const SLOW_EVERY: Duration = Duration::from_millis(100);
/// Bytes of the content of an answer `big`: more than the kernel buffers for a client that reads nothing.
pub(crate) const BIG_BYTES: usize = 12 << 20;
/// The bytes of one write of `fast` and `line`.
const BURST_BYTES: usize = 64 << 10;

#[derive(Debug, Default)]
struct Seen {
    arrived: Mutex<Vec<Asked>>,
    poured: AtomicU64,
}

/// The backend; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    seen: Arc<Seen>,
    _end: DropGuard,
}

impl Backend {
    /// On a free port.
    pub(crate) async fn start() -> Self {
        let (end, seen) = (CancellationToken::new(), Arc::<Seen>::default());
        let log = seen.clone();
        let scripted = Scripted::start(&end, move |asked, wire| serve(asked, wire, log.clone())).await;
        Self { address: scripted.address, seen, _end: end.drop_guard() }
    }

    /// Every request but health checks, in order of arrival.
    pub(crate) fn arrived(&self) -> Vec<Asked> {
        self.seen.arrived.lock().expect("nobody panicked").clone()
    }

    /// The bytes of `fast` and `line` that were taken so far.
    pub(crate) fn poured(&self) -> u64 {
        self.seen.poured.load(Ordering::Relaxed)
    }
}

async fn serve(asked: Asked, mut wire: Wire, seen: Arc<Seen>) -> Option<Wire> {
    // A gateway without a control plane looks whether its backends live, after a few seconds.
    if asked.head.starts_with("HEAD ") {
        return wire.send(answer(200, &[JSON], "")).await.then_some(wire);
    }
    if asked.head.starts_with("GET ") {
        let list = r#"{"object":"list","data":[{"id":"m"},{"id":"short"}]}"#;
        return wire.send(answer(200, &[JSON], list)).await.then_some(wire);
    }
    let act = asked.header("x-client-request-id").unwrap_or("ok").to_owned();
    seen.arrived.lock().expect("nobody panicked").push(asked);
    perform(&act, wire, &seen.poured).await
}

/// An event of a stream with this content, which is JSON already.
fn event(content: &str) -> String {
    format!(
        "data: {{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"model\":\"m\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\"{content}\"}},\"finish_reason\":null}}]}}\n\n"
    )
}

fn stream() -> Vec<u8> {
    head(200, &[("content-type", "text/event-stream"), ("transfer-encoding", "chunked")])
}

/// Writes the same bytes until the gateway leaves.
async fn pour(mut wire: Wire, burst: &[u8], poured: &AtomicU64) -> Option<Wire> {
    while wire.send(burst).await {
        poured.fetch_add(burst.len() as u64, Ordering::Relaxed);
    }
    None
}

async fn perform(act: &str, mut wire: Wire, poured: &AtomicU64) -> Option<Wire> {
    let said = match act.split_once('-').unwrap_or((act, "")) {
        // Events as fast as they are taken, without an end.
        ("fast", _) => {
            let one = event(&"a".repeat(1000));
            wire.send(stream()).await;
            return pour(wire, &chunk(one.repeat(BURST_BYTES / one.len())), poured).await;
        }
        // One line that never ends.
        ("line", _) => {
            wire.send([stream(), chunk(event("a")), chunk("data: ")].concat()).await;
            return pour(wire, &chunk("a".repeat(BURST_BYTES)), poured).await;
        }
        // `slow-N`: N events, one each `SLOW_EVERY`, then the end.
        ("slow", count) => {
            wire.send(stream()).await;
            for _ in 0..count.parse::<u32>().unwrap_or(u32::MAX) {
                if !wire.send(chunk(event("a"))).await {
                    return None;
                }
                tokio::time::sleep(SLOW_EVERY).await;
            }
            [chunk(DONE), chunk("")].concat()
        }
        // An answer of some MiB that is not streamed.
        ("big", _) => answer(200, &[JSON], ANSWER.replace("hi", &"a".repeat(BIG_BYTES))),
        // A stream whose content looks like the end of a stream.
        ("escaped", _) => {
            let content = event(r"\n\ndata: [DONE]\n\n");
            [stream(), chunk(content), chunk(event("after")), chunk(DONE), chunk("")].concat()
        }
        // `status-NNN`: this status, and a place to go to.
        ("status", code) => {
            let code = code.parse().expect("a status");
            answer(code, &[JSON, ("location", "/redirected")], "{}")
        }
        _ => answer(200, &[JSON], ANSWER),
    };
    wire.send(said).await.then_some(wire)
}
