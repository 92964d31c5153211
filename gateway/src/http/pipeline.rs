//! The life of a request, top to bottom.
//!
//! ```text
//!   route      an exact table; anything else is 404 or 405
//!   identify   bearer key -> digest -> key -> tenant              401, the same for every reason
//!   read       one borrowing pass over the body                   400, 408, 413, 415
//!   choose     model -> pool -> backends in order of preference   404, from the snapshot, no I/O
//!   admit      one limiter call: every limit and a slot;          429 (the caller's limits), 503 (ours)
//!              refused, it waits in turn where that can help
//!   attempt    at the backend; elsewhere while nothing was sent   502, 503, 504
//!   answer     unary, or as a stream that owns the rest
//!   settle     on drop, exactly once, on every way out
//! ```

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::Poll;

use futures_util::FutureExt as _;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use weir_runtime::edge::{self, Client};

use super::admission::{self, Admitted};
use super::answer::{self, Reply};
use super::attempts::{self, Attempts};
use super::authentication::{self, Failure};
use super::bounds::HTTP;
use super::call::{Call, ModelCall};
use super::context::RequestContext;
use super::gateway::Gateway;
use super::response_body::Body;
use super::{headers, models, request_body};
use crate::api::request::{self, RouteKind};
use crate::error::{Blame, GatewayError};
use crate::metrics::AuthenticationLabels;
use crate::routing::entries::{KeyEntry, ModelEntry};
use crate::routing::snapshot::Snapshot;

/// Answers one request; every failure becomes an answer.
pub async fn handle(gateway: Arc<Gateway>, request: Request<Incoming>, client: Client) -> Response<Body> {
    let mut context =
        RequestContext::begin(&gateway.metrics, &gateway.traffic, request.headers(), client.clone());
    let request_id = context.request_id_header();
    let is_http1 = request.version() < Version::HTTP_2;
    let reply = {
        // A bug of ours costs the request that met it, and nobody else's.
        let reply = AssertUnwindSafe(respond(&gateway, request, &mut context)).catch_unwind();
        let mut reply = std::pin::pin!(reply);
        poll_fn(|cx| match client.clock.poll_ending(cx) {
            true => Poll::Ready(Err(GatewayError::Draining)),
            false => reply.as_mut().poll(cx).map(|reply| reply.unwrap_or(Err(GatewayError::Internal))),
        })
        .await
    };
    let mut response = match reply {
        Ok(Reply::Complete(response)) => response,
        Ok(Reply::Stream(stream)) => stream.into_response(context),
        Err(error) => refuse(&error, is_http1, &mut context),
    };
    if let Some(request_id) = request_id {
        response.headers_mut().insert("x-request-id", request_id);
    }
    response
}

