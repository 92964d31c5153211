//! One attempt at one backend, up to the first event of its answer.
//!
//! What comes back is judged here: whose fault a failure is, and whether another backend may be tried. A stream's
//! first event is awaited before anything is said to the client, so that an early failure can still go elsewhere;
//! a unary answer is read to its end, within a bound, for the same reason.
//!
//! Blame: what only the backend can have done (no connection, silence, a refused credential, "busy") counts against it at
//! once. An answer that is no answer may be the request's doing: it counts only when another backend answers the same
//! request well ([`Fault::Suspected`]), so that no caller can eject a backend with requests that no server can answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use tokio::time::{Instant, timeout, timeout_at};
use weir_proto::resource::Dialect;
use weir_ratelimit::Cost;
use weir_runtime::RefusedAddress;

use crate::api::answer::{self, NoAnswer};
use crate::api::request::RouteKind;
use crate::api::response::{ReadAnswer, is_error_object};
use crate::api::upstream_error::{self, ApiError, MESSAGE_CHARS_MAX, Meaning, redact, without_echo};
use crate::api::usage::{Implausible, Tokens};
use crate::error::{GatewayError, UpstreamFailure};
use crate::http::first_event::{self, Begun};
use crate::http::joined::Joined;
use crate::http::request_body::{BodyMemory, Room};
use crate::http::{headers, retry_after};
use crate::limits::price;
use crate::metrics::{AttemptLabels, ImplausibleLabels, Metrics};
use crate::routing::backend::BackendEntry;
use crate::routing::backend_state::{AttemptOutcome, LastFailure};
use crate::routing::balance::{Measure, Sample};
use crate::routing::entries::ModelEntry;
use crate::routing::upstream::{self, AnswerBody, SendError};

/// A refusal's body that takes longer than this is judged by its status alone.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where an attempt goes, and what came of it so far.
#[derive(Debug, Clone)]
pub struct Target {
    /// The model.
    pub model: Arc<ModelEntry>,
    /// The backend.
    pub backend: Arc<BackendEntry>,
    /// What the backend calls the model.
    pub upstream_model: String,
    /// Where attempts are counted.
    pub metrics: Arc<Metrics>,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// Tokens of the prompt: what the time to the first byte depends on.
    pub prompt_tokens: u64,
    /// When it was sent.
    pub sent: Instant,
    /// When the first byte of the answer came.
    pub began: Option<Instant>,
}

impl Target {
    /// Records the first byte of a stream, or all of a unary answer.
    pub fn begin(&mut self) {
        self.began = Some(Instant::now());
        let sample = self.sample(0);
        if self.stream {
            self.backend.state.note_first_byte(sample.took);
        }
        self.model.pool.state.began(&self.model.name, &self.backend, self.stream, &sample);
    }

    /// Records a complete answer that refuses a mistake of the client's: the backend works, but how fast it refuses says
    /// nothing about how fast it serves.
    pub fn refuse(&self) {
        self.count(AttemptOutcome::Success);
        self.backend.state.count(AttemptOutcome::Success);
        self.model.pool.state.succeeded(&self.model.name, &self.backend, None);
    }

    /// Records a complete and good answer.
    pub fn succeed(&self, output_tokens: u64) {
        self.count(AttemptOutcome::Success);
        self.backend.state.count(AttemptOutcome::Success);
        let sample = match (self.stream, self.began) {
            (true, Some(began)) => {
                let took = began.elapsed();
                self.backend.state.note_decode(output_tokens, took);
                Sample { measure: Measure::Decode, took, prompt_tokens: self.prompt_tokens, output_tokens }
            }
            _ => self.sample(output_tokens),
        };
        self.model.pool.state.succeeded(&self.model.name, &self.backend, Some(&sample));
    }

    /// Records a failure that counts against the backend in the next choice.
    pub fn fail(&self, outcome: AttemptOutcome) {
        self.count(outcome);
        self.blame(outcome, None);
    }

    /// Records a failure that says nothing certain about the backend: it is counted and shown, and has no effect on the
    /// next choice.
    pub fn fail_without_blame(&self, outcome: AttemptOutcome) {
        self.count(outcome);
    }

