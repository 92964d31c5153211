//! What became of each limit in a run.

use super::driver::{End, Record};
use super::event::Bound;
use super::limits::{GATEWAYS, Limit, Scope};
use super::oracle::{Span, crowd_refused_wrongly};
use crate::load::micros;

/// What a refusal may be off by: the stated slack of one unit per bucket, and for tokens what the estimate of one
/// request may differ.
pub(crate) const SLACK_REQUESTS: u64 = 1;
pub(crate) const SLACK_TOKENS: u64 = 80;
/// A slot is free for others this long after its stream ended; a refusal within it is not held against the limiter.
const RELEASE_LAG_US: u64 = 300_000;

/// When the store was away, microseconds since the load began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outage {
    /// When it went.
    pub(crate) began_us: u64,
    /// When it served again.
    pub(crate) back_us: u64,
    /// When the last gateway decided alone for the last time.
    pub(crate) over_us: u64,
}

/// A run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    /// What the clients saw.
    pub(crate) records: &'a [Record],
    /// When the store was away, and what that allows.
    pub(crate) outage: Option<(Outage, Bound)>,
    /// When the data set was born that every meter counts as full in.
    pub(crate) full_at_us: Option<u64>,
    /// How long leases of the dead stand.
    pub(crate) lease_us: u64,
}

/// What became of a limit.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) admitted: u64,
    /// By the envelope, and the bound of the outage.
    pub(crate) allowed: u64,
    /// The worst of all windows against the envelope alone.
    pub(crate) beyond_envelope: u64,
    /// The same against what is allowed.
    pub(crate) over_admission: u64,
    pub(crate) refused: u64,
    /// While the store served.
    pub(crate) false_refusals: u64,
}

impl Run<'_> {
    fn end_us(&self) -> u64 {
        self.records.iter().map(|r| r.decided.until_us).max().unwrap_or(0)
    }

    /// Whether a request may have been decided without the store.
    fn alone(&self, record: &Record) -> bool {
        self.outage.is_some_and(|(outage, _)| {
            record.decided.from_us <= outage.over_us && record.decided.until_us >= outage.began_us
        })
    }

    /// What the outage allows of this limit.
    fn extra(&self, limit: &Limit) -> u64 {
        let Some((outage, bound)) = self.outage else { return 0 };
        let since = outage.began_us.saturating_sub(micros(bound.unreplicated));
        let unreplicated = self.records.iter().filter(|r| {
            limit.covers(r)
                && r.end == End::Answered
                && r.decided.until_us >= since
                && r.decided.from_us <= outage.began_us
        });
        let unreplicated: u64 =
            if bound.unreplicated.is_zero() { 0 } else { unreplicated.map(|r| limit.cost(r)).sum() };
        let others = GATEWAYS as u64 - 1;
        match limit.envelope() {
            Some(envelope) => {
                let burst = if bound.burst { envelope.capacity } else { 0 };
                burst + unreplicated
            }
            // What is held goes on, and who holds none has its share beside it: how many are taken gateways are not told.
            None if matches!(limit.scope, Scope::Backend(_)) => {
                others * (limit.most / GATEWAYS as u64).max(1)
            }
            None => unreplicated,
        }
    }

    /// Judges a limit over requests or tokens.
    pub(crate) fn bucket(&self, limit: &Limit) -> Found {
        let Some(envelope) = limit.envelope() else { return Found::default() };
        let extra = self.extra(limit);
        let under = |r: &&Record| limit.covers(r);
        let costs = |r: &Record| (r.decided, limit.cost(r));
        let admitted: Vec<(Span, u64)> =
            self.records.iter().filter(under).filter(|r| r.end == End::Answered).map(costs).collect();
        // Refused by a limit, a request was certainly not charged; in any other case it may have been.
        let charged = self.records.iter().filter(under).filter(|r| !r.end.is_refusal());
        let mut maybe: Vec<(Span, u64)> = charged.map(costs).collect();
        maybe.extend(self.full_at_us.map(|at| (Span { from_us: at, until_us: at }, envelope.capacity)));
        let refused: Vec<&Record> = self.records.iter().filter(|r| limit.refused(r)).collect();
        let slack = if limit.counts_tokens() { SLACK_TOKENS } else { SLACK_REQUESTS };
        let wrong = |r: &&&Record| {
            !self.alone(r) && envelope.refused_wrongly(r.decided, limit.cost(r), slack, &maybe)
        };
        let beyond_envelope = envelope.over_admission(&admitted);
        Found {
            admitted: admitted.iter().map(|(_, cost)| cost).sum(),
            allowed: envelope.allowed(self.end_us()) + extra,
            beyond_envelope,
            over_admission: beyond_envelope.saturating_sub(extra),
            refused: refused.len() as u64,
            false_refusals: refused.iter().filter(wrong).count() as u64,
        }
    }

    /// Judges a limit over requests in flight, of which its server saw so many at most.
    pub(crate) fn crowd(&self, limit: &Limit, most: u64) -> Found {
        let extra = self.extra(limit);
        let in_flight: Vec<Span> = self
            .records
            .iter()
            .filter(|r| limit.covers(r) && !r.end.is_refusal())
            .map(|r| {
                // What a dead gateway held stands until its leases run out.
                let held = if r.end == End::Unknown { self.lease_us } else { RELEASE_LAG_US };
                Span { from_us: r.decided.from_us, until_us: r.ended_us + held }
            })
            .collect();
        let refused: Vec<&Record> = self.records.iter().filter(|r| limit.refused(r)).collect();
        let wrong = |r: &&&Record| !self.alone(r) && crowd_refused_wrongly(r.decided, limit.most, &in_flight);
        Found {
            admitted: most,
            allowed: limit.most + extra,
            beyond_envelope: most.saturating_sub(limit.most),
            over_admission: most.saturating_sub(limit.most + extra),
            refused: refused.len() as u64,
            false_refusals: refused.iter().filter(wrong).count() as u64,
        }
    }
}
