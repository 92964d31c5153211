//! Every way a request can fail, and the only mapping from failure to what the client and the operator see.
//!
//! Invariants:
//! - [`GatewayError::facts`] is one total match: status, code, label, blame and retry verdict of a failure stand
//!   together and nowhere else.
//! - 429 only ever means a limit that an operator set, the caller's own or one it shares; trouble of ours or of a
//!   backend is 5xx, with a time to come back.
//! - Messages are for clients: no key or address of ours is in them, and what the client sent is escaped and cut. A
//!   backend's own text is in them where it may be about the request, on one line and without what looks like a key. A key that is missing, wrong, expired or revoked gives the same answer, as does a model that is unknown or
//!   not allowed.

mod refusal;
#[cfg(test)]
mod tests;
mod upstream_failure;

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use weir_ratelimit::{Kind, What};
use weir_runtime::edge::framing::Violation;

pub use self::refusal::Refusal;
pub use self::upstream_failure::UpstreamFailure;

use crate::api::duration::millis;
use crate::api::request::ReadError;
use crate::api::upstream_error::Meaning;
use crate::routing::scope::what_name;

/// Most characters of a client's own text that are repeated to it.
pub const ECHO_CHARS_MAX: usize = 64;

/// What a client is told of a failure that it cannot do anything about.
const UPSTREAM: &str = "The model's server failed to answer. Please retry.";
/// When to come back where nothing better is known.
pub const RETRY_SOON: Duration = Duration::from_secs(1);

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The caller's; never counts against a backend.
    Client,
    /// Ours.
    Gateway,
    /// The backend's.
    Upstream,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each is")]
