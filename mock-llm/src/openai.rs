//! The part of OpenAI's API that all endpoints share: the fields of requests, and the form of errors.

use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Deserialize;

use crate::body::Body;
use crate::error::ApiError;
use crate::oddities::Reply;
use crate::text::{Kind, Measured};

/// The largest request body; a larger one is answered 413.
pub(crate) const REQUEST_BYTES_MAX: usize = 32 * 1024 * 1024;
/// The maximum of answers to one prompt, as at OpenAI.
const CHOICES_MAX: u32 = 128;
/// The maximum of inputs of one embeddings request, as at OpenAI.
const EMBEDDING_INPUTS_MAX: usize = 2048;
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

    /// The prompt, which must be of a kind that this endpoint takes.
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

    pub(crate) fn has_stream_options(&self) -> bool {
        self.stream_options.is_some()
    }

    pub(crate) fn include_usage(&self) -> bool {
        self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// The maximum of tokens that the client allows; the newer field wins.
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

/// The reply that replaces every answer.
pub(crate) fn reply_response(reply: &Reply) -> Response<Body> {
    let mut response = Response::new(Body::full(reply.body.clone()));
    *response.status_mut() = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in [(CONTENT_TYPE, &reply.content_type), (RETRY_AFTER, &reply.retry_after)] {
        if let Some(value) = value.as_ref().and_then(|text| HeaderValue::from_str(text).ok()) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// The answer that reports an error to a client.
pub(crate) fn error_response(error: &ApiError) -> Response<Body> {
    let mut response = Response::new(Body::full(error.json()));
    *response.status_mut() = error.status();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = error.retry_after_s() {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}
