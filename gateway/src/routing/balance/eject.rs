//! Local ejection: a gateway stops using a backend because of its own requests' results, within milliseconds.
//!
//! Invariants:
//! - At most `max_ejected_percent` of a pool (but at least one backend) is ejected because of requests: never the last two
//!   of three or more, never the last one. A backend on probation counts as ejected.
//! - Consecutive failures eject a backend, and so does a high share of failures among successes.
//! - A backend without a first byte counts as silent only after another backend answered the same request. Otherwise the
//!   request itself may be slow.
//! - If the maximum is reached, a failing backend replaces a silent one, because silence can be the gateway's fault.
//! - A longer ejection is never shortened by a later one, nor by answers to requests that were sent before it.
//! - After an ejection the backend is on probation: one request at a time until one succeeds. Which request it is is known
//!   before it is sent: it holds the probe's number, and gives the probe back when it is refused or sent elsewhere.
//! - Each consecutive ejection doubles. The count starts again when the backend has served for the length of its last
//!   ejection.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Seconds over which the share of failures is computed.
const WINDOW: usize = 10;

/// When and for how long to eject.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EjectConfig {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// The first ejection's length.
    pub base: Duration,
    /// The longest ejection by doubling.
    pub max: Duration,
    /// Share of the pool that may be ejected.
    pub max_ejected_percent: u32,
    /// Share of failures over the last `WINDOW` seconds that ejects.
    pub failure_percent: u32,
    /// The share is ignored below this number of requests.
    pub failure_min_requests: u32,
    /// The longest time for which a backend counts as busy; a larger Retry-After is cut.
    pub busy_max: Duration,
    /// The time after which another request on probation is allowed although the outcome of the last one is unknown.
    pub probe_timeout: Duration,
}

impl Default for EjectConfig {
    fn default() -> Self {
        Self {
            consecutive_failures: 3,
            base: Duration::from_secs(5),
            max: Duration::from_secs(300),
            max_ejected_percent: 50,
            failure_percent: 50,
            failure_min_requests: 10,
            busy_max: Duration::from_secs(60),
            probe_timeout: Duration::from_secs(10),
        }
    }
}

/// Whether a backend may be used now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EjectionStatus {
    /// The backend may be used.
    Open,
    /// On probation. One request may try it: the one that [`Ejector::begin_probe`] gives the probe to.
    Probe,
    /// Ejected because of failures, until this time.
    Ejected(Instant),
    /// Left out because it answered that it is busy, until this time.
    Busy(Instant),
}

/// The ejection state of one backend.
#[derive(Debug, Default)]
struct Backend {
    failures: u32,
    /// Requests in a row that another backend answered first.
    silences: u32,
    recent: Recent,
    /// Consecutive ejections.
    row: u32,
    busy_until: Option<Instant>,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Open,
    /// Ejected until `until`, then on probation.
    Ejected {
        until: Instant,
        length: Duration,
        /// The number of the probe under way, and until when no other is let through.
        probe: Option<(u64, Instant)>,
        /// Ejected because of silence only.
        silent: bool,
    },
    /// In use again; at `forgiven_at` the count of consecutive ejections starts again.
    Returned { forgiven_at: Instant },
}

/// Successes and failures of the last [`WINDOW`] seconds, by second.
#[derive(Debug, Default)]
struct Recent {
    seconds: [(u32, u32); WINDOW],
    /// The start of the newest second.
    newest: Option<Instant>,
}

impl Recent {
    fn add(&mut self, success: bool, now: Instant) {
        let newest = *self.newest.get_or_insert(now);
        let passed = now.saturating_duration_since(newest).as_secs();
        if passed > 0 {
            let gone = usize::try_from(passed).map_or(WINDOW, |p| p.min(WINDOW));
            self.seconds.rotate_right(gone);
            self.seconds[..gone].fill((0, 0));
            self.newest = Some(newest + Duration::from_secs(passed));
        }
        let (successes, failures) = &mut self.seconds[0];
        *(if success { successes } else { failures }) += 1;
    }

    /// Whether the share of failures ejects the backend.
    fn is_over_share(&self, config: &EjectConfig) -> bool {
        let sum = |of: fn(&(u32, u32)) -> u32| self.seconds.iter().map(|s| u64::from(of(s))).sum::<u64>();
        let (successes, failures) = (sum(|s| s.0), sum(|s| s.1));
        let all = successes + failures;
        all >= u64::from(config.failure_min_requests)
            && failures * 100 >= all * u64::from(config.failure_percent)
    }
}

