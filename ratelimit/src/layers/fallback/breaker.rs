//! The circuit breaker of the store: when to stop and when to start asking it. Pure; time is an argument.
//!
//! Three consecutive refusals or two consecutive silences open the breaker, and so does a failed fifth of many calls (one
//! shard of a cluster is down). Calls that fail at the same moment are one failure: they have one cause. While it is open, only a background task probes the store, at growing intervals. When the
//! store is back, requests do not use it for a grace time, in which every gateway notices the return and charges what it
//! admitted. Then, for the same time, requests ask for at most the local share, because gateways that noticed the return
//! later still decide alone.

use std::time::Duration;

use crate::model::error::Trouble;

/// Consecutive refusals that open the breaker.
const REFUSALS_MAX: u32 = 3;
/// Consecutive timeouts that open the breaker. Each of them stands for a silence of the whole connection.
const SILENCES_MAX: u32 = 2;
/// Failures within this time are one.
const ONE_FAILURE: Duration = Duration::from_millis(10);
/// The time within which every gateway finds out by itself that the store is away: the pause of one without traffic, a
/// silence, and some more.
const KNOWN: Duration = Duration::from_secs(3);
/// Consecutive timeouts after which a store that just returned is probed again.
const DOUBTFUL: u32 = 2;
/// The window of the failure rate.
const WINDOW: Duration = Duration::from_secs(1);
/// The failures in a window below which the rate is ignored.
const WINDOW_FAILURES_MIN: u32 = 10;
/// One failure in this number of calls opens the breaker...
const FAILING_SHARE: u32 = 5;
/// ...if they are spread over this time.
const SPREAD: Duration = Duration::from_millis(100);
/// The first pause between probes; it doubles up to the longest.
const PROBE_MIN: Duration = Duration::from_millis(100);
/// The longest pause between probes.
const PROBE_MAX: Duration = Duration::from_secs(1);
/// The grace time from the first successful probe to the first request, and from there to the first request beyond the
/// local share. Longer than the pause until any gateway's next probe.
const GRACE: Duration = Duration::from_millis(1500);

/// The phase of the breaker, which decides where requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Requests ask the store.
    Closed,
    /// Store outage: requests do not ask the store.
    Open,
    /// The store is back, and the decisions made without it are being reported.
    Returning,
    /// Requests ask the store for at most the local share, because other gateways may not use the store yet.
    Joining,
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Breaker {
    phase: Phase,
    strikes: u32,
    /// When the last failure was.
    failed_at: Option<Duration>,
    /// Since when the store is away.
    away_since: Option<Duration>,
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
            failed_at: None,
            away_since: None,
            failures: 0,
            window: Duration::ZERO,
            pause: PROBE_MIN,
            due: Duration::ZERO,
        }
    }
}

impl Breaker {
    /// The current phase.
    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// When every gateway knows that the store is away; zero if they do, or if the store decides as well.
    pub(super) fn known_in(&self, now: Duration) -> Duration {
        if self.phase == Phase::Joining {
            return Duration::ZERO;
        }
        (self.away_since.unwrap_or(now) + KNOWN).saturating_sub(now)
    }

    /// When the background has something to do, in the time of the other calls. Meaningless while closed.
    pub(super) fn due(&self) -> Duration {
        self.due
    }

    /// Records an answered call.
    pub(super) fn answered(&mut self) {
        self.strikes = 0;
    }

