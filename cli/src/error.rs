//! What can go wrong, as sentences for the person at the terminal, and the exit code of each.

use std::io;

use tonic::{Code, Status};
use weir_proto::manifest;
use weir_proto::status::field_violations;
use weir_runtime::exit;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection.
    #[error(
        "the control plane at {server} cannot be reached: {reason}\n\
         start it (weir-control-plane, or weir up), or say where it is with --server or WEIR_SERVER"
    )]
    Unreachable {
        /// The address tried.
        server: String,
        /// What the system said.
        reason: String,
    },
    /// A connection, and no answer in time.
    #[error("the control plane at {server} did not answer within {timeout}; --timeout allows more")]
    Timeout {
        /// The address.
        server: String,
        /// The time it had.
        timeout: String,
    },
    /// It answered with an error.
    #[error("{}", sentence(.status, .server))]
    Refused {
        /// The address.
        server: String,
        /// The answer.
        status: Box<Status>,
    },
    /// A part of `weir up` could not start.
    #[error("{reason}")]
    Start {
        /// The exit code.
        code: u8,
        /// What and why.
        reason: String,
    },
    /// A setting is wrong.
    #[error("{0}")]
    Setting(String),
    /// It answered with nothing where there has to be something.
    #[error("the control plane's answer lacks its {0}; does its version fit this one?")]
    Answer(&'static str),
    /// A file of resources is wrong.
    #[error("{0}")]
    Manifest(#[from] manifest::Error),
    /// A file of another gateway cannot be made sense of.
    #[error("{0}")]
    Import(String),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Two files name the same resource.
    #[error("{0} is given twice")]
    Twice(String),
    /// The control plane refused resources that were given; one line for each mistake.
    #[error("the control plane does not take this, and has changed nothing:\n  {}", .0.join("\n  "))]
    NotTaken(Vec<String>),
    /// The token cannot be sent.
    #[error("the token of {0} is empty or holds characters a header cannot")]
    Token(&'static str),
    /// The gateways did not all take a change in time; what there is to say has been said.
    #[error("the change is stored, but not every gateway holds it yet: weir gateways shows why")]
    Pending,
    /// Gateways refused a part of a change; what there is to say has been said.
    #[error(
        "the change is stored and the rest of it is in force; the gateways named do not use what they refuse"
    )]
    PartlyRefused,
    /// Requests went on for longer than was waited.
    #[error(
        "backend {0} is draining, but not everything had ended within {1}; weir drain {0} goes on waiting"
    )]
    Undrained(String, String),
    /// The audit log is not what was written.
    #[error("the audit log is not whole: {0}; restore a backup, and find out who wrote to the store's file")]
    AuditBroken(String),
    /// A probe on demand found something.
    #[error("backend {backend}: {failed} looks did not pass, {silent} of those asked did not answer in time")]
    Probed {
        /// The backend.
        backend: String,
        /// Looks that saw something wrong.
        failed: usize,
        /// Vantage points that were silent.
        silent: usize,
    },
    /// A check found something.
    #[error("{0} of the checks found something")]
    Check(usize),
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A process says that it is not well.
    #[error("{url} answered {status}: {text}")]
    Unhealthy {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
        /// Its reason, cut.
        text: String,
    },
    /// A process does not answer.
    #[error("{url} cannot be asked: {reason}; is the process running, and does it listen there?")]
    Silent {
        /// What was asked.
        url: String,
        /// What the system said.
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
            Self::Manifest(_) | Self::Import(_) | Self::Twice(_) | Self::NotTaken(_) | Self::File { .. } => {
                exit::CONFIG
            }
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
            "the control plane at {server} wants a valid token ({message}); give it with --token-file or WEIR_TOKEN"
        ),
        Code::PermissionDenied => format!("the token does not allow this: {message}"),
        Code::NotFound => format!("not found: {message}"),
        Code::AlreadyExists => format!("exists already: {message}"),
        Code::InvalidArgument => match field_violations(status).as_slice() {
            [] | [_] => format!("the control plane does not take this: {message}"),
            several => {
                let lines = several.iter().map(|v| format!("\n  {}: {}", v.field, v.description));
                format!("the control plane does not take this:{}", lines.collect::<String>())
            }
        },
        Code::FailedPrecondition => format!("not now: {message}"),
        Code::Aborted => format!("it has changed in the meantime: {message}; read it again and retry"),
        Code::ResourceExhausted => format!("too much at once: {message}"),
        Code::Unavailable => {
            format!("the control plane at {server} is not ready: {message}; try again in a moment")
        }
        Code::DeadlineExceeded | Code::Cancelled => {
            format!("the control plane at {server} gave up: {message}; --timeout allows more")
        }
        Code::Unimplemented => {
            format!(
                "the control plane at {server} does not know this call; is it an older version, or another server?"
            )
        }
        Code::OutOfRange => format!("too far: {message}"),
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
            (Code::AlreadyExists, "exists already: backend sgp-1", 1),
            (Code::InvalidArgument, "the control plane does not take this: backend sgp-1", 64),
            (Code::FailedPrecondition, "not now: backend sgp-1", 1),
            (
                Code::Unauthenticated,
                "the control plane at http://h:7070 wants a valid token (backend sgp-1); give it with --token-file \
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
