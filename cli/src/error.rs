//! The errors of commands, as text for people, and their exit codes.

use std::io;

use tonic::{Code, Status};
use weir_proto::manifest;
use weir_proto::status::{FieldViolation, field_violations};
use weir_runtime::exit;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control plane cannot be reached.
    #[error(
        "the control plane at {server} cannot be reached: {reason}\n\
         start it (weir-control-plane, or weir up), or say where it is with --server or WEIR_SERVER"
    )]
    Unreachable {
        /// The address tried.
        server: String,
        /// The reason.
        reason: String,
    },
    /// The control plane did not answer within the timeout.
    #[error("the control plane at {server} did not answer within {timeout}; --timeout allows more")]
    Timeout {
        /// The address.
        server: String,
        /// The timeout.
        timeout: String,
    },
    /// The control plane answered with an error.
    #[error("{}", sentence(.status, .server))]
    Refused {
        /// The address.
        server: String,
        /// The gRPC status.
        status: Box<Status>,
    },
    /// A part of `weir up` could not start.
    #[error("{reason}")]
    Start {
        /// The exit code.
        code: u8,
        /// The reason.
        reason: String,
    },
    /// A setting is invalid.
    #[error("{0}")]
    Setting(String),
    /// A required field is missing in an answer.
    #[error("the control plane's answer lacks {0}; check that both have the same version")]
    Answer(&'static str),
    /// A file of resources is invalid.
    #[error("{0}")]
    Manifest(#[from] manifest::Error),
    /// A configuration of another gateway is invalid.
    #[error("{0}")]
    Import(String),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The path of the file.
        path: String,
        /// The reason.
        source: io::Error,
    },
    /// There is nothing to apply.
    #[error("{0} holds no resource; check that it is the right file, and that whatever writes it has worked")]
    Empty(String),
    /// Two files contain the same resource.
    #[error("{0} is given twice")]
    Twice(String),
    /// The control plane refused resources; one line per problem.
    #[error("the control plane refused this and changed nothing:\n  {}", .0.join("\n  "))]
    NotTaken(Vec<String>),
    /// The token cannot be sent.
    #[error("the token of {0} is empty or holds characters a header cannot")]
    Token(&'static str),
    /// Not all gateways applied a change in time. The details are printed already.
    #[error("the change is stored, but not every gateway has applied it yet: weir gateways shows why")]
    Pending,
    /// Gateways refused a part of a change. The details are printed already.
    #[error("the change is stored, but gateways refuse a part of it; the rest is in force")]
    PartlyRefused,
    /// A drain did not end within the wait time.
    #[error(
        "backend {0} is draining, but requests were still in progress after {1}; weir drain {0} waits again"
    )]
    Undrained(String, String),
    /// The hash chain of the audit log is broken.
    #[error("the audit log was changed: {0}; restore a backup, and find out who wrote to the store")]
    AuditBroken(String),
    /// A probe on demand failed or was not answered.
    #[error("backend {backend}: {failed} probes failed, {silent} observers did not answer in time")]
    Probed {
        /// The backend.
        backend: String,
        /// Probes that did not pass.
        failed: usize,
        /// Observers that did not answer.
        silent: usize,
    },
    /// A check found problems.
    #[error("{0} checks found problems")]
    Check(usize),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The path of the file.
        path: String,
        /// The reason.
        source: io::Error,
    },
    /// A process reports that it is not healthy.
    #[error("{url} answered {status}: {text}")]
    Unhealthy {
        /// The URL.
        url: String,
        /// The status.
        status: u16,
        /// The reason, cut to a bound.
        text: String,
    },
    /// A process does not answer.
    #[error("cannot reach {url}: {reason}; check that the process runs and listens there")]
    Silent {
        /// The URL.
        url: String,
        /// The reason.
        reason: String,
    },
    /// The result cannot be printed.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

