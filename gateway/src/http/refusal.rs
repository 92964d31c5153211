//! Limits as clients see them: the refusal that explains itself, and the headers on every answer.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use weir_ratelimit::{Cost, Decision, Kind, Outcome, ScopeLimits, Verdict, What};

use crate::error::{GatewayError, Refusal};
use crate::http::headers::{self, LimitKind, ShownLimits};
use crate::limits::account_groups::CandidateGroups;
use crate::routing::accounts::Accounts;
use crate::routing::balance::Candidate;
use crate::routing::declared::{DeclaredLimit, declared, declared_as};
use crate::routing::scope::{ScopeEntry, ScopeKind};

/// The refusal of what can never fit: `least` is what the request asks for beyond any guess, and some enforced bucket
/// holds less. A bucket of nothing fits nothing, whatever was guessed.
pub fn never_fits(entries: &[&ScopeEntry], reserved: &Cost, least: &Cost) -> Option<GatewayError> {
    let enforced = entries.iter().filter(|e| e.limits.mode == weir_ratelimit::Mode::Enforce);
    let (entry, kind, capacity) = enforced.flat_map(|e| buckets(e)).find(|(_, kind, capacity)| {
        let needs = if *capacity == 0 { reserved.get(*kind) } else { least.get(*kind) };
        *kind != Kind::Requests && needs > *capacity
    })?;
    Some(GatewayError::Limited(Refusal {
        scope_kind: entry.kind,
        scope: entry.name.clone(),
        what: What::Bucket(kind),
        limit: declared_as(entry, What::Bucket(kind), capacity),
        remaining: 0,
        needs: least.get(kind),
        wait: None,
    }))
}

/// The backends by account, without accounts that could never take the request.
///
/// # Errors
/// The refusal of the first account when none is left.
pub(crate) fn usable_accounts(
    accounts: &Accounts,
    candidates: &[Candidate],
    own: usize,
    reserved: &Cost,
    least: &Cost,
) -> Result<CandidateGroups, GatewayError> {
    let never = |account: usize| {
        let entries: Vec<&ScopeEntry> = accounts[account].scopes.iter().collect();
        never_fits(&entries, reserved, least)
    };
    let groups = CandidateGroups::of(accounts, candidates, own, |account| never(account).is_none());
    if !groups.is_empty() {
        return Ok(groups);
    }
    let refusal = candidates.iter().find_map(|candidate| never(accounts.of(candidate.index)?));
    Err(refusal.unwrap_or(GatewayError::NoBackend { retry_after: None }))
}

fn buckets(entry: &ScopeEntry) -> impl Iterator<Item = (&ScopeEntry, Kind, u64)> {
    Kind::ALL.into_iter().filter_map(move |kind| {
        let bucket = entry.limits.buckets[kind as usize]?;
        Some((entry, kind, bucket.capacity))
    })
}

/// The refusal for a decision that refused: it names the limit that keeps the caller waiting longest. `next_free` says
/// when one of so many leases is likely free; how long a lease lives says little about that.
pub fn limited(
    decision: &Decision,
    entries: &[&ScopeEntry],
    cost: &Cost,
    now: SystemTime,
    next_free: impl Fn(u64) -> Duration,
) -> GatewayError {
    let refusing = decision.limits.iter().filter_map(|l| {
        let entry = entries
            .iter()
            .find(|e| e.limits.record == l.scope)
            .filter(|e| e.limits.mode == weir_ratelimit::Mode::Enforce)?;
        let needs = match l.what {
            What::Bucket(kind) => cost.get(kind),
            What::Concurrency => 1,
        };
        let wait = match l.verdict {
            Verdict::Fits => return None,
            Verdict::Wait(wait) if l.what == What::Concurrency => Some(wait.min(next_free(l.limit))),
            Verdict::Wait(wait) => Some(wait),
            // A budget does not drain, it begins anew.
            Verdict::Never => entry.renews.and_then(|at| at.duration_since(now).ok()).filter(|_| l.limit > 0),
        };
        Some((l, *entry, needs, wait))
    });
    let worst = refusing.max_by_key(|(.., wait)| wait.unwrap_or(Duration::MAX));
    let outcome = match decision.outcome {
        Outcome::Limited { wait } => wait,
        _ => Some(Duration::ZERO),
    };
    let Some((limit, entry, needs, wait)) = worst else {
        let scope = String::new();
        return GatewayError::Limited(Refusal {
            scope_kind: ScopeKind::Global,
            scope,
            what: What::Bucket(Kind::Requests),
            limit: DeclaredLimit { amount: 0, period: None, burst: 0 },
            remaining: 0,
            needs: 1,
            wait: outcome,
        });
    };
    GatewayError::Limited(Refusal {
        scope_kind: entry.kind,
        scope: entry.name.clone(),
        what: limit.what,
        limit: declared(entry, limit),
        remaining: limit.remaining,
        needs,
        wait,
    })
}

/// What headers tell about the limits of a call under these scopes.
pub fn shown(decision: &Decision, scopes: &[ScopeLimits]) -> ShownLimits {
    let shown = decision.limits.iter().filter_map(|l| {
        let What::Bucket(counts) = l.what else { return None };
        let kind = match counts {
            Kind::Requests => LimitKind::Requests,
            Kind::Tokens | Kind::InputTokens | Kind::OutputTokens => LimitKind::Tokens,
            Kind::Spend => return None,
        };
        let bucket = l.scope_in(scopes).and_then(|scope| scope.buckets[counts as usize]);
        Some(headers::ShownLimit {
            kind,
            limit: bucket.map_or(l.limit, |bucket| bucket.rate),
            burst: l.limit,
            remaining: l.remaining,
            reset: l.reset,
        })
    });
    shown.collect()
}

/// The limits as they will stand once what was reserved has been settled with what was used.
pub fn settled(decision: &mut Decision, reserved: &Cost, actual: &Cost) {
    for limit in &mut decision.limits {
        let What::Bucket(kind) = limit.what else { continue };
        // A bucket reserved no more than it holds.
        let (reserved, actual) = (reserved.get(kind).min(limit.limit), actual.get(kind));
        let remaining = limit.remaining.saturating_add(reserved).saturating_sub(actual);
        limit.remaining = remaining.min(limit.limit);
    }
}

/// OpenAI's `x-ratelimit-*` headers, of the tightest limit of each kind.
pub fn write_limits(headers: &mut HeaderMap, decision: &Decision, scopes: &[ScopeLimits]) {
    headers::write_limits(headers, &shown(decision, scopes));
}