pub enum GatewayError {
    #[error("no api key given")]
    MissingKey,
    #[error("api key not valid")]
    InvalidKey,
    /// The method and the path as they came, and the path that was probably meant.
    #[error("unknown route")]
    UnknownRoute { url: String, nearest: Option<&'static str> },
    /// The methods that are, as the header `Allow` lists them.
    #[error("method not allowed on this route")]
    MethodNotAllowed { allow: &'static str },
    #[error(transparent)]
    BadRequest(#[from] ReadError),
    #[error("invalid header or path: {0}")]
    BadHead(Violation),
    #[error("no such model")]
    ModelNotFound { model: String },
    #[error("model not allowed for this tenant")]
    ModelNotAllowed { model: String },
    #[error("request body larger than {max} bytes")]
    BodyTooLarge { max: u64 },
    #[error("request body did not arrive in time")]
    BodyTimeout,
    #[error("request body broke off or is not well framed")]
    BrokenBody,
    /// All bodies together take the memory they may take.
    #[error("no memory for another request body")]
    BodyMemory,
    #[error("request body has an encoding that is not supported")]
    UnsupportedEncoding,
    #[error("limited by {} of {} {}", what_name(.0.what), .0.scope_kind, .0.scope)]
    Limited(Refusal),
    #[error("limit store cannot be reached and the limit is closed")]
    LimitStore,
    #[error("no backend available")]
    NoBackend { retry_after: Option<Duration> },
    #[error("all slots busy")]
    Busy { retry_after: Option<Duration> },
    #[error("connecting to the backend failed")]
    UpstreamConnect,
    #[error("connection to the backend broke")]
    UpstreamBroken,
    #[error("backend did not answer in time")]
    UpstreamTimeout,
    #[error("backend answered {}: {}", .0.status, .0.meaning.as_str())]
    Upstream(Box<UpstreamFailure>),
    #[error("answer of the backend larger than {max} bytes")]
    AnswerTooLarge { max: u64 },
    #[error("answer of the backend makes no sense")]
    UpstreamInvalid,
    #[error("deadline of the request passed")]
    Deadline,
    #[error("the gateway is shutting down")]
    Draining,
    #[error("internal error")]
    Internal,
}

/// Everything that follows from a failure.
#[derive(Debug, Clone, PartialEq)]
pub struct ErrorFacts {
    /// The status of the answer.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: &'static str,
    /// OpenAI's `param`.
    pub param: Option<&'static str>,
    /// The text for the client.
    pub message: Cow<'static, str>,
    /// The value of the metric's label.
    pub label: &'static str,
    /// When to come back, for `retry-after`.
    pub retry_after: Option<Duration>,
    /// Whose fault it is.
    pub blame: Blame,
    /// Whether another backend may be tried, as long as nothing was sent.
    pub retry_elsewhere: bool,
}

impl GatewayError {
    /// The one mapping.
    pub fn facts(&self) -> ErrorFacts {
        const KEY: &str = "Missing or invalid API key. Send it as 'Authorization: Bearer KEY', 'x-api-key: KEY' or 'api-key: KEY'.";
        match self {
            Self::MissingKey => client(401, "invalid_api_key", "missing_key", KEY),
            Self::InvalidKey => client(401, "invalid_api_key", "invalid_key", KEY),
            Self::UnknownRoute { url, nearest } => no_route(url, *nearest),
            Self::MethodNotAllowed { allow } => client(
                405,
                "method_not_allowed",
                "method_not_allowed",
                format!("This method is not allowed here; allowed: {allow}."),
            ),
            Self::BadRequest(error) => ErrorFacts {
                param: error.param(),
                ..client(400, read_code(error), "bad_request", capitalised(&error.to_string()))
            },
            Self::BadHead(Violation { status, what }) => ErrorFacts {
                status: *status,
                ..client(400, "invalid_request", "bad_head", format!("Invalid request: {what}."))
            },
            Self::BrokenBody => client(
                400,
                "invalid_request",
                "broken_body",
                "The request body broke off or is not framed as HTTP asks for.",
            ),
            Self::Draining => {
                ours("shutting_down", "draining", "This gateway is shutting down. Please retry.", None)
            }
            Self::ModelNotFound { model } => no_model(model, "model_not_found"),
            Self::ModelNotAllowed { model } => no_model(model, "model_not_allowed"),
            Self::BodyTooLarge { max } => client(
                413,
                "request_too_large",
                "body_too_large",
                format!(
                    "The request body is larger than {max} bytes, the most that the operator of this gateway lets pass."
                ),
            ),
            Self::BodyTimeout => {
                client(408, "request_timeout", "body_timeout", "The request body did not arrive in time.")
            }
            Self::BodyMemory => ours("overloaded", "body_memory", "This gateway is overloaded.", None),
            Self::UnsupportedEncoding => client(
                415,
                "unsupported_encoding",
                "unsupported_encoding",
                "Compressed request bodies are not supported; send the body without Content-Encoding.",
            ),
            Self::Limited(refusal) => match refusal.wait {
                // OpenAI's own code for money that is spent.
                Some(wait) if refusal.what == What::Bucket(Kind::Spend) => ErrorFacts {
                    kind: "insufficient_quota",
                    retry_after: Some(wait),
                    ..client(429, "insufficient_quota", "budget_spent", refusal.message())
                },
                Some(wait) if refusal.scope_kind.is_of_account() => ErrorFacts {
                    kind: openai_limit(refusal.what),
                    retry_after: Some(wait),
                    // What the caller did is fine, so its fallbacks are tried; what is left is a limit with a time.
                    blame: Blame::Gateway,
                    ..client(429, "rate_limit_exceeded", "account_limited", refusal.message())
                },
                Some(wait) => ErrorFacts {
                    kind: openai_limit(refusal.what),
                    retry_after: Some(wait),
                    ..client(429, "rate_limit_exceeded", "limited", refusal.message())
                },
                // Clients try a 429 again, which cannot help here: the request, or the limit, has to change.
                None if refusal.scope_kind.is_of_account() && refusal.is_closed() => ErrorFacts {
                    blame: Blame::Gateway,
                    ..client(403, "limit_closed", "account_closed", refusal.message())
                },
                None if refusal.can_never_fit() => {
                    client(400, "request_exceeds_limit", "exceeds_limit", refusal.message())
                }
                None => client(403, "limit_closed", "limit_closed", refusal.message()),
            },
            Self::LimitStore => {
                ours("limit_store_unavailable", "limit_store", "Limits cannot be checked now.", None)
            }
            Self::NoBackend { retry_after } => ours(
                "no_backend_available",
                "no_backend",
                "No server for this model is available now.",
                *retry_after,
            ),
            Self::Busy { retry_after } => {
                ours("overloaded", "busy", "All servers for this model are busy now.", *retry_after)
            }
            Self::UpstreamConnect => upstream(502, "upstream_unavailable", "upstream_connect", UPSTREAM),
            Self::UpstreamBroken => upstream(502, "upstream_disconnected", "upstream_broken", UPSTREAM),
            Self::Upstream(failure) => failure.facts(),
            // A bound of the gateway's own: neither the client nor the backend did anything wrong, and another backend's
            // answer would be as large.
            Self::AnswerTooLarge { max } => ErrorFacts {
                status: StatusCode::BAD_GATEWAY,
                retry_after: None,
                message: format!(
                    "The answer is larger than {max} bytes, the most that this gateway takes of an answer that is not \
                     streamed. Ask for less at once, or have the operator raise --answer-max-mib."
                )
                .into(),
                ..ours("answer_too_large", "answer_too_large", "", None)
            },
            Self::UpstreamInvalid => upstream(502, "upstream_invalid_response", "upstream_invalid", UPSTREAM),
            Self::UpstreamTimeout => upstream(
                504,
                "upstream_timeout",
                "upstream_timeout",
                "The model's server did not answer in time.",
            ),
            // Time the client or the pool set for the whole request; no backend is to blame for it, and the same
            // request would need as long again.
            Self::Deadline => ErrorFacts {
                status: StatusCode::GATEWAY_TIMEOUT,
                retry_after: None,
                ..ours("deadline_exceeded", "deadline", "The request did not finish within its time.", None)
            },
            Self::Internal => ErrorFacts {
                status: StatusCode::INTERNAL_SERVER_ERROR,
                retry_after: None,
                ..ours("internal_error", "internal", "The gateway failed to process this request.", None)
            },
        }
    }

    /// Whether it is known that a retry fails in the same way. SDKs repeat a 5xx unless they are told.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Upstream(failure) => {
                failure.elsewhere_too || matches!(failure.meaning, Meaning::Credential | Meaning::Quota)
            }
            Self::AnswerTooLarge { .. } => true,
            _ => false,
        }
    }

