//! Reports to the store: grants, charges and usage records, and the part of them that the store knows already.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Grant, HELD_LIFE, Local, RECORDS_MAX, UnreportedUsage};
use crate::layers::fallback::local_share::{self, Sharing};
use crate::model::call::Settle;
use crate::model::cost::Cost;
use crate::model::id::ReservationId;
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::{BucketState, Terms};
use crate::model::limits::{ScopeLimits, Scopes};
use crate::model::usage::Usage;

/// The smallest reported charge, as a fraction of a unit.
const PARTS: f64 = 1000.0;

impl Local {
    /// The local grants that the store does not know yet.
    pub(in crate::layers::fallback) fn unadopted(&self) -> Vec<(ReservationId, Grant)> {
        let known = self.grants.iter().filter(|(_, grant)| !grant.asking);
        known.map(|(id, grant)| (*id, grant.clone())).collect()
    }

    /// Records that the store has taken over a grant and charged it.
    pub(in crate::layers::fallback) fn adopted(
        &mut self,
        id: ReservationId,
        leases: &[Key],
        sharing: Sharing,
        now: f64,
    ) {
        let Some(grant) = self.grants.remove(&id) else { return };
        for (record, amounts) in grant.charged {
            let Some(base) = self.records.get_mut(&record) else { continue };
            for kind in Kind::ALL {
                let Some(bucket) = base.full.buckets[kind as usize] else { continue };
                let terms = Terms::of(kind, &local_share::bucket(&bucket, sharing.gateways));
                let level = base.known[kind as usize].level_at(&terms, now) + amounts[kind as usize];
                base.known[kind as usize] = BucketState { level, ts: now };
            }
        }
        // The lease is kept, like every lease of the store during an outage. The store may have granted another slot
        // than the local one.
        if let Some(slot) = grant.slot {
            self.limiter.free(id, std::slice::from_ref(&slot));
        }
        self.limiter.hold(id, leases, HELD_LIFE);
    }

    /// The charge of each record: the part of its bucket state that the store does not know and that no open grant
    /// will bring. A charge that is asked for again keeps its id until [`Local::charged`].
    pub(in crate::layers::fallback) fn charges(&mut self, sharing: Sharing, now: f64) -> Vec<Settle> {
        let mut open: HashMap<&Key, [f64; Kind::COUNT]> = HashMap::new();
        for (record, amounts) in self.grants.values().flat_map(|grant| &grant.charged) {
            let sum = open.entry(record).or_default();
            (0..Kind::COUNT).for_each(|k| sum[k] += amounts[k]);
        }
        let mut charges = Vec::new();
        for (record, base) in &mut self.records {
            if let Some(charge) = &base.charge {
                charges.push(charge.clone());
                continue;
            }
            let bucket_states = self.limiter.bucket_states(record);
            let mut cost = Cost::default();
            for kind in Kind::ALL {
                let Some(bucket) = base.full.buckets[kind as usize] else { continue };
                let terms = Terms::of(kind, &local_share::bucket(&bucket, sharing.gateways));
                let known = base.known[kind as usize].level_at(&terms, now);
                let level = bucket_states[kind as usize].level_at(&terms, now);
                let waits = open.get(record).map_or(0.0, |sum| sum[kind as usize]);
                // Fractions of a unit are reported too. Rounded down they would be admitted once more; rounded up,
                // five times a second, they would grow to units that nobody used. Rounding errors of the bucket
                // states are too small to report.
                let owed = (level - known - waits).floor();
                if owed >= (terms.unit / PARTS).max(1.0) {
                    cost.set_amount(kind, owed);
                    base.known[kind as usize] = BucketState { level: known + owed, ts: now };
                }
            }
            if cost == Cost::default() {
                continue;
            }
            let scope = ScopeLimits { concurrency: None, ..base.full.clone() };
            let id = ReservationId::now_v7();
            let charge = Settle { id, actual: cost, scopes: [scope].into(), slot: None, usage: None };
            base.charge = Some(charge.clone());
            charges.push(charge);
        }
        charges
    }

    /// Records that a charge is done, or can never be made.
    pub(in crate::layers::fallback) fn charged(&mut self, charge: &Settle) {
        let record = charge.scopes.first().map(|scope| &scope.record);
        if let Some(base) = record.and_then(|record| self.records.get_mut(record)) {
            base.charge = None;
        }
    }

    /// Records usage that ended locally. Returns false without room for another line.
    pub(in crate::layers::fallback) fn note_usage(&mut self, usage: &Usage) -> bool {
        let line = (usage.record.clone(), usage.model.clone());
        if self.usage.len() >= RECORDS_MAX && !self.usage.contains_key(&line) {
            return false;
        }
        let noted = self.usage.entry(line).or_default();
        noted.tally = noted.tally.plus(usage.tally);
        true
    }

    /// The usage that the store lacks, one call per line. A call that is asked for again keeps its id until
    /// [`Local::noted`].
    pub(in crate::layers::fallback) fn usage_notes(&mut self) -> Vec<Settle> {
        let note = |((record, model), noted): (&(Key, Arc<str>), &mut UnreportedUsage)| {
            let note = noted.reporting.get_or_insert_with(|| Settle {
                id: ReservationId::now_v7(),
                actual: Cost::default(),
                scopes: Scopes::new(),
                slot: None,
                usage: Some(Usage {
                    record: record.clone(),
                    model: model.clone(),
                    tally: std::mem::take(&mut noted.tally),
                }),
            });
            note.clone()
        };
        self.usage.iter_mut().map(note).collect()
    }

    /// Records that usage is reported, or can never be.
    pub(in crate::layers::fallback) fn noted(&mut self, note: &Settle) {
        let Some(usage) = &note.usage else { return };
        let line = (usage.record.clone(), usage.model.clone());
        if let Some(noted) = self.usage.get_mut(&line) {
            noted.reporting = None;
            if noted.tally.is_zero() {
                self.usage.remove(&line);
            }
        }
    }
}
