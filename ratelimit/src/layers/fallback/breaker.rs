//! When to stop asking a store that does not serve, and when to ask it again: pure, the time is an argument.
//!
//! Evidence is bounded: three refusals or five silences in a row open it, and so does a store that fails a fifth of
//! many calls (one shard of a cluster is down). Open, nobody asks: a prober in the background does, at growing
//! intervals. When the store is back the breaker stays shut to requests for a grace time, in which every gateway
//! learns of the return and charges what it admitted; only then do requests go to the store again. For the same time
//! they ask for no more than the gateway's share, since others, which found the store later, still decide alone.

use std::time::Duration;

use crate::model::error::Trouble;

/// Refusals in a row that open the breaker.
const REFUSALS_MAX: u32 = 3;
/// Silences in a row that open it: one slow moment is not an outage.
const SILENCES_MAX: u32 = 5;
/// As many in a row make a store doubtful that has just come back.
const DOUBTFUL: u32 = 2;
/// The window in which a share of failures is judged.
const WINDOW: Duration = Duration::from_secs(1);
/// Failures in a window below which no share is judged.
const WINDOW_FAILURES_MIN: u32 = 10;
/// One in so many calls failing opens it.
const FAILING_SHARE: u32 = 5;
/// First pause between probes; doubles up to the last.
const PROBE_MIN: Duration = Duration::from_millis(100);
/// Last pause between probes.
const PROBE_MAX: Duration = Duration::from_secs(1);
/// From the first good probe to the first request, and from there to the first beyond the share: longer than any
/// gateway's next probe takes to come.
const GRACE: Duration = Duration::from_millis(1500);

/// What requests may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// They ask the store.
    Closed,
    /// The store is away: they do not ask it.
    Open,
    /// The store is back; what was admitted without it is being charged.
    Returning,
    /// They ask the store, for no more than this gateway's share: others may not ask it yet.
    Joining,
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Breaker {
    phase: Phase,
    strikes: u32,
    /// Failures of this window and its start.
    failures: u32,
    window: Duration,
    pause: Duration,
    /// When the next probe (open) or the end of the grace (returning, joining) is due.
    due: Duration,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            phase: Phase::Closed,
            strikes: 0,
            failures: 0,
            window: Duration::ZERO,
            pause: PROBE_MIN,
            due: Duration::ZERO,
        }
    }
}

impl Breaker {
    /// What requests may do now.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// When the background has something to do, in the time of the other calls. Meaningless while closed.
    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// A call was answered.
    pub(super) fn answered(&mut self) {
        self.strikes = 0;
    }

    /// A call failed; `calls` is how many there were since the window began. True when this opens the breaker.
    pub(super) fn failed(&mut self, now: Duration, trouble: Trouble, calls: u32) -> bool {
        if !matches!(self.phase, Phase::Closed | Phase::Joining)
            || !matches!(trouble, Trouble::Away | Trouble::Unknown)
        {
            return false;
        }
        self.strikes += 1;
        self.failures += 1;
        if self.phase == Phase::Joining && self.strikes >= DOUBTFUL {
            // Others may have found it away again, and have to return and join.
            self.due = now + GRACE * 2;
        }
        let row = if trouble == Trouble::Away { REFUSALS_MAX } else { SILENCES_MAX };
        let share =
            self.failures >= WINDOW_FAILURES_MIN && self.failures.saturating_mul(FAILING_SHARE) >= calls;
        if self.strikes < row && !share {
            return false;
        }
        self.phase = Phase::Open;
        self.pause = PROBE_MIN;
        self.due = now + self.pause;
        true
    }

    /// The store has lost what it knew: everything is reported to it before it is asked again, as after an outage.
    pub(super) fn lost(&mut self, now: Duration) {
        *self = Self { phase: Phase::Open, due: now, ..Self::default() };
    }

    /// Starts a new window when the last is over; true when it did.
    pub(super) fn next_window(&mut self, now: Duration) -> bool {
        let over = now.saturating_sub(self.window) >= WINDOW;
        if over {
            (self.window, self.failures) = (now, 0);
        }
        over
    }

