//! The answer of a backend, on its way to the client.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use weir_ratelimit::{Cost, Decision, Kind};

use super::attempt::{Answer, Target};
use super::attempts::Won;
use super::call::ModelCall;
use super::context::RequestContext;
use super::headers::{self, Content};
use super::refusal;
use super::request_body::Room;
use super::response_body::{Body, Clocks, StreamBody, StreamEnd, UnaryBody};
use crate::api::response::{MissingUsage, ReadAnswer, RewritePlan, Rewriter};
use crate::api::usage::Tokens;
use crate::error::GatewayError;
use crate::limits::reservation::Reservation;
use crate::routing::backend_state::InFlight;
use crate::routing::upstream::AnswerBody;

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
    rest: Option<AnswerBody>,
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
    let request_id = context.request_id.clone();
    let Won { answer, target, in_flight } = won;
    match answer {
        Answer::Unary { status, headers, body, read, room } => {
            let headers = headers::to_client(&headers, request_id);
            let answer = UnaryAnswer { status, headers, body, read, room };
            Ok(Reply::Complete(unary(call, answer, &target, (reservation, decision), context)))
        }
        Answer::Stream { headers, first, rest } => {
            let request = &call.call.request;
            let plan = RewritePlan {
                kind: request.kind,
                dialect: target.backend.spec.dialect,
                rename_model: Some(request.model.to_string()),
                drop_usage_chunk: request.kind.takes_include_usage() && !request.include_usage,
                append_done: request.kind.takes_include_usage(),
                bounds: call.call.usage_bounds(),
                missing_usage: (request.include_usage && request.kind.takes_include_usage())
                    .then(|| MissingUsage::new(&first, request.kind, &request.model, call.prompt_tokens)),
            };
            let mut headers = headers::to_client(&headers, request_id);
            headers::content_type(&mut headers, Content::Events);
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            // nginx and its like hold streams back unless told not to.
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
            refusal::write_limits(&mut headers, &decision, &reservation.scopes);
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
    read: ReadAnswer,
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
    let UnaryAnswer { status, mut headers, body, read, room } = answer;
    let (request, is_success) = (&call.call.request, status.is_success());
    let usage = read.usage(body.len(), &call.call.usage_bounds());
    if let Err(found) = &usage {
        target.implausible(found);
    }
    let (usage, plausible) = (usage.unwrap_or_default(), usage.is_ok());
    let tokens = match is_success {
        true => {
            let written = || read.completion_estimate(body.len(), request.kind);
            let counted = usage.and_then(|usage| usage.completion).is_some();
            Tokens::of(usage, call.prompt_tokens, if counted { 0 } else { written() })
        }
        false => Tokens::of(usage, 0, 0),
    };
    match is_success {
        true => target.succeed(tokens.completion),
        false => target.refuse(),
    }
    context.tokens = Some(tokens);
    let cost = target.cost(&tokens);
    reservation.used(cost);
    if is_success && plausible {
        let usage = usage.unwrap_or_default();
        reservation.learn(usage.prompt, usage.completion);
    }
    refusal::settled(&mut decision, &reservation.reserved, &cost);
    context.finished(status, if is_success { "ok" } else { "client_error" });
    // It was read as JSON when it came.
    headers::content_type(&mut headers, Content::Json);
    refusal::write_limits(&mut headers, &decision, &reservation.scopes);
    headers::write_wait(&mut headers, context.waited);
    let body = read.models.renamed(&body, &request.model);
    let body = UnaryBody::new(body, room, context.client.clock.clone());
    let mut response = Response::new(Body::Unary(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

/// Settles a request that got no answer. A backend may have generated to the end without our seeing it: if the outcome of
/// any attempt is unknown, what was reserved stands.
pub(super) fn settle_failure(
    unknown_outcome: bool,
    reservation: &mut Reservation,
    context: &mut RequestContext,
) {
    if !unknown_outcome {
        reservation.used(Cost::default());
        return;
    }
    let reserved = reservation.reserved;
    reservation.used(reserved);
    let (prompt, completion) = (reserved.get(Kind::InputTokens), reserved.get(Kind::OutputTokens));
    context.tokens = Some(Tokens::reserved(prompt, completion));
}