    /// Of a failed attempt that was sent: whether its backend may have generated, and billed, all the same.
    pub const fn leaves_outcome_unknown(&self) -> bool {
        matches!(
            self,
            Self::UpstreamTimeout | Self::UpstreamBroken | Self::AnswerTooLarge { .. } | Self::Deadline
        )
    }

    /// The body of the answer, in OpenAI's shape.
    pub fn to_body(&self) -> String {
        self.to_json().to_string()
    }

    /// The event that tells a client of a failure after bytes were sent. A `[DONE]` never follows it.
    pub fn sse_event(&self) -> String {
        // JSON text holds no line breaks, so it cannot end the event early.
        format!("data: {}\n\n", self.to_json())
    }

    fn to_json(&self) -> Value {
        let facts = self.facts();
        let mut error = json!({
            "message": facts.message, "type": facts.kind, "param": facts.param, "code": facts.code,
        });
        if let Self::Limited(refusal) = self {
            error["scope"] = json!({ "kind": refusal.scope_kind.as_str(), "name": echo(&refusal.scope) });
            error["kind"] = Value::from(what_name(refusal.what));
            if !refusal.scope_kind.is_of_account() {
                error["limit"] = Value::from(refusal.limit.amount);
                error["period"] = Value::from(refusal.limit.period);
                error["burst"] = Value::from(refusal.limit.burst);
                error["remaining"] = Value::from(refusal.remaining);
                if refusal.what == What::Bucket(Kind::Spend) {
                    error["unit"] = Value::from("micro_dollars");
                }
            }
            error["retry_after_ms"] = refusal.wait.map_or(Value::Null, |wait| Value::from(millis(wait)));
        }
        json!({ "error": error })
    }
}

