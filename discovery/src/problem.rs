//! Why a control plane is not followed, in words that an operator can act on: for the log and for `/readyz`. Gateways and
//! limit services have the same flags for it, so they say the same.

use std::error::Error;
use std::io;

use tonic::{Code, Status};
use weir_proto::status::{reason, refusal};
use weir_proto::v1::SubscriberRole;

use crate::link::{Identity, error_chain};

/// How a process gets a token.
const TOKEN: &str =
    "needs a token of role gateway: --gateway-token-file, `weir token create NAME --role gateway`";

/// Why a control plane is not followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Problem {
    /// Nothing answers at its address, or the connection broke.
    Unreachable(String),
    /// One of both sides does not accept the certificate of the other, or a certificate file cannot be read.
    Tls(String),
    /// No token was sent.
    NoToken,
    /// The token is not known.
    UnknownToken,
    /// The token cannot be used for another reason, such as its age.
    UnusableToken(String),
    /// The token has another role.
    WrongRole(String),
    /// The token is bound to another gateway, or another token to this one.
    OtherGateway(String),
    /// The control plane refused the stream for another reason.
    Refused(String),
    /// A stream that was open has ended.
    Ended(String),
}

impl Problem {
    /// A connection that could not be opened or that broke.
    pub(crate) fn of_transport(error: &(dyn Error + 'static)) -> Self {
        let text = error_chain(error);
        // After the handshake the alert of the other side is known by its text only.
        let alert = text.contains("received fatal alert");
        if alert || is_tls(error) { Self::Tls(text) } else { Self::Unreachable(text) }
    }

    /// A call that failed: by the connection, or because the control plane refused it.
    pub(crate) fn of_status(status: &Status) -> Self {
        if let Some(cause) = status.source() {
            return Self::of_transport(cause);
        }
        let message = || status.message().to_owned();
        match (status.code(), reason(status).as_str()) {
            (_, refusal::TOKEN_MISSING) => Self::NoToken,
            (_, refusal::TOKEN_UNKNOWN) => Self::UnknownToken,
            (_, refusal::ROLE) => Self::WrongRole(message()),
            (_, refusal::GATEWAY_ID) => Self::OtherGateway(message()),
            (Code::Unauthenticated, _) => Self::UnusableToken(message()),
            (Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled, _) => Self::Ended(message()),
            _ => Self::Refused(message()),
        }
    }

    /// The problem of this process with the control plane at `url`, and what to do about it.
    pub(crate) fn text(&self, identity: &Identity, url: &str) -> String {
        match self {
            Self::Unreachable(cause) => {
                let tls =
                    if url.starts_with("http:") { "; an address with TLS begins with https" } else { "" };
                format!(
                    "not reached: {cause}: check that {url} (--control-plane) is its address and that it runs{tls}"
                )
            }
            Self::Tls(cause) => format!("not reached: TLS: {cause}: {}", certificates(identity.role)),
            Self::NoToken => format!("refused: {TOKEN}"),
            Self::UnknownToken => {
                format!(
                    "refused: the token is not known: it was revoked, or is of another control plane: {TOKEN}"
                )
            }
            Self::UnusableToken(said) | Self::WrongRole(said) => format!("refused: {said}: {TOKEN}"),
            Self::OtherGateway(said) => format!(
                "refused: {said}: needs the id of its token (--id), or a token of its own: --gateway-token-file, \
                 `weir token create NAME --role gateway --gateway {}`",
                identity.id
            ),
            Self::Refused(said) => format!("refused: {said}"),
            Self::Ended(said) => format!("stream ended: {said}"),
        }
    }
}

/// The certificates that a process can be given.
const fn certificates(role: SubscriberRole) -> &'static str {
    match role {
        SubscriberRole::LimitService => {
            "a CA of this system must have signed the certificate of the control plane"
        }
        SubscriberRole::Unspecified | SubscriberRole::Gateway => {
            "check --control-plane-ca, --control-plane-cert and --control-plane-key"
        }
    }
}

/// Whether TLS is somewhere in the causes. An I/O error hides the error inside it from the chain of sources.
fn is_tls(error: &(dyn Error + 'static)) -> bool {
    let mut at = Some(error);
    while let Some(error) = at {
        let inside = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<rustls::Error>() || inside.is_some_and(|inside| inside.is::<rustls::Error>()) {
            return true;
        }
        at = error.source();
    }
    false
}

/// What `/readyz` says of a process without a configuration, by the problem with the control plane.
pub fn not_configured(problem: Option<&str>) -> String {
    const NOTHING: &str = "no configuration, and no copy of one on disk";
    match problem {
        None => format!("{NOTHING}: the control plane has not answered yet"),
        Some(problem) => format!("{NOTHING}: {problem}"),
    }
}

#[cfg(test)]
mod tests {
    use weir_proto::status::with_reason;

    use super::*;

    fn identity(role: SubscriberRole) -> Identity {
        let (id, incarnation, region) = ("gw-1".to_owned(), String::new(), String::new());
        Identity { id, role, incarnation, region, token: None }
    }

    fn text(status: &Status) -> String {
        Problem::of_status(status).text(&identity(SubscriberRole::Gateway), "http://h:7070")
    }

    #[test]
    fn each_refusal_has_its_remedy() {
        for (code, reason, says, remedy) in [
            (
                Code::Unauthenticated,
                refusal::TOKEN_MISSING,
                "refused: needs a token of role gateway",
                "--gateway-token-file",
            ),
            (
                Code::Unauthenticated,
                refusal::TOKEN_UNKNOWN,
                "refused: the token is not known",
                "weir token create NAME",
            ),
            (
                Code::Unauthenticated,
                refusal::TOKEN_EXPIRED,
                "refused: said: needs a token",
                "weir token create NAME",
            ),
            (Code::PermissionDenied, refusal::ROLE, "refused: said: needs a token", "--role gateway"),
            (Code::PermissionDenied, refusal::GATEWAY_ID, "refused: said: needs the id", "--gateway gw-1"),
            (Code::Aborted, "", "refused: said", ""),
            (Code::Unavailable, "", "stream ended: said", ""),
        ] {
            let text = text(&with_reason(code, "said", reason));
            assert!(text.starts_with(says) && text.contains(remedy), "{reason}: {text}");
        }
    }

    #[test]
    fn a_problem_with_tls_is_known_behind_an_io_error() {
        let inside = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let error = io::Error::new(io::ErrorKind::InvalidData, inside);
        let problem = Problem::of_transport(&error);
        let text = problem.text(&identity(SubscriberRole::Gateway), "https://h:7070");
        assert!(text.starts_with("not reached: TLS: ") && text.contains("--control-plane-ca"), "{text}");
        assert!(
            !problem
                .text(&identity(SubscriberRole::LimitService), "https://h")
                .contains("--control-plane-ca")
        );
        let broken = Problem::of_transport(&io::Error::from(io::ErrorKind::ConnectionRefused));
        let text = broken.text(&identity(SubscriberRole::Gateway), "http://h:7070");
        assert!(text.contains("http://h:7070 (--control-plane)") && text.contains("https"), "{text}");
    }
}
