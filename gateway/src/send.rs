//! One attempt at one backend, up to the first byte of its answer.
//!
//! What comes back is judged here: whose fault a failure is, and whether another backend may be tried. A stream's
//! first chunk is awaited before anything is said to the client, so that an early failure can still go elsewhere;
//! an unary answer is taken whole, within a bound, for the same reason.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};
use weir_ratelimit::Cost;

use crate::error::GatewayError;
use crate::metrics::{AttemptLabels, Metrics};
use crate::runtime_state::Attempt;
use crate::snapshot::{BackendEntry, ModelEntry};

/// Largest unary answer that is taken.
const ANSWER_MAX_BYTES: usize = 64 << 20;
/// Longest Retry-After of a backend that is believed.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Where an attempt goes.
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
}

impl Target {
    /// Counts what an attempt came to and lets it bear on the next choice.
    pub fn record(&self, attempt: Attempt) {
        self.record_busy(attempt, None);
    }

    fn record_busy(&self, attempt: Attempt, retry_after: Option<Duration>) {
        self.backend.runtime.count(attempt);
        let labels = AttemptLabels { backend: self.backend.name.to_string(), outcome: attempt.label() };
        self.metrics.attempts.get_or_create(&labels).inc();
        self.model.pool.runtime.record(&self.backend.name, attempt, retry_after);
    }

    /// What so many tokens of this model cost.
    pub fn cost(&self, prompt: u64, completion: u64) -> Cost {
        cost(&self.model, prompt, completion)
    }
}

/// What so many tokens of a model cost; money is rounded up to the next micro-dollar.
pub fn cost(model: &ModelEntry, prompt: u64, completion: u64) -> Cost {
    let (input, output) = (model.spec.input_price_micro_dollars, model.spec.output_price_micro_dollars);
    let spend = u128::from(prompt) * u128::from(input) + u128::from(completion) * u128::from(output);
    Cost::of_request(prompt, completion, u64::try_from(spend.div_ceil(1_000_000)).unwrap_or(u64::MAX))
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
    Whole {
        /// The status.
        status: StatusCode,
        /// Its headers.
        headers: HeaderMap,
        /// The body.
        body: Bytes,
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
    /// When the first byte must be there.
    pub first_byte_by: Instant,
    /// When the whole answer must be there.
    pub deadline: Instant,
}

/// Sends a request to a backend. An error says whether another may be tried; the backend's part in it is recorded.
pub async fn attempt(target: &Target, outgoing: Outgoing) -> Result<Answer, GatewayError> {
    let (answer, error) = match exchange(target, outgoing).await {
        Ok(answer) => return Ok(answer),
        Err(Failure { attempt, error, retry_after }) => ((attempt, retry_after), error),
    };
    target.record_busy(answer.0, answer.1);
    Err(error)
}

struct Failure {
    attempt: Attempt,
    error: GatewayError,
    retry_after: Option<Duration>,
}

impl From<(Attempt, GatewayError)> for Failure {
    fn from((attempt, error): (Attempt, GatewayError)) -> Self {
        Self { attempt, error, retry_after: None }
    }
}

async fn exchange(target: &Target, outgoing: Outgoing) -> Result<Answer, Failure> {
    let Outgoing { path, headers, body, first_byte_by, deadline } = outgoing;
    let first_byte_by = first_byte_by.min(deadline);
    let uri =
        target.backend.upstream.uri(path).map_err(|_| (Attempt::ServerError, GatewayError::Internal))?;
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    if let Some(authorization) = &target.backend.authorization {
        request.headers_mut().insert(header::AUTHORIZATION, authorization.clone());
    }
    let late = || Failure::from((Attempt::Timeout, GatewayError::UpstreamTimeout));
    let sent = timeout_at(first_byte_by, target.backend.upstream.send(request)).await.map_err(|_| late())?;
    let response = sent.map_err(|error| {
        tracing::debug!(backend = %target.backend.name, error = crate::subscribe::error_chain(&error), "no answer");
        (Attempt::ConnectFailure, GatewayError::UpstreamConnect)
    })?;
    let (head, mut rest) = response.into_parts();
    let retry_after = retry_after(&head.headers);
    judge_status(head.status, retry_after)?;
    let is_stream = head.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let is_stream =
        is_stream.is_some_and(|t| t.trim_start().to_ascii_lowercase().starts_with("text/event-stream"));
    if is_stream && head.status.is_success() {
        let first = timeout_at(first_byte_by, first_chunk(&mut rest)).await.map_err(|_| late())??;
        return Ok(Answer::Stream { headers: head.headers, first, rest });
    }
    let body = timeout_at(deadline, whole(rest)).await.map_err(|_| late())??;
    Ok(Answer::Whole { status: head.status, headers: head.headers, body })
}

/// Whose fault a status is. 2xx and the client's own mistakes go on to the client.
fn judge_status(status: StatusCode, retry_after: Option<Duration>) -> Result<(), Failure> {
    match status.as_u16() {
        200..=299 | 400 | 409 | 413 | 415 | 422 => Ok(()),
        429 | 503 => Err(Failure {
            attempt: Attempt::Busy,
            error: GatewayError::UpstreamBusy { retry_after },
            retry_after,
        }),
        // 401 and 403 are about our credential, 404 about a model that should be there: the backend is set up
        // wrongly and the client cannot mend it.
        status => Err((Attempt::ServerError, GatewayError::UpstreamStatus { status }).into()),
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse::<u64>().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

async fn first_chunk(body: &mut Incoming) -> Result<Bytes, Failure> {
    loop {
        match body.frame().await {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if !data.is_empty() => return Ok(data),
                _ => {}
            },
            Some(Err(_)) | None => {
                return Err((Attempt::ConnectFailure, GatewayError::UpstreamConnect).into());
            }
        }
    }
}

async fn whole(mut body: Incoming) -> Result<Bytes, Failure> {
    let mut taken = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| (Attempt::ConnectFailure, GatewayError::UpstreamConnect))?;
        let Ok(data) = frame.into_data() else { continue };
        if taken.len() + data.len() > ANSWER_MAX_BYTES {
            return Err((Attempt::ServerError, GatewayError::UpstreamInvalid).into());
        }
        taken.extend_from_slice(&data);
    }
    Ok(taken.freeze())
}