    /// Lets a failure that was counted before bear on the next choice.
    pub fn blame(&self, outcome: AttemptOutcome, retry_after: Option<Duration>) {
        let state = &self.model.pool.state;
        self.backend.state.count(outcome);
        if self.began.is_none() && matches!(outcome, AttemptOutcome::Timeout | AttemptOutcome::Overtaken) {
            state.first_byte_timed_out(&self.model.name, self.backend.id, self.stream);
        }
        state.failed(&self.model.name, &self.backend, outcome, &self.sample(0), retry_after);
    }

    /// The backend reported a use that cannot be true, and the gateway's own count is taken.
    pub fn implausible(&self, found: &Implausible) {
        let Implausible { direction, reported, possible } = *found;
        let labels = ImplausibleLabels { backend: self.backend.name.to_string(), direction };
        self.metrics.implausible_usage.get_or_create(&labels).inc();
        if let Some(held_back) = self.backend.state.implausible_lines.pass() {
            tracing::warn!(
                backend = %self.backend.name, model = %self.model.name, direction, reported, possible, held_back,
                "usage reported by the backend cannot be true; tokens were counted by the gateway"
            );
        }
    }

    /// Notes whether the backend refuses the `stream_options` that Weir adds for this model. Says whether that is news.
    pub fn set_refuses_addition(&self, refuses: bool) -> bool {
        let news = self.backend.state.set_refuses_addition(&self.model.name, refuses);
        if news && refuses {
            tracing::info!(
                backend = %self.backend.name, model = %self.model.name,
                "backend refuses stream_options; usage of its streams is counted by the gateway"
            );
        }
        news
    }

    /// How long to wait for the first byte before another backend is tried as well; `None` is until it times out.
    pub fn hedge_delay(&self) -> Option<Duration> {
        let state = &self.model.pool.state;
        state.hedge_delay(&self.model.name, self.backend.id, self.stream, self.prompt_tokens)
    }

    fn sample(&self, output_tokens: u64) -> Sample {
        let measure = if self.stream { Measure::FirstByte } else { Measure::Unary };
        let took = self.began.unwrap_or_else(Instant::now).saturating_duration_since(self.sent);
        Sample { measure, took, prompt_tokens: self.prompt_tokens, output_tokens }
    }

    fn count(&self, outcome: AttemptOutcome) {
        let labels = AttemptLabels { backend: self.backend.name.to_string(), outcome: outcome.label() };
        self.metrics.attempts.get_or_create(&labels).inc();
    }

    /// What these tokens of this model cost.
    pub fn cost(&self, tokens: &Tokens) -> Cost {
        price::cost_of(&self.model, tokens)
    }
}

/// What a backend answered.
#[derive(Debug)]
pub enum Answer {
    /// A stream with its first chunk.
    Stream {
        /// Its headers.
        headers: HeaderMap,
        /// Everything up to its first event with data; never empty.
        first: Bytes,
        /// The rest; `None` where the server did not stream, and `first` is all.
        rest: Option<AnswerBody>,
    },
    /// All of it. The status is 2xx, or 4xx when the client is at fault.
    Unary {
        /// The status.
        status: StatusCode,
        /// Its headers.
        headers: HeaderMap,
        /// The body.
        body: Bytes,
        /// What it says.
        read: ReadAnswer,
        /// The memory it takes.
        room: Room,
    },
}

/// What one attempt sends.
#[derive(Debug)]
pub struct Outgoing {
    /// The endpoint.
    pub kind: RouteKind,
    /// How the backend counts.
    pub dialect: Dialect,
    /// The path, such as `/v1/chat/completions`.
    pub path: &'static str,
    /// The client's headers.
    pub client: Arc<HeaderMap>,
    /// The id of the request.
    pub request_id: HeaderValue,
    /// The body, spliced for this backend.
    pub body: Bytes,
    /// Whether the body asks for usage in the stream, which the client did not.
    pub added_usage: bool,
    /// What answers that are not streamed may take.
    pub memory: Arc<BodyMemory>,
    /// Largest unary answer that is taken, bytes.
    pub answer_max: usize,
    /// When the first byte must be there; `None` where only the whole answer has a time.
    pub first_byte_by: Option<Instant>,
    /// When the whole answer must be there.
    pub deadline: Instant,
}

