//! Which failed attempts of a request count against their backends.
//!
//! What only the backend can have done counts at once. A failure that may be the request's own doing counts if another
//! backend answers the same request well; where none does, nobody is blamed.

use super::attempt::{Failure, Fault, Target};
use crate::error::GatewayError;
use crate::routing::backend_state::AttemptOutcome;

/// Failed attempts that count against their backends only if another one answers well.
#[derive(Debug, Default)]
pub(super) struct Suspects(Vec<Suspect>);

/// A failed attempt that may be the request's own doing.
#[derive(Debug)]
struct Suspect {
    target: Target,
    outcome: AttemptOutcome,
    status: Option<u16>,
}

impl Suspects {
    /// Records a failed attempt; returns what the request fails with if it was the last one.
    pub(super) fn record(&mut self, failed: &Target, failure: Failure) -> GatewayError {
        failure.note(failed);
        let Failure { error, fault, status, .. } = failure;
        let mut error = *error;
        match fault {
            Fault::None | Fault::Addition => {}
            Fault::Backend(outcome, retry_after) => failed.blame(outcome, retry_after),
            Fault::Suspected(outcome) => {
                if let GatewayError::Upstream(failure) = &mut error {
                    let same = |suspect: &Suspect| {
                        (suspect.outcome, suspect.status) == (outcome, status)
                            && suspect.target.backend.id != failed.backend.id
                    };
                    failure.elsewhere_too = self.0.iter().any(same);
                }
                self.0.push(Suspect { target: failed.clone(), outcome, status });
            }
        }
        error
    }

    /// Records an attempt that was given up before it ended, since its backend was found unhealthy meanwhile.
    pub(super) fn given_up(&mut self, over: Target) {
        let outcome = AttemptOutcome::Overtaken;
        over.fail_without_blame(outcome);
        self.0.push(Suspect { target: over, outcome, status: None });
    }

    /// Another backend answered well: those that failed at the same request are to blame.
    pub(super) fn blame(&mut self) {
        for suspect in std::mem::take(&mut self.0) {
            suspect.target.blame(suspect.outcome, None);
        }
    }
}
