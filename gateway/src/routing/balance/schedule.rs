//! Orders of preference: smooth weighted round-robin, plain round-robin and weighted random order.
//!
//! Invariants of [`Scheduler`]:
//! - The lag of a backend counts picks, not weight: the picks it was due less the picks it got. So a lag stays valid when
//!   weights or members change.
//! - A lag is at most [`LAG_MAX`]: a backend that was full or unavailable does not get a burst afterwards.
//! - Whoever wants only the first few ([`Scheduler::first`]) gets those of the whole order, pick for pick.
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
    /// Where the lag of each backend is.
    positions: HashMap<K, usize>,
    lags: Vec<f64>,
    /// Positions of deleted backends.
    vacant: Vec<usize>,
    /// Rises when a position may be another backend's.
    generation: u64,
}

impl<K> Default for Scheduler<K> {
    fn default() -> Self {
        Self { positions: HashMap::new(), lags: Vec::new(), vacant: Vec::new(), generation: 0 }
    }
}

/// The entries of many picks: looked up once, so that a pick is a pass over two arrays.
#[derive(Debug, Default)]
pub(super) struct Entries {
    positions: Vec<usize>,
    shares: Vec<f64>,
    generation: u64,
}

impl<K: Clone + Eq + Hash> Scheduler<K> {
    /// Returns all `entries` in order of preference. The first one is picked and charged.
    ///
    /// The others follow by descending lag, entries without weight last. `phase` returns random numbers of `[0, 1)` and is
    /// called once per new backend. If another entry than the first is used, call [`Self::reassign`].
    pub fn order(&mut self, entries: &[(K, f64)], mut phase: impl FnMut() -> f64) -> Order {
        let share = shares(entries);
        let mut ranked: SmallVec<[(f64, usize); 8]> = SmallVec::with_capacity(entries.len());
        for (index, (key, weight)) in entries.iter().enumerate() {
            let (position, share) = (self.position(key, &mut phase), share(*weight));
            ranked.push((self.advance(position, share), index));
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        if let Some(&(_, first)) = ranked.first() {
            self.charge(&entries[first].0, 1.0);
        }
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    /// All `entries` as [`Self::order`] would return them, without a pick.
    pub(super) fn peek(&self, entries: &[(K, f64)]) -> Order {
        let share = shares(entries);
        let lag = |key| self.positions.get(key).map_or(0.0, |position| self.lags[*position]);
        let mut ranked: SmallVec<[(f64, usize); 8]> = SmallVec::with_capacity(entries.len());
        for (index, (key, weight)) in entries.iter().enumerate() {
            let share = share(*weight);
            ranked.push((if share > 0.0 { lag(key) + share } else { f64::NEG_INFINITY }, index));
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    /// Looks up `entries` for [`Self::first`].
    pub(super) fn prepare(
        &mut self,
        entries: &[(K, f64)],
        prepared: &mut Entries,
        mut phase: impl FnMut() -> f64,
    ) {
        let share = shares(entries);
        prepared.positions.clear();
        prepared.positions.extend(entries.iter().map(|(key, _)| self.position(key, &mut phase)));
        prepared.shares.clear();
        prepared.shares.extend(entries.iter().map(|(_, weight)| share(*weight)));
        prepared.generation = self.generation;
    }

    /// The first `most` of what [`Self::order`] returns. `None` if a backend was deleted since `entries` were prepared.
    pub(super) fn first(&mut self, entries: &Entries, most: usize) -> Option<Order> {
        if entries.generation != self.generation {
            return None;
        }
        let mut top = Top::of(most);
        for (index, (&position, &share)) in entries.positions.iter().zip(&entries.shares).enumerate() {
            top.offer(self.advance(position, share), index);
        }
        let order = top.into_order();
        if let Some(&first) = order.first() {
            self.lags[entries.positions[first]] -= 1.0;
        }
        Some(order)
    }

    /// Charges `used` instead of `picked`, which had no free slot.
    pub fn reassign(&mut self, picked: &K, used: &K) {
        self.charge(picked, -1.0);
        self.charge(used, 1.0);
    }

    /// Removes deleted backends. A backend that is only unused at the moment should be kept.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        let before = self.vacant.len();
        let (positions, vacant) = (&mut self.positions, &mut self.vacant);
        positions.retain(|key, position| {
            let kept = keep(key);
            if !kept {
                vacant.push(*position);
            }
            kept
        });
        self.generation += u64::from(self.vacant.len() > before);
    }

    /// What the backend is due with this pick, by which it is ranked.
    fn advance(&mut self, position: usize, share: f64) -> f64 {
        let lag = &mut self.lags[position];
        *lag = (*lag + share).clamp(-LAG_MAX, LAG_MAX);
        if share > 0.0 { *lag } else { f64::NEG_INFINITY }
    }

    fn position(&mut self, key: &K, mut phase: impl FnMut() -> f64) -> usize {
        if let Some(position) = self.positions.get(key) {
            return *position;
        }
        let lag = phase() - 1.0;
        let position = self.vacant.pop().unwrap_or(self.lags.len());
        if position == self.lags.len() {
            self.lags.push(lag);
        } else {
            self.lags[position] = lag;
        }
        self.positions.insert(key.clone(), position);
        position
    }

    fn charge(&mut self, key: &K, picks: f64) {
        if let Some(position) = self.positions.get(key) {
            self.lags[*position] -= picks;
        }
    }
}

/// The share of each weight. Without any weight all entries count the same, because the scheduler does not refuse requests.
fn shares<K>(entries: &[(K, f64)]) -> impl Fn(f64) -> f64 + use<K> {
    let total: f64 = entries.iter().map(|(_, weight)| usable(*weight)).sum();
    let even = 1.0 / entries.len() as f64;
    move |weight| if total > 0.0 { usable(weight) / total } else { even }
}

/// The highest scores of many, best first; of equal ones the first.
#[derive(Debug)]
pub(super) struct Top {
    most: usize,
    kept: SmallVec<[(f64, usize); 8]>,
}

impl Top {
    /// Keeps so many.
    pub(super) fn of(most: usize) -> Self {
        Self { most, kept: SmallVec::with_capacity(most) }
    }

    /// The lowest score that is kept, once there are enough: a score must exceed it.
    pub(super) fn least(&self) -> Option<f64> {
        self.kept.last().filter(|_| self.kept.len() == self.most).map(|(score, _)| *score)
    }

    /// Keeps the score if it is among the highest.
    pub(super) fn offer(&mut self, score: f64, index: usize) {
        if self.most == 0 || self.least().is_some_and(|least| score.total_cmp(&least).is_le()) {
            return;
        }
        if self.kept.len() == self.most {
            self.kept.pop();
        }
        let at = self.kept.partition_point(|(kept, _)| kept.total_cmp(&score).is_ge());
        self.kept.insert(at, (score, index));
    }

    /// Their indices.
    pub(super) fn into_order(self) -> Order {
        self.kept.into_iter().map(|(_, index)| index).collect()
    }
}

/// Weights from which a few are drawn without a pass over all of them.
#[derive(Debug, Default)]
pub(super) struct Urn {
    /// The sum of the weights up to each.
    sums: Vec<f64>,
}

impl Urn {
    /// Replaces the weights.
    pub(super) fn refill(&mut self, weights: impl IntoIterator<Item = f64>) {
        self.sums.clear();
        let mut sum = 0.0;
        self.sums.extend(weights.into_iter().map(|weight| {
            sum += usable(weight);
            sum
        }));
    }

    /// The first `most` of a weighted random order, as [`random`] returns it.
    pub(super) fn draw(&self, most: usize, mut uniform: impl FnMut() -> f64) -> Order {
        let (mut order, all) = (Order::new(), self.sums.last().copied().unwrap_or(0.0));
        let most = most.min(self.sums.len());
        // To draw again what is out of the urn is to draw from the rest, unless almost nothing is left there.
        for _ in 0..4 * most {
            if order.len() == most || all <= 0.0 {
                break;
            }
            let point = uniform() * all;
            let index = self.sums.partition_point(|sum| *sum <= point);
            if index < self.sums.len() && !order.contains(&index) {
                order.push(index);
            }
        }
        if order.len() < most {
            let left: SmallVec<[usize; 8]> = (0..self.sums.len()).filter(|i| !order.contains(i)).collect();
            let drawn = random(left.iter().map(|index| self.weight(*index)), uniform);
            let missing = most - order.len();
            order.extend(drawn.into_iter().take(missing).map(|at| left[at]));
        }
        order
    }

    fn weight(&self, index: usize) -> f64 {
        self.sums[index] - index.checked_sub(1).map_or(0.0, |before| self.sums[before])
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
pub(super) fn round_robin(len: usize, cursor: u64) -> impl Iterator<Item = usize> {
    let start = cursor.checked_rem(len as u64).unwrap_or(0) as usize;
    (start..len).chain(0..start)
}

/// The arrival time of a weight; infinite for a weight of zero.
fn arrival(weight: f64, uniform: f64) -> f64 {
    if weight > 0.0 { -(1.0 - uniform).ln() / weight } else { f64::INFINITY }
}

fn usable(weight: f64) -> f64 {
    if weight.is_finite() { weight.max(0.0) } else { 0.0 }
}

#[cfg(test)]
mod tests;