impl Outgoing {
    /// When the answer must have begun.
    fn begins_by(&self) -> Instant {
        self.first_byte_by.map_or(self.deadline, |by| by.min(self.deadline))
    }
}

/// Whose fault a failed attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nobody's, or the gateway's own.
    None,
    /// The backend's; how long it asked to be left alone.
    Backend(AttemptOutcome, Option<Duration>),
    /// The backend's if another one answers the same request well, else the request's.
    Suspected(AttemptOutcome),
    /// What Weir added to the request was refused: without it the same backend may do.
    Addition,
}

/// Why an attempt failed.
#[derive(Debug)]
pub struct Failure {
    /// What the client is told if this was the last attempt.
    pub error: Box<GatewayError>,
    /// Whose fault it is.
    pub fault: Fault,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// What was seen, for operators; redacted.
    pub seen: String,
}

impl Failure {
    fn new(error: GatewayError, fault: Fault, seen: impl Into<String>) -> Self {
        Self { error: Box::new(error), fault, status: None, seen: seen.into() }
    }

    /// An answer that makes no sense.
    fn invalid(status: StatusCode, reason: impl std::fmt::Display) -> Self {
        let fault = Fault::Suspected(AttemptOutcome::InvalidAnswer);
        let failure = Self::new(GatewayError::UpstreamInvalid, fault, reason.to_string());
        Self { status: Some(status.as_u16()), ..failure }
    }

    /// The outcome to count; `None` when the attempt counts for nothing.
    const fn outcome(&self) -> Option<AttemptOutcome> {
        match self.fault {
            Fault::None | Fault::Addition => None,
            Fault::Backend(outcome, _) | Fault::Suspected(outcome) => Some(outcome),
        }
    }

    /// Counts and shows the failure; blaming is up to the caller.
    pub fn note(&self, target: &Target) {
        let Some(outcome) = self.outcome() else { return };
        target.count(outcome);
        let (backend, model) = (&target.backend, &target.model.name);
        if matches!(self.fault, Fault::Suspected(_)) {
            backend.state.count_suspected();
        }
        backend.state.note_failure(LastFailure {
            at: weir_runtime::wall_clock(),
            outcome,
            model: model.to_string(),
            status: self.status,
            seen: self.seen.clone(),
        });
        if let Some(held_back) = backend.state.failure_lines.pass() {
            let (status, seen) = (self.status, &self.seen);
            tracing::warn!(
                backend = %backend.name, %model, outcome = outcome.label(), status, seen, held_back,
                "attempt failed"
            );
        }
    }
}

/// Failures that must not count against the backend.
impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        let seen = error.to_string();
        Self::new(error, Fault::None, seen)
    }
}

/// Sends a request to a backend.
///
/// # Errors
/// What failed, and whose fault it is; nothing of it is recorded yet.
pub async fn send(target: &Target, outgoing: Outgoing) -> Result<Answer, Failure> {
    let begun = timeout_at(outgoing.begins_by(), begin(target, &outgoing)).await;
    let (head, begun) = begun.map_err(|_| late(&outgoing))??;
    match begun {
        Beginning::Refusal(rest) => refused(&outgoing, head, rest).await,
        Beginning::Stream(begun, rest) => streamed(&outgoing, head, begun, rest).await,
        Beginning::Whole(body, room) => unary(&outgoing, head, body, room),
    }
}

/// What there is of an answer when it has begun.
enum Beginning {
    /// The head of a refusal.
    Refusal(AnswerBody),
    /// The first event of a stream.
    Stream(Begun, AnswerBody),
    /// All of an answer that is not streamed.
    Whole(Bytes, Room),
}

