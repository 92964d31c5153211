//! What requests came to, as far as it makes probes needless.

use crate::routing::backend::BackendEntry;
use crate::routing::backend_state::Totals;

/// What requests came to, and whose.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted {
    totals: Totals,
    /// Of the whole fleet; of this gateway alone otherwise.
    fleet: bool,
}

impl Counted {
    pub(super) fn now(entry: &BackendEntry) -> Self {
        let fleet = entry.state.fleet_totals();
        Self { totals: fleet.unwrap_or_else(|| entry.state.totals()), fleet: fleet.is_some() }
    }

    /// What came since `before`. Nothing, if that counted something else or another control plane counts.
    pub(super) fn since(&self, before: Option<Self>) -> Totals {
        let (now, Some(Self { totals: old, .. })) = (self.totals, before.filter(|b| b.fleet == self.fleet))
        else {
            return Totals::default();
        };
        let since = |now: u64, old: u64| now.checked_sub(old);
        let all = || {
            Some(Totals {
                good: since(now.good, old.good)?,
                bad: since(now.bad, old.bad)?,
                answers: since(now.answers, old.answers)?,
                tokens: since(now.tokens, old.tokens)?,
                decode_us: since(now.decode_us, old.decode_us)?,
            })
        };
        all().unwrap_or_default()
    }
}
