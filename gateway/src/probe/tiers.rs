//! The probes of each tier: the same connections and credentials as requests, bounded in time and in bytes.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use http_body_util::{BodyExt as _, Full, Limited};
use tokio::time::{Instant, timeout};
use weir_probe::{Answer, Finding, late, no_answer};
use weir_proto::v1::ProbeOutcome;

use super::engine::Engine;
use super::judge;
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

/// What earlier probes found out about a model at a backend.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct KnownModel {
    /// What it calls itself.
    pub(super) named: Option<String>,
    /// What to ask it for; `None` while that is not known.
    pub(super) ask: Option<Ask>,
}

/// What one probe came to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Probed {
    pub(super) found: Finding,
    pub(super) latency: Option<Duration>,
    /// The name the model goes by, when the answer said it.
    pub(super) named: Option<String>,
    /// What the model is to be asked for from now on, when this told.
    pub(super) ask: Option<Ask>,
    pub(super) reading: Reading,
    /// Tokens it cost, as far as the answers said.
    pub(super) tokens: u64,
}

impl From<Finding> for Probed {
    fn from(found: Finding) -> Self {
        Self { found, latency: None, named: None, ask: None, reading: Reading::default(), tokens: 0 }
    }
}

/// One exchange; the error is what was found instead of an answer.
async fn ask(
    backend: &BackendEntry,
    method: Method,
    uri: Result<Uri, http::Error>,
    body: Bytes,
    most: usize,
) -> Result<Answer, Finding> {
    let uri = uri.map_err(|_| Finding::new(ProbeOutcome::BadAnswer, "the address is not valid"))?;
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
    let answer = backend
        .upstream
        .send(|| request.clone())
        .await
        .map_err(|error| no_answer(&error, error.is_connect()))?;
    let (head, body) = answer.into_parts();
    let body = Limited::new(body, most).collect().await;
    let body = body.map_err(|_| Finding::new(ProbeOutcome::Broken, "the answer broke off or is too long"))?;
    Ok(Answer {
        status: head.status,
        retry_after: head.headers.contains_key(header::RETRY_AFTER),
        body: body.to_bytes(),
        with_credential: true,
    })
}

/// Whether the server answers at all.
pub(super) async fn liveness(backend: Arc<BackendEntry>, limit: Duration) -> Probed {
    let path = &backend.spec.health_path;
    let ask = |method| ask(&backend, method, backend.upstream.uri(path), Bytes::new(), ANSWER_MAX_BYTES);
    let (found, latency) = weir_probe::liveness(ask, limit).await;
    Probed { latency, ..Probed::from(found) }
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
    known: KnownModel,
    limit: Duration,
) -> Probed {
    if known.ask == Some(Ask::Embedding) {
        return embed(&backend, &model, &known, limit).await;
    }
    let (chat, took_chat) = complete(&backend, &model, &known, limit).await;
    if took_chat || known.ask == Some(Ask::Chat) || chat.found.outcome != ProbeOutcome::Pass {
        return chat;
    }
    let embedded = embed(&backend, &model, &known, limit).await;
    if embedded.ask == Some(Ask::Embedding) { embedded } else { Probed { ask: Some(Ask::Chat), ..chat } }
}

/// A completion of one token, and whether there was one.
async fn complete(
    backend: &BackendEntry,
    model: &str,
    known: &KnownModel,
    limit: Duration,
) -> (Probed, bool) {
    let began = Instant::now();
    let asked = ask(backend, Method::POST, backend.endpoint(CHAT), question(model, 1), ANSWER_MAX_BYTES);
    let answer = match timeout(limit, asked).await {
        Err(_) => return (late(limit).into(), false),
        Ok(Err(found)) => return (found.into(), false),
        Ok(Ok(answer)) => answer,
    };
    let named = known.named.as_deref();
    let (found, named) = judge::completion(&answer, model, named);
    let completed = found.outcome == ProbeOutcome::Pass && answer.status.is_success();
    let tokens = judge::tokens_written(&answer.body, 1).unwrap_or_default();
    let ask = completed.then_some(Ask::Chat);
    (
        Probed { latency: completed.then(|| began.elapsed()), named, ask, tokens, ..Probed::from(found) },
        completed,
    )
}

async fn embed(backend: &BackendEntry, model: &str, known: &KnownModel, limit: Duration) -> Probed {
    let began = Instant::now();
    let asked = ask(backend, Method::POST, backend.endpoint(EMBEDDINGS), input(model), ANSWER_MAX_BYTES);
    let answer = match timeout(limit, asked).await {
        Err(_) => return late(limit).into(),
        Ok(Err(found)) => return found.into(),
        Ok(Ok(answer)) => answer,
    };
    let named = known.named.as_deref();
    let (found, named) = judge::embedding(&answer, model, named);
    let embedded = found.outcome == ProbeOutcome::Pass && answer.status.is_success();
    let ask = embedded.then_some(Ask::Embedding);
    Probed { latency: embedded.then(|| began.elapsed()), named, ask, ..Probed::from(found) }
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
pub(super) async fn deep(backend: &BackendEntry, depth: &Depth) -> Probed {
    let get = |uri: Result<Uri, http::Error>| {
        timeout(depth.limit, ask(backend, Method::GET, uri, Bytes::new(), PAGE_MAX_BYTES))
    };
    let mut probed =
        Probed::from(Finding::new(ProbeOutcome::Pass, "throughput, engine and models looked at"));
    probed.reading.tokens_per_second = depth.known_rate;
    if let Ok(Ok(page)) = get(backend.upstream.uri("/metrics")).await
        && page.status.is_success()
    {
        let engine = Engine::read(&String::from_utf8_lossy(&page.body));
        (probed.reading.cache_used, probed.reading.queue) = (engine.cache_used, engine.queue);
    }
    if let Ok(Ok(list)) = get(backend.endpoint("/v1/models")).await
        && list.status.is_success()
    {
        let wanted: Vec<&str> = depth.models.iter().map(String::as_str).collect();
        let missing = judge::missing(&list.body, &wanted);
        if !missing.is_empty() {
            let detail = format!("its list lacks {}", missing.join(", "));
            probed.found = Finding::new(ProbeOutcome::WrongModel, detail);
        }
    }
    probed
}

/// Throughput by a few short answers, one after the other: a benchmark must not become the load.
pub(super) async fn measure(backend: &BackendEntry, model: &str, limit: Duration, probed: &mut Probed) {
    let (mut tokens, began) = (0_u64, Instant::now());
    for _ in 0..DEEP_REQUESTS {
        let asked = ask(
            backend,
            Method::POST,
            backend.endpoint(CHAT),
            question(model, DEEP_TOKENS),
            ANSWER_MAX_BYTES,
        );
        let Ok(Ok(answer)) = timeout(limit, asked).await else { return };
        if !answer.status.is_success() {
            return;
        }
        let Some(written) = judge::tokens_written(&answer.body, DEEP_TOKENS) else { return };
        tokens += written;
        probed.tokens = tokens;
    }
    let seconds = began.elapsed().as_secs_f64();
    if seconds > 0.0 {
        probed.reading.tokens_per_second = Some(tokens as f64 / seconds);
    }
}
