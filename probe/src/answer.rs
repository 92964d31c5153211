//! Evaluates answers to probes. Pure.

use bytes::Bytes;
use http::StatusCode;
use weir_proto::v1::ProbeOutcome;

/// The finding of one probe. The text never contains what a backend sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The outcome.
    pub outcome: ProbeOutcome,
    /// A description for people.
    pub detail: String,
}

impl Finding {
    /// A finding.
    pub fn new(outcome: ProbeOutcome, detail: impl Into<String>) -> Self {
        Self { outcome, detail: detail.into() }
    }

    /// Whether the backend works: it passed or is busy.
    pub const fn is_good(&self) -> bool {
        matches!(self.outcome, ProbeOutcome::Pass | ProbeOutcome::Busy)
    }
}

/// The parts of an answer that a probe evaluates.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// Whether it has a Retry-After header.
    pub retry_after: bool,
    /// The body, cut to the caller's bound.
    pub body: Bytes,
    /// Whether the request had the backend's credential.
    pub with_credential: bool,
}

impl Answer {
    /// The finding of a liveness probe. Every answer proves liveness, 404, 401 and 429 included, because many servers have no
    /// health page. `None`: the body of a GET is needed.
    pub fn liveness(&self) -> Option<Finding> {
        let (status, code) = (self.status, self.status.as_u16());
        let alive = status.is_success() || status.is_redirection() || matches!(code, 401 | 404 | 405 | 429);
        alive.then(|| Finding::new(ProbeOutcome::Pass, format!("answered {code}")))
    }

    /// The finding for an answer of any tier that is not a success.
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
