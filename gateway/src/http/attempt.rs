//! One attempt at one backend, up to the first byte of its answer.
//!
//! What comes back is judged here: whose fault a failure is, and whether another backend may be tried. A stream's
//! first chunk is awaited before anything is said to the client, so that an early failure can still go elsewhere;
//! a unary answer is read to its end, within a bound, for the same reason.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout, timeout_at};
use weir_ratelimit::Cost;
use weir_runtime::RefusedAddress;

use crate::api::response::{begins_with_error, is_error_object};
use crate::api::usage::Implausible;
use crate::error::GatewayError;
use crate::http::headers;
use crate::http::request_body::{BodyMemory, Room};
use crate::limits::price;
use crate::metrics::{AttemptLabels, ImplausibleLabels, Metrics};
use crate::routing::backend::BackendEntry;
use crate::routing::backend_state::AttemptOutcome;
use crate::routing::balance::{Measure, Sample};
use crate::routing::entries::ModelEntry;

/// Largest unary answer that is taken.
const ANSWER_MAX_BYTES: usize = 64 << 20;

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
    pub metrics: Metrics,
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
        self.model.pool.state.succeeded(&self.model.name, &self.backend, None);
    }

    /// Records a complete and good answer.
    pub fn succeed(&self, output_tokens: u64) {
        self.count(AttemptOutcome::Success);
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
        self.fail_busy(outcome, None);
    }

    fn fail_busy(&self, outcome: AttemptOutcome, retry_after: Option<Duration>) {
        self.count(outcome);
        let state = &self.model.pool.state;
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

    /// The answer makes no sense: the backend's fault. The client does not hear the reason, the log does.
    fn invalid(&self, reason: impl std::fmt::Display) -> Failure {
        if let Some(held_back) = self.backend.state.invalid_lines.pass() {
            tracing::warn!(backend = %self.backend.name, %reason, held_back, "answer of the backend refused");
        }
        (AttemptOutcome::ServerError, GatewayError::UpstreamInvalid).into()
    }

    /// How long to wait for the first byte before another backend is tried as well.
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
        self.backend.state.count(outcome);
        let labels = AttemptLabels { backend: self.backend.name.to_string(), outcome: outcome.label() };
        self.metrics.attempts.get_or_create(&labels).inc();
    }

    /// What so many tokens of this model cost.
    pub fn cost(&self, prompt: u64, completion: u64) -> Cost {
        price::cost(&self.model, prompt, completion)
    }
}

/// What a backend answered.
#[derive(Debug)]
pub enum Answer {
    /// A stream with its first chunk.
    Stream {
        /// Its headers.
        headers: HeaderMap,
        /// The first chunk; never empty.
        first: Bytes,
        /// The rest.
        rest: Incoming,
    },
    /// All of it. The status is 2xx, or 4xx when the client is at fault.
    Unary {
        /// The status.
        status: StatusCode,
        /// Its headers.
        headers: HeaderMap,
        /// The body.
        body: Bytes,
        /// The memory it takes.
        room: Room,
    },
}

/// What one attempt sends.
#[derive(Debug)]
pub struct Outgoing {
    /// The path, such as `/v1/chat/completions`.
    pub path: &'static str,
    /// From the client's, by an allow-list.
    pub headers: HeaderMap,
    /// The body, spliced for this backend.
    pub body: Bytes,
    /// What answers that are not streamed may take.
    pub memory: Arc<BodyMemory>,
    /// When the first byte must be there.
    pub first_byte_by: Instant,
    /// When the whole answer must be there.
    pub deadline: Instant,
}

/// Sends a request to a backend. An error says whether another may be tried; the backend's part in it is recorded.
pub async fn send(target: &Target, outgoing: Outgoing) -> Result<Answer, GatewayError> {
    let Failure { outcome, error, retry_after } = match exchange(target, outgoing).await {
        Ok(answer) => return Ok(answer),
        Err(failure) => failure,
    };
    if let Some(outcome) = outcome {
        target.fail_busy(outcome, retry_after);
    }
    Err(error)
}

struct Failure {
    /// `None` when it must not count against the backend.
    outcome: Option<AttemptOutcome>,
    error: GatewayError,
    retry_after: Option<Duration>,
}

impl From<(AttemptOutcome, GatewayError)> for Failure {
    fn from((outcome, error): (AttemptOutcome, GatewayError)) -> Self {
        Self { outcome: Some(outcome), error, retry_after: None }
    }
}

/// Failures that must not count against the backend.
impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        Self { outcome: None, error, retry_after: None }
    }
}

