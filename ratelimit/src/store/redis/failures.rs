//! Classifies Redis errors: what they mean for the call and for the connection.

use ::redis::{ErrorKind, RedisError, ServerErrorKind};

use super::reply;
use crate::model::error::{Error, Fault};

/// Whether the connection is lost, or leads to a server that is no longer the primary.
pub(super) fn replaces_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown))
}

/// The error of a call that was sent. It never contains an address.
pub(super) fn classify(error: &RedisError) -> Error {
    if let Some(fault) = fault_of(error) {
        let code = error.code().unwrap_or("NOAUTH");
        let detail = match error.detail() {
            Some(detail) => format!("{code} {}", detail.chars().take(200).collect::<String>()),
            None => code.to_owned(),
        };
        return Error::Refused { fault, detail };
    }
    match error.kind() {
        ErrorKind::Parse | ErrorKind::UnexpectedReturnType => reply::malformed(),
        // The client had no node to send the call to.
        ErrorKind::ClusterConnectionNotFound => Error::Unreachable("no node of the cluster answers".into()),
        _ => Error::Lost,
    }
}

/// The error of an attempt to connect. No call was sent.
pub(super) fn classify_connect(error: &RedisError) -> Error {
    match classify(error) {
        Error::Lost if error.is_connection_refusal() => Error::Unreachable("connection refused".into()),
        Error::Lost if error.is_timeout() => Error::Unreachable("connection timed out".into()),
        Error::Lost if error.is_io_error() || error.is_connection_dropped() => {
            Error::Unreachable("connection lost".into())
        }
        Error::Lost => Error::Unreachable(error.category().to_owned()),
        refused => refused,
    }
}

fn fault_of(error: &RedisError) -> Option<Fault> {
    match error.kind() {
        ErrorKind::AuthenticationFailed => Some(Fault::Denied),
        ErrorKind::Server(_) | ErrorKind::Extension => Some(Fault::of_code(error.code().unwrap_or_default())),
        _ => None,
    }
}
