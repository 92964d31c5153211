//! What probing may cost: a bucket of requests per backend, so that no fault in the schedule runs up a bill.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

const HOUR: Duration = Duration::from_secs(3600);

/// A bucket of each backend.
#[derive(Debug, Default)]
pub(super) struct ProbeRate {
    backends: BTreeMap<String, (f64, Instant)>,
}

impl ProbeRate {
    /// Takes so many requests for a backend, if its hour still has them. At most a tenth of an hour's worth is saved up.
    pub(super) fn take(&mut self, backend: &str, requests: u32, per_hour: u32, now: Instant) -> bool {
        let rate = f64::from(per_hour);
        let most = (rate / 10.0).max(f64::from(per_hour.min(5)));
        let (left, at) = self.backends.get(backend).copied().unwrap_or((most, now));
        let earned = now.saturating_duration_since(at).as_secs_f64() / HOUR.as_secs_f64() * rate;
        let left = (left + earned).min(most);
        let enough = left >= f64::from(requests);
        let left = if enough { left - f64::from(requests) } else { left };
        self.backends.insert(backend.to_owned(), (left, now));
        enough
    }

    /// What was taken was not used after all.
    pub(super) fn give_back(&mut self, backend: &str, requests: u32) {
        if let Some((left, _)) = self.backends.get_mut(backend) {
            // The next taking bounds it.
            *left += f64::from(requests);
        }
    }

    /// Forgets backends that are gone.
    pub(super) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.backends.retain(|backend, _| keep(backend));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_never_costs_more_than_its_budget_and_a_tenth() {
        for (per_hour, most) in [(240, 264), (12, 17), (0, 0)] {
            let (mut rate, start) = (ProbeRate::default(), Instant::now());
            let taken = (0..36_000_u64)
                .filter(|i| rate.take("b", 1, per_hour, start + Duration::from_millis(i * 100)))
                .count();
            assert!(taken <= most, "{per_hour}: {taken}");
            assert!(taken >= per_hour as usize, "{per_hour}: {taken}");
        }
    }

    #[test]
    fn what_is_given_back_can_be_taken_again_and_no_more_is_saved_up() {
        let (mut rate, now) = (ProbeRate::default(), Instant::now());
        for _ in 0..100 {
            assert!(rate.take("b", 5, 12, now));
            rate.give_back("b", 5);
        }
        rate.give_back("b", 100);
        assert_eq!((0..100).filter(|_| rate.take("b", 1, 12, now)).count(), 5);
    }

    #[test]
    fn the_regular_rounds_fit_into_the_default() {
        let (mut rate, start) = (ProbeRate::default(), Instant::now());
        for second in (0..3600).step_by(30) {
            let now = start + Duration::from_secs(second);
            assert!(rate.take("b", 1, 240, now));
            if second % 300 == 0 {
                assert!(rate.take("b", 5, 240, now), "at {second}");
            }
        }
    }
}
