//! What the pages have in common: reading a query, and answering with JSON or with a reason.

use axum::extract::Query;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use serde::de::DeserializeOwned;
use serde_json::Value;
use weir_proto::resource::Name;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// A parameter is missing or wrong.
    #[error("{0}")]
    BadQuery(&'static str),
    /// No such key or model is in force.
    #[error("this gateway has no {kind} {name} in force: it is not there, or it is revoked")]
    Unknown {
        /// "key" or "model".
        kind: &'static str,
        /// As asked for.
        name: Name,
    },
    /// The limit store does not answer.
    #[error("the limit store cannot be read now: {0}")]
    Store(String),
}

impl PageError {
    const fn status(&self) -> StatusCode {
        match self {
            Self::BadQuery(_) => StatusCode::BAD_REQUEST,
            Self::Unknown { .. } => StatusCode::NOT_FOUND,
            Self::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// The parameters of a query, all of them text and none of them required.
///
/// # Errors
/// When a parameter is given twice: which of the two is meant cannot be known.
pub(super) fn parameters<T: DeserializeOwned>(uri: &Uri) -> Result<T, PageError> {
    let query = Query::try_from_uri(uri).map(|Query(parameters)| parameters);
    query.map_err(|_| PageError::BadQuery("query: each parameter can be given once"))
}

/// A parameter that is a name.
pub(super) fn name(text: Option<&str>, wrong: &'static str) -> Result<Option<Name>, PageError> {
    text.map(|text| Name::parse(text).map_err(|_| PageError::BadQuery(wrong))).transpose()
}

/// The answer as JSON, or its reason as a line of text.
pub(super) fn respond(answer: Result<Value, PageError>) -> Response {
    match answer {
        Ok(value) => ([(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response(),
        Err(error) => (error.status(), format!("{error}\n")).into_response(),
    }
}
