//! The life of a request, top to bottom.
//!
//! ```text
//!   route      an exact table; anything else is 404 or 405
//!   identify   bearer key -> digest -> key -> tenant              401, the same for every reason
//!   read       one borrowing pass over the body                   400, 408, 413, 415
//!   choose     model -> pool -> backends in order of preference   404, from the snapshot, no I/O
//!   admit      one limiter call: every limit and a slot           429 (the caller's limits), 503 (ours)
//!   send       to the backend; elsewhere while nothing was sent   502, 503, 504
//!   answer     whole, or as a stream that owns the rest
//!   account    on drop, exactly once, on every way out
//! ```

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use weir_proto::resource::BalancingPolicy;
use weir_ratelimit::{Acquire, AnyLimiter, Decision, Limiter, Outcome, Scopes, WithoutStore};

use crate::account::{Admission, Ledger};
use crate::balance::{Place, prefix_hash, stable_hash};
use crate::body::{Body, Clocks, StreamBody, StreamEnd};
use crate::context::RequestContext;
use crate::error::{Blame, GatewayError};
use crate::intake::{self, BodyMemory};
use crate::live::Live;
use crate::metrics::{LimiterLabels, Metrics};
use crate::read::{self, RouteKind};
use crate::send::{self, Answer, Outgoing, Target};
use crate::snapshot::{KeyEntry, LEASE_TTL, ModelEntry, ScopeEntry, Snapshot};
use crate::stream::meter::{RewritePlan, Rewriter, rename_model_in_body, usage_of_body};
use crate::tries::{self, Tries, Won};
use crate::{headers, refusal};

/// A request that comes before the first configuration waits for it this long: a load balancer that goes by names may
/// send before it has asked for readiness. Without a configuration every key would be unknown, and 401 a lie.
const FIRST_CONFIGURATION_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest Authorization header that is looked at, bytes.
const KEY_MAX_BYTES: usize = 512;
/// Tokens reserved for an answer whose length the client did not bound.
const EXPECTED_OUTPUT_TOKENS: u64 = 512;
/// Bytes of prompt taken for one token.
const PROMPT_BYTES_PER_TOKEN: u64 = 4;

/// Tokens reserved for an image, a file or a sound, whose size in bytes says little: the upper end of what OpenAI
/// counts for one image of high detail with four tiles (85 + 4 x 170, rounded up).
const ATTACHMENT_TOKENS: u64 = 1000;