/// Sends a request, and reads its answer up to where it has begun.
async fn begin(target: &Target, outgoing: &Outgoing) -> Result<(http::response::Parts, Beginning), Failure> {
    let (head, mut rest) = respond(target, outgoing).await?.into_parts();
    if !head.status.is_success() {
        return Ok((head, Beginning::Refusal(rest)));
    }
    if let Some(coding) = headers::coding(&head.headers) {
        let reason = format_args!("it is encoded ({coding}), which the request did not accept");
        return Err(Failure::invalid(head.status, reason));
    }
    let begun = match target.stream {
        true => Beginning::Stream(first_event::read(&mut rest).await, rest),
        false => {
            let (body, room) = read_unary(outgoing, Bytes::new(), rest).await?;
            Beginning::Whole(body, room)
        }
    };
    Ok((head, begun))
}

/// The head of the answer.
async fn respond(target: &Target, outgoing: &Outgoing) -> Result<Response<AnswerBody>, Failure> {
    let uri = target.backend.endpoint_of(outgoing.kind, outgoing.path);
    let uri = uri.map_err(|_| GatewayError::Internal)?;
    let request = || {
        let mut request = Request::new(Full::new(outgoing.body.clone()));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = uri.clone();
        let mut headers = headers::to_backend(&outgoing.client, outgoing.request_id.clone());
        if let Some(authorization) = &target.backend.authorization {
            headers.insert(header::AUTHORIZATION, authorization.clone());
        }
        *request.headers_mut() = headers;
        request
    };
    let sent = target.backend.upstream.send(request).await;
    sent.map_err(|error| unanswered(&target.backend, &error))
}

/// No answer came on the connection, or no connection.
fn unanswered(backend: &BackendEntry, error: &SendError) -> Failure {
    tracing::debug!(backend = %backend.name, error = weir_discovery::error_chain(error), "no answer");
    if let Some(refused) = RefusedAddress::of(error)
        && let Some(held_back) = backend.state.address_lines.pass()
    {
        tracing::warn!(backend = %backend.name, %refused, held_back, "connection to the backend refused by its address");
    }
    if error.is_head_too_large() {
        let seen = format!(
            "the head of the answer is larger than this gateway takes, which is {} bytes and {} fields",
            upstream::HEAD_BYTES_MAX,
            upstream::HEAD_FIELDS_MAX
        );
        if let Some(held_back) = backend.state.failure_lines.pass() {
            tracing::warn!(backend = %backend.name, held_back, "{seen}; look at what a proxy in between adds to it");
        }
        return Failure::new(GatewayError::UpstreamInvalid, Fault::None, seen);
    }
    // A connection that breaks under a request may be broken by the request.
    let fault = match error.is_connect() {
        true => Fault::Backend(AttemptOutcome::ConnectFailure, None),
        false => Fault::Suspected(AttemptOutcome::ConnectFailure),
    };
    Failure::new(GatewayError::UpstreamConnect, fault, weir_discovery::error_chain(error))
}

/// No first byte in time. A request that had little time left when it was sent says nothing about the backend.
fn late(outgoing: &Outgoing) -> Failure {
    match outgoing.first_byte_by.is_some_and(|by| by <= outgoing.deadline) {
        true => {
            let fault = Fault::Backend(AttemptOutcome::Timeout, None);
            Failure::new(GatewayError::UpstreamTimeout, fault, "no first byte in time")
        }
        false => Failure::from(GatewayError::Deadline),
    }
}

/// The connection broke before an answer was complete. After the head the backend may have generated, and billed, more than
/// arrived.
fn broken(seen: &str) -> Failure {
    Failure::new(GatewayError::UpstreamBroken, Fault::Suspected(AttemptOutcome::ConnectFailure), seen)
}