    /// Records a failed call; `calls` is the number of calls since the start of the window. Returns true if this opens the
    /// breaker.
    pub(super) fn failed(&mut self, now: Duration, trouble: Trouble, calls: u32) -> bool {
        if !matches!(self.phase, Phase::Closed | Phase::Joining)
            || !matches!(trouble, Trouble::Away | Trouble::Unknown)
        {
            return false;
        }
        self.failures += 1;
        if self.failed_at.is_none_or(|at| now.saturating_sub(at) >= ONE_FAILURE) {
            self.strikes += 1;
            self.failed_at = Some(now);
        }
        if self.phase == Phase::Joining && self.strikes >= DOUBTFUL {
            // Other gateways may have seen another outage, and have to pass the same phases.
            self.due = now + GRACE * 2;
        }
        let row = if trouble == Trouble::Away { REFUSALS_MAX } else { SILENCES_MAX };
        let share =
            self.failures >= WINDOW_FAILURES_MIN && self.failures.saturating_mul(FAILING_SHARE) >= calls;
        let share = share && now.saturating_sub(self.window) >= SPREAD;
        if self.strikes < row && !share {
            return false;
        }
        self.phase = Phase::Open;
        self.away_since = Some(now);
        self.pause = PROBE_MIN;
        self.due = now + self.pause;
        true
    }

    /// Records a data loss of the store: decisions and leases are reported before requests use it, as after an outage.
    pub(super) fn lost(&mut self, now: Duration) {
        *self = Self { phase: Phase::Open, away_since: Some(now), due: now, ..Self::default() };
    }

    /// Starts a new window if the last one is over; returns whether it did.
    pub(super) fn next_window(&mut self, now: Duration) -> bool {
        let over = now.saturating_sub(self.window) >= WINDOW;
        if over {
            (self.window, self.failures) = (now, 0);
        }
        over
    }

    /// Records the end of a probe. `jitter`, 0 to 1, spreads the probes of gateways.
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

    /// Ends the first grace time after everything is reported: requests use the store, within the local share.
    pub(super) fn join(&mut self, now: Duration) {
        *self = Self { phase: Phase::Joining, window: now, due: now + GRACE, ..Self::default() };
    }

    /// Ends the second grace time: requests use the store without the local share.
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
        (0..times).any(|n| breaker.failed(NOW + ONE_FAILURE * n, trouble, 1))
    }

    #[test]
    fn what_fails_at_one_moment_fails_once() {
        let mut breaker = Breaker::default();
        breaker.next_window(NOW);
        for (moment, opens) in [(0, false), (1, false), (2, true)] {
            let opened = (0..500).any(|n| breaker.failed(NOW + ONE_FAILURE * moment, Trouble::Away, n + 1));
            assert_eq!(opened, opens, "at moment {moment}");
        }
    }

    #[test]
    fn everybody_knows_some_time_after_it_opened_and_while_the_store_decides_as_well() {
        let mut breaker = Breaker::default();
        assert_eq!(breaker.known_in(NOW), KNOWN, "others may ask the store");
        breaker.lost(NOW);
        assert_eq!(breaker.known_in(NOW + KNOWN / 3), KNOWN - KNOWN / 3);
        breaker.probed(NOW, true, 0.0);
        assert_eq!(breaker.known_in(NOW + KNOWN), Duration::ZERO);
        breaker.join(NOW);
        assert_eq!(breaker.known_in(NOW), Duration::ZERO);
        breaker.close(NOW + KNOWN);
        assert_eq!(breaker.known_in(NOW + 2 * KNOWN), KNOWN);
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
                breaker.failed(NOW + ONE_FAILURE * n, Trouble::Unknown, n * calls_per_failure)
            })
        };
        assert!(fails(3) && fails(5));
        assert!(!fails(6));
    }

    #[test]
    fn probes_back_off_and_a_return_has_its_grace() {
        let mut breaker = Breaker::default();
        let mut now = NOW;
        while !breaker.failed(now, Trouble::Away, 1) {
            now += ONE_FAILURE;
        }
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
        let again = |n| breaker.failed(now + ONE_FAILURE * n, Trouble::Away, 1);
        assert!((0..REFUSALS_MAX).any(again), "gone again while joining");
        breaker.join(now);
        breaker.close(now);
        assert_eq!(breaker.phase(), Phase::Closed);
        assert!(GRACE > PROBE_MAX, "every gateway probes within the grace");
        breaker.lost(now);
        assert_eq!((breaker.phase(), breaker.due()), (Phase::Open, now), "asked at once whether it serves");
    }
}
