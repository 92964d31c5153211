//! The life of a request, top to bottom.
//!
//! ```text
//!   route      an exact table; anything else is 404 or 405
//!   identify   bearer key -> digest -> key -> tenant              401, the same for every reason
//!   read       one borrowing pass over the body                   400, 408, 413, 415
//!   choose     model -> pool -> backends in order of preference   404, from the snapshot, no I/O
//!   admit      one limiter call: every limit and a slot;          429 (the caller's limits), 503 (ours)
//!              refused, it waits in turn where that can help
//!   send       to the backend; elsewhere while nothing was sent   502, 503, 504
//!   answer     whole, or as a stream that owns the rest
//!   account    on drop, exactly once, on every way out
//! ```

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::Poll;
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use weir_proto::resource::BalancingPolicy;
use weir_ratelimit::{Cost, Decision, Kind};
use weir_runtime::edge::{self, Client};

use crate::api::request::{self, RouteKind};
use crate::api::response::{
    BYTES_PER_TOKEN, RewritePlan, Rewriter, is_error_object, rename_model_in_body, usage_of_body,
};
use crate::api::usage::UsageBounds;
use crate::control::live_config::LiveConfig;
use crate::control::traffic_report::TrafficCounter;
use crate::error::{Blame, GatewayError};
use crate::http::attempt::{Answer, Outgoing, Target};
use crate::http::attempts::{self, Attempts, Won};
use crate::http::authentication::{Failure, Failures};
use crate::http::bounds::HTTP;
use crate::http::context::RequestContext;
use crate::http::headers::Content;
use crate::http::request_body::{self, BodyMemory};
use crate::http::response_body::{Body, Clocks, StreamBody, StreamEnd, WholeBody, usage_or_count};
use crate::http::{headers, refusal};
use crate::limits::ledger::Ledger;
use crate::limits::reservation::Reservation;
use crate::metrics::{AuthenticationLabels, Metrics};
use crate::routing::balance::{prefix_hash, stable_hash};
use crate::routing::entries::{KeyEntry, ModelEntry};
use crate::routing::snapshot::Snapshot;

/// Longest Authorization header that is looked at, bytes.
const KEY_MAX_BYTES: usize = 512;
/// Tokens reserved for an image, a file or a sound, whose size in bytes says little: the upper end of what OpenAI
/// counts for one image of high detail with four tiles (85 + 4 x 170, rounded up).
const ATTACHMENT_TOKENS: u64 = 1000;

/// Everything a request needs.
#[derive(Debug)]
pub struct Gateway {
    /// The configuration in force.
    pub live: Arc<LiveConfig>,
    /// Limits and their settlement.
    pub ledger: Arc<Ledger>,
    /// Requests without a valid key, by address.
    pub failures: Failures,
    /// Memory for request bodies.
    pub bodies: Arc<BodyMemory>,
    /// What is counted.
    pub metrics: Metrics,
    /// What is reported of requests to the control plane.
    pub traffic: Arc<TrafficCounter>,
}

