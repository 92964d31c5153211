//! Every way a request can fail, and the only mapping from failure to what the client and the operator see.
//!
//! Invariants:
//! - [`GatewayError::facts`] is one total match: status, code, label, blame and retry verdict of a failure stand
//!   together and nowhere else.
//! - 429 only ever means a limit that an operator set, the caller's own or one it shares; trouble of ours or of a
//!   backend is 5xx, with a time to come back.
//! - Messages are for clients: no key, address or upstream body is in them, and what the client sent is escaped and
//!   cut. A key that is missing, wrong, expired or revoked gives the same answer, as does a model that is unknown or
//!   not allowed.

use std::borrow::Cow;
use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use weir_ratelimit::{Kind, What};
use weir_runtime::edge::framing::Violation;

use crate::api::duration::{duration, millis};
use crate::api::request::ReadError;
use crate::routing::scope::{ScopeKind, what_name};

/// Most characters of a client's own text that are repeated to it.
pub const ECHO_CHARS_MAX: usize = 64;

/// When to come back where nothing better is known.
const RETRY_SOON: Duration = Duration::from_secs(1);

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

/// A limit that refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the limit is over.
    pub scope_kind: ScopeKind,
    /// The configured name of the scope.
    pub scope: String,
    /// What is limited.
    pub what: What,
    /// How much the limit allows.
    pub limit: u64,
    /// How much is left.
    pub remaining: u64,
    /// How much the request needs.
    pub needs: u64,
    /// The time until this request would fit; `None` when it never will.
    pub wait: Option<Duration>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each is")]
pub enum GatewayError {
    #[error("no api key given")]
    MissingKey,
    #[error("api key not valid")]
    InvalidKey,
    #[error("unknown route")]
    UnknownRoute,
    #[error("method not allowed on this route")]
    MethodNotAllowed,
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
    #[error("backend is busy")]
    UpstreamBusy { retry_after: Option<Duration> },
    #[error("connecting to the backend failed")]
    UpstreamConnect,
    #[error("connection to the backend broke")]
    UpstreamBroken,
    #[error("backend did not answer in time")]
    UpstreamTimeout,
    #[error("backend answered {status}")]
    UpstreamStatus { status: u16 },
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
        const KEY: &str = "Missing or invalid API key. Send it as 'Authorization: Bearer KEY'.";
        const UPSTREAM: &str = "The model's server failed to answer. Please retry.";
        match self {
            Self::MissingKey => client(401, "invalid_api_key", "missing_key", KEY),
            Self::InvalidKey => client(401, "invalid_api_key", "invalid_key", KEY),
            Self::UnknownRoute => client(404, "unknown_url", "unknown_route", "Unknown request URL."),
            Self::MethodNotAllowed => {
                client(405, "method_not_allowed", "method_not_allowed", "This method is not allowed here.")
            }
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
                format!("The request body is larger than {max} bytes."),
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
                None if refusal.scope_kind.is_of_account() && refusal.limit == 0 => ErrorFacts {
                    blame: Blame::Gateway,
                    ..client(403, "limit_closed", "account_closed", refusal.message())
                },
                None if refusal.needs > refusal.limit && refusal.limit > 0 => {
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
            // Busy is not broken, and it is not the caller's limit either: 503, never 429.
            Self::UpstreamBusy { retry_after } => ErrorFacts {
                retry_elsewhere: true,
                blame: Blame::Upstream,
                ..ours("upstream_busy", "upstream_busy", "The model's server is busy.", *retry_after)
            },
            Self::UpstreamConnect => upstream(502, "upstream_unavailable", "upstream_connect", UPSTREAM),
            Self::UpstreamBroken => upstream(502, "upstream_disconnected", "upstream_broken", UPSTREAM),
            Self::UpstreamStatus { .. } => upstream(502, "upstream_error", "upstream_status", UPSTREAM),
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
                error["limit"] = Value::from(refusal.limit);
                error["remaining"] = Value::from(refusal.remaining);
            }
            error["retry_after_ms"] = refusal.wait.map_or(Value::Null, |wait| Value::from(millis(wait)));
        }
        json!({ "error": error })
    }
}

