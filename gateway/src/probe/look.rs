//! The looks themselves: the same connections and credentials as requests, bounded in time and in bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use tokio::time::{Instant, timeout};
use weir_proto::v1::ProbeOutcome;
use weir_runtime::RefusedAddress;

use super::engine::Engine;
use super::judge::{self, Seen};
use crate::routing::backend::BackendEntry;

/// What is read of an answer; a longer one is no answer to such a question.
const ANSWER_MAX_BYTES: usize = 256 << 10;
/// What is read of a metrics page: those of large engines are long.
const PAGE_MAX_BYTES: usize = 4 << 20;
/// Output tokens of each request of a deep probe...
const DEEP_TOKENS: u32 = 20;
/// ...and how many there are.
pub(super) const DEEP_REQUESTS: u32 = 5;

/// What a deep probe read.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Reading {
    pub(super) tokens_per_second: Option<f64>,
    pub(super) cache_used: Option<f64>,
    pub(super) queue: Option<u64>,
}

/// What a model is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Ask {
    /// A completion.
    #[default]
    Chat,
    /// An embedding: it takes no chat.
    Embedding,
}

/// What earlier looks found out about a model at a backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Known {
    /// What it calls itself.
    pub(super) named: Option<String>,
    /// What to ask it for; `None` while that is not known.
    pub(super) ask: Option<Ask>,
}

/// What one look came to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Looked {
    pub(super) seen: Seen,
    pub(super) latency: Option<Duration>,
    /// The name the model goes by, when the answer said it.
    pub(super) named: Option<String>,
    /// What the model is to be asked for from now on, when this told.
    pub(super) ask: Option<Ask>,
    pub(super) reading: Reading,
    /// Tokens it cost, as far as the answers said.
    pub(super) tokens: u64,
}

impl From<Seen> for Looked {
    fn from(seen: Seen) -> Self {
        Self { seen, latency: None, named: None, ask: None, reading: Reading::default(), tokens: 0 }
    }
}

struct Answer {
    status: StatusCode,
    retry_after: bool,
    body: Bytes,
}

/// One exchange; the error is what was seen instead.
async fn ask(
    backend: &BackendEntry,
    method: Method,
    path: &str,
    body: Bytes,
    most: usize,
) -> Result<Answer, Seen> {
    let uri = backend.upstream.uri(path);
    let uri = uri.map_err(|_| Seen::new(ProbeOutcome::BadAnswer, "the address is not usable"))?;
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    let headers: &mut HeaderMap = request.headers_mut();
    headers.insert(header::USER_AGENT, HeaderValue::from_static("weir-probe"));
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if let Some(authorization) = &backend.authorization {
        headers.insert(header::AUTHORIZATION, authorization.clone());
    }
    let answer = backend.upstream.send(request).await.map_err(|error| {
        if let Some(refused) = RefusedAddress::of(&error) {
            Seen::new(ProbeOutcome::Refused, refused.to_string())
        } else if error.is_connect() {
            Seen::new(ProbeOutcome::Refused, "cannot connect")
        } else {
            Seen::new(ProbeOutcome::Broken, "the connection broke")
        }
    })?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, most).collect().await;
    let body = body.map_err(|_| Seen::new(ProbeOutcome::Broken, "the answer broke off or is too long"))?;
    Ok(Answer {
        status: head.status,
        retry_after: head.headers.contains_key(header::RETRY_AFTER),
        body: body.to_bytes(),
    })
}

fn late(limit: Duration) -> Seen {
    Seen::new(ProbeOutcome::Timeout, format!("no answer within {} ms", limit.as_millis()))
}

/// HEAD, and GET where HEAD does not tell.
pub(super) async fn liveness(backend: Arc<BackendEntry>, limit: Duration) -> Looked {
    let began = Instant::now();
    let look = async {
        let path = &backend.spec.health_path;
        let mut last = Seen::new(ProbeOutcome::Broken, "the connection broke");
        for method in [Method::HEAD, Method::GET] {
            let last_try = method == Method::GET;
            match ask(&backend, method, path, Bytes::new(), ANSWER_MAX_BYTES).await {
                Ok(answer) => {
                    last = match judge::liveness(answer.status) {
                        Some(alive) => return alive,
                        None => judge::refusal(answer.status, answer.retry_after, &answer.body),
                    };
                    if last.is_good() || last_try {
                        return last;
                    }
                }
                Err(seen) if seen.outcome == ProbeOutcome::Refused => return seen,
                // A connection that was kept open may have been closed at the other end: a new one tells.
                Err(seen) => last = seen,
            }
        }
        last
    };
    match timeout(limit, look).await {
        Ok(seen) => {
            let latency = seen.is_good().then(|| began.elapsed());
            Looked { latency, ..Looked::from(seen) }
        }
        Err(_) => late(limit).into(),
    }
}

/// The question. A number nobody has asked with before goes first, or a cache of prefixes would answer.
fn question(model: &str, tokens: u32) -> Bytes {
    let nonce = uuid::Uuid::new_v4().simple();
    let body = serde_json::json!({
        "model": model,
        "messages": [{"role": "user", "content": format!("{nonce} Say something short.")}],
        "max_tokens": tokens,
        "stream": false,
    });
    body.to_string().into()
}

const CHAT: &str = "/v1/chat/completions";

const EMBEDDINGS: &str = "/v1/embeddings";

