//! What an answer to a probe says of the backend. Pure.

use bytes::Bytes;
use http::StatusCode;
use weir_proto::v1::ProbeOutcome;

/// What one probe found, for the machine and for people. The text never holds what a backend sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// For the machine.
    pub outcome: ProbeOutcome,
    /// For people.
    pub detail: String,
}

impl Finding {
    /// A finding.
    pub fn new(outcome: ProbeOutcome, detail: impl Into<String>) -> Self {
        Self { outcome, detail: detail.into() }
    }

    /// The server is there and does its work, if reluctantly.
    pub const fn is_good(&self) -> bool {
        matches!(self.outcome, ProbeOutcome::Pass | ProbeOutcome::Busy)
    }
}

/// As much of an answer as a probe judges.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Whether it says when to come back.
    pub retry_after: bool,
    /// Its body, within the caller's bound.
    pub body: Bytes,
    /// Whether the request carried our credential.
    pub with_credential: bool,
}

impl Answer {
    /// Whoever answers a liveness probe lives, even with "no such page" or "who are you": many servers have no health
    /// page. 429 is alive too. `None`: the body of a GET must be seen.
    pub fn liveness(&self) -> Option<Finding> {
        let (status, code) = (self.status, self.status.as_u16());
        let alive = status.is_success() || status.is_redirection() || matches!(code, 401 | 404 | 405 | 429);
        alive.then(|| Finding::new(ProbeOutcome::Pass, format!("answered {code}")))
    }

    /// An answer of any tier that is not what was asked for.
    pub fn refusal(&self) -> Finding {
        let code = self.status.as_u16();
        let (outcome, detail) = match code {
            429 => (ProbeOutcome::Busy, "answered 429".to_owned()),
            503 if self.retry_after => (ProbeOutcome::Busy, "answered 503 with Retry-After".to_owned()),
            503 if mentions(&self.body, "loading") => {
                (ProbeOutcome::Loading, "it says that it is loading".to_owned())
            }
            401 | 403 if self.with_credential => {
                (ProbeOutcome::Status, format!("answered {code}: it refuses our credential"))
            }
            _ => (ProbeOutcome::Status, format!("answered {code}")),
        };
        Finding { outcome, detail }
    }
}

/// Whether a body holds a text, which is in lower case, in any case.
pub fn mentions(body: &[u8], text: &str) -> bool {
    String::from_utf8_lossy(body).to_ascii_lowercase().contains(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, retry_after: bool, body: &'static str, with_credential: bool) -> Answer {
        let status = StatusCode::from_u16(code).expect("a status");
        Answer { status, retry_after, body: Bytes::from_static(body.as_bytes()), with_credential }
    }

    #[test]
    fn who_answers_lives_unless_it_says_it_is_broken() {
        for code in [200, 204, 302, 401, 404, 405, 429] {
            assert!(answer(code, false, "", false).liveness().is_some(), "{code}");
        }
        for code in [400, 403, 500, 502, 503] {
            assert!(answer(code, false, "", false).liveness().is_none(), "{code}");
        }
    }

    #[test]
    fn a_refusal_says_whether_it_is_busy_or_loading_or_minds_our_credential() {
        use ProbeOutcome as O;
        for (code, retry_after, body, with_credential, outcome, detail) in [
            (429, false, "", true, O::Busy, "answered 429"),
            (503, true, "", true, O::Busy, "answered 503 with Retry-After"),
            (503, false, "Loading model", true, O::Loading, "it says that it is loading"),
            (503, false, "", true, O::Status, "answered 503"),
            (403, false, "", true, O::Status, "answered 403: it refuses our credential"),
            (403, false, "", false, O::Status, "answered 403"),
        ] {
            let found = answer(code, retry_after, body, with_credential).refusal();
            assert_eq!(found, Finding::new(outcome, detail), "{code}");
        }
    }
}
