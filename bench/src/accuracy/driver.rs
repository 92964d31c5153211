//! The load of `accuracy`: requests of several tenants for several models, streams and unary, which arrive at a fixed
//! rate at random gateways; and the record of each client.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::load::{self, Connection, Pacer, REQUEST_TIMEOUT};
use crate::rng::Rng;

use super::oracle::Span;

/// The code of a refusal for want of a slot.
const NO_SLOT: &str = "overloaded";

/// A tenant's load: its key, and its share of the arrivals.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// Its name and the stem of its key.
    pub(crate) tenant: &'static str,
    /// Its share of the arrivals, percent.
    pub(crate) percent: u64,
    /// The range of the tokens of its answers.
    pub(crate) tokens: (u64, u64),
    /// The share of streams, percent.
    pub(crate) streams: u64,
    /// The models it asks for, each as often as the others.
    pub(crate) models: &'static [&'static str],
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// Admitted and answered.
    Answered,
    /// Refused with 429: the kind and the name of the scope, and the limit.
    Limited(String, String, String),
    /// Refused because every slot of the model was taken.
    NoSlot,
    /// Answered with another status and this code.
    Failed(u16, String),
    /// Cut, or not answered in time: it is unknown whether it was admitted.
    Unknown,
}

impl End {
    /// Whether the request was refused and so charged nothing. Any other request may have been charged.
    pub(crate) const fn is_refusal(&self) -> bool {
        matches!(self, End::Limited(..) | End::NoSlot)
    }
}

/// One request as its client saw it; times are in microseconds since the start.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// The tenant.
    pub(crate) tenant: &'static str,
    /// The model.
    pub(crate) model: &'static str,
    /// The tokens of its prompt.
    pub(crate) prompt_tokens: u64,
    /// The tokens of its answer.
    pub(crate) tokens: u64,
    /// The time of the decision: between sending and the first byte of the answer.
    pub(crate) decided: Span,
    /// The time of the last byte, or of the end of the connection.
    pub(crate) ended_us: u64,
    /// Its end.
    pub(crate) end: End,
}

/// The key of a tenant.
pub(crate) fn key(tenant: &str) -> String {
    format!("weir_bench_key_{tenant}")
}

/// The requests to send, and the time for them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan<'a> {
    /// The tenants.
    pub(crate) callers: &'a [Caller],
    /// Arrivals per second.
    pub(crate) per_second: f64,
    /// The time in which they arrive.
    pub(crate) length: Duration,
    /// The seed of all draws.
    pub(crate) seed: u64,
    /// The tokens of every prompt, as the servers count them.
    pub(crate) prompt_tokens: u64,
}

/// Sends the planned requests and waits for the last one to end. Times count from `started`, which may be in the
/// past.
pub(crate) async fn drive(
    gateways: &[SocketAddr],
    plan: Plan<'_>,
    started: Instant,
) -> anyhow::Result<Vec<Record>> {
    let mut rng = Rng::new(plan.seed, 0);
    let gateways: Arc<[SocketAddr]> = gateways.into();
    let mut tasks = JoinSet::new();
    let mut records = Vec::new();
    let mut pacer = Pacer::start(plan.per_second)?;
    let end = Instant::now() + plan.length;
    while pacer.next().await? < end {
        let caller = pick(plan.callers, &mut rng);
        let tokens = rng.between(caller.tokens.0, caller.tokens.1);
        let model = caller.models[rng.between(0, caller.models.len() as u64 - 1) as usize];
        let stream = rng.between(1, 100) <= caller.streams;
        let request = load::chat(&key(caller.tenant), model, tokens, stream);
        let first = rng.between(0, gateways.len() as u64 - 1) as usize;
        let gateways = gateways.clone();
        let blank = Record {
            tenant: caller.tenant,
            model,
            prompt_tokens: plan.prompt_tokens,
            tokens,
            decided: Span { from_us: 0, until_us: 0 },
            ended_us: 0,
            end: End::Unknown,
        };
        tasks.spawn(async move { send(&gateways, first, &request, started, blank).await });
        while let Some(done) = tasks.try_join_next() {
            records.push(done.context("a client panicked")?);
        }
    }
    while let Some(done) = tasks.join_next().await {
        records.push(done.context("a client panicked")?);
    }
    Ok(records)
}

fn pick(callers: &[Caller], rng: &mut Rng) -> Caller {
    let mut at = rng.between(0, 99);
    for caller in callers {
        if at < caller.percent {
            return *caller;
        }
        at -= caller.percent;
    }
    callers[0]
}

/// Uses the next gateway if one refuses the connection, as a load balancer does.
async fn send(
    gateways: &[SocketAddr],
    first: usize,
    request: &[u8],
    started: Instant,
    mut record: Record,
) -> Record {
    let now = || load::micros(started.elapsed());
    let mut connection = None;
    for k in 0..gateways.len() {
        if let Ok(open) = Connection::open(gateways[(first + k) % gateways.len()]).await {
            connection = Some(open);
            break;
        }
    }
    record.decided.from_us = now();
    let answer = match &mut connection {
        Some(open) => timeout(REQUEST_TIMEOUT, open.call(request)).await.ok().and_then(Result::ok),
        None => None,
    };
    record.ended_us = now();
    record.decided.until_us = record.ended_us;
    if let Some(answer) = answer {
        if let Some(head_at) = answer.head_at {
            record.decided.until_us = load::micros(head_at.saturating_duration_since(started));
        }
        record.end = match answer.status {
            200 => End::Answered,
            status => refusal(status, &answer.excerpt),
        };
    }
    record
}

/// The limit that a refusal names, or its code.
fn refusal(status: u16, body: &str) -> End {
    let body: serde_json::Value = serde_json::from_str(body).unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let error = &body["error"];
    if status == 429 && error["scope"].is_object() {
        End::Limited(text(&error["scope"]["kind"]), text(&error["scope"]["name"]), text(&error["kind"]))
    } else if status == 503 && error["code"] == NO_SLOT {
        End::NoSlot
    } else {
        End::Failed(status, text(&error["code"]))
    }
}
