//! The answer of a backend, on its way to the client.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::body::Incoming;
use weir_ratelimit::{Cost, Decision, Kind};

use super::attempt::{Answer, Target};
use super::attempts::Won;
use super::call::ModelCall;
use super::context::RequestContext;
use super::headers::{self, Content};
use super::refusal;
use super::request_body::Room;
use super::response_body::{Body, Clocks, StreamBody, StreamEnd, UnaryBody, usage_or_count};
use crate::api::request::RouteKind;
use crate::api::response::{
    BYTES_PER_TOKEN, RewritePlan, Rewriter, is_error_object, rename_model_in_body, usage_of_body,
};
use crate::error::GatewayError;
use crate::limits::reservation::Reservation;
use crate::routing::backend_state::InFlight;

/// What the client is answered.
pub(super) enum Reply {
    /// An answer that is complete.
    Complete(Response<Body>),
    /// A stream that has begun.
    Stream(Box<OpenStream>),
}

/// A stream of which the first chunk is there. It takes the request's context along, which ends with its body.
pub(super) struct OpenStream {
    headers: HeaderMap,
    first: Bytes,
    rest: Incoming,
    plan: RewritePlan,
    clocks: Clocks,
    reservation: Reservation,
    prompt_tokens: u64,
    target: Target,
    in_flight: InFlight,
}

impl OpenStream {
    /// The answer; its body owns everything that must be given back.
    pub(super) fn into_response(self, context: Box<RequestContext>) -> Response<Body> {
        let Self { headers, first, rest, plan, clocks, reservation, prompt_tokens, target, in_flight } = self;
        let end = StreamEnd { reservation, prompt_tokens, target, in_flight, context };
        let stream = StreamBody::new(first, rest, Rewriter::new(plan), clocks, end);
        let mut response = Response::new(Body::Stream(Box::pin(stream)));
        *response.headers_mut() = headers;
        response
    }
}

/// An answer that is made here.
pub(super) fn json(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// What the client gets of the answer that won.
pub(super) fn reply(
    call: &ModelCall<'_>,
    won: Won,
    reservation: Reservation,
    decision: Decision,
    context: &mut RequestContext,
) -> Result<Reply, GatewayError> {
    context.note_first_byte();
    let request_id = context.request_id_header().ok_or(GatewayError::Internal)?;
    let Won { answer, target, in_flight } = won;
    match answer {
        Answer::Unary { status, headers, body, room } => {
            let headers = headers::to_client(&headers, request_id);
            let answer = UnaryAnswer { status, headers, body, room };
            Ok(Reply::Complete(unary(call, answer, &target, (reservation, decision), context)))
        }
        Answer::Stream { headers, first, rest } => {
            let request = &call.call.request;
            let plan = RewritePlan {
                rename_model: Some(request.model.to_string()),
                drop_usage_chunk: request.kind.takes_include_usage() && !request.include_usage,
                append_done: request.kind.takes_include_usage(),
                bounds: call.call.usage_bounds(),
            };
            let mut headers = headers::to_client(&headers, request_id);
            headers::content_type(&mut headers, Content::Events);
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            // nginx and its like hold streams back unless told not to.
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
            refusal::write_limits(&mut headers, &decision);
            headers::write_wait(&mut headers, context.waited);
            let clocks = Clocks { idle: call.model.timeouts.idle, deadline: call.deadline };
            let prompt_tokens = call.prompt_tokens;
            let stream = OpenStream {
                headers,
                first,
                rest,
                plan,
                clocks,
                reservation,
                prompt_tokens,
                target,
                in_flight,
            };
            Ok(Reply::Stream(Box::new(stream)))
        }
    }
}

/// An answer that is not streamed, with the headers that the client gets.
struct UnaryAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    room: Room,
}

/// Settles a unary answer with what it used, and hands it on.
fn unary(
    call: &ModelCall<'_>,
    answer: UnaryAnswer,
    target: &Target,
    (mut reservation, mut decision): (Reservation, Decision),
    context: &mut RequestContext,
) -> Response<Body> {
    let UnaryAnswer { status, mut headers, body, room } = answer;
    let (request, is_success) = (&call.call.request, status.is_success());
    let usage = usage_of_body(&body, &call.call.usage_bounds());
    if let Err(found) = &usage {
        target.implausible(found);
    }
    let (usage, plausible) = (usage.unwrap_or_default(), usage.is_ok());
    let written = match request.kind {
        RouteKind::Embeddings => 0,
        _ => (body.len() as u64).div_ceil(BYTES_PER_TOKEN),
    };
    let (prompt, completion, source) = match is_success {
        true => usage_or_count(usage, call.prompt_tokens, written),
        false => usage_or_count(usage, 0, 0),
    };
    match is_success {
        true => target.succeed(completion),
        false => target.refuse(),
    }
    context.tokens = Some((prompt, completion, source));
    let cost = target.cost(prompt, completion);
    reservation.used(cost);
    if is_success && plausible {
        let usage = usage.unwrap_or_default();
        reservation.learn(usage.prompt, usage.completion);
    }
    refusal::settled(&mut decision, &reservation.reserved, &cost);
    context.finished(status, if is_success { "ok" } else { "client_error" });
    // A good answer was read as JSON when it came.
    let content = match is_success || is_error_object(&body).is_ok() {
        true => Content::Json,
        false => Content::Text,
    };
    headers::content_type(&mut headers, content);
    refusal::write_limits(&mut headers, &decision);
    headers::write_wait(&mut headers, context.waited);
    let body = rename_model_in_body(&body, &request.model);
    let body = UnaryBody::new(body, room, context.client.clock.clone());
    let mut response = Response::new(Body::Unary(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Settles a request that got no answer.
pub(super) fn settle_failure(
    error: &GatewayError,
    reservation: &mut Reservation,
    context: &mut RequestContext,
) {
    // A backend may have generated to the end without our seeing it: then what was reserved stands.
    let unknown_outcome = matches!(
        error,
        GatewayError::UpstreamTimeout | GatewayError::UpstreamBroken | GatewayError::Deadline
    );
    if !unknown_outcome {
        reservation.used(Cost::default());
        return;
    }
    let reserved = reservation.reserved;
    reservation.used(reserved);
    context.tokens = Some((reserved.get(Kind::InputTokens), reserved.get(Kind::OutputTokens), "reserved"));
}