/// Answers one request; every failure becomes an answer.
pub async fn handle(gateway: Arc<Gateway>, request: Request<Incoming>, client: Client) -> Response<Body> {
    let context =
        RequestContext::begin(&gateway.metrics, &gateway.traffic, request.headers(), client.clone());
    let request_id = context.request_id.clone();
    let is_http1 = request.version() < Version::HTTP_2;
    let mut slot = Some(context);
    let done = {
        // A bug of ours costs the request that met it, and nobody else's.
        let route = AssertUnwindSafe(route(&gateway, request, &mut slot)).catch_unwind();
        let mut route = std::pin::pin!(route);
        poll_fn(|cx| match client.clock.poll_ending(cx) {
            true => Poll::Ready(Err(GatewayError::Draining)),
            false => route.as_mut().poll(cx).map(|done| done.unwrap_or(Err(GatewayError::Internal))),
        })
        .await
    };
    let mut response = match done {
        Ok(response) => response,
        Err(error) => {
            if let Some(context) = &mut slot {
                let facts = error.facts();
                context.finished(facts.status, facts.label);
            }
            let mut response = refusal_of(&error);
            // Where the next request would begin is not known.
            if is_http1 && matches!(error, GatewayError::BadHead(_) | GatewayError::BrokenBody) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            if let Some(context) = &slot {
                headers::write_limits(response.headers_mut(), &context.limits);
                headers::write_wait(response.headers_mut(), context.waited);
                if context.close {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
            }
            response
        }
    };
    if let Ok(value) = HeaderValue::try_from(request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

fn refusal_of(error: &GatewayError) -> Response<Body> {
    let facts = error.facts();
    let mut response = json(facts.status, error.to_body().into());
    if let Some(wait) = facts.retry_after {
        headers::write_retry_after(response.headers_mut(), wait);
    }
    response
}

/// The way a request may take through the code below: the context leaves `slot` only when a stream takes it along.
pub(super) type Slot = Option<Box<RequestContext>>;

async fn route(
    gateway: &Arc<Gateway>,
    request: Request<Incoming>,
    slot: &mut Slot,
) -> Result<Response<Body>, GatewayError> {
    edge::check(&request, HTTP.head.fields).map_err(GatewayError::BadHead)?;
    let (path, kind) = match request.uri().path() {
        "/v1/chat/completions" => ("/v1/chat/completions", Some(RouteKind::ChatCompletions)),
        "/v1/completions" => ("/v1/completions", Some(RouteKind::Completions)),
        "/v1/embeddings" => ("/v1/embeddings", Some(RouteKind::Embeddings)),
        "/v1/responses" => ("/v1/responses", Some(RouteKind::Responses)),
        "/v1/models" => ("/v1/models", None),
        _ => return Err(GatewayError::UnknownRoute),
    };
    if let Some(context) = slot {
        context.route = path;
    }
    let allowed = if kind.is_some() { Method::POST } else { Method::GET };
    if request.method() != allowed {
        return Err(GatewayError::MethodNotAllowed);
    }
    let snapshot = gateway.live.snapshot();
    let key = identify(&snapshot, request.headers()).map_err(|failure| {
        let labels = AuthenticationLabels { reason: failure.label() };
        gateway.metrics.authentication_failures.get_or_create(&labels).inc();
        if let Some(context) = slot {
            context.unlogged = gateway.failures.note(Some(context.client.connection.peer()));
            // HTTP/2 has no such header; its connection carries the requests of others.
            context.close = context.unlogged && request.version() <= Version::HTTP_11;
        }
        match failure {
            Failure::Missing => GatewayError::MissingKey,
            Failure::Unknown | Failure::Expired => GatewayError::InvalidKey,
        }
    })?;
    if let Some(context) = slot {
        context.client.connection.trust();
        context.tenant = Some(key.tenant.name.to_string());
        context.api_key = Some(key.name.to_string());
    }
    match kind {
        Some(kind) => complete(gateway, &snapshot, &key, kind, path, request, slot).await,
        None => {
            let body = models(&snapshot, &key)?;
            if let Some(context) = slot {
                context.finished(StatusCode::OK, "ok");
            }
            Ok(json(StatusCode::OK, body))
        }
    }
}

/// Missing, wrong, unknown, revoked and expired keys are told apart in no answer.
fn identify(snapshot: &Snapshot, headers: &HeaderMap) -> Result<Arc<KeyEntry>, Failure> {
    let value = headers.get(header::AUTHORIZATION).filter(|v| v.len() <= KEY_MAX_BYTES);
    let token = value.and_then(|v| v.to_str().ok()).and_then(|v| {
        let (scheme, token) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    let token = token.ok_or(Failure::Missing)?;
    // The map is keyed by digest, so a comparison tells nothing about how much of a secret was right.
    let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    let key = snapshot.keys.get(&digest).ok_or(Failure::Unknown)?;
    match key.expires {
        Some(expires) if expires <= SystemTime::now() => Err(Failure::Expired),
        _ => Ok(key.clone()),
    }
}

#[derive(serde::Serialize)]
struct ModelList<'a> {
    object: &'static str,
    data: Vec<ModelItem<'a>>,
}

#[derive(serde::Serialize)]
struct ModelItem<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'a str,
}

fn models(snapshot: &Snapshot, key: &KeyEntry) -> Result<Bytes, GatewayError> {
    let allowed = snapshot.models_by_name.values().filter(|m| key.allows(&m.name));
    let data = allowed.map(|m| ModelItem {
        id: &m.spec.client_name,
        object: "model",
        created: 0,
        owned_by: m.pool.name.as_str(),
    });
    let list = ModelList { object: "list", data: data.collect() };
    serde_json::to_vec(&list).map(Bytes::from).map_err(|_| GatewayError::Internal)
}

fn json(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

async fn complete(
    gateway: &Arc<Gateway>,
    snapshot: &Arc<Snapshot>,
    key: &Arc<KeyEntry>,
    kind: RouteKind,
    path: &'static str,
    request: Request<Incoming>,
    slot: &mut Slot,
) -> Result<Response<Body>, GatewayError> {
    let (head, body) = request.into_parts();
    let (body, _room) = request_body::take(&gateway.bodies, &head.headers, body).await?;
    let asked = request::Request::read(kind, &body)?.into_owned();
    let Some(model) = snapshot.models.get(&*asked.model) else {
        return Err(GatewayError::ModelNotFound { model: asked.model.into_owned() });
    };
    if !key.allows(&model.name) {
        return Err(GatewayError::ModelNotAllowed { model: asked.model.into_owned() });
    }
    if let Some(context) = slot {
        context.stream = asked.stream;
    }
    let call = Call { gateway, snapshot, key, path, asked, body, headers: head.headers };
    let fallbacks = model.spec.fallbacks.iter().filter_map(|name| snapshot.models_by_name.get(name));
    let mut last = GatewayError::NoBackend { retry_after: None };
    for model in std::iter::once(model).chain(fallbacks) {
        if !key.allows(&model.name) {
            continue;
        }
        if let Some(context) = slot {
            context.model = Some(model.name.to_string());
        }
        match call.with_model(model, slot).await {
            // Trouble of ours with this model; the next one has backends and limits of its own.
            Err(error) if error.facts().blame != Blame::Client && slot.is_some() => last = error,
            done => return done,
        }
    }
    Err(last)
}

/// A request that was read, before a model has been settled on.
pub(super) struct Call<'a> {
    pub(super) gateway: &'a Arc<Gateway>,
    pub(super) snapshot: &'a Arc<Snapshot>,
    pub(super) key: &'a Arc<KeyEntry>,
    pub(super) path: &'static str,
    pub(super) asked: request::Request<'static>,
    pub(super) body: Bytes,
    pub(super) headers: HeaderMap,
}

impl Call<'_> {
    /// Admits and sends, elsewhere as long as that is allowed.
    async fn with_model(
        &self,
        model: &Arc<ModelEntry>,
        slot: &mut Slot,
    ) -> Result<Response<Body>, GatewayError> {
        let started = slot.as_ref().map_or_else(Instant::now, |c| c.started);
        let pool = &model.pool;
        let gateways = self.gateway.live.live_gateways();
        let places = model.order(gateways, self.prefix(model));
        if places.is_empty() {
            return Err(GatewayError::NoBackend { retry_after: None });
        }
        let (mut reservation, decision, chosen) = self.admit(model, &places, slot).await?;
        pool.state.count_request();
        if places[chosen].index != places[0].index {
            model.reassign(places[0].index, places[chosen].index);
        }
        let deadline = started + model.timeouts.total;
        let request_id =
            slot.as_ref().and_then(|context| HeaderValue::try_from(context.request_id.as_str()).ok());
        let attempts = Attempts {
            model,
            reservation: &mut reservation,
            metrics: &self.gateway.metrics,
            context: slot.as_deref_mut(),
            stream: self.asked.stream,
            prompt_tokens: self.prompt_tokens(model),
            deadline,
            tenant: self.key.tenant.queue.clone(),
            least: if model.accounts.is_empty() { Cost::default() } else { self.estimate(model).1 },
            outgoing: |target: &Target| self.outgoing(target, request_id.as_ref(), deadline),
        };
        match attempts.run(places[chosen].index, attempts::others(&places, chosen)).await {
            Ok(won) => self.answer(won, reservation, decision, slot, deadline),
            Err(error) => {
                if unknown_outcome(&error) {
                    // It may have generated to the end without our seeing it: what was reserved stands.
                    let reserved = reservation.reserved;
                    reservation.used(reserved);
                    if let Some(context) = slot {
                        let (input, output) = (Kind::InputTokens, Kind::OutputTokens);
                        context.tokens = Some((reserved.get(input), reserved.get(output), "reserved"));
                    }
                } else {
                    // It got no answer, so it used nothing.
                    reservation.used(weir_ratelimit::Cost::default());
                }
                Err(error)
            }
        }
    }

    /// What prefix affinity goes by: who asks and how the prompt begins.
    fn prefix(&self, model: &ModelEntry) -> Option<u64> {
        let spec = &model.pool.spec;
        let wanted = spec.balancing_policy == BalancingPolicy::PrefixAffinity;
        let bytes = self.asked.prompt_prefix(&self.body, spec.affinity.prefix_bytes as usize);
        let tenant = || stable_hash(self.key.tenant.name.as_str().as_bytes());
        (wanted && !bytes.is_empty()).then(|| prefix_hash(tenant(), bytes))
    }

    pub(super) fn prompt_tokens(&self, model: &ModelEntry) -> u64 {
        let text = self.gateway.ledger.estimates.prompt(&model.queue, self.asked.prompt_bytes);
        text.saturating_add(u64::from(self.asked.attachments) * ATTACHMENT_TOKENS)
    }

    fn outgoing(
        &self,
        target: &Target,
        request_id: Option<&HeaderValue>,
        deadline: Instant,
    ) -> Result<Outgoing, GatewayError> {
        let mut headers = headers::to_backend(&self.headers);
        if let Some(id) = request_id {
            headers.insert("x-request-id", id.clone());
        }
        Ok(Outgoing {
            path: self.path,
            headers,
            body: self.asked.forward(&self.body, &target.upstream_model, true),
            memory: self.gateway.bodies.clone(),
            first_byte_by: Instant::now() + target.model.timeouts.first_byte,
            deadline,
        })
    }

    fn answer(
        &self,
        won: Won,
        mut reservation: Reservation,
        mut decision: Decision,
        slot: &mut Slot,
        deadline: Instant,
    ) -> Result<Response<Body>, GatewayError> {
        let Won { answer, target, in_flight } = won;
        let mut context = slot.take().ok_or(GatewayError::Internal)?;
        context.note_first_byte();
        let waited = context.waited;
        let request_id =
            HeaderValue::try_from(context.request_id.as_str()).map_err(|_| GatewayError::Internal)?;
        let prompt_tokens = self.prompt_tokens(&target.model);
        match answer {
            Answer::Whole { status, headers, body, room } => {
                let usage = usage_of_body(&body, &UsageBounds::of(&self.asked, self.body.len()));
                if let Err(found) = &usage {
                    target.implausible(found);
                }
                let (usage, plausible) = (usage.unwrap_or_default(), usage.is_ok());
                let written = match self.asked.kind {
                    RouteKind::Embeddings => 0,
                    _ => (body.len() as u64).div_ceil(BYTES_PER_TOKEN),
                };
                let (prompt, completion, source) = match status.is_success() {
                    true => usage_or_count(usage, prompt_tokens, written),
                    false => usage_or_count(usage, 0, 0),
                };
                match status.is_success() {
                    true => target.succeed(completion),
                    false => target.refuse(),
                }
                context.tokens = Some((prompt, completion, source));
                let cost = target.cost(prompt, completion);
                reservation.used(cost);
                if status.is_success() && plausible {
                    let usage = usage.unwrap_or_default();
                    reservation.learn(usage.prompt, usage.completion);
                }
                refusal::settled(&mut decision, &reservation.reserved, &cost);
                // A good answer was read as JSON when it came.
                let content = match status.is_success() || is_error_object(&body).is_ok() {
                    true => Content::Json,
                    false => Content::Text,
                };
                let body = rename_model_in_body(&body, &self.asked.model);
                context.finished(status, if status.is_success() { "ok" } else { "client_error" });
                let mut response =
                    Response::new(Body::Whole(WholeBody::new(body, room, context.client.clock.clone())));
                *response.status_mut() = status;
                *response.headers_mut() = headers::to_client(&headers, request_id);
                headers::content_type(response.headers_mut(), content);
                refusal::write_limits(response.headers_mut(), &decision);
                headers::write_wait(response.headers_mut(), waited);
                Ok(response)
            }
            Answer::Stream { headers, first, rest } => {
                let plan = RewritePlan {
                    rename_model: Some(self.asked.model.to_string()),
                    drop_usage_chunk: self.asked.kind.takes_include_usage() && !self.asked.include_usage,
                    append_done: self.asked.kind.takes_include_usage(),
                    bounds: UsageBounds::of(&self.asked, self.body.len()),
                };
                let clocks = Clocks { idle: target.model.timeouts.idle, deadline };
                let mut client_headers = headers::to_client(&headers, request_id);
                headers::content_type(&mut client_headers, Content::Events);
                client_headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
                // nginx and its like hold streams back unless told not to.
                client_headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
                refusal::write_limits(&mut client_headers, &decision);
                headers::write_wait(&mut client_headers, waited);
                let end = StreamEnd { reservation, prompt_tokens, target, in_flight, context };
                let stream = StreamBody::new(first, rest, Rewriter::new(plan), clocks, end);
                let mut response = Response::new(Body::Stream(Box::pin(stream)));
                *response.headers_mut() = client_headers;
                Ok(response)
            }
        }
    }
}

/// Whether a backend may have done its work although nothing of it was seen.
fn unknown_outcome(error: &GatewayError) -> bool {
    matches!(error, GatewayError::UpstreamTimeout | GatewayError::UpstreamBroken | GatewayError::Deadline)
}