impl Error {
    /// The exit code: see [`weir_runtime::exit`].
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } | Self::Silent { .. } => exit::UNAVAILABLE,
            Self::Manifest(_)
            | Self::Import(_)
            | Self::Empty(_)
            | Self::Twice(_)
            | Self::NotTaken(_)
            | Self::File { .. } => exit::CONFIG,
            Self::Token(_) | Self::Setting(_) => exit::USAGE,
            Self::Start { code, .. } => *code,
            Self::Refused { status, .. } => match status.code() {
                Code::Unavailable => exit::UNAVAILABLE,
                Code::InvalidArgument => exit::CONFIG,
                _ => exit::FAILED,
            },
            Self::PartlyRefused
            | Self::Undrained(..)
            | Self::AuditBroken(_)
            | Self::Check(_)
            | Self::Probed { .. }
            | Self::Write { .. } => exit::FAILED,
            Self::Answer(_) | Self::Unhealthy { .. } | Self::Pending | Self::Print(_) => exit::FAILED,
        }
    }
}

fn sentence(status: &Status, server: &str) -> String {
    let message = match status.message() {
        "" => "no reason given",
        message => message,
    };
    match status.code() {
        Code::Unauthenticated => format!(
            "the control plane at {server} requires a valid token ({message}); set --token-file or WEIR_TOKEN"
        ),
        Code::PermissionDenied => format!("the token does not allow this: {message}"),
        Code::NotFound => format!("not found: {message}"),
        Code::AlreadyExists => format!("already exists: {message}"),
        Code::InvalidArgument => match field_violations(status).as_slice() {
            [] | [_] => format!("the control plane refused this: {message}"),
            several => {
                // How many are left out has no field.
                let separator = |field: &str| if field.is_empty() { "" } else { ": " };
                let line =
                    |v: &FieldViolation| format!("\n  {}{}{}", v.field, separator(&v.field), v.description);
                let lines = several.iter().map(line);
                format!("the control plane refused this:{}", lines.collect::<String>())
            }
        },
        Code::FailedPrecondition => format!("not possible now: {message}"),
        Code::Aborted => format!("the resource has changed: {message}; read it again and retry"),
        Code::ResourceExhausted => format!("too many calls: {message}"),
        Code::Unavailable => {
            format!("the control plane at {server} is not ready: {message}; try again in a moment")
        }
        Code::DeadlineExceeded | Code::Cancelled => {
            format!("the control plane at {server} timed out: {message}; --timeout allows more")
        }
        Code::Unimplemented => {
            format!("the control plane at {server} does not know this call; check its version and address")
        }
        Code::OutOfRange => format!("out of range: {message}"),
        Code::Internal | Code::Unknown | Code::DataLoss | Code::Ok => {
            format!("the control plane at {server} failed: {message}; its log says more")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code) -> Error {
        let status = Box::new(Status::new(code, "backend sgp-1"));
        Error::Refused { server: "http://h:7070".into(), status }
    }

    #[test]
    fn answers_become_sentences_with_exit_codes() {
        for (code, text, exit) in [
            (Code::NotFound, "not found: backend sgp-1", 1),
            (Code::AlreadyExists, "already exists: backend sgp-1", 1),
            (Code::InvalidArgument, "the control plane refused this: backend sgp-1", 64),
            (Code::FailedPrecondition, "not possible now: backend sgp-1", 1),
            (
                Code::Unauthenticated,
                "the control plane at http://h:7070 requires a valid token (backend sgp-1); set --token-file \
                 or WEIR_TOKEN",
                1,
            ),
            (
                Code::Unavailable,
                "the control plane at http://h:7070 is not ready: backend sgp-1; try again in a moment",
                69,
            ),
        ] {
            assert_eq!((refused(code).to_string().as_str(), refused(code).exit_code()), (text, exit));
        }
    }

    #[test]
    fn an_unreachable_server_is_named_with_the_remedy() {
        let error = Error::Unreachable { server: "http://h:1".into(), reason: "refused".into() };
        assert_eq!(error.exit_code(), 69);
        let text = error.to_string();
        assert!(
            text.contains("http://h:1") && text.contains("--server") && text.contains("weir up"),
            "{text}"
        );
    }
}