/// An answer to a request for a stream.
async fn streamed(
    outgoing: &Outgoing,
    head: http::response::Parts,
    begun: Begun,
    rest: AnswerBody,
) -> Result<Answer, Failure> {
    let (status, headers) = (head.status, head.headers);
    match begun {
        Begun::Event { bytes, payload } => match payload.filter(|p| is_error_object(p) == Ok(true)) {
            // Nothing was said to the client yet: another backend may do better.
            Some(payload) => error_under_success(outgoing, (status, headers), payload),
            None => Ok(Answer::Stream { headers, first: bytes, rest: Some(rest) }),
        },
        Begun::Json(first) => {
            let (body, room) = read_all(outgoing, first, rest).await?;
            if is_error_object(&body) == Ok(true) {
                return error_under_success(outgoing, (status, headers), body);
            }
            answer::check(outgoing.kind, &body).map_err(|reason| Failure::invalid(status, reason))?;
            let events = answer::as_events(outgoing.kind, &body);
            drop(room);
            let events = events.ok_or_else(|| Failure::invalid(status, NoAnswer::Empty))?;
            Ok(Answer::Stream { headers, first: events.into(), rest: None })
        }
        Begun::Other => {
            Err(Failure::invalid(status, "it is neither the event stream that was asked for nor JSON"))
        }
        Begun::Ended { bytes: 0 } => Err(Failure::invalid(status, NoAnswer::Empty)),
        Begun::Ended { .. } => Err(Failure {
            error: Box::new(GatewayError::UpstreamBroken),
            ..Failure::invalid(status, "its stream ended before its first event")
        }),
        Begun::Broken => Err(broken("the connection broke before the first event of the stream")),
    }
}

/// A complete answer to a request for one.
fn unary(
    outgoing: &Outgoing,
    head: http::response::Parts,
    body: Bytes,
    room: Room,
) -> Result<Answer, Failure> {
    let (status, headers) = (head.status, head.headers);
    let read = ReadAnswer::of(&body, outgoing.kind, outgoing.dialect).unwrap_or_default();
    if read.is_error {
        return error_under_success(outgoing, (status, headers), body);
    }
    if !answer::is_of(outgoing.kind, &read) {
        answer::check(outgoing.kind, &body).map_err(|reason| Failure::invalid(status, reason))?;
    }
    Ok(Answer::Unary { status, headers, body, read, room })
}

/// A refusal with its own status.
async fn refused(
    outgoing: &Outgoing,
    head: http::response::Parts,
    rest: AnswerBody,
) -> Result<Answer, Failure> {
    let reading = read_all(outgoing, Bytes::new(), rest);
    let body = timeout(ERROR_BODY_TIMEOUT, reading).await.ok().and_then(Result::ok);
    let encoded = headers::coding(&head.headers).is_some();
    let body = body.filter(|_| !encoded).map(|(body, _)| body).unwrap_or_default();
    if encoded && upstream_error::meaning(head.status.as_u16(), None) == Meaning::Foreign {
        return Err(Failure::invalid(head.status, "it is encoded, which the request did not accept"));
    }
    judged(outgoing, (head.status, head.headers), body)
}

/// An error under a status of success: it is judged by the status that it holds, if there is one.
fn error_under_success(
    outgoing: &Outgoing,
    (success, headers): (StatusCode, HeaderMap),
    body: Bytes,
) -> Result<Answer, Failure> {
    let Some(error) = upstream_error::read(&body) else {
        return Err(Failure::invalid(success, "an error under a success, without a word"));
    };
    let status = error.code.parse().ok().filter(|code| (400..600).contains(code)).unwrap_or(500);
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    judged(outgoing, (status, headers), body)
}

