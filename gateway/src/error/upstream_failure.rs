//! What a backend answered in place of an answer, and what the client is told of it.

use std::borrow::Cow;
use std::time::Duration;

use super::{ErrorFacts, RETRY_SOON, UPSTREAM, upstream};
use crate::api::upstream_error::Meaning;

/// What a backend answered in place of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamFailure {
    /// The status it answered with.
    pub status: u16,
    /// What it means.
    pub meaning: Meaning,
    /// Its own text, redacted; empty when it gave none.
    pub message: String,
    /// How long it asked to be left alone.
    pub retry_after: Option<Duration>,
    /// Another backend failed at the same request in the same way: a retry will not help.
    pub elsewhere_too: bool,
}

impl UpstreamFailure {
    /// What the client is told: the backend's own status and text where they may be about the request, else what went
    /// wrong and who mends it.
    pub(super) fn facts(&self) -> ErrorFacts {
        const OPERATOR: &str = "The operator of this gateway has to mend it.";
        let told = |status, code, label, message: Cow<'static, str>| ErrorFacts {
            message,
            retry_after: Some(self.retry_after.unwrap_or(RETRY_SOON)),
            ..upstream(status, code, label, "")
        };
        match self.meaning {
            Meaning::Credential => told(
                502,
                "upstream_credential_refused",
                "upstream_credential",
                format!("The model's server refuses the gateway's credential. {OPERATOR}").into(),
            ),
            Meaning::Quota => told(
                503,
                "upstream_quota_used_up",
                "upstream_quota",
                format!("The account at the model's server has no quota left. {OPERATOR}").into(),
            ),
            Meaning::NoModel => told(
                502,
                "upstream_no_model",
                "upstream_no_model",
                format!("The model's server does not have the model. {OPERATOR}").into(),
            ),
            // Busy is not broken, and it is not the caller's limit either: 503, never 429.
            Meaning::Busy => {
                told(503, "upstream_busy", "upstream_busy", "The model's server is busy.".into())
            }
            Meaning::Failed | Meaning::Request if !self.message.is_empty() => {
                let status = if self.status >= 500 { self.status } else { 502 };
                told(status, "upstream_error", "upstream_status", self.message.clone().into())
            }
            Meaning::Failed | Meaning::Foreign | Meaning::Request => {
                // Where every server failed in the same way, nobody should be told to try again.
                let text =
                    if self.elsewhere_too { "The model's servers failed to answer." } else { UPSTREAM };
                told(502, "upstream_error", "upstream_status", text.into())
            }
        }
    }
}
