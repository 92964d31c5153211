//! The results of requests that make probes needless.

use crate::routing::backend::BackendEntry;
use crate::routing::backend_state::Totals;

/// Results of requests, of all gateways or of this one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted {
    totals: Totals,
    /// Whether the results are of all gateways.
    fleet: bool,
}

impl Counted {
    pub(super) fn now(entry: &BackendEntry) -> Self {
        let fleet = entry.state.fleet_totals();
        Self { totals: fleet.unwrap_or_else(|| entry.state.totals()), fleet: fleet.is_some() }
    }

    /// The results since `before`; zero if `before` has another source or is of another control plane.
    pub(super) fn since(&self, before: Option<Self>) -> Totals {
        let (now, Some(Self { totals: old, .. })) = (self.totals, before.filter(|b| b.fleet == self.fleet))
        else {
            return Totals::default();
        };
        let since = |now: u64, old: u64| now.checked_sub(old);
        let all = || {
            Some(Totals {
                successes: since(now.successes, old.successes)?,
                failures: since(now.failures, old.failures)?,
                timed_answers: since(now.timed_answers, old.timed_answers)?,
                tokens: since(now.tokens, old.tokens)?,
                decode_us: since(now.decode_us, old.decode_us)?,
            })
        };
        all().unwrap_or_default()
    }
}
