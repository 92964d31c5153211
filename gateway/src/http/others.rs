//! The backends that a request may be sent to beside the one that it was admitted to.

use smallvec::SmallVec;

use super::call::ModelCall;
use crate::routing::balance::Candidate;

/// The backends that are left, in order of preference: each once, with all its slots.
#[derive(Debug)]
pub(super) struct Others {
    pub(super) candidates: Vec<Candidate>,
    /// The backends that are none of them.
    without: SmallVec<[usize; 2]>,
    /// Whether those after the first candidates are among them. Most requests never need them.
    is_whole: bool,
}

impl Others {
    /// Those of the first candidates, and of the rest if it is known, beside the one that is `used` and one that was passed
    /// over.
    pub(super) fn of(
        call: &ModelCall<'_>,
        [first, rest]: [&[Candidate]; 2],
        used: usize,
        passed_over: Option<usize>,
    ) -> Self {
        let without = passed_over.into_iter().chain([used]).collect();
        // Where accounts are limited, the first candidates were all there are.
        let is_whole = !rest.is_empty() || !call.model.accounts.is_empty() || !call.model.has_rest();
        let candidates = Vec::with_capacity(first.len() + rest.len());
        let mut others = Self { candidates, without, is_whole };
        others.add(first);
        others.add(rest);
        others
    }

    /// Whether there may be one.
    pub(super) fn may_be(&self) -> bool {
        !self.is_whole || !self.candidates.is_empty()
    }

    /// Adds those after the first candidates. To be called before another backend is tried.
    pub(super) fn widen(&mut self, call: &ModelCall<'_>) {
        if !std::mem::replace(&mut self.is_whole, true) {
            let rest = call.rest(&self.candidates);
            self.add(&rest);
        }
    }

    fn add(&mut self, candidates: &[Candidate]) {
        for candidate in candidates {
            if self.without.contains(&candidate.index) {
                continue;
            }
            match self.candidates.iter_mut().find(|known| known.index == candidate.index) {
                Some(known) => known.slots = known.slots.max(candidate.slots),
                None => self.candidates.push(Candidate { bound: None, ..*candidate }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;
    use weir_ratelimit::Bound;

    use super::*;

    #[test]
    fn what_is_left_names_each_backend_once_with_all_its_slots() {
        let candidate = |index, slots| Candidate { index, slots, bound: None };
        let bounded = |index| Candidate {
            bound: Some(Bound { millionths: 400_000, elsewhere: 0, estimate: 3 }),
            ..candidate(index, 50)
        };
        let candidates =
            [bounded(2), bounded(0), bounded(1), candidate(1, 50), candidate(0, 50), candidate(2, 50)];
        let others = |used| {
            let mut others = Others { candidates: Vec::new(), without: smallvec![used], is_whole: false };
            others.add(&candidates);
            others.add(&[candidate(1, 80), candidate(7, 50)]);
            others.candidates
        };
        assert_eq!(others(2), [candidate(0, 50), candidate(1, 80), candidate(7, 50)]);
        assert_eq!(others(1), [candidate(2, 50), candidate(0, 50), candidate(7, 50)]);
    }
}
