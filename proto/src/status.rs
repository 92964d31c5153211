//! gRPC errors that name the fields that are wrong, in the form of Google's error model: `google.rpc.BadRequest` inside
//! `google.rpc.Status` in the binary details, which generic clients show. Two small messages, so their definitions are
//! here and not a dependency.

use prost::Message;
use tonic::{Code, Status};

use crate::resource::{Violation, Violations};

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

/// Reasons for which a control plane refuses a caller, as in [`with_reason`]. Subscribers tell their remedies by them.
pub mod refusal {
    /// No token was sent.
    pub const TOKEN_MISSING: &str = "TOKEN_MISSING";
    /// The token is not known: it was revoked, or it is of another control plane.
    pub const TOKEN_UNKNOWN: &str = "TOKEN_UNKNOWN";
    /// The token has expired.
    pub const TOKEN_EXPIRED: &str = "TOKEN_EXPIRED";
    /// The role of the token does not allow the method.
    pub const ROLE: &str = "ROLE_NOT_ALLOWED";
    /// The token is bound to another gateway, or the gateway has another token.
    pub const GATEWAY_ID: &str = "GATEWAY_ID_NOT_ALLOWED";
}

const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";
const BAD_REQUEST: &str = "type.googleapis.com/google.rpc.BadRequest";

/// The most violations that a status lists.
const LISTED_MAX: usize = 50;
/// What they may take, bytes. A status is in the trailers of an answer, of which clients read 16 KiB, and there its details are
/// base64 and stand beside the message.
const LISTED_BYTES_MAX: usize = 6 << 10;
/// The longest path of a field that is shown whole, bytes.
const FIELD_BYTES_MAX: usize = 256;
/// The longest description that is shown whole, bytes.
const DESCRIPTION_BYTES_MAX: usize = 512;
/// The longest message, bytes. Each of them may become three in the trailers.
const MESSAGE_BYTES_MAX: usize = 1 << 10;

/// A text of at most so many bytes, which tells when something is left out.
fn cut(text: &str, most: usize) -> String {
    const LEFT_OUT: &str = "...";
    match text.len() <= most {
        true => text.to_owned(),
        false => format!("{}{LEFT_OUT}", &text[..text.floor_char_boundary(most - LEFT_OUT.len())]),
    }
}

/// The first violations, and how many are left out.
fn listed(violations: &Violations) -> (Vec<FieldViolation>, usize) {
    let mut bytes = 0;
    let cut = |v: &Violation| FieldViolation {
        field: cut(&v.path, FIELD_BYTES_MAX),
        description: cut(&v.message, DESCRIPTION_BYTES_MAX),
    };
    let fits = |one: &FieldViolation| {
        bytes += one.encoded_len();
        bytes <= LISTED_BYTES_MAX
    };
    let listed: Vec<_> = violations.0.iter().take(LISTED_MAX).map(cut).take_while(fits).collect();
    let left_out = violations.0.len() - listed.len();
    (listed, left_out)
}

/// INVALID_ARGUMENT with the first 50 violations as details, of which the last says how many are left out, and the first of them as
/// text.
pub fn invalid_argument(violations: &Violations) -> Status {
    let (mut listed, left_out) = listed(violations);
    let mut message = String::new();
    let mut told = 0;
    for FieldViolation { field, description } in &listed {
        let separator = if told == 0 { "" } else { "; " };
        let text = format!("{separator}{field}: {description}");
        if message.len() + text.len() > MESSAGE_BYTES_MAX {
            break;
        }
        message.push_str(&text);
        told += 1;
    }
    if told < violations.0.len() {
        message.push_str(&format!("; and {} more", violations.0.len() - told));
    }
    if left_out > 0 {
        listed.push(FieldViolation { field: String::new(), description: format!("and {left_out} more") });
    }
    let bad = BadRequest { field_violations: listed };
    let details = RpcStatus {
        code: Code::InvalidArgument as i32,
        message: message.clone(),
        details: vec![prost_types::Any { type_url: BAD_REQUEST.into(), value: bad.encode_to_vec() }],
    };
    Status::with_details(Code::InvalidArgument, message, details.encode_to_vec().into())
}

/// A status with a reason that programs can match.
pub fn with_reason(code: Code, message: &str, reason: &str) -> Status {
    let message = cut(message, MESSAGE_BYTES_MAX);
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

    /// What a status takes in the trailers of an answer, bytes.
    fn in_trailers(status: &Status) -> usize {
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers).expect("valid");
        // RFC 9113, 6.5.2.
        trailers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    }

    #[test]
    fn of_ten_thousand_violations_the_first_are_listed_and_the_others_counted() {
        let violation = |i| Violation { path: format!("resources[{i}].pool"), message: "must be set".into() };
        let status = invalid_argument(&Violations((0..10_000).map(violation).collect()));
        let found = field_violations(&status);
        assert_eq!((found.len(), found[49].field.as_str()), (51, "resources[49].pool"));
        assert_eq!((found[50].field.as_str(), found[50].description.as_str()), ("", "and 9950 more"));
        assert!(status.message().starts_with("resources[0].pool: must be set; resources[1].pool: "));
        assert!(status.message().ends_with(" more"), "{}", status.message());
        assert!(in_trailers(&status) < 8 << 10);
    }

    #[test]
    fn a_status_fits_into_trailers_whatever_its_texts_are() {
        for (length, letter, count) in [
            (10, "x", 1),
            (100_000, "x", 1),
            (5_000, "\u{1F600}", 400),
            (600, " ", 100),
            (200, "\u{e9}", 10_000),
        ] {
            let text = letter.repeat(length);
            let violation = |_| Violation { path: text.clone(), message: text.clone() };
            let status = invalid_argument(&Violations((0..count).map(violation).collect()));
            assert!(in_trailers(&status) < 15 << 10, "{length} {letter:?}: {}", in_trailers(&status));
            assert!(!field_violations(&status).is_empty());
            let status = with_reason(Code::Aborted, &text, "ETAG_MISMATCH");
            assert!(in_trailers(&status) < 15 << 10, "{length} {letter:?}: {}", in_trailers(&status));
            assert_eq!(reason(&status), "ETAG_MISMATCH");
        }
    }
}
