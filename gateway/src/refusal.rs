//! Limits as clients see them: the refusal that explains itself, and the headers on every answer.

use std::time::Duration;

use http::HeaderMap;
use weir_ratelimit::{Cost, Decision, Kind, LimitState, Outcome, Verdict, What};

use crate::error::{GatewayError, Refusal};
use crate::headers::{self, LimitKind, ShownLimits};
use crate::snapshot::ScopeEntry;

/// The refusal of what can never fit: `least` is what the request asks for beyond any guess, and some enforced bucket
/// holds less.
pub fn never_fits(entries: &[&ScopeEntry], least: &Cost) -> Option<GatewayError> {
    let enforced = entries.iter().filter(|e| e.limits.mode == weir_ratelimit::Mode::Enforce);
    let (entry, kind, capacity) = enforced.flat_map(|e| buckets(e)).find(|(_, kind, capacity)| {
        // A request with any tokens does not fit a bucket of none, whatever was guessed.
        *kind != Kind::Requests && least.get(*kind).max(u64::from(*capacity == 0)) > *capacity
    })?;
    Some(GatewayError::Limited(Refusal {
        scope_kind: entry.kind,
        scope: entry.name.clone(),
        what: kind.name(),
        limit: capacity,
        remaining: 0,
        needs: least.get(kind),
        wait: None,
    }))
}

fn buckets(entry: &ScopeEntry) -> impl Iterator<Item = (&ScopeEntry, Kind, u64)> {
    Kind::ALL.into_iter().filter_map(move |kind| {
        let bucket = entry.limits.buckets[kind as usize]?;
        Some((entry, kind, bucket.capacity))
    })
}

/// The 429 for a decision that refused: it names the limit that keeps the caller waiting longest.
pub fn limited(decision: &Decision, entries: &[&ScopeEntry], cost: &Cost) -> GatewayError {
    let wait = match decision.outcome {
        Outcome::Limited { wait } => wait,
        _ => Some(Duration::ZERO),
    };
    let longest = |l: &&LimitState| match l.verdict {
        Verdict::Fits => (0, Duration::ZERO),
        Verdict::Wait(wait) => (1, wait),
        Verdict::Never => (2, Duration::MAX),
    };
    let enforced = decision.limits.iter().filter(|l| {
        l.verdict != Verdict::Fits
            && entries.get(l.scope).is_some_and(|e| e.limits.mode == weir_ratelimit::Mode::Enforce)
    });
    let worst = enforced.max_by_key(longest);
    let entry = worst.and_then(|l| entries.get(l.scope));
    GatewayError::Limited(Refusal {
        scope_kind: entry.map_or("global", |e| e.kind),
        scope: entry.map_or_else(String::new, |e| e.name.clone()),
        what: worst.map_or("requests", |l| kind_name(l.what)),
        limit: worst.map_or(0, |l| l.limit),
        remaining: worst.map_or(0, |l| l.remaining),
        needs: worst.map_or(1, |l| match l.what {
            What::Bucket(kind) => cost.get(kind),
            What::Concurrency => 1,
        }),
        wait,
    })
}

const fn kind_name(what: What) -> &'static str {
    match what {
        What::Bucket(kind) => kind.name(),
        What::Concurrency => "concurrency",
    }
}

/// What headers tell about.
pub fn shown(decision: &Decision) -> ShownLimits {
    let shown = decision.limits.iter().filter_map(|l| {
        let kind = match l.what {
            What::Bucket(Kind::Requests) => LimitKind::Requests,
            What::Bucket(Kind::Tokens | Kind::InputTokens | Kind::OutputTokens) => LimitKind::Tokens,
            What::Bucket(Kind::Spend) | What::Concurrency => return None,
        };
        Some(headers::LimitState { kind, limit: l.limit, remaining: l.remaining, reset: l.reset })
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
pub fn write_limits(headers: &mut HeaderMap, decision: &Decision) {
    headers::write_limits(headers, &shown(decision));
}