fn facts(
    status: u16,
    code: &'static str,
    label: &'static str,
    message: Cow<'static, str>,
    blame: Blame,
) -> ErrorFacts {
    let kind = if blame == Blame::Client { "invalid_request_error" } else { "server_error" };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let retry_elsewhere = blame == Blame::Upstream;
    ErrorFacts { status, kind, code, param: None, message, label, retry_after: None, blame, retry_elsewhere }
}

fn client(
    status: u16,
    code: &'static str,
    label: &'static str,
    message: impl Into<Cow<'static, str>>,
) -> ErrorFacts {
    facts(status, code, label, message.into(), Blame::Client)
}

/// A retry helps: the next request goes to another backend, or to one that has come back. SDKs repeat 5xx anyway, and
/// without a time to come back at once.
fn upstream(status: u16, code: &'static str, label: &'static str, message: &'static str) -> ErrorFacts {
    ErrorFacts {
        retry_after: Some(RETRY_SOON),
        ..facts(status, code, label, message.into(), Blame::Upstream)
    }
}

fn ours(
    code: &'static str,
    label: &'static str,
    message: &'static str,
    wait: Option<Duration>,
) -> ErrorFacts {
    let retry_after = Some(wait.unwrap_or(RETRY_SOON));
    ErrorFacts { retry_after, ..facts(503, code, label, message.into(), Blame::Gateway) }
}

/// As OpenAI words it, and what to write instead where that is clear.
fn no_route(url: &str, nearest: Option<&'static str>) -> ErrorFacts {
    let hint = nearest.map(|path| format!(" Did you mean {path}?")).unwrap_or_default();
    client(404, "unknown_url", "unknown_route", format!("Invalid URL ({}).{hint}", echo(url)))
}

/// 404 for a model that is not allowed too, as OpenAI does: names of others' models cannot be probed for.
fn no_model(model: &str, label: &'static str) -> ErrorFacts {
    let message = format!("The model '{}' does not exist or you do not have access to it.", echo(model));
    ErrorFacts { param: Some("model"), ..client(404, "model_not_found", label, message) }
}

/// OpenAI's `type` of a rate limit.
fn openai_limit(what: What) -> &'static str {
    if matches!(what, What::Bucket(Kind::Requests) | What::Concurrency) { "requests" } else { "tokens" }
}

fn read_code(error: &ReadError) -> &'static str {
    match error {
        ReadError::NotJson(_) | ReadError::NotObject => "invalid_json",
        ReadError::Missing(_) => "missing_required_parameter",
        ReadError::Duplicate(_) | ReadError::CaseVariant(_) => "duplicate_parameter",
        ReadError::WrongType { .. } => "invalid_type",
        ReadError::OutOfRange { .. } => "invalid_value",
        ReadError::Unsupported { .. } => "unsupported_value",
    }
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().into_iter().flat_map(char::to_uppercase).chain(chars).chain(['.']).collect()
}

/// Text of a client, cut and with everything but plain ASCII escaped: it ends up in logs and terminals.
fn echo(text: &str) -> String {
    let mut out: String = text.chars().take(ECHO_CHARS_MAX).flat_map(char::escape_default).collect();
    if text.chars().nth(ECHO_CHARS_MAX).is_some() {
        out.push_str("...");
    }
    out
}