/// The ejections of one pool.
#[derive(Debug)]
pub struct Ejector<K> {
    config: EjectConfig,
    backends: HashMap<K, Backend>,
    /// Probes begun so far.
    probes: u64,
}

impl<K: Clone + Eq + Hash> Ejector<K> {
    /// Creates the state of a pool without ejections.
    pub fn new(config: EjectConfig) -> Self {
        Self { config, backends: HashMap::new(), probes: 0 }
    }

    /// Replaces the configuration for future ejections.
    pub fn set_config(&mut self, config: EjectConfig) {
        self.config = config;
    }

    /// Removes backends that left the pool.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        self.backends.retain(|key, _| keep(key));
    }

    /// Returns whether `key` may be used.
    pub fn status(&self, key: &K, now: Instant) -> EjectionStatus {
        let Some(backend) = self.backends.get(key) else {
            return EjectionStatus::Open;
        };
        match (&backend.state, backend.busy_until) {
            (State::Ejected { until, .. }, _) if now < *until => EjectionStatus::Ejected(*until),
            (_, Some(until)) if now < until => EjectionStatus::Busy(until),
            (State::Ejected { probe: Some((_, until)), .. }, _) if now < *until => {
                EjectionStatus::Ejected(*until)
            }
            (State::Ejected { .. }, _) => EjectionStatus::Probe,
            (State::Open | State::Returned { .. }, _) => EjectionStatus::Open,
        }
    }

    /// Takes the one probe and says its number; `None` when there is none to take: another request has it, or the backend
    /// is open or out.
    pub fn begin_probe(&mut self, key: &K, now: Instant) -> Option<u64> {
        if self.status(key, now) != EjectionStatus::Probe {
            return None;
        }
        let State::Ejected { probe, .. } = &mut self.backends.get_mut(key)?.state else { return None };
        self.probes += 1;
        *probe = Some((self.probes, now + self.config.probe_timeout));
        Some(self.probes)
    }

    /// The probe of this number ended with no evidence either way, such as a request that was refused or a client that
    /// went away: the next request may probe. Nothing happens when another has taken over.
    pub fn abandon_probe(&mut self, key: &K, number: u64) {
        if let Some(Backend { state: State::Ejected { probe, .. }, .. }) = self.backends.get_mut(key)
            && probe.is_some_and(|(taken, _)| taken == number)
        {
            *probe = None;
        }
    }

    /// Records the first byte of an answer: the backend is not silent. Success or failure is recorded later.
    pub fn began(&mut self, key: &K) {
        if let Some(backend) = self.backends.get_mut(key) {
            backend.silences = 0;
        }
    }

    /// Records a successful request.
    pub fn succeeded(&mut self, key: &K, now: Instant) {
        let backend = self.backends.entry(key.clone()).or_default();
        (backend.failures, backend.silences) = (0, 0);
        backend.recent.add(true, now);
        match backend.state {
            State::Ejected { until, length, .. } if now >= until => {
                backend.state = State::Returned { forgiven_at: now + length };
            }
            State::Returned { forgiven_at } if now >= forgiven_at => {
                backend.row = 0;
                backend.state = State::Open;
            }
            // A success during an ejection answers a request that was sent before the ejection.
            State::Open | State::Ejected { .. } | State::Returned { .. } => {}
        }
    }

    /// Records a request that failed because of `key`, in a pool of `pool_size` backends. Returns the end of the ejection
    /// if this failure ejected the backend.
    pub fn failed(&mut self, key: &K, pool_size: usize, now: Instant) -> Option<Instant> {
        let backend = self.backends.entry(key.clone()).or_default();
        backend.failures = backend.failures.saturating_add(1);
        self.judge(key, pool_size, false, now)
    }

    /// Records that `key` sent no first byte within its hedge delay and another backend answered the same request. Returns
    /// the same as [`Self::failed`].
    pub fn overtaken(&mut self, key: &K, pool_size: usize, now: Instant) -> Option<Instant> {
        let backend = self.backends.entry(key.clone()).or_default();
        backend.silences = backend.silences.saturating_add(1);
        self.judge(key, pool_size, true, now)
    }

    fn judge(&mut self, key: &K, pool_size: usize, silent: bool, now: Instant) -> Option<Instant> {
        let (out, config) = (self.ejected(), self.config);
        let backend = self.backends.get_mut(key)?;
        backend.recent.add(false, now);
        match backend.state {
            // The request was sent before the ejection and changes nothing.
            State::Ejected { until, .. } if now < until => return None,
            // On probation one failure is enough, and the backend still counts as ejected.
            State::Ejected { .. } => {}
            State::Returned { forgiven_at } if now >= forgiven_at => {
                backend.row = 0;
                backend.state = State::Open;
            }
            State::Open | State::Returned { .. } => {}
        }
        let probation = matches!(backend.state, State::Ejected { .. });
        let in_a_row = backend.failures.max(backend.silences) >= config.consecutive_failures;
        let enough = in_a_row || backend.recent.is_over_share(&config);
        if !(probation || enough) {
            return None;
        }
        let budget = ejectable(pool_size, config.max_ejected_percent);
        if !probation && out >= budget && !(budget > 0 && !silent && self.replace_silent(now)) {
            return None;
        }
        let backend = self.backends.get_mut(key)?;
        let length =
            config.base.saturating_mul(1u32.checked_shl(backend.row).unwrap_or(u32::MAX)).min(config.max);
        backend.row = (backend.row + 1).min(31);
        Some(backend.eject(now, length, silent))
    }

    /// `key` refuses everything that this gateway sends, by what an operator has set up there: its credential, its account.
    /// One answer is enough, and no budget applies, since requests there are lost. Each time in a row is twice as long as the
    /// one before, from `base` to the longest ejection. Says until when it is out.
    pub fn refused(&mut self, key: &K, base: Duration, now: Instant) -> Instant {
        let max = self.config.max;
        let backend = self.backends.entry(key.clone()).or_default();
        match backend.state {
            // Sent before the ejection: no news.
            State::Ejected { until, .. } if now < until => return until,
            State::Returned { forgiven_at } if now >= forgiven_at => backend.row = 0,
            State::Open | State::Ejected { .. } | State::Returned { .. } => {}
        }
        let length =
            base.saturating_mul(1u32.checked_shl(backend.row).unwrap_or(u32::MAX)).min(max.max(base));
        backend.row = (backend.row + 1).min(31);
        backend.eject(now, length, false)
    }

    /// Returns a silent backend to use, to make room for the ejection of another one. Returns false without a silent one.
    fn replace_silent(&mut self, now: Instant) -> bool {
        let silent = |b: &&mut Backend| matches!(b.state, State::Ejected { silent: true, .. });
        let Some(backend) = self.backends.values_mut().find(silent) else { return false };
        backend.state = State::Returned { forgiven_at: now + self.config.base };
        true
    }

    /// Ejects `key` for `length` because of a probe, without regard to the maximum. Returns the end of the ejection.
    pub fn eject_for(&mut self, key: &K, length: Duration, now: Instant) -> Instant {
        self.backends.entry(key.clone()).or_default().eject(now, length, false)
    }

    /// Records an answer of 429 or 503 with Retry-After: the backend is busy, not broken. Returns until when.
    pub fn busy(&mut self, key: &K, retry_after: Duration, now: Instant) -> Instant {
        let until = now + retry_after.min(self.config.busy_max);
        let backend = self.backends.entry(key.clone()).or_default();
        if let State::Ejected { probe, .. } = &mut backend.state {
            *probe = None;
        }
        *backend.busy_until.insert(backend.busy_until.map_or(until, |old| old.max(until)))
    }

    /// The number of backends that are ejected or on probation.
    pub fn ejected(&self) -> usize {
        self.backends.values().filter(|backend| matches!(backend.state, State::Ejected { .. })).count()
    }
}

