//! The part of OpenAI's API that all endpoints share: what is read of a request, and the shape of errors.

use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Deserialize;
use serde_json::json;

use crate::body::Body;
use crate::faults::ErrorStatus;
use crate::text::{Kind, Measured};

/// Largest request body; larger is answered 413.
pub(crate) const REQUEST_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Most answers to one prompt, as at OpenAI.
const CHOICES_MAX: u32 = 128;
/// Most inputs of one embedding request, as at OpenAI.
const EMBEDDING_INPUTS_MAX: usize = 2048;
/// What a client is told to wait when the queue is full.
const RETRY_AFTER_S: u32 = 1;

/// The endpoints that cost tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completions,
    Embeddings,
    Responses,
}

impl Endpoint {
    pub(crate) fn of(path: &str) -> Option<Self> {
        match path {
            "/v1/chat/completions" => Some(Self::Chat),
            "/v1/completions" => Some(Self::Completions),
            "/v1/embeddings" => Some(Self::Embeddings),
            "/v1/responses" => Some(Self::Responses),
            _ => None,
        }
    }
}

/// Fields that change the answer; all others are skipped.
#[derive(Debug, Deserialize)]
pub(crate) struct Request {
    pub(crate) model: String,
    messages: Option<Measured>,
    prompt: Option<Measured>,
    input: Option<Measured>,
    instructions: Option<Measured>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    n: Option<u32>,
    pub(crate) dimensions: Option<usize>,
    pub(crate) encoding_format: Option<String>,
}

#[derive(Debug, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Request {
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|error| ApiError::BadJson(error.to_string()))
    }

    /// The prompt, checked to be of a kind this endpoint takes.
    pub(crate) fn measured(&self, endpoint: Endpoint) -> Result<Measured, ApiError> {
        let (param, value) = match endpoint {
            Endpoint::Chat => ("messages", self.messages),
            Endpoint::Completions => ("prompt", self.prompt),
            Endpoint::Embeddings | Endpoint::Responses => ("input", self.input),
        };
        let mut measured = value.ok_or(ApiError::Invalid { param, message: "is required" })?;
        match (endpoint, measured.kind) {
            (Endpoint::Chat, Kind::List)
            | (Endpoint::Completions | Endpoint::Responses, Kind::Text | Kind::List)
                if measured.items > 0 => {}
            (Endpoint::Embeddings, Kind::Text | Kind::List)
                if (1..=EMBEDDING_INPUTS_MAX).contains(&measured.items) => {}
            _ => {
                return Err(ApiError::Invalid { param, message: "has the wrong type or number of elements" });
            }
        }
        if endpoint == Endpoint::Responses {
            measured.bytes += self.instructions.map_or(0, |instructions| instructions.bytes);
        }
        Ok(measured)
    }

    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    pub(crate) fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// Tokens the client allows; the newer field wins.
    pub(crate) fn tokens_max(&self) -> Result<Option<u64>, ApiError> {
        match self.max_completion_tokens.or(self.max_output_tokens).or(self.max_tokens) {
            Some(0) => Err(ApiError::Invalid { param: "max_tokens", message: "must be at least 1" }),
            tokens => Ok(tokens),
        }
    }

    pub(crate) fn choices(&self) -> Result<u32, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=CHOICES_MAX => Ok(n),
            _ => Err(ApiError::Invalid { param: "n", message: "must be from 1 to 128" }),
        }
    }
}

/// Every answer that is not the one asked for.
#[derive(Clone, Debug)]
pub(crate) enum ApiError {
    BadJson(String),
    Invalid { param: &'static str, message: &'static str },
    InvalidFaults(String),
    BodyTooLarge,
    BodyIncomplete,
    UnknownModel(String),
    UnknownPath,
    WrongMethod,
    QueueFull,
    Loading,
    Fault(ErrorStatus),
}

impl ApiError {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::BadJson(_) | Self::Invalid { .. } | Self::InvalidFaults(_) | Self::BodyIncomplete => {
                StatusCode::BAD_REQUEST
            }
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnknownModel(_) | Self::UnknownPath => StatusCode::NOT_FOUND,
            Self::WrongMethod => StatusCode::METHOD_NOT_ALLOWED,
            Self::QueueFull => StatusCode::TOO_MANY_REQUESTS,
            Self::Loading => StatusCode::SERVICE_UNAVAILABLE,
            Self::Fault(fault) => {
                StatusCode::from_u16(fault.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
            }
        }
    }

    /// Message, `param` and `code` of OpenAI's error object.
    fn texts(&self) -> (String, Option<&'static str>, Option<&'static str>) {
        match self {
            Self::BadJson(why) => (format!("could not parse the JSON body: {why}"), None, None),
            Self::Invalid { param, message } => {
                (format!("{param} {message}"), Some(param), Some("invalid_value"))
            }
            Self::InvalidFaults(why) => (why.clone(), None, Some("invalid_value")),
            Self::BodyTooLarge => {
                ("request body is larger than 32 MiB".to_owned(), None, Some("body_too_large"))
            }
            Self::BodyIncomplete => ("request body ended early".to_owned(), None, None),
            Self::UnknownModel(model) => {
                (format!("the model `{model}` does not exist"), Some("model"), Some("model_not_found"))
            }
            Self::UnknownPath => ("unknown path".to_owned(), None, Some("unknown_url")),
            Self::WrongMethod => ("method not allowed".to_owned(), None, Some("method_not_allowed")),
            Self::QueueFull => ("the request queue is full".to_owned(), None, Some("rate_limit_exceeded")),
            Self::Loading => ("the model is loading".to_owned(), None, Some("model_loading")),
            Self::Fault(_) => ("simulated error".to_owned(), None, Some("simulated_error")),
        }
    }

    fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::QueueFull | Self::Loading => Some(RETRY_AFTER_S),
            Self::Fault(fault) => fault.retry_after_s,
            Self::BadJson(_)
            | Self::Invalid { .. }
            | Self::InvalidFaults(_)
            | Self::BodyTooLarge
            | Self::BodyIncomplete
            | Self::UnknownModel(_)
            | Self::UnknownPath
            | Self::WrongMethod => None,
        }
    }

    /// OpenAI's error object, as it also appears inside streams.
    pub(crate) fn json(&self) -> String {
        let (message, param, code) = self.texts();
        let kind = match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({ "error": { "message": message, "type": kind, "param": param, "code": code } }).to_string()
    }

    pub(crate) fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::full(self.json()));
        *response.status_mut() = self.status();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
