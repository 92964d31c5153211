//! One call: asks, and waits in a queue while it is refused.

use std::future::Future;

use super::policy::{GaveUp, QueuePolicy, Waited};
use super::queue::QueueId;
use super::shared::Waiting;
use super::wait::Wait;
use crate::model::call::{Acquire, Decision, Outcome};

impl Waiting {
    /// Asks, and waits in turn while the call is refused and `policy` allows it. `ask` must decide `call` as it
    /// stands at that time; what it returns beside the decision is passed on. It gets the queue whose head the call
    /// is, so that it can pass over alternatives that others wait for ([`Waiting::is_awaited`]). If all alternatives
    /// refuse, its decision must name the limits of the alternative to wait for, and no others.
    ///
    /// Cancel-safe: a dropped caller leaves its queue.
    ///
    /// # Errors
    /// Those of `ask`, at once.
    pub async fn acquire<T, E, F>(
        &self,
        call: &Acquire,
        policy: &QueuePolicy,
        mut ask: impl FnMut(Option<&QueueId>) -> F,
    ) -> Result<Waited<T>, E>
    where
        F: Future<Output = Result<(Decision, T), E>>,
    {
        let mut wait = Wait::new(self, call, policy);
        if let Err((refusal, reason)) = wait.line_up() {
            return Ok(wait.refused(refusal, None, reason));
        }
        let mut last = None;
        loop {
            if !wait.turn().await {
                let (decision, with) = match last {
                    Some((decision, with)) => (decision, Some(with)),
                    None => (wait.refusal_of_queue(), None),
                };
                return Ok(wait.refused(decision, with, GaveUp::Expired));
            }
            let seen = self.queues().releases();
            let (decision, with) = ask(wait.queue()).await?;
            if matches!(decision.outcome, Outcome::Granted { .. }) {
                return Ok(wait.granted(decision, with));
            }
            if let Err(reason) = wait.again(&decision, seen) {
                return Ok(wait.refused(decision, Some(with), reason));
            }
            last = Some((decision, with));
        }
    }
}
