//! The verdict on each limit of a run.

use super::driver::{End, Record};
use super::event::Bound;
use super::limits::{GATEWAYS, Limit, Scope};
use super::oracle::{Span, crowd_refused_wrongly};
use crate::load::micros;

/// The allowed error of a refusal: the stated slack of one unit per bucket, and for tokens the possible error of one
/// estimate.
pub(crate) const SLACK_REQUESTS: u64 = 1;
pub(crate) const SLACK_TOKENS: u64 = 80;
/// A slot is free for others this long after its stream ended. A refusal within this time does not count against the
/// limiter.
const RELEASE_LAG_US: u64 = 300_000;

/// The time of the store outage, microseconds since the start of the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outage {
    /// Its start.
    pub(crate) began_us: u64,
    /// When the store served again.
    pub(crate) back_us: u64,
    /// The last decision of a gateway without the store.
    pub(crate) over_us: u64,
}

/// The data of one run.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    /// The records of the clients.
    pub(crate) records: &'a [Record],
    /// The store outage, and the excess that it allows.
    pub(crate) outage: Option<(Outage, Bound)>,
    /// The creation of the data set at which missing buckets count as full.
    pub(crate) full_at_us: Option<u64>,
    /// The life of leases of dead gateways.
    pub(crate) lease_us: u64,
}

/// The result for one limit.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) admitted: u64,
    /// Compared with the envelope, and with the bound of the outage.
    pub(crate) allowed: u64,
    /// The worst window compared with the envelope alone.
    pub(crate) beyond_envelope: u64,
    /// The worst window compared with what is allowed.
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

    /// The excess of this limit that the outage allows.
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
            // Running requests continue, and a gateway without any adds its share. Gateways do not know how many
            // slots others hold.
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
        // A request that a limit refused was certainly not charged; any other one may have been.
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

    /// Judges a limit of requests in flight by the maximum that its server saw.
    pub(crate) fn crowd(&self, limit: &Limit, most: u64) -> Found {
        let extra = self.extra(limit);
        let in_flight: Vec<Span> = self
            .records
            .iter()
            .filter(|r| limit.covers(r) && !r.end.is_refusal())
            .map(|r| {
                // The leases of a dead gateway stand until they expire.
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
