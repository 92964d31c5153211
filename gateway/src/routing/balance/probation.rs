//! Backends on probation in an order of preference: which of them a request may try.

use std::borrow::Borrow;
use std::hash::Hash;

use tokio::time::Instant;

use super::choose::Candidates;
use super::eject::{EjectionStatus, Ejector};

/// Leaves those on probation to whom they belong. A request that prefers one takes its probe, whose number is returned, if
/// nobody else has it. To all others it goes only in a panic, and after everything else: they would be given as many
/// requests at once as they have slots, while it is not known whether they work. `key` is the ejector's key of a
/// candidate's index. What is left is never empty unless `candidates` was.
pub fn claim_probe<K: Clone + Eq + Hash, B: Borrow<K>>(
    ejector: &mut Ejector<K>,
    candidates: &mut Candidates,
    key: impl Fn(usize) -> B,
    panic: bool,
    now: Instant,
) -> Option<u64> {
    let first = candidates.first()?.index;
    leave_probation(candidates, panic, |index| {
        index != first && ejector.status(key(index).borrow(), now) == EjectionStatus::Probe
    });
    ejector.begin_probe(key(first).borrow(), now)
}

/// The same for candidates of which none may take a probe.
pub fn leave_probation(candidates: &mut Candidates, panic: bool, is_on_probation: impl Fn(usize) -> bool) {
    let (on_probation, mut open): (Candidates, Candidates) =
        candidates.iter().copied().partition(|candidate| is_on_probation(candidate.index));
    if !on_probation.is_empty() {
        if panic {
            open.extend(on_probation);
        }
        *candidates = open;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::choose::Candidate;
    use super::super::eject::EjectConfig;
    use super::*;

    const OVER: Duration = Duration::from_secs(5);

    fn candidates(indices: &[usize]) -> Candidates {
        indices.iter().map(|&index| Candidate { index, slots: 8, bound: None }).collect()
    }

    fn indices(candidates: &Candidates) -> Vec<usize> {
        candidates.iter().map(|candidate| candidate.index).collect()
    }

    /// Of four backends these were ejected, and are on probation now.
    fn on_probation(ejected: &[usize]) -> (Ejector<usize>, Instant) {
        let config = EjectConfig { max_ejected_percent: 100, ..EjectConfig::default() };
        let (mut ejector, start) = (Ejector::new(config), Instant::now());
        ejected.iter().for_each(|key| {
            ejector.eject_for(key, OVER, start);
        });
        (ejector, start + OVER)
    }

    #[test]
    fn only_the_request_that_prefers_it_goes_there_and_only_one_at_a_time() {
        let (mut ejector, now) = on_probation(&[1]);
        let mut order = candidates(&[0, 1, 2]);
        assert_eq!(claim_probe(&mut ejector, &mut order, |index| index, false, now), None);
        assert_eq!(indices(&order), [0, 2], "it does not overflow there, nor is it tried again there");
        let mut order = candidates(&[1, 0, 1, 2]);
        assert!(claim_probe(&mut ejector, &mut order, |index| index, false, now).is_some());
        assert_eq!(indices(&order), [1, 0, 1, 2]);
        let mut order = candidates(&[1, 0]);
        assert_eq!(claim_probe(&mut ejector, &mut order, |index| index, false, now), None, "taken");
    }

    #[test]
    fn a_probe_that_was_given_back_goes_to_the_next_request() {
        let (mut ejector, now) = on_probation(&[1]);
        for _ in 0..1000 {
            let mut order = candidates(&[1, 0]);
            let number = claim_probe(&mut ejector, &mut order, |index| index, false, now);
            ejector.abandon_probe(&1, number.expect("whoever was refused before took nothing"));
        }
    }

    #[test]
    fn in_a_panic_those_on_probation_come_last() {
        let (mut ejector, now) = on_probation(&[1, 3]);
        let mut order = candidates(&[1, 3, 0, 2]);
        let number = claim_probe(&mut ejector, &mut order, |index| index, true, now);
        assert_eq!((number.is_some(), indices(&order)), (true, vec![1, 0, 2, 3]));
        let mut nothing = Candidates::new();
        assert_eq!(claim_probe(&mut ejector, &mut nothing, |index| index, true, now), None);
    }
}
