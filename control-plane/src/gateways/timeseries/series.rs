//! A rate over the last seconds, and a line over the last minutes. Both have a fixed size.

use std::collections::VecDeque;

use super::POINTS;

/// Whole seconds that a rate is over.
const OVER: u64 = 5;
/// One more, for the second that has not passed yet.
const SECONDS: usize = OVER as usize + 1;

/// Something per second, over the last five seconds that have passed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rate([(u64, u64); SECONDS]);

impl Rate {
    /// Counts in a second; seconds never go back.
    pub(crate) fn add(&mut self, second: u64, count: u64) {
        let slot = &mut self.0[(second % SECONDS as u64) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 = slot.1.saturating_add(count);
    }

    /// The mean over the seconds before this one.
    pub(crate) fn per_second(&self, second: u64) -> f64 {
        let passed = |of: u64| of < second && of + OVER >= second;
        let counts = self.0.iter().filter(|(of, _)| passed(*of)).map(|(_, count)| *count);
        let sum = counts.fold(0, u64::saturating_add);
        sum as f64 / OVER as f64
    }
}

/// A figure over time, the oldest point first; a gap where nothing was known.
#[derive(Debug, Default)]
pub(crate) struct Line(VecDeque<Option<f32>>);

impl Line {
    pub(crate) fn push(&mut self, value: Option<f64>) {
        if self.0.len() == POINTS {
            self.0.pop_front();
        }
        self.0.push_back(value.map(|value| value as f32));
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = Option<f64>> {
        self.0.iter().map(|value| value.map(f64::from))
    }

    /// The newest point.
    pub(crate) fn last(&self) -> Option<f64> {
        self.0.back().copied().flatten().map(f64::from)
    }
}