/// Everything a request needs.
#[derive(Debug)]
pub struct Gateway {
    /// The configuration in force.
    pub live: Arc<Live>,
    /// Limits and their settlement.
    pub ledger: Arc<Ledger>,
    /// Memory for request bodies.
    pub bodies: Arc<BodyMemory>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Answers one request; every failure becomes an answer.
pub async fn handle(
    gateway: Arc<Gateway>,
    request: Request<Incoming>,
    peer: Option<IpAddr>,
) -> Response<Body> {
    let context = RequestContext::begin(&gateway.metrics, request.headers(), peer);
    let request_id = context.request_id.clone();
    let mut slot = Some(context);
    let mut response = match route(&gateway, request, &mut slot).await {
        Ok(response) => response,
        Err(error) => {
            if let Some(context) = &mut slot {
                let facts = error.facts();
                context.finished(facts.status, facts.label);
            }
            refusal_of(&error)
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
type Slot = Option<Box<RequestContext>>;

async fn route(
    gateway: &Arc<Gateway>,
    request: Request<Incoming>,
    slot: &mut Slot,
) -> Result<Response<Body>, GatewayError> {
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
    let configured = gateway.live.configured(FIRST_CONFIGURATION_TIMEOUT).await;
    let snapshot = configured.ok_or(GatewayError::Unconfigured)?;
    let key = identify(&snapshot, request.headers())?;
    if let Some(context) = slot {
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

/// Missing, wrong, unknown, revoked and expired keys are told apart nowhere.
fn identify(snapshot: &Snapshot, headers: &HeaderMap) -> Result<Arc<KeyEntry>, GatewayError> {
    let value = headers.get(header::AUTHORIZATION).filter(|v| v.len() <= KEY_MAX_BYTES);
    let token = value.and_then(|v| v.to_str().ok()).and_then(|v| {
        let (scheme, token) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    });
    let token = token.ok_or(GatewayError::MissingKey)?;
    // The map is keyed by digest, so a comparison tells nothing about how much of a secret was right.
    let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    let key = snapshot.keys.get(&digest).ok_or(GatewayError::InvalidKey)?;
    match key.expires {
        Some(expires) if expires <= SystemTime::now() => Err(GatewayError::InvalidKey),
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
    let (body, _room) = intake::take(&gateway.bodies, &head.headers, body).await?;
    let asked = read::Request::read(kind, &body)?.into_owned();
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
struct Call<'a> {
    gateway: &'a Arc<Gateway>,
    snapshot: &'a Arc<Snapshot>,
    key: &'a Arc<KeyEntry>,
    path: &'static str,
    asked: read::Request<'static>,
    body: Bytes,
    headers: HeaderMap,
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
        let places = pool.runtime.order(model, gateways, self.prefix(model));
        if places.is_empty() {
            return Err(GatewayError::NoBackend { retry_after: None });
        }
        let (mut admission, decision, chosen) = self.admit(model, &places, slot).await?;
        pool.runtime.count_request();
        if places[chosen].index != places[0].index {
            pool.runtime.reassign(model, places[0].index, places[chosen].index);
        }
        let deadline = started + model.timeouts.total;
        let request_id =
            slot.as_ref().and_then(|context| HeaderValue::try_from(context.request_id.as_str()).ok());
        let tries = Tries {
            model,
            admission: &mut admission,
            metrics: &self.gateway.metrics,
            context: slot.as_deref_mut(),
            stream: self.asked.stream,
            prompt_tokens: self.prompt_tokens(),
            deadline,
            outgoing: |target: &Target| self.outgoing(target, request_id.as_ref(), deadline),
        };
        match tries.run(places[chosen].index, tries::others(&places, chosen)).await {
            Ok(won) => self.answer(won, admission, &decision, slot, deadline),
            Err(error) => {
                // It got no answer, so it used nothing.
                admission.used(weir_ratelimit::Cost::default());
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

    fn prompt_tokens(&self) -> u64 {
        let text = self.asked.prompt_bytes.div_ceil(PROMPT_BYTES_PER_TOKEN).max(1);
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
            first_byte_by: Instant::now() + target.model.timeouts.first_byte,
            deadline,
        })
    }

    /// One limiter call: every limit of the request and a slot at the first candidate that has one.
    async fn admit(
        &self,
        model: &Arc<ModelEntry>,
        places: &[Place],
        slot: &mut Slot,
    ) -> Result<(Admission, Decision, usize), GatewayError> {
        let entries = self.scopes(model);
        let scopes: Scopes = entries.iter().map(|e| e.limits.clone()).collect();
        let output = match self.asked.kind {
            RouteKind::Embeddings => 0,
            _ => self.asked.max_output_tokens.map_or(EXPECTED_OUTPUT_TOKENS, u64::from),
        };
        let reserved =
            send::cost(model, self.prompt_tokens(), output.saturating_mul(u64::from(self.asked.choices)));
        let mut call = Acquire {
            id: uuid::Uuid::nil(),
            cost: reserved,
            estimated: self.asked.max_output_tokens.is_none(),
            scopes,
            candidates: tries::candidates(model, places),
            lease_ttl: LEASE_TTL,
        };
        let ledger = &self.gateway.ledger;
        let asked = Instant::now();
        let mut result = self.acquire(&ledger.limiter, &mut call, false).await;
        if let Err(error) = &result {
            tracing::warn!(%error, "limit store away; deciding without it");
            if entries.iter().any(|e| e.limits.without_store == WithoutStore::Closed) {
                return Err(GatewayError::LimitStore);
            }
            call = self.local_share(call, &entries);
            result = self.acquire(&ledger.local, &mut call, true).await;
        }
        if let Some(context) = slot {
            context.limiter += asked.elapsed();
        }
        self.gateway.metrics.limiter_duration.observe(asked.elapsed().as_secs_f64());
        let (mut admission, decision) = result.map_err(|_| GatewayError::LimitStore)?;
        match decision.outcome {
            Outcome::Granted { slot } => {
                let chosen = slot.unwrap_or(0);
                admission.granted(slot.map(|s| call.candidates[s].leases.clone()));
                Ok((admission, decision, chosen))
            }
            Outcome::Limited { .. } => {
                admission.refused();
                Err(refusal::limited(&decision, &entries))
            }
            Outcome::NoSlot { .. } => {
                admission.refused();
                Err(GatewayError::Busy { retry_after: None })
            }
        }
    }

    async fn acquire(
        &self,
        limiter: &AnyLimiter,
        call: &mut Acquire,
        local: bool,
    ) -> Result<(Admission, Decision), weir_ratelimit::Error> {
        // Made before the call: if this future is dropped while the limiter decides, the grant is cancelled.
        let admission = Admission::prepare(&self.gateway.ledger, limiter, call.scopes.clone(), call.cost);
        call.id = admission.id;
        let decision = match local {
            true => limiter.acquire(call).await,
            false => self.gateway.ledger.acquire(call).await,
        };
        let outcome = match &decision {
            Ok(Decision { outcome: Outcome::Granted { .. }, .. }) => "granted",
            Ok(Decision { outcome: Outcome::Limited { .. }, .. }) => "limited",
            Ok(Decision { outcome: Outcome::NoSlot { .. }, .. }) => "no_slot",
            Err(_) => "error",
        };
        self.gateway.metrics.limiter.get_or_create(&LimiterLabels { outcome }).inc();
        Ok((admission, decision?))
    }

    /// The same call against this gateway's share of each limit: the limit over the gateways there are.
    fn local_share(&self, mut call: Acquire, entries: &[&ScopeEntry]) -> Acquire {
        let gateways = self.gateway.live.live_gateways();
        for (scope, entry) in call.scopes.iter_mut().zip(entries) {
            let open = entry.limits.without_store == WithoutStore::Open;
            for bucket in &mut scope.buckets {
                *bucket = bucket.filter(|_| !open).map(|mut b| {
                    b.capacity /= u64::from(gateways);
                    b.period *= gateways;
                    b
                });
            }
            scope.concurrency = scope.concurrency.filter(|_| !open).map(|c| c.div_ceil(gateways));
        }
        for candidate in &mut call.candidates {
            candidate.max_concurrency = candidate.max_concurrency.div_ceil(gateways);
        }
        call
    }

    fn scopes(&self, model: &ModelEntry) -> Vec<&ScopeEntry> {
        let tenant_model = (self.key.tenant.name.clone(), model.name.clone());
        // The model's entry lives in the snapshot; `model` may be a clone of the handle.
        let model = self.snapshot.models_by_name.get(&model.name);
        [
            self.key.scope.as_ref(),
            self.key.tenant.scope.as_ref(),
            self.snapshot.tenant_models.get(&tenant_model),
            model.and_then(|m| m.scope.as_ref()),
            self.snapshot.global.as_ref(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn answer(
        &self,
        won: Won,
        mut admission: Admission,
        decision: &Decision,
        slot: &mut Slot,
        deadline: Instant,
    ) -> Result<Response<Body>, GatewayError> {
        let Won { answer, target, in_flight } = won;
        let mut context = slot.take().ok_or(GatewayError::Internal)?;
        context.note_first_byte();
        let request_id =
            HeaderValue::try_from(context.request_id.as_str()).map_err(|_| GatewayError::Internal)?;
        let prompt_tokens = self.prompt_tokens();
        match answer {
            Answer::Whole { status, headers, body } => {
                let (prompt, completion, source) = match usage_of_body(&body) {
                    Some(usage) => (usage.prompt, usage.completion, "provider"),
                    None if status.is_success() => (prompt_tokens, body.len() as u64 / 4, "counted"),
                    None => (0, 0, "counted"),
                };
                match status.is_success() {
                    true => target.succeed(completion),
                    false => target.refuse(),
                }
                context.tokens = Some((prompt, completion, source));
                admission.used(target.cost(prompt, completion));
                let body = rename_model_in_body(&body, &self.asked.model);
                context.finished(status, if status.is_success() { "ok" } else { "client_error" });
                let mut response = Response::new(Body::from(body));
                *response.status_mut() = status;
                *response.headers_mut() = headers::to_client(&headers, request_id);
                refusal::write_limits(response.headers_mut(), decision);
                Ok(response)
            }
            Answer::Stream { headers, first, rest } => {
                let plan = RewritePlan {
                    rename_model: Some(self.asked.model.to_string()),
                    drop_usage_chunk: self.asked.kind.takes_include_usage() && !self.asked.include_usage,
                    append_done: self.asked.kind.takes_include_usage(),
                };
                let clocks = Clocks { idle: target.model.timeouts.idle, deadline };
                let mut client_headers = headers::to_client(&headers, request_id);
                client_headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
                // nginx and its like hold streams back unless told not to.
                client_headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
                refusal::write_limits(&mut client_headers, decision);
                let end = StreamEnd { admission, prompt_tokens, target, in_flight, context };
                let stream = StreamBody::new(first, rest, Rewriter::new(plan), clocks, end);
                let mut response = Response::new(Body::Stream(Box::pin(stream)));
                *response.headers_mut() = client_headers;
                Ok(response)
            }
        }
    }
}
