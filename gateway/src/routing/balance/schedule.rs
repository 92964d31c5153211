//! Orders of preference: smooth weighted round-robin, plain round-robin and weighted random order.
//!
//! Invariants of [`Scheduler`]:
//! - The lag of a backend counts picks, not weight: the picks it was due less the picks it got. So a lag stays valid when
//!   weights or members change.
//! - A lag is at most [`LAG_MAX`]: a backend that was full or unavailable does not get a burst afterwards.
//! - A new backend starts at a random phase of its cycle. Otherwise the first requests of all gateways would go to the
//!   same backend.

use std::collections::HashMap;
use std::hash::Hash;

use smallvec::SmallVec;

/// The largest lag in picks, in both directions.
const LAG_MAX: f64 = 2.0;

/// Indices of the entries, best first.
pub type Order = SmallVec<[usize; 8]>;

/// Smooth weighted round-robin.
#[derive(Debug)]
pub struct Scheduler<K> {
    lags: HashMap<K, f64>,
}

impl<K> Default for Scheduler<K> {
    fn default() -> Self {
        Self { lags: HashMap::new() }
    }
}

impl<K: Clone + Eq + Hash> Scheduler<K> {
    /// Returns all `entries` in order of preference. The first one is picked and charged.
    ///
    /// The others follow by descending lag, entries without weight last. `phase` returns random numbers of `[0, 1)` and is
    /// called once per new backend. If another entry than the first is used, call [`Self::reassign`].
    pub fn order(&mut self, entries: &[(K, f64)], mut phase: impl FnMut() -> f64) -> Order {
        let total: f64 = entries.iter().map(|(_, weight)| usable(*weight)).sum();
        let mut ranked: SmallVec<[(f64, usize); 8]> = SmallVec::with_capacity(entries.len());
        for (index, (key, weight)) in entries.iter().enumerate() {
            // Without any weight all entries count the same, because the scheduler does not refuse requests.
            let share = if total > 0.0 { usable(*weight) / total } else { 1.0 / entries.len() as f64 };
            let lag = match self.lags.get_mut(key) {
                Some(lag) => lag,
                None => self.lags.entry(key.clone()).or_insert_with(|| phase() - 1.0),
            };
            *lag = (*lag + share).clamp(-LAG_MAX, LAG_MAX);
            ranked.push((if share > 0.0 { *lag } else { f64::NEG_INFINITY }, index));
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        if let Some(&(_, first)) = ranked.first() {
            self.charge(&entries[first].0, 1.0);
        }
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    /// Charges `used` instead of `picked`, which had no free slot.
    pub fn reassign(&mut self, picked: &K, used: &K) {
        self.charge(picked, -1.0);
        self.charge(used, 1.0);
    }

    /// Removes deleted backends. A backend that is only unused at the moment should be kept.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        self.lags.retain(|key, _| keep(key));
    }

    fn charge(&mut self, key: &K, picks: f64) {
        if let Some(lag) = self.lags.get_mut(key) {
            *lag -= picks;
        }
    }
}

/// A weighted random order: each position is drawn from the remaining entries, in proportion to their weights.
///
/// `uniform` returns random numbers of `[0, 1)`.
pub(super) fn random(weights: impl IntoIterator<Item = f64>, mut uniform: impl FnMut() -> f64) -> Order {
    // Efraimidis and Spirakis: the order of exponential arrival times with the weights as rates.
    let mut arrivals: SmallVec<[(f64, usize); 8]> = weights
        .into_iter()
        .enumerate()
        .map(|(index, weight)| (arrival(usable(weight), uniform()), index))
        .collect();
    arrivals.sort_by(|a, b| a.0.total_cmp(&b.0));
    arrivals.into_iter().map(|(_, index)| index).collect()
}

/// Plain round-robin over `len` entries; `cursor` is the caller's count of picks.
pub(super) fn round_robin(len: usize, cursor: u64) -> Order {
    let start = cursor.checked_rem(len as u64).unwrap_or(0) as usize;
    (start..len).chain(0..start).collect()
}

/// The arrival time of a weight; infinite for a weight of zero.
fn arrival(weight: f64, uniform: f64) -> f64 {
    if weight > 0.0 { -(1.0 - uniform).ln() / weight } else { f64::INFINITY }
}

fn usable(weight: f64) -> f64 {
    if weight.is_finite() { weight.max(0.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small generator, so that tests are the same each time.
    fn uniform(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    fn picks(scheduler: &mut Scheduler<u32>, entries: &[(u32, f64)], n: usize, seed: u64) -> Vec<u32> {
        let mut phase = uniform(seed);
        (0..n).map(|_| entries[scheduler.order(entries, &mut phase)[0]].0).collect()
    }

    fn share(picks: &[u32], key: u32) -> f64 {
        picks.iter().filter(|&&pick| pick == key).count() as f64 / picks.len() as f64
    }

    #[test]
    fn shares_follow_weights() {
        let entries = [(1, 100.0), (2, 80.0), (3, 70.0), (4, 0.0)];
        let picks = picks(&mut Scheduler::default(), &entries, 25_000, 1);
        for (key, weight) in entries {
            assert!((share(&picks, key) - weight / 250.0).abs() < 0.0005, "{key}");
        }
        assert!(picks.windows(3).all(|run| run[0] != run[1] || run[1] != run[2]), "smooth: no run of three");
    }

    #[test]
    fn one_percent_stays_one_percent_under_constant_rebuilds() {
        let mut scheduler = Scheduler::default();
        let mut all = Vec::new();
        for round in 0..2000u64 {
            let scale = 1.0 + (round % 7) as f64;
            let mut entries = vec![(1, 99.0 * scale), (2, scale)];
            if round % 2 == 0 {
                entries.reverse();
            }
            scheduler.retain(|_| true);
            all.extend(picks(&mut scheduler, &entries, 50, round));
        }
        let rare = share(&all, 2);
        assert!((rare - 0.01).abs() < 0.001, "{rare}");
    }

    #[test]
    fn one_percent_survives_coming_and_going() {
        let mut scheduler = Scheduler::default();
        let mut with = Vec::new();
        for round in 0..4000u64 {
            with.extend(picks(&mut scheduler, &[(1, 99.0), (2, 1.0)], 25, round));
            picks(&mut scheduler, &[(1, 99.0)], 10, round);
            if round % 2 == 0 {
                // Removed and added again: the random phase neither favours nor starves the backend.
                scheduler.retain(|key| *key != 2);
            }
        }
        let rare = share(&with, 2);
        assert!((rare - 0.01).abs() < 0.001, "{rare}");
    }

    #[test]
    fn a_backend_that_was_full_returns_without_a_burst() {
        let mut scheduler = Scheduler::default();
        let entries = [(1, 1.0), (2, 1.0)];
        for _ in 0..1000 {
            let order = scheduler.order(&entries, || 0.5);
            if entries[order[0]].0 == 1 {
                scheduler.reassign(&1, &2);
            }
        }
        let after = picks(&mut scheduler, &entries, 100, 1);
        assert!(share(&after, 1) < 0.56, "{after:?}");
    }

    #[test]
    fn first_picks_of_many_gateways_spread() {
        let entries: Vec<(u32, f64)> = (0..4).map(|key| (key, 1.0)).collect();
        let firsts: Vec<u32> =
            (0..1000).map(|seed| picks(&mut Scheduler::default(), &entries, 1, seed + 1)[0]).collect();
        let chi: f64 = (0..4).map(|key| (share(&firsts, key) * 1000.0 - 250.0).powi(2) / 250.0).sum();
        assert!(chi < 16.27, "chi-square {chi} with 3 degrees of freedom, p = 0.001");
    }

    #[test]
    fn every_entry_is_in_the_order_once() {
        let mut scheduler = Scheduler::default();
        let entries = [(1, f64::NAN), (2, -3.0), (3, 1.0), (4, f64::INFINITY)];
        let mut order = scheduler.order(&entries, || 0.0);
        assert_eq!(order[0], 2);
        order.sort_unstable();
        assert_eq!(order.as_slice(), [0, 1, 2, 3]);
        assert_eq!(scheduler.order(&[(1, 0.0), (2, 0.0)], || 0.0).len(), 2);
        assert!(scheduler.order(&[], || 0.0).is_empty());
    }

    #[test]
    fn baselines_order_everything() {
        assert_eq!(round_robin(3, 4).as_slice(), [1, 2, 0]);
        assert!(round_robin(0, 4).is_empty());
        let mut chance = uniform(7);
        let firsts: Vec<u32> = (0..20_000).map(|_| random([3.0, 1.0, 0.0], &mut chance)[0] as u32).collect();
        assert!((share(&firsts, 0) - 0.75).abs() < 0.015);
        assert!(share(&firsts, 2) < f64::EPSILON);
    }
}
