//! What all requests of a key for a model have in common, made for the first of them.
//!
//! It belongs to one snapshot and goes with it, so nothing in it is ever out of date but the day.

use std::collections::HashMap;
use std::ptr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use weir_ratelimit::{Key, Scopes};

use super::entries::{KeyEntry, ModelEntry};
use super::scope::ScopeEntry;
use super::spend_period;
use crate::metrics::RequestSeries;

/// Uses that are kept in each part of the table. One takes some kilobytes where there are many limits; a part that is full
/// begins anew.
const PART_MAX: usize = 512;
/// Parts, so that requests seldom meet at the lock of one.
const PARTS: usize = 16;

/// A key's use of a model.
#[derive(Debug)]
pub struct ModelUse {
    /// The limits of its requests, those of budgets in their present period last.
    pub entries: Box<[ScopeEntry]>,
    /// The same, as the limiter takes them.
    pub scopes: Scopes,
    /// The record of what the tenant uses today.
    pub record: Key,
    /// The end of the day, in UTC, with which every period of a budget ends too.
    until: SystemTime,
    /// Where its requests are counted.
    pub series: RequestSeries,
}

/// The key and the model by their place in the snapshot, which holds both for as long as it lives.
type Pair = (usize, usize);

/// The uses that were asked for so far.
#[derive(Debug, Default)]
pub struct ModelUses([RwLock<HashMap<Pair, Arc<ModelUse>>>; PARTS]);

impl ModelUses {
    fn part(&self, pair: Pair) -> &RwLock<HashMap<Pair, Arc<ModelUse>>> {
        // Entries are on the heap: their lowest bits say little.
        &self.0[((pair.0 >> 6) ^ (pair.1 >> 6)) % PARTS]
    }
}

impl ModelUses {
    /// What requests of this key for this model have in common at `now`. `own` says under which limits they are. Both entries
    /// are of the snapshot that these uses belong to.
    pub(super) fn of<'a>(
        &self,
        key: &KeyEntry,
        model: &ModelEntry,
        own: impl FnOnce() -> Vec<&'a ScopeEntry>,
        now: SystemTime,
    ) -> Arc<ModelUse> {
        let pair = (ptr::from_ref(key).addr(), ptr::from_ref(model).addr());
        let part = self.part(pair);
        // Whole entries are put in, so a poisoned lock guards a table that is right.
        let known = part.read().unwrap_or_else(PoisonError::into_inner).get(&pair).cloned();
        if let Some(known) = known.filter(|known| now < known.until) {
            return known;
        }
        let made = Arc::new(ModelUse::new(key, model, &own(), now));
        let mut part = part.write().unwrap_or_else(PoisonError::into_inner);
        if part.len() >= PART_MAX && !part.contains_key(&pair) {
            part.clear();
        }
        part.insert(pair, made.clone());
        made
    }
}

impl ModelUse {
    fn new(key: &KeyEntry, model: &ModelEntry, own: &[&ScopeEntry], now: SystemTime) -> Self {
        let budgets = spend_period::scopes(own, now);
        let (day, until) = spend_period::today(now);
        let entries: Box<[ScopeEntry]> = own.iter().copied().cloned().chain(budgets).collect();
        let scopes = entries.iter().map(|entry| entry.limits.clone()).collect();
        let series = RequestSeries::of(key.tenant.name.clone(), model.name.clone());
        let record = Key::usage(key.tenant.name.as_str(), &day.to_string());
        Self { entries, scopes, record, until, series }
    }
}
