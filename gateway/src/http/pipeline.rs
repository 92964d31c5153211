//! The life of a request, top to bottom.
//!
//! ```text
//!   route      an exact table; anything else is 404 or 405
//!   identify   key -> digest -> key -> tenant                     401, the same for every reason
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
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::time::Instant;
use weir_runtime::edge::{self, Client, RequestClock};

use super::admission::{self, Admitted};
use super::answer::{self, Reply};
use super::attempts::{Attempts, Failed};
use super::authentication::{self, Failure};
use super::bounds::HTTP;
use super::call::{Call, ModelCall};
use super::context::RequestContext;
use super::gateway::Gateway;
use super::keep_alive::{Done, KeepAlive, Work};
use super::models::choose;
use super::others::Others;
use super::request_body::Room;
use super::response_body::Body;
use super::route::{self, Endpoint, Route};
use super::{headers, models, request_body};
use crate::api::request;
use crate::error::{Blame, GatewayError};
use crate::metrics::AuthenticationLabels;
use crate::routing::entries::{KeyEntry, ModelEntry};
use crate::routing::snapshot::Snapshot;

/// Answers one request; every failure becomes an answer.
pub async fn handle(gateway: Arc<Gateway>, request: Request<Incoming>, client: Client) -> Response<Body> {
    let clock = client.clock.clone();
    let mut context = RequestContext::begin(&gateway.metrics, &gateway.traffic, request.headers(), client);
    let (is_http1, is_head) = (request.version() < Version::HTTP_2, request.method() == Method::HEAD);
    let page = gateway.cors.allowed(request.headers());
    let asked = {
        let asked = pin!(AssertUnwindSafe(respond(&gateway, request, &mut context)).catch_unwind());
        guarded(&clock, asked).await
    };
    let mut response = match asked {
        Ok(Asked::Answered(reply)) => answered((Ok(reply), context), is_http1),
        Ok(Asked::Silent(request, every)) => {
            let keep_alive = KeepAlive { every, clock, request_id: context.request_id.clone() };
            keep_alive.answer(request.work(context), |done| answered(done, is_http1)).await
        }
        Err(error) => answered((Err(error), context), is_http1),
    };
    gateway.cors.mark(response.headers_mut(), page);
    if is_head { without_body(response) } else { response }
}

/// A bug of ours costs the request that met it, and nobody else's; the end of the gateway ends it as well.
async fn guarded<T>(
    clock: &RequestClock,
    // Where it lies: an argument that is moved would be held twice.
    mut reply: Pin<&mut impl Future<Output = std::thread::Result<Result<T, GatewayError>>>>,
) -> Result<T, GatewayError> {
    poll_fn(|cx| match clock.poll_ending(cx) {
        true => Poll::Ready(Err(GatewayError::Draining)),
        false => reply.as_mut().poll(cx).map(|reply| reply.unwrap_or(Err(GatewayError::Internal))),
    })
    .await
}

fn answered((reply, mut context): Done, is_http1: bool) -> Response<Body> {
    let request_id = context.request_id.clone();
    let mut response = match reply {
        Ok(Reply::Complete(response)) => response,
        Ok(Reply::Stream(stream)) => stream.into_response(context),
        Err(error) => refuse(&error, is_http1, &mut context),
    };
    response.headers_mut().insert(headers::REQUEST_ID, request_id);
    response
}