/// The answer to a request that failed before anything was sent.
fn refuse(error: &GatewayError, is_http1: bool, context: &mut RequestContext) -> Response<Body> {
    let facts = error.facts();
    context.finished(facts.status, facts.label);
    let mut response = answer::json(facts.status, error.to_body().into());
    let headers = response.headers_mut();
    if let Some(wait) = facts.retry_after {
        headers::write_retry_after(headers, wait);
    }
    headers::write_limits(headers, &context.limits);
    headers::write_wait(headers, context.waited);
    // After a broken head or body it is not known where the next request would begin.
    let broken = is_http1 && matches!(error, GatewayError::BadHead(_) | GatewayError::BrokenBody);
    if broken || context.close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Routes, identifies and reads the request, and has it answered.
async fn respond(
    gateway: &Gateway,
    request: Request<Incoming>,
    context: &mut RequestContext,
) -> Result<Reply, GatewayError> {
    edge::check(&request, HTTP.head.fields).map_err(GatewayError::BadHead)?;
    let (path, kind) = route(&request, context)?;
    let snapshot = gateway.live.snapshot();
    let key = identify(gateway, &snapshot, &request, context)?;
    let Some(kind) = kind else {
        let list = models::list(&snapshot, &key)?;
        context.finished(StatusCode::OK, "ok");
        return Ok(Reply::Complete(answer::json(StatusCode::OK, list)));
    };
    let (head, body) = request.into_parts();
    let (body, _room) = request_body::take(&gateway.bodies, &head.headers, body).await?;
    let request = request::Request::read(kind, &body)?.into_owned();
    context.stream = request.stream;
    let model = choose(&snapshot, &key, &request.model)?;
    let headers = head.headers;
    let call = Call { gateway, snapshot: &snapshot, key: &key, path, request, body, headers };
    complete(&call, model, context).await
}

/// The endpoint of a request; `None` is the list of models.
fn route(
    request: &Request<Incoming>,
    context: &mut RequestContext,
) -> Result<(&'static str, Option<RouteKind>), GatewayError> {
    let (path, kind) = match request.uri().path() {
        "/v1/chat/completions" => ("/v1/chat/completions", Some(RouteKind::ChatCompletions)),
        "/v1/completions" => ("/v1/completions", Some(RouteKind::Completions)),
        "/v1/embeddings" => ("/v1/embeddings", Some(RouteKind::Embeddings)),
        "/v1/responses" => ("/v1/responses", Some(RouteKind::Responses)),
        "/v1/models" => ("/v1/models", None),
        _ => return Err(GatewayError::UnknownRoute),
    };
    context.route = path;
    let allowed = if kind.is_some() { Method::POST } else { Method::GET };
    match request.method() == allowed {
        true => Ok((path, kind)),
        false => Err(GatewayError::MethodNotAllowed),
    }
}

/// The key of a request. Missing, wrong, unknown, revoked and expired keys are told apart in no answer.
fn identify(
    gateway: &Gateway,
    snapshot: &Snapshot,
    request: &Request<Incoming>,
    context: &mut RequestContext,
) -> Result<Arc<KeyEntry>, GatewayError> {
    let key = authentication::identify(snapshot, request.headers()).map_err(|failure| {
        let labels = AuthenticationLabels { reason: failure.label() };
        gateway.metrics.authentication_failures.get_or_create(&labels).inc();
        context.unlogged = gateway.failures.note(Some(context.client.connection.peer()));
        // HTTP/2 has no such header; its connection carries the requests of others.
        context.close = context.unlogged && request.version() <= Version::HTTP_11;
        match failure {
            Failure::Missing => GatewayError::MissingKey,
            Failure::Unknown | Failure::Expired => GatewayError::InvalidKey,
        }
    })?;
    context.client.connection.trust();
    context.tenant = Some(key.tenant.name.to_string());
    context.api_key = Some(key.name.to_string());
    Ok(key)
}

/// The model that the client names, if its key allows it.
fn choose<'a>(
    snapshot: &'a Snapshot,
    key: &KeyEntry,
    name: &str,
) -> Result<&'a Arc<ModelEntry>, GatewayError> {
    match snapshot.models.get(name) {
        None => Err(GatewayError::ModelNotFound { model: name.to_owned() }),
        Some(model) if !key.allows(&model.name) => {
            Err(GatewayError::ModelNotAllowed { model: name.to_owned() })
        }
        Some(model) => Ok(model),
    }
}

/// Has the model answer, and after a failure that is not the client's its fallbacks: each has backends and limits of its
/// own.
async fn complete(
    call: &Call<'_>,
    model: &Arc<ModelEntry>,
    context: &mut RequestContext,
) -> Result<Reply, GatewayError> {
    let fallbacks = model.spec.fallbacks.iter().filter_map(|name| call.snapshot.models_by_name.get(name));
    let mut last = GatewayError::NoBackend { retry_after: None };
    for model in std::iter::once(model).chain(fallbacks).filter(|model| call.key.allows(&model.name)) {
        context.model = Some(model.name.to_string());
        match complete_with(&call.for_model(model, context.started), context).await {
            Err(error) if error.facts().blame != Blame::Client => last = error,
            done => return done,
        }
    }
    Err(last)
}

/// Admits the request for one model and sends it, elsewhere as long as that is allowed.
async fn complete_with(call: &ModelCall<'_>, context: &mut RequestContext) -> Result<Reply, GatewayError> {
    let candidates = call.candidates();
    if candidates.is_empty() {
        return Err(GatewayError::NoBackend { retry_after: None });
    }
    let Admitted { mut reservation, decision, chosen } = admission::admit(call, &candidates, context).await?;
    let (model, preferred, used) = (call.model, candidates[0].index, candidates[chosen].index);
    model.pool.state.count_request();
    if used != preferred {
        model.reassign(preferred, used);
    }
    let others = attempts::others(&candidates, chosen);
    match Attempts::new(call, &mut reservation, context, others).run(used).await {
        Ok(won) => answer::reply(call, won, reservation, decision, context),
        Err(error) => {
            answer::settle_failure(&error, &mut reservation, context);
            Err(error)
        }
    }
}
