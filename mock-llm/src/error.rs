//! Error answers, in the form of OpenAI's errors.

use hyper::StatusCode;
use serde_json::json;

use crate::faults::ErrorStatus;

/// The wait that clients are told when the queue is full.
const RETRY_AFTER_S: u32 = 1;

/// Every error answer.
#[derive(Clone, Debug)]
pub(crate) enum ApiError {
    BadJson(String),
    Invalid {
        param: &'static str,
        message: &'static str,
    },
    InvalidFaults(String),
    BodyTooLarge,
    BodyIncomplete,
    UnknownModel(String),
    /// Refused because of a field that the server does not know.
    ExtraField(&'static str),
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
            Self::ExtraField(_) => StatusCode::UNPROCESSABLE_ENTITY,
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
            Self::ExtraField(name) => {
                (format!("Extra inputs are not permitted: {name}"), Some(name), Some("extra_forbidden"))
            }
            Self::UnknownPath => ("unknown path".to_owned(), None, Some("unknown_url")),
            Self::WrongMethod => ("method not allowed".to_owned(), None, Some("method_not_allowed")),
            Self::QueueFull => ("the request queue is full".to_owned(), None, Some("rate_limit_exceeded")),
            Self::Loading => ("the model is loading".to_owned(), None, Some("model_loading")),
            Self::Fault(_) => ("simulated error".to_owned(), None, Some("simulated_error")),
        }
    }

    pub(crate) fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::QueueFull | Self::Loading => Some(RETRY_AFTER_S),
            Self::Fault(fault) => fault.retry_after_s,
            Self::BadJson(_)
            | Self::Invalid { .. }
            | Self::InvalidFaults(_)
            | Self::BodyTooLarge
            | Self::BodyIncomplete
            | Self::UnknownModel(_)
            | Self::ExtraField(_)
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
}