    /// A probe ended. `jitter` is between 0 and 1 and spreads gateways.
    pub(super) fn probed(&mut self, now: Duration, good: bool, jitter: f64) {
        match (self.phase, good) {
            (Phase::Closed, _) => {}
            (Phase::Open, true) => {
                self.phase = Phase::Returning;
                self.due = now + GRACE;
            }
            (Phase::Returning | Phase::Joining, true) => {}
            (Phase::Open | Phase::Returning | Phase::Joining, false) => {
                self.phase = Phase::Open;
                self.pause = (self.pause * 2).min(PROBE_MAX);
                self.due = now + self.pause.mul_f64(0.75 + 0.25 * jitter.clamp(0.0, 1.0));
            }
        }
    }

    /// The grace is over and everything is charged: requests ask the store again.
    pub(super) fn join(&mut self, now: Duration) {
        *self = Self { phase: Phase::Joining, window: now, due: now + GRACE, ..Self::default() };
    }

    /// So do those of every other gateway.
    pub(super) fn close(&mut self, now: Duration) {
        *self = Self { window: now, ..Self::default() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn opened_by(trouble: Trouble, times: u32) -> bool {
        let mut breaker = Breaker::default();
        (0..times).any(|_| breaker.failed(NOW, trouble, 1))
    }

    #[test]
    fn refusals_open_sooner_than_silence_and_single_failures_never() {
        assert!(!opened_by(Trouble::Away, REFUSALS_MAX - 1) && opened_by(Trouble::Away, REFUSALS_MAX));
        assert!(!opened_by(Trouble::Unknown, SILENCES_MAX - 1) && opened_by(Trouble::Unknown, SILENCES_MAX));
        assert!(!opened_by(Trouble::Keys, 1000) && !opened_by(Trouble::Caller, 1000));
        let mut breaker = Breaker::default();
        for n in 0..100 {
            assert!(!breaker.failed(NOW + WINDOW * n, Trouble::Unknown, 1));
            breaker.next_window(NOW + WINDOW * n);
            breaker.answered();
        }
    }

    #[test]
    fn a_fifth_of_many_calls_failing_opens_it() {
        let fails = |calls_per_failure: u32| {
            let mut breaker = Breaker::default();
            breaker.next_window(NOW);
            (1..=40).any(|n| {
                breaker.answered();
                breaker.failed(NOW, Trouble::Unknown, n * calls_per_failure)
            })
        };
        assert!(fails(3) && fails(5));
        assert!(!fails(6));
    }

    #[test]
    fn probes_back_off_and_a_return_has_its_grace() {
        let mut breaker = Breaker::default();
        while !breaker.failed(NOW, Trouble::Away, 1) {}
        let mut now = NOW;
        let mut pauses = Vec::new();
        for _ in 0..6 {
            pauses.push(breaker.due() - now);
            now = breaker.due();
            breaker.probed(now, false, 1.0);
        }
        assert_eq!(
            pauses.iter().map(|p| p.as_millis()).collect::<Vec<_>>(),
            [100, 200, 400, 800, 1000, 1000]
        );
        breaker.probed(now, true, 0.0);
        assert_eq!((breaker.phase(), breaker.due()), (Phase::Returning, now + GRACE));
        breaker.probed(now, false, 0.0);
        assert_eq!(breaker.phase(), Phase::Open, "gone again within the grace");
        breaker.probed(now, true, 0.0);
        breaker.join(now);
        assert_eq!((breaker.phase(), breaker.due()), (Phase::Joining, now + GRACE));
        assert!((0..REFUSALS_MAX).any(|_| breaker.failed(now, Trouble::Away, 1)), "gone again while joining");
        breaker.join(now);
        breaker.close(now);
        assert_eq!(breaker.phase(), Phase::Closed);
        assert!(GRACE > PROBE_MAX, "every gateway probes within the grace");
        breaker.lost(now);
        assert_eq!((breaker.phase(), breaker.due()), (Phase::Open, now), "asked at once whether it serves");
    }
}
