//! Judges a run offline, from what the clients saw: no clock, no I/O.
//!
//! A client knows that its request was decided between sending it and the first byte of the answer. That suffices for
//! verdicts without false alarms:
//!
//! - **Over-admission**: for every window, the cost of the requests that were certainly admitted inside it, less
//!   `capacity + rate x length`. A request that may have been admitted outside of the window is not counted.
//! - **False refusal**: a refused request would have fitted even if everything that may have been admitted before was
//!   charged as late as possible.

/// A limit over requests or tokens.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Envelope {
    /// Units that fit at once.
    pub(crate) capacity: u64,
    /// Units that drain in a minute.
    pub(crate) per_minute: u64,
}

/// A time between two others, microseconds since the start of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// The earliest time.
    pub(crate) from_us: u64,
    /// The latest time.
    pub(crate) until_us: u64,
}

const MINUTE_US: u128 = 60_000_000;

impl Envelope {
    /// The units that may be admitted in a window of this length.
    pub(crate) fn allowed(&self, length_us: u64) -> u64 {
        let drained = u128::from(self.per_minute) * u128::from(length_us) / MINUTE_US;
        self.capacity.saturating_add(u64::try_from(drained).unwrap_or(u64::MAX))
    }

    /// The largest excess of a window; zero if there was none.
    pub(crate) fn over_admission(&self, admitted: &[(Span, u64)]) -> u64 {
        self.worst_window(admitted).map_or(0, |(beyond, _)| beyond)
    }

    /// The window with the largest excess, and that excess; `None` if there was none.
    pub(crate) fn worst_window(&self, admitted: &[(Span, u64)]) -> Option<(u64, Span)> {
        let mut by_end: Vec<&(Span, u64)> = admitted.iter().collect();
        by_end.sort_by_key(|(span, _)| span.until_us);
        let mut worst = None;
        for (first, _) in admitted {
            let mut sum = 0_u64;
            for (span, cost) in &by_end {
                if span.from_us < first.from_us {
                    continue;
                }
                sum += cost;
                let window = Span { from_us: first.from_us, until_us: span.until_us.max(first.from_us) };
                let beyond = sum.saturating_sub(self.allowed(window.until_us - window.from_us));
                if beyond > worst.map_or(0, |(most, _)| most) {
                    worst = Some((beyond, window));
                }
            }
        }
        worst
    }

    /// The units that fit at a time if each of these was charged as late as possible and nothing else was charged.
    pub(crate) fn room(&self, admitted: &[(Span, u64)], at_us: u64) -> u64 {
        let mut charges: Vec<(u64, u64)> = admitted
            .iter()
            .filter(|(span, _)| span.until_us <= at_us)
            .map(|(s, c)| (s.until_us, *c))
            .collect();
        charges.sort_unstable();
        // In sixty-millionths of a unit, so that nothing is rounded.
        let (mut level, mut since) = (0_u128, 0_u64);
        let drained = |from: u64, to: u64| u128::from(self.per_minute) * u128::from(to.saturating_sub(from));
        for (at, cost) in charges {
            level = level.saturating_sub(drained(since, at)) + u128::from(cost) * MINUTE_US;
            since = at;
        }
        level = level.saturating_sub(drained(since, at_us));
        let room = (u128::from(self.capacity) * MINUTE_US).saturating_sub(level).div_ceil(MINUTE_US);
        u64::try_from(room).unwrap_or(u64::MAX)
    }

    /// Whether a refusal of `cost` was certainly wrong, by more than `slack` units.
    /// `maybe` is everything that may have been admitted.
    pub(crate) fn refused_wrongly(
        &self,
        refused: Span,
        cost: u64,
        slack: u64,
        maybe: &[(Span, u64)],
    ) -> bool {
        let mut charges: Vec<(u64, u64)> = maybe
            .iter()
            .filter(|(span, _)| span.from_us <= refused.until_us)
            .map(|(span, cost)| (span.until_us.min(refused.until_us), *cost))
            .collect();
        // From the latest back: the level is the largest rest of any suffix.
        charges.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        let (mut sum, mut level) = (0_u64, 0_u64);
        for (at, cost) in charges {
            sum += cost;
            let drained =
                u128::from(self.per_minute) * u128::from(refused.from_us.saturating_sub(at)) / MINUTE_US;
            level = level.max(sum.saturating_sub(u64::try_from(drained).unwrap_or(u64::MAX)));
        }
        level + cost + slack <= self.capacity
    }
}

/// Whether a refusal for concurrency was certainly wrong: fewer than `limit` requests can have been in flight at any
/// possible time of the decision.
pub(crate) fn crowd_refused_wrongly(refused: Span, limit: u64, in_flight: &[Span]) -> bool {
    let present = |span: &&Span| span.from_us <= refused.until_us && span.until_us >= refused.from_us;
    (in_flight.iter().filter(present).count() as u64) < limit
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn at(from_us: u64, until_us: u64) -> Span {
        Span { from_us, until_us }
    }

    /// A capacity of ten, and one per second.
    const TEN: Envelope = Envelope { capacity: 10, per_minute: 60 };

    #[test]
    fn a_window_that_is_exceeded_is_found_wherever_it_lies() {
        let mut admitted: Vec<_> = (0..10).map(|n| (at(n, n + 100), 1)).collect();
        assert_eq!(TEN.over_admission(&admitted), 0);
        // Five seconds later five more fit, and the sixth and seventh do not.
        admitted.extend((0..7).map(|n| (at(5 * SECOND + n, 5 * SECOND + n + 100), 1)));
        assert_eq!(TEN.over_admission(&admitted), 2);
    }

    #[test]
    fn room_is_what_has_drained() {
        let admitted: Vec<_> = (0..10).map(|n| (at(n, n), 1)).collect();
        assert_eq!(TEN.room(&admitted[..4], 10), 6 + 1, "rounded up");
        assert_eq!(TEN.room(&admitted, 5 * SECOND), 5);
        assert_eq!(TEN.room(&admitted, 60 * SECOND), 10);
    }

    #[test]
    fn what_may_lie_outside_the_window_is_not_held_against_it() {
        let mut admitted: Vec<_> = (0..10).map(|_| (at(SECOND, SECOND), 1)).collect();
        admitted.push((at(0, 20 * SECOND), 1));
        assert_eq!(TEN.over_admission(&admitted), 0);
        admitted.push((at(SECOND, SECOND), 1));
        assert_eq!(TEN.over_admission(&admitted), 1);
    }

    #[test]
    fn a_refusal_is_wrong_only_if_it_would_have_fitted_in_any_case() {
        let mut maybe: Vec<_> = (0..9).map(|_| (at(0, 10), 1)).collect();
        assert!(TEN.refused_wrongly(at(20, 30), 1, 0, &maybe));
        assert!(!TEN.refused_wrongly(at(20, 30), 1, 1, &maybe), "within the slack");
        maybe.push((at(25, 9 * SECOND), 1));
        assert!(!TEN.refused_wrongly(at(20, 30), 1, 0, &maybe), "one more may have come first");
        assert!(TEN.refused_wrongly(at(3 * SECOND, 4 * SECOND), 1, 0, &maybe), "two have drained");
    }

    #[test]
    fn a_crowd_is_counted_with_everybody_who_may_have_been_there() {
        let crowd = [at(0, 10), at(5, 20), at(30, 40)];
        assert!(!crowd_refused_wrongly(at(8, 9), 2, &crowd));
        assert!(crowd_refused_wrongly(at(11, 12), 2, &crowd));
    }
}