impl Refusal {
    fn message(&self) -> String {
        let Self { scope_kind, limit, remaining, needs, .. } = self;
        let what = what_name(self.what);
        let scope = echo(&self.scope);
        let advice = match self.wait {
            Some(wait) => format!("Please try again in {}.", duration(wait)),
            None if needs > limit && *limit > 0 => {
                format!("This request needs {needs} and can never fit; make it smaller.")
            }
            None => "It lets nothing more pass.".to_owned(),
        };
        if self.scope_kind.is_of_account() {
            return format!("Rate limit reached for {what} of {scope_kind} '{scope}'. {advice}");
        }
        format!(
            "Rate limit reached for {what} of {scope_kind} '{scope}': limit {limit}, remaining {remaining}. {advice}"
        )
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

/// 404 for a model that is not allowed too, as OpenAI does: names of others' models cannot be probed for.
fn no_model(model: &str, label: &'static str) -> ErrorFacts {
    let message = format!("The model '{}' does not exist or you do not have access to it.", echo(model));
    ErrorFacts { param: Some("model"), ..client(404, "model_not_found", label, message) }
}

/// OpenAI's `type` of a rate limit.
fn openai_limit(what: What) -> &'static str {
    if what == What::Bucket(Kind::Requests) { "requests" } else { "tokens" }
}

fn read_code(error: &ReadError) -> &'static str {
    match error {
        ReadError::NotJson(_) | ReadError::NotObject => "invalid_json",
        ReadError::Missing(_) => "missing_required_parameter",
        ReadError::Duplicate(_) | ReadError::CaseVariant(_) => "duplicate_parameter",
        ReadError::WrongType { .. } => "invalid_type",
        ReadError::OutOfRange { .. } => "invalid_value",
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

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(wait: Option<Duration>) -> GatewayError {
        let scope = "acme".to_owned();
        GatewayError::Limited(Refusal {
            scope_kind: ScopeKind::Tenant,
            scope,
            what: What::Bucket(Kind::Tokens),
            limit: 10,
            remaining: 2,
            needs: 11,
            wait,
        })
    }

    #[test]
    fn one_answer_for_every_bad_key_and_one_for_every_model_out_of_reach() {
        assert_eq!(GatewayError::MissingKey.to_body(), GatewayError::InvalidKey.to_body());
        let model = || "m".to_owned();
        let unknown = GatewayError::ModelNotFound { model: model() };
        assert_eq!(unknown.to_body(), GatewayError::ModelNotAllowed { model: model() }.to_body());
        assert_eq!((unknown.facts().status.as_u16(), unknown.facts().code), (404, "model_not_found"));
    }

    #[test]
    fn what_a_client_sent_is_cut_and_escaped() {
        let error = GatewayError::ModelNotFound { model: format!("a\n\u{1b}[31m{}", "x".repeat(500)) };
        let message = error.facts().message;
        assert!(
            message.len() < 200 && message.chars().all(|c| c.is_ascii() && !c.is_ascii_control()),
            "{message}"
        );
    }

    #[test]
    fn a_refusal_explains_itself() {
        let error = limited(Some(Duration::from_millis(1500)));
        let body: Value = serde_json::from_str(&error.to_body()).unwrap();
        assert_eq!(error.facts().status, 429);
        assert_eq!(body["error"]["code"], "rate_limit_exceeded");
        assert_eq!(body["error"]["retry_after_ms"], 1500);
        assert_eq!(body["error"]["scope"]["name"], "acme");
        assert!(error.facts().message.ends_with("try again in 1.5s."));
        let never = limited(None).facts();
        assert_eq!(
            (never.status.as_u16(), never.code, never.retry_after),
            (400, "request_exceeds_limit", None)
        );
    }

    #[test]
    fn only_an_upstreams_fault_is_tried_elsewhere_and_429_is_the_callers_alone() {
        let retry_after = None;
        for error in [
            GatewayError::LimitStore,
            GatewayError::NoBackend { retry_after },
            GatewayError::Busy { retry_after },
        ] {
            let facts = error.facts();
            assert_eq!((facts.status.as_u16(), facts.retry_elsewhere), (503, false));
            assert!(facts.retry_after.is_some(), "{error}");
        }
        assert!(GatewayError::UpstreamConnect.facts().retry_elsewhere);
        for error in [
            GatewayError::UpstreamConnect,
            GatewayError::UpstreamBroken,
            GatewayError::UpstreamInvalid,
            GatewayError::UpstreamTimeout,
            GatewayError::UpstreamStatus { status: 500 },
            GatewayError::UpstreamBusy { retry_after: None },
        ] {
            assert!(error.facts().retry_after.is_some(), "a retry helps: {error}");
        }
        for error in [GatewayError::Deadline, GatewayError::Internal, GatewayError::InvalidKey] {
            assert!(error.facts().retry_after.is_none(), "a retry does not help: {error}");
        }
        assert!(!limited(None).facts().retry_elsewhere);
        assert_eq!(GatewayError::UpstreamStatus { status: 429 }.facts().status, 502);
    }

    #[test]
    fn bodies_have_openais_shape_and_events_end_once() {
        let error = GatewayError::from(ReadError::Duplicate("model"));
        let body: Value = serde_json::from_str(&error.to_body()).unwrap();
        assert_eq!(body["error"]["param"], "model");
        assert_eq!(body["error"]["message"], "Duplicate parameter: 'model'.");
        let event = GatewayError::Internal.sse_event();
        assert_eq!(event.matches('\n').count(), 2);
        assert!(event.starts_with("data: {\"error\"") && event.contains("\"param\":null"));
    }
}