/// The answer to HEAD: the head of the answer to GET.
fn without_body(mut response: Response<Body>) -> Response<Body> {
    if let Some(length) = response.body().size_hint().exact() {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    response.map(|_| Body::from(Bytes::new()))
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
    if error.is_final() {
        // OpenAI's SDKs repeat a 5xx unless they are told not to.
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    headers::write_limits(headers, &context.limits);
    headers::write_wait(headers, context.waited);
    if let GatewayError::MethodNotAllowed { allow } = error {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    // After a broken head or body it is not known where the next request would begin.
    let broken = is_http1 && matches!(error, GatewayError::BadHead(_) | GatewayError::BrokenBody);
    if broken || context.close {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What has become of a request that was read.
enum Asked {
    Answered(Reply),
    /// Nothing yet: its client is to hear comments, one each time that this has passed.
    Silent(Box<ReadRequest>, Duration),
}

/// A request that was read, by itself.
struct ReadRequest {
    gateway: Arc<Gateway>,
    snapshot: Arc<Snapshot>,
    key: Arc<KeyEntry>,
    model: Arc<ModelEntry>,
    path: &'static str,
    request: request::Request<'static>,
    body: Bytes,
    /// What the body takes.
    room: Room,
    headers: Arc<HeaderMap>,
}

impl ReadRequest {
    /// Has it answered, away from the connection.
    fn work(self: Box<Self>, mut context: Box<RequestContext>) -> Work {
        Box::pin(async move {
            let clock = context.client.clock.clone();
            let reply = {
                let reply = pin!(AssertUnwindSafe(self.complete(&mut context)).catch_unwind());
                guarded(&clock, reply).await
            };
            (reply, context)
        })
    }

    async fn complete(self: Box<Self>, context: &mut RequestContext) -> Result<Reply, GatewayError> {
        let Self { gateway, snapshot, key, model, path, request, body, room: _room, headers } = *self;
        let call = Call { gateway: &gateway, snapshot: &snapshot, key: &key, path, request, body, headers };
        complete(&call, &model, context).await
    }
}

/// Routes, identifies and reads the request, and has it answered.
async fn respond(
    gateway: &Arc<Gateway>,
    request: Request<Incoming>,
    context: &mut RequestContext,
) -> Result<Asked, GatewayError> {
    edge::check(&request, HTTP.head.fields).map_err(GatewayError::BadHead)?;
    if let Some(preflight) = gateway.cors.preflight(&request) {
        context.route = "preflight";
        context.finished(preflight.status(), "ok");
        return Ok(Asked::Answered(Reply::Complete(preflight)));
    }
    let Endpoint { path, route } = endpoint(&request, context)?;
    let snapshot = gateway.live.snapshot();
    let key = identify(gateway, &snapshot, &request, context)?;
    let kind = match route {
        Route::Generate(kind) => kind,
        Route::Models => return listed(models::list(&snapshot, &key)?, context),
        Route::Model(id) => return listed(models::one(&snapshot, &key, &id)?, context),
    };
    let (head, body) = request.into_parts();
    let (body, room) =
        request_body::take(&gateway.bodies, gateway.body_bytes_max, &head.headers, body).await?;
    let request = request::Request::read(kind, &body)?.into_owned();
    context.stream = request.stream;
    let model = choose(&snapshot, &key, &request.model)?;
    let headers = Arc::new(head.headers);
    if let Some(every) = model.timeouts.keep_alive.filter(|_| request.stream) {
        let (gateway, model) = (gateway.clone(), model.clone());
        let request = ReadRequest { gateway, snapshot, key, model, path, request, body, room, headers };
        return Ok(Asked::Silent(Box::new(request), every));
    }
    let call = Call { gateway, snapshot: &snapshot, key: &key, path, request, body, headers };
    complete(&call, model, context).await.map(Asked::Answered)
}

/// The answer that is made of the configuration alone.
fn listed(body: Bytes, context: &mut RequestContext) -> Result<Asked, GatewayError> {
    context.finished(StatusCode::OK, "ok");
    Ok(Asked::Answered(Reply::Complete(answer::json(StatusCode::OK, body))))
}

/// The endpoint of a request, if it takes the request's method.
fn endpoint(request: &Request<Incoming>, context: &mut RequestContext) -> Result<Endpoint, GatewayError> {
    let (method, path) = (request.method(), request.uri().path());
    let endpoint = Endpoint::at(path).ok_or_else(|| route::unknown(method, path))?;
    context.route = endpoint.path;
    match endpoint.takes(method) {
        true => Ok(endpoint),
        false => Err(GatewayError::MethodNotAllowed { allow: endpoint.allow() }),
    }
}

/// The key of a request. Missing, wrong, unknown, revoked and expired keys are told apart in no answer.
fn identify(
    gateway: &Gateway,
    snapshot: &Snapshot,
    request: &Request<Incoming>,
    context: &mut RequestContext,
) -> Result<Arc<KeyEntry>, GatewayError> {
    let token = authentication::key(request.headers()).map_err(GatewayError::BadHead)?;
    let key = authentication::identify(snapshot, token).map_err(|failure| {
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
    context.key = Some(key.clone());
    Ok(key)
}

/// Has the model answer, and after a failure that is not the client's its fallbacks: each has backends and limits of its
/// own. All of it takes no longer than the total of the model that was asked for, and a fallback no longer than its own:
/// after that nothing is admitted, sent or charged any more.
async fn complete(
    call: &Call<'_>,
    model: &Arc<ModelEntry>,
    context: &mut RequestContext,
) -> Result<Reply, GatewayError> {
    let fallbacks = model.spec.fallbacks.iter().filter_map(|name| call.snapshot.models_by_name.get(name));
    let end = context.started + model.timeouts.total;
    let mut last = None;
    for model in std::iter::once(model).chain(fallbacks).filter(|model| call.key.allows(&model.name)) {
        let now = Instant::now();
        if now >= end {
            last = last.or(Some(GatewayError::Deadline));
            break;
        }
        context.model = Some(model.name.clone());
        context.model_use = None;
        let asked_at = if last.is_some() { now } else { context.started };
        let deadline = end.min(asked_at + model.timeouts.total);
        match complete_with(&call.for_model(model, deadline), context).await {
            Err(error) if error.facts().blame != Blame::Client => last = Some(error),
            done => return done,
        }
    }
    Err(last.unwrap_or(GatewayError::NoBackend { retry_after: None }))
}

/// Admits the request for one model and sends it, elsewhere as long as that is allowed.
async fn complete_with(call: &ModelCall<'_>, context: &mut RequestContext) -> Result<Reply, GatewayError> {
    let (candidates, probation) = call.candidates();
    if candidates.is_empty() {
        return Err(GatewayError::NoBackend { retry_after: None });
    }
    let Admitted { mut reservation, decision, rest, chosen } =
        admission::admit(call, &candidates, context).await?;
    let (model, preferred, used) = (call.model, candidates[0].index, chosen.index);
    model.pool.state.count_request();
    if used != preferred {
        model.reassign(preferred, used);
    }
    // Its probe is for another request now, and so is the backend.
    let (probation, passed_over) = match probation {
        Some(probation) if probation.index() != used => (None, Some(probation.index())),
        probation => (probation, None),
    };
    let others = Others::of(call, [&candidates, &rest], used, passed_over);
    match Attempts::new(call, &mut reservation, context, others).run(used, probation).await {
        Ok(won) => answer::reply(call, won, reservation, decision, context),
        Err(Failed { error, unknown_outcome }) => {
            answer::settle_failure(unknown_outcome, &mut reservation, context);
            Err(error)
        }
    }
}