/// What follows from a refusal.
fn judged(
    outgoing: &Outgoing,
    (status, mut headers): (StatusCode, HeaderMap),
    body: Bytes,
) -> Result<Answer, Failure> {
    let code = status.as_u16();
    let error = upstream_error::read(&body);
    let meaning = upstream_error::meaning(code, error.as_ref());
    if outgoing.added_usage && is_about_addition(code, error.as_ref()) {
        return Err(Failure::new(GatewayError::UpstreamInvalid, Fault::Addition, "refused stream_options"));
    }
    if meaning == Meaning::Request {
        let mut room = outgoing.memory.room();
        let body = match error.as_ref().is_some_and(|error| error.is_openai) {
            true => body,
            // Clients read OpenAI's shape; a page or another provider's shape says nothing to them.
            false => upstream_error::to_openai(code, error.as_ref()).into(),
        };
        room.grow(body.len())?;
        headers::content_type(&mut headers, headers::Content::Json);
        let read = ReadAnswer::of(&body, outgoing.kind, outgoing.dialect).unwrap_or_default();
        return Ok(Answer::Unary { status, headers, body, read, room });
    }
    let wait = retry_after::of(&headers, weir_runtime::wall_clock());
    let wait =
        wait.or_else(|| error.as_ref()?.retry_after.map(|wait| wait.min(retry_after::RETRY_AFTER_MAX)));
    let fault = match (meaning, code) {
        (Meaning::Busy, _) => Fault::Backend(AttemptOutcome::Busy, wait),
        (Meaning::Credential, 401) => Fault::Backend(AttemptOutcome::CredentialRefused, None),
        (Meaning::Credential, _) => Fault::Suspected(AttemptOutcome::CredentialRefused),
        (Meaning::Quota, 429) => Fault::Backend(AttemptOutcome::QuotaUsedUp, wait),
        (Meaning::Quota, _) => Fault::Suspected(AttemptOutcome::QuotaUsedUp),
        (Meaning::NoModel, _) => Fault::Suspected(AttemptOutcome::NoModel),
        (Meaning::Failed | Meaning::Foreign | Meaning::Request, _) => {
            Fault::Suspected(AttemptOutcome::ServerError)
        }
    };
    let message = error.as_ref().map(|error| redact(&error.message, MESSAGE_CHARS_MAX)).unwrap_or_default();
    let seen = match (&error, message.is_empty()) {
        (Some(_), false) => message.clone(),
        _ => redact(&String::from_utf8_lossy(&body[..body.len().min(MESSAGE_CHARS_MAX)]), MESSAGE_CHARS_MAX),
    };
    // The client may read its own text again; operators may not.
    let seen = without_echo(&seen, &outgoing.body);
    let failure = UpstreamFailure { status: code, meaning, message, retry_after: wait, elsewhere_too: false };
    let error = Box::new(GatewayError::Upstream(Box::new(failure)));
    Err(Failure { error, fault, status: Some(code), seen })
}

/// Whether a refusal may be about `stream_options`, which Weir added: the error names it, or is one of those that servers
/// answer to members they do not know.
fn is_about_addition(status: u16, error: Option<&ApiError>) -> bool {
    let Some(error) = error else { return false };
    let named = error.mentions("stream_options") || error.mentions("include_usage");
    let unknown =
        ["extra inputs", "extra fields", "extra_forbidden", "unknown field", "unrecognized", "unexpected"]
            .iter()
            .any(|words| error.mentions(words));
    matches!(status, 400 | 404 | 422 | 500 | 501) && named || matches!(status, 400 | 422) && unknown
}

/// All of a body that begins with `before`. No clock but the deadline: the parts of an answer that is not streamed say
/// nothing of how far it is.
async fn read_all(outgoing: &Outgoing, before: Bytes, body: AnswerBody) -> Result<(Bytes, Room), Failure> {
    let reading = read_unary(outgoing, before, body);
    timeout_at(outgoing.deadline, reading).await.map_err(|_| Failure::from(GatewayError::Deadline))?
}

async fn read_unary(
    outgoing: &Outgoing,
    before: Bytes,
    mut body: AnswerBody,
) -> Result<(Bytes, Room), Failure> {
    let mut room = outgoing.memory.room();
    room.grow(before.len())?;
    let rest = http_body::Body::size_hint(&body).exact().and_then(|rest| usize::try_from(rest).ok());
    let mut taken = Joined::of(rest.map(|rest| rest.saturating_add(before.len())));
    taken.push(before);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| broken("the connection broke in the middle of the answer"))?;
        let Ok(data) = frame.into_data() else { continue };
        if taken.len() + data.len() > outgoing.answer_max {
            return Err(GatewayError::AnswerTooLarge { max: outgoing.answer_max as u64 }.into());
        }
        room.grow(data.len())?;
        taken.push(data);
    }
    Ok((taken.finish(), room))
}