impl Backend {
    fn eject(&mut self, now: Instant, length: Duration, silent: bool) -> Instant {
        (self.failures, self.silences, self.recent) = (0, 0, Recent::default());
        let (until, length) = match self.state {
            State::Ejected { until, length: old, .. } if until > now + length => (until, old),
            State::Open | State::Ejected { .. } | State::Returned { .. } => (now + length, length),
        };
        self.state = State::Ejected { until, length, probe: None, silent };
        until
    }
}

/// The number of backends of a pool that may be ejected at the same time.
fn ejectable(pool_size: usize, percent: u32) -> usize {
    let kept = if pool_size > 2 { 2 } else { 1 };
    let share = pool_size.saturating_mul(percent as usize) / 100;
    if percent == 0 { 0 } else { share.max(1).min(pool_size.saturating_sub(kept)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_refused_credential_takes_a_backend_out_at_once_and_for_longer_each_time() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        let base = 30 * SECOND;
        assert_eq!(ejector.refused(&1, base, now), now + base, "no budget: the last one of a pool too");
        assert_eq!(ejector.refused(&1, base, now + SECOND), now + base, "sent before: no news");
        let (mut at, mut lengths) = (now + base, Vec::new());
        for _ in 0..5 {
            assert_eq!(ejector.status(&1, at), EjectionStatus::Probe);
            let until = ejector.refused(&1, base, at);
            lengths.push((until - at).as_secs());
            at = until;
        }
        assert_eq!(lengths, [60, 120, 240, 300, 300]);
        ejector.succeeded(&1, at);
        assert_eq!(ejector.status(&1, at), EjectionStatus::Open, "the operator mended it");
        assert_eq!(ejector.refused(&1, base, at + 300 * SECOND), at + 330 * SECOND, "the row is forgotten");
    }

    fn fail(ejector: &mut Ejector<u32>, key: u32, pool: usize, now: Instant, times: u32) -> Option<Instant> {
        (0..times).filter_map(|_| ejector.failed(&key, pool, now)).last()
    }

    #[test]
    fn three_failures_in_a_row_eject_and_a_success_between_does_not() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        assert_eq!(fail(&mut ejector, 1, 3, now, 2), None);
        ejector.succeeded(&1, now);
        assert_eq!(fail(&mut ejector, 1, 3, now, 2), None);
        assert_eq!(ejector.failed(&1, 3, now), Some(now + 5 * SECOND));
        assert_eq!(ejector.status(&1, now), EjectionStatus::Ejected(now + 5 * SECOND));
        assert_eq!(ejector.status(&2, now), EjectionStatus::Open);
    }

    #[test]
    fn half_of_the_recent_requests_failing_ejects_though_none_fail_in_a_row() {
        let (mut ejector, start) = (Ejector::new(EjectConfig::default()), Instant::now());
        let at = |i: u32| start + i * SECOND / 4;
        let mut out = None;
        for i in 0..10 {
            assert_eq!(out, None, "{i} are too few");
            if i % 2 == 0 {
                ejector.succeeded(&1, at(i));
            } else {
                out = ejector.failed(&1, 3, at(i));
            }
        }
        assert!(out.is_some());
        for i in 0..1000 {
            ejector.succeeded(&2, at(i));
            ejector.succeeded(&2, at(i));
            assert_eq!(ejector.failed(&2, 3, at(i)), None, "a third is not half");
        }
        // One success and one failure in ten seconds: older failures do not count.
        for i in 0..20 {
            ejector.succeeded(&3, start + 11 * i * SECOND);
            assert_eq!(ejector.failed(&3, 3, start + 11 * i * SECOND), None);
        }
    }

    #[test]
    fn silence_ejects_only_when_others_answered_and_a_first_byte_ends_it() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        for _ in 0..3 {
            assert_eq!(ejector.overtaken(&1, 3, now), None);
            assert_eq!(ejector.overtaken(&1, 3, now), None);
            ejector.began(&1);
        }
        let slow = Ejector::new(EjectConfig { failure_min_requests: 1000, ..EjectConfig::default() });
        ejector = slow;
        ejector.failed(&1, 3, now);
        ejector.failed(&1, 3, now);
        ejector.began(&1);
        assert!(ejector.failed(&1, 3, now).is_some(), "a first byte does not excuse what fails afterwards");
        let until = fail(&mut ejector, 2, 5, now, 0);
        assert_eq!(until, None);
        ejector.overtaken(&2, 5, now);
        ejector.overtaken(&2, 5, now);
        assert!(ejector.overtaken(&2, 5, now).is_some());
    }

    #[test]
    fn one_that_fails_takes_the_place_of_one_that_was_only_silent() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        (0..3).for_each(|_| {
            ejector.overtaken(&1, 3, now);
        });
        assert_eq!(ejector.ejected(), 1, "the budget of three is one");
        assert_eq!(
            (0..9).filter_map(|_| ejector.overtaken(&2, 3, now)).count(),
            0,
            "silence gives way to nothing"
        );
        assert!(fail(&mut ejector, 3, 3, now, 3).is_some());
        assert_eq!((ejector.status(&1, now), ejector.ejected()), (EjectionStatus::Open, 1));
        assert_eq!(fail(&mut ejector, 2, 3, now, 9), None, "one that failed keeps its place");
    }

    #[test]
    fn ejections_in_a_row_double_up_to_the_bound() {
        let (mut ejector, mut now) = (Ejector::new(EjectConfig::default()), Instant::now());
        let mut lengths = Vec::new();
        let mut until = fail(&mut ejector, 1, 3, now, 3).unwrap();
        for _ in 0..40 {
            lengths.push((until - now).as_secs());
            now = until;
            assert!(ejector.begin_probe(&1, now).is_some());
            until = ejector.failed(&1, 3, now).unwrap();
        }
        assert_eq!(lengths[..8], [5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(lengths[39], 300);
    }

    #[test]
    fn a_backend_that_flaps_stays_out_longer_and_one_that_lasts_is_forgiven() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        fail(&mut ejector, 1, 3, now, 3);
        let back = now + 5 * SECOND;
        ejector.succeeded(&1, back);
        assert_eq!(ejector.status(&1, back), EjectionStatus::Open);
        assert_eq!(fail(&mut ejector, 1, 3, back + SECOND, 3), Some(back + 11 * SECOND));
        let again = back + 11 * SECOND;
        ejector.succeeded(&1, again);
        let later = again + 10 * SECOND;
        assert_eq!(fail(&mut ejector, 1, 3, later, 3), Some(later + 5 * SECOND));
    }

    #[test]
    fn one_probe_at_a_time_until_a_success() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        let until = fail(&mut ejector, 1, 3, now, 3).unwrap();
        assert_eq!(ejector.begin_probe(&1, now), None);
        assert_eq!(ejector.status(&1, until), EjectionStatus::Probe);
        let first = ejector.begin_probe(&1, until).expect("the first");
        assert_eq!(ejector.begin_probe(&1, until), None, "the second is turned away");
        ejector.abandon_probe(&1, first);
        let second = ejector.begin_probe(&1, until).expect("the next");
        let late = until + 10 * SECOND;
        let third = ejector.begin_probe(&1, late).expect("a probe that never reports does not lock it");
        ejector.abandon_probe(&1, second);
        assert_eq!(ejector.begin_probe(&1, late), None, "what was overdue gives back nobody else's probe");
        ejector.succeeded(&1, late);
        assert_eq!(ejector.status(&1, late), EjectionStatus::Open);
        ejector.abandon_probe(&1, third);
        assert_eq!(ejector.begin_probe(&1, late), None, "one that is open needs no probe");
    }

    #[test]
    fn late_answers_neither_shorten_nor_lengthen_an_ejection() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        let until = fail(&mut ejector, 1, 3, now, 3).unwrap();
        ejector.succeeded(&1, now + SECOND);
        assert_eq!(fail(&mut ejector, 1, 3, now + SECOND, 9), None);
        assert_eq!(ejector.status(&1, now + SECOND), EjectionStatus::Ejected(until));
    }

    #[test]
    fn the_longer_ejection_wins_whichever_comes_first() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        assert_eq!(ejector.eject_for(&1, 60 * SECOND, now), now + 60 * SECOND);
        assert_eq!(ejector.eject_for(&1, 5 * SECOND, now + SECOND), now + 60 * SECOND);
        assert_eq!(ejector.eject_for(&1, 90 * SECOND, now + SECOND), now + 91 * SECOND);
        assert_eq!(ejector.busy(&2, 600 * SECOND, now), now + 60 * SECOND);
        assert_eq!(ejector.busy(&2, SECOND, now), now + 60 * SECOND);
        assert_eq!(ejector.status(&2, now), EjectionStatus::Busy(now + 60 * SECOND));
        assert_eq!(ejector.status(&2, now + 60 * SECOND), EjectionStatus::Open);
    }

    #[test]
    fn the_budget_keeps_enough_backends() {
        for (pool, percent, out) in
            [(1, 100, 0), (2, 100, 1), (3, 100, 1), (4, 100, 2), (10, 50, 5), (10, 1, 1), (10, 0, 0)]
        {
            let config = EjectConfig { max_ejected_percent: percent, ..EjectConfig::default() };
            let (mut ejector, now) = (Ejector::new(config), Instant::now());
            for key in 0..pool {
                fail(&mut ejector, key, pool as usize, now, 10);
            }
            assert_eq!(ejector.ejected(), out, "{pool} {percent}");
        }
    }

    #[test]
    fn one_that_left_the_pool_frees_its_place() {
        let (mut ejector, now) = (Ejector::new(EjectConfig::default()), Instant::now());
        fail(&mut ejector, 1, 3, now, 3);
        assert_eq!(fail(&mut ejector, 2, 3, now, 5), None);
        ejector.retain(|key| *key != 1);
        assert!(ejector.failed(&2, 3, now).is_some());
    }
}