async fn exchange(target: &Target, outgoing: Outgoing) -> Result<Answer, Failure> {
    let Outgoing { path, headers, body, memory, first_byte_by, deadline } = outgoing;
    let uri = target.backend.upstream.uri(path).map_err(|_| GatewayError::Internal)?;
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    if let Some(authorization) = &target.backend.authorization {
        request.headers_mut().insert(header::AUTHORIZATION, authorization.clone());
    }
    // A request that had little time left when it was sent says nothing about the backend.
    let late = || match first_byte_by <= deadline {
        true => Failure::from((AttemptOutcome::Timeout, GatewayError::UpstreamTimeout)),
        false => Failure::from(GatewayError::Deadline),
    };
    let first_byte_by = first_byte_by.min(deadline);
    let sent = timeout_at(first_byte_by, target.backend.upstream.send(request)).await.map_err(|_| late())?;
    let response = sent.map_err(|error| {
        let backend = &target.backend;
        tracing::debug!(backend = %backend.name, error = weir_discovery::error_chain(&error), "no answer");
        if let Some(refused) = RefusedAddress::of(&error)
            && let Some(held_back) = backend.state.address_lines.pass()
        {
            tracing::warn!(backend = %backend.name, %refused, held_back, "connection to the backend refused by its address");
        }
        (AttemptOutcome::ConnectFailure, GatewayError::UpstreamConnect)
    })?;
    let (head, mut rest) = response.into_parts();
    let retry_after = headers::retry_after(&head.headers, weir_runtime::wall_clock());
    judge_status(head.status, retry_after)?;
    if let Some(coding) = headers::coding(&head.headers) {
        return Err(
            target.invalid(format_args!("it is encoded ({coding}), which the request did not accept"))
        );
    }
    let is_stream = headers::media_type(&head.headers) == "text/event-stream";
    if is_stream && head.status.is_success() {
        if !target.stream {
            return Err(target.invalid("it is a stream, and none was asked for"));
        }
        let first = timeout_at(first_byte_by, first_chunk(&mut rest)).await.map_err(|_| late())??;
        // Nothing was said to the client yet: another backend may do better.
        if begins_with_error(&first) {
            return Err(target.invalid("its stream begins with an error"));
        }
        return Ok(Answer::Stream { headers: head.headers, first, rest });
    }
    let idle = target.model.timeouts.idle;
    let unary = read_unary(rest, idle, memory.room());
    let unary = timeout_at(deadline, unary).await.map_err(|_| GatewayError::Deadline)??;
    let Some((body, room)) = unary else {
        return Err(target.invalid(format_args!("it is longer than {ANSWER_MAX_BYTES} bytes")));
    };
    if head.status.is_success() {
        match is_error_object(&body) {
            Ok(false) => {}
            Ok(true) => return Err(target.invalid("it is an error under a status of success")),
            Err(fault) => return Err(target.invalid(format_args!("it is not a JSON object: {fault}"))),
        }
    }
    Ok(Answer::Unary { status: head.status, headers: head.headers, body, room })
}

/// Whose fault a status is. 2xx and the client's own mistakes go on to the client.
fn judge_status(status: StatusCode, retry_after: Option<Duration>) -> Result<(), Failure> {
    match status.as_u16() {
        200..=299 | 400 | 409 | 413 | 415 | 422 => Ok(()),
        429 | 503 => Err(Failure {
            outcome: Some(AttemptOutcome::Busy),
            error: GatewayError::UpstreamBusy { retry_after },
            retry_after,
        }),
        // 401 and 403 are about our credential, 404 about a model that should be there: the backend is set up
        // wrongly and the client cannot mend it.
        status => Err((AttemptOutcome::ServerError, GatewayError::UpstreamStatus { status }).into()),
    }
}

async fn first_chunk(body: &mut Incoming) -> Result<Bytes, Failure> {
    loop {
        match body.frame().await {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if !data.is_empty() => return Ok(data),
                _ => {}
            },
            Some(Err(_)) | None => {
                return Err((AttemptOutcome::ConnectFailure, GatewayError::UpstreamConnect).into());
            }
        }
    }
}

/// All of a body; `None` when it is longer than it may be.
async fn read_unary(
    mut body: Incoming,
    idle: Duration,
    mut room: Room,
) -> Result<Option<(Bytes, Room)>, Failure> {
    let mut first: Option<Bytes> = None;
    let mut taken = BytesMut::new();
    let mut length = 0;
    let silent = |_| Failure::from((AttemptOutcome::Timeout, GatewayError::UpstreamTimeout));
    while let Some(frame) = timeout(idle, body.frame()).await.map_err(silent)? {
        let frame = frame.map_err(|_| (AttemptOutcome::ConnectFailure, GatewayError::UpstreamConnect))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length > ANSWER_MAX_BYTES {
            return Ok(None);
        }
        room.grow(data.len())?;
        // Most answers come in one part and are not copied.
        match &first {
            None => first = Some(data),
            Some(before) => {
                if taken.is_empty() {
                    taken.reserve(length * 2);
                    taken.extend_from_slice(before);
                }
                taken.extend_from_slice(&data);
            }
        }
    }
    let body = if taken.is_empty() { first.unwrap_or_default() } else { taken.freeze() };
    Ok(Some((body, room)))
}
