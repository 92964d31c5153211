//! Counts over the last seconds, and a line over the last minutes. All have a fixed size.

use std::collections::VecDeque;

use super::POINTS;

/// Something per second, over the last five seconds that have passed. One second more, for the one that has not passed yet.
pub(crate) type Rate = Window<6>;
/// Something counted over the last minute that has passed.
pub(crate) type Minute = Window<61>;

/// Counts of the last whole seconds, each with its second.
#[derive(Debug, Clone)]
pub(crate) struct Window<const SECONDS: usize>([(u64, u64); SECONDS]);

impl<const SECONDS: usize> Default for Window<SECONDS> {
    fn default() -> Self {
        Self([(0, 0); SECONDS])
    }
}

impl<const SECONDS: usize> Window<SECONDS> {
    /// Whole seconds that have passed.
    const OVER: u64 = SECONDS as u64 - 1;

    /// Counts in a second; seconds never go back.
    pub(crate) fn add(&mut self, second: u64, count: u64) {
        let slot = &mut self.0[(second % SECONDS as u64) as usize];
        if slot.0 != second {
            *slot = (second, 0);
        }
        slot.1 = slot.1.saturating_add(count);
    }

    /// The sum over the seconds before this one.
    pub(crate) fn sum(&self, second: u64) -> u64 {
        let passed = |of: u64| of < second && of + Self::OVER >= second;
        let counts = self.0.iter().filter(|(of, _)| passed(*of)).map(|(_, count)| *count);
        counts.fold(0, u64::saturating_add)
    }

    /// The mean over the seconds before this one.
    pub(crate) fn per_second(&self, second: u64) -> f64 {
        self.sum(second) as f64 / Self::OVER as f64
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_is_sixty_seconds_that_have_passed() {
        let mut minute = Minute::default();
        (10..100).for_each(|second| minute.add(second, 8));
        assert_eq!((minute.sum(100), minute.sum(130), minute.sum(160)), (480, 240, 0));
        assert_eq!(Minute::default().sum(5), 0);
    }
}
