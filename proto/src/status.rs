//! gRPC errors that name the fields that are wrong, in the form of Google's error model: `google.rpc.BadRequest` inside
//! `google.rpc.Status` in the binary details, which generic clients show. Two small messages, so their definitions are
//! here and not a dependency.

use prost::Message;
use tonic::{Code, Status};

use crate::resource::Violations;

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
pub struct RpcStatus {
    /// The code of the call.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For developers.
    #[prost(string, tag = "2")]
    pub message: String,
    /// What exactly is wrong.
    #[prost(message, repeated, tag = "3")]
    pub details: Vec<prost_types::Any>,
}

/// `google.rpc.BadRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct BadRequest {
    /// Every field that is wrong.
    #[prost(message, repeated, tag = "1")]
    pub field_violations: Vec<FieldViolation>,
}

/// `google.rpc.BadRequest.FieldViolation`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FieldViolation {
    /// The path of the field.
    #[prost(string, tag = "1")]
    pub field: String,
    /// What is wrong and what would be right.
    #[prost(string, tag = "2")]
    pub description: String,
}

/// `google.rpc.ErrorInfo`.
#[derive(Clone, PartialEq, Message)]
pub struct ErrorInfo {
    /// For programs, in capitals, such as `ETAG_MISMATCH`.
    #[prost(string, tag = "1")]
    pub reason: String,
    /// Whose reasons these are: always "weir".
    #[prost(string, tag = "2")]
    pub domain: String,
}

const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";
const BAD_REQUEST: &str = "type.googleapis.com/google.rpc.BadRequest";

/// INVALID_ARGUMENT with every violation, as text and as details.
pub fn invalid_argument(violations: &Violations) -> Status {
    let field_violations =
        violations.0.iter().map(|v| FieldViolation { field: v.path.clone(), description: v.message.clone() });
    let bad = BadRequest { field_violations: field_violations.collect() };
    let message = violations.to_string();
    let details = RpcStatus {
        code: Code::InvalidArgument as i32,
        message: message.clone(),
        details: vec![prost_types::Any { type_url: BAD_REQUEST.into(), value: bad.encode_to_vec() }],
    };
    Status::with_details(Code::InvalidArgument, message, details.encode_to_vec().into())
}

/// A status with a reason that programs can match.
pub fn with_reason(code: Code, message: String, reason: &str) -> Status {
    let info = ErrorInfo { reason: reason.to_owned(), domain: "weir".to_owned() };
    let any = prost_types::Any { type_url: ERROR_INFO.into(), value: info.encode_to_vec() };
    let details = RpcStatus { code: code as i32, message: message.clone(), details: vec![any] };
    Status::with_details(code, message, details.encode_to_vec().into())
}

/// The reason a status carries; empty when it carries none.
pub fn reason(status: &Status) -> String {
    let details = RpcStatus::decode(status.details()).unwrap_or_default().details;
    let info = details.into_iter().find(|any| any.type_url == ERROR_INFO);
    info.and_then(|any| ErrorInfo::decode(any.value.as_slice()).ok()).unwrap_or_default().reason
}

/// The violations a status carries; empty when it carries none.
pub fn field_violations(status: &Status) -> Vec<FieldViolation> {
    let Ok(details) = RpcStatus::decode(status.details()) else { return Vec::new() };
    let bad = details.details.iter().find(|any| any.type_url == BAD_REQUEST);
    bad.and_then(|any| BadRequest::decode(any.value.as_slice()).ok()).unwrap_or_default().field_violations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::Violation;

    #[test]
    fn violations_are_in_text_and_details() {
        let one = Violation { path: "scopes[0].rates".into(), message: "must be set".into() };
        let status = invalid_argument(&Violations(vec![one]));
        assert_eq!(status.message(), "scopes[0].rates: must be set");
        let found = field_violations(&status);
        assert_eq!(
            (found[0].field.as_str(), found[0].description.as_str()),
            ("scopes[0].rates", "must be set")
        );
        assert!(field_violations(&Status::internal("x")).is_empty());
    }
}