/// One input, which no cache has seen.
fn input(model: &str) -> Bytes {
    let nonce = uuid::Uuid::new_v4().simple();
    serde_json::json!({ "model": model, "input": nonce.to_string() }).to_string().into()
}

/// One token of a model, or one embedding of a model that takes no chat. Which of the two is found out once.
pub(super) async fn readiness(
    backend: Arc<BackendEntry>,
    model: String,
    known: Known,
    limit: Duration,
) -> Looked {
    if known.ask == Some(Ask::Embedding) {
        return embed(&backend, &model, &known, limit).await;
    }
    let (chat, took_chat) = complete(&backend, &model, &known, limit).await;
    if took_chat || known.ask == Some(Ask::Chat) || chat.seen.outcome != ProbeOutcome::Pass {
        return chat;
    }
    let embedded = embed(&backend, &model, &known, limit).await;
    if embedded.ask == Some(Ask::Embedding) { embedded } else { Looked { ask: Some(Ask::Chat), ..chat } }
}

/// A completion of one token, and whether there was one.
async fn complete(backend: &BackendEntry, model: &str, known: &Known, limit: Duration) -> (Looked, bool) {
    let began = Instant::now();
    let asked = ask(backend, Method::POST, CHAT, question(model, 1), ANSWER_MAX_BYTES);
    let answer = match timeout(limit, asked).await {
        Err(_) => return (late(limit).into(), false),
        Ok(Err(seen)) => return (seen.into(), false),
        Ok(Ok(answer)) => answer,
    };
    let named = known.named.as_deref();
    let (seen, named) = judge::completion(answer.status, answer.retry_after, &answer.body, model, named);
    let completed = seen.outcome == ProbeOutcome::Pass && answer.status.is_success();
    let tokens = judge::tokens_written(&answer.body, 1).unwrap_or_default();
    let ask = completed.then_some(Ask::Chat);
    (
        Looked { latency: completed.then(|| began.elapsed()), named, ask, tokens, ..Looked::from(seen) },
        completed,
    )
}

async fn embed(backend: &BackendEntry, model: &str, known: &Known, limit: Duration) -> Looked {
    let began = Instant::now();
    let asked = ask(backend, Method::POST, EMBEDDINGS, input(model), ANSWER_MAX_BYTES);
    let answer = match timeout(limit, asked).await {
        Err(_) => return late(limit).into(),
        Ok(Err(seen)) => return seen.into(),
        Ok(Ok(answer)) => answer,
    };
    let named = known.named.as_deref();
    let (seen, named) = judge::embedding(answer.status, answer.retry_after, &answer.body, model, named);
    let embedded = seen.outcome == ProbeOutcome::Pass && answer.status.is_success();
    let ask = embedded.then_some(Ask::Embedding);
    Looked { latency: embedded.then(|| began.elapsed()), named, ask, ..Looked::from(seen) }
}

/// What a deep probe is to find out.
#[derive(Debug, Clone)]
pub(super) struct Depth {
    /// What traffic says.
    pub(super) known_rate: Option<f64>,
    /// What its list of models should hold.
    pub(super) models: Vec<String>,
    /// For each question.
    pub(super) limit: Duration,
}

/// The engine's own page and the list of models; nothing that costs a token.
pub(super) async fn deep(backend: &BackendEntry, depth: &Depth) -> Looked {
    let get =
        |path: &'static str, most| timeout(depth.limit, ask(backend, Method::GET, path, Bytes::new(), most));
    let mut looked = Looked::from(Seen::new(ProbeOutcome::Pass, "throughput, engine and models looked at"));
    looked.reading.tokens_per_second = depth.known_rate;
    if let Ok(Ok(page)) = get("/metrics", PAGE_MAX_BYTES).await
        && page.status.is_success()
    {
        let engine = Engine::read(&String::from_utf8_lossy(&page.body));
        (looked.reading.cache_used, looked.reading.queue) = (engine.cache_used, engine.queue);
    }
    if let Ok(Ok(list)) = get("/v1/models", PAGE_MAX_BYTES).await
        && list.status.is_success()
    {
        let wanted: Vec<&str> = depth.models.iter().map(String::as_str).collect();
        let missing = judge::missing(&list.body, &wanted);
        if !missing.is_empty() {
            let detail = format!("its list lacks {}", missing.join(", "));
            looked.seen = Seen::new(ProbeOutcome::WrongModel, detail);
        }
    }
    looked
}

/// Throughput by a few short answers, one after the other: a benchmark must not become the load.
pub(super) async fn measure(backend: &BackendEntry, model: &str, limit: Duration, looked: &mut Looked) {
    let (mut tokens, began) = (0_u64, Instant::now());
    for _ in 0..DEEP_REQUESTS {
        let asked = ask(backend, Method::POST, CHAT, question(model, DEEP_TOKENS), ANSWER_MAX_BYTES);
        let Ok(Ok(answer)) = timeout(limit, asked).await else { return };
        if !answer.status.is_success() {
            return;
        }
        let Some(written) = judge::tokens_written(&answer.body, DEEP_TOKENS) else { return };
        tokens += written;
        looked.tokens = tokens;
    }
    let seconds = began.elapsed().as_secs_f64();
    if seconds > 0.0 {
        looked.reading.tokens_per_second = Some(tokens as f64 / seconds);
    }
}
