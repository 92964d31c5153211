//! Whom to believe: an observer that alone sees most of its backends fail is itself in trouble.

use std::collections::BTreeMap;

use super::evidence::{Moment, Vantage};
use super::params::{ISOLATION, OBSERVER_MIN_BACKENDS};

/// The observers that are not believed at present.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observers {
    isolated_until: BTreeMap<Vantage, Moment>,
}

/// What one observer saw lately of backends on which others had something to say too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sight {
    /// Backends looked at.
    pub(crate) seen: usize,
    /// Of these, those it saw fail.
    pub(crate) failed: usize,
    /// Of these, those that others saw well at the same time.
    pub(crate) contradicted: usize,
}

impl Sight {
    /// Most fail for it, and most of those do not for others.
    const fn is_its_own_trouble(&self) -> bool {
        self.seen >= OBSERVER_MIN_BACKENDS
            && self.failed * 2 > self.seen
            && self.contradicted * 2 > self.failed
    }
}

impl Observers {
    pub(crate) fn is_isolated(&self, vantage: &Vantage, now: Moment) -> bool {
        self.isolated_until.get(vantage).is_some_and(|until| now < *until)
    }

    /// Takes the vote from observers whose sight says that they are in trouble. Returns those that just lost it.
    pub(crate) fn weigh(&mut self, sights: &BTreeMap<Vantage, Sight>, now: Moment) -> Vec<Vantage> {
        let mut lost = Vec::new();
        self.isolated_until.retain(|_, until| now < *until);
        for (vantage, _) in sights.iter().filter(|(_, sight)| sight.is_its_own_trouble()) {
            if self.isolated_until.insert(vantage.clone(), now + ISOLATION).is_none() {
                lost.push(vantage.clone());
            }
        }
        lost
    }

    /// Those that are not believed, and until when.
    pub(crate) fn isolated(&self) -> impl Iterator<Item = (&Vantage, Moment)> {
        self.isolated_until.iter().map(|(vantage, until)| (vantage, *until))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_who_is_contradicted_on_most_of_many_loses_its_vote_and_for_a_while() {
        let gateway = Vantage::Gateway("g".into());
        let verdict = |seen, failed, contradicted| {
            let sights = [(gateway.clone(), Sight { seen, failed, contradicted })].into();
            let mut observers = Observers::default();
            observers.weigh(&sights, Duration::ZERO);
            observers.is_isolated(&gateway, ISOLATION - Duration::from_nanos(1))
        };
        assert!(verdict(4, 4, 4));
        assert!(verdict(10, 6, 4));
        assert!(!verdict(3, 3, 3), "too few to say");
        assert!(!verdict(10, 5, 5), "half is not most");
        assert!(!verdict(10, 10, 2), "the others see the same: it is the backends");
        let mut observers = Observers::default();
        let sights = [(gateway.clone(), Sight { seen: 4, failed: 4, contradicted: 4 })].into();
        assert_eq!(observers.weigh(&sights, Duration::ZERO), std::slice::from_ref(&gateway));
        assert_eq!(observers.weigh(&sights, Duration::from_secs(1)), [], "said once");
        assert!(!observers.is_isolated(&gateway, ISOLATION + Duration::from_secs(1)));
    }
}
