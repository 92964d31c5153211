//! Isolated observers: an observer that sees most backends fail while others do not has a fault of its own, and loses its
//! vote for a time.

use std::collections::BTreeMap;

use super::evidence::{Observer, Timestamp};
use super::params::{ISOLATION, OBSERVER_MIN_BACKENDS};

/// The observers without a vote at present.
#[derive(Debug, Clone, Default)]
pub(crate) struct IsolatedObservers {
    isolated_until: BTreeMap<Observer, Timestamp>,
}

/// The recent votes of one observer on backends, compared with the votes of others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ObserverCounts {
    /// Backends probed.
    pub(crate) seen: usize,
    /// Backends that failed for this observer.
    pub(crate) failed: usize,
    /// Backends that failed for this observer and passed for others.
    pub(crate) contradicted: usize,
}

impl ObserverCounts {
    /// Whether most backends fail for this observer and most of these pass for others.
    const fn is_isolated(&self) -> bool {
        self.seen >= OBSERVER_MIN_BACKENDS
            && self.failed * 2 > self.seen
            && self.contradicted * 2 > self.failed
    }
}

impl IsolatedObservers {
    pub(crate) fn contains(&self, observer: &Observer, now: Timestamp) -> bool {
        self.isolated_until.get(observer).is_some_and(|until| now < *until)
    }

    /// Isolates observers by their counts. Returns the newly isolated observers.
    pub(crate) fn weigh(
        &mut self,
        counts: &BTreeMap<Observer, ObserverCounts>,
        now: Timestamp,
    ) -> Vec<Observer> {
        let mut lost = Vec::new();
        self.isolated_until.retain(|_, until| now < *until);
        for (observer, _) in counts.iter().filter(|(_, count)| count.is_isolated()) {
            if self.isolated_until.insert(observer.clone(), now + ISOLATION).is_none() {
                lost.push(observer.clone());
            }
        }
        lost
    }

    /// The isolated observers, and until when.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&Observer, Timestamp)> {
        self.isolated_until.iter().map(|(observer, until)| (observer, *until))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_who_is_contradicted_on_most_of_many_loses_its_vote_and_for_a_while() {
        let gateway = Observer::Gateway("g".into());
        let verdict = |seen, failed, contradicted| {
            let counts = [(gateway.clone(), ObserverCounts { seen, failed, contradicted })].into();
            let mut observers = IsolatedObservers::default();
            observers.weigh(&counts, Duration::ZERO);
            observers.contains(&gateway, ISOLATION - Duration::from_nanos(1))
        };
        assert!(verdict(4, 4, 4));
        assert!(verdict(10, 6, 4));
        assert!(!verdict(3, 3, 3), "too few to say");
        assert!(!verdict(10, 5, 5), "half is not most");
        assert!(!verdict(10, 10, 2), "the others see the same: it is the backends");
        let mut observers = IsolatedObservers::default();
        let counts = [(gateway.clone(), ObserverCounts { seen: 4, failed: 4, contradicted: 4 })].into();
        assert_eq!(observers.weigh(&counts, Duration::ZERO), std::slice::from_ref(&gateway));
        assert_eq!(observers.weigh(&counts, Duration::from_secs(1)), [], "said once");
        assert!(!observers.contains(&gateway, ISOLATION + Duration::from_secs(1)));
    }
}
