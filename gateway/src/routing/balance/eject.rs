//! Local ejection: this gateway leaves a backend out on its own passive evidence, within milliseconds.
//!
//! Invariants:
//! - The budget holds for ejections on passive evidence: at most `max_ejected_percent` of a pool (one at least), never
//!   the last two of more than two, never the last one. A backend that is coming back counts as ejected.
//! - Failures in a row eject, and so does a share of failures with good answers between them.
//! - Silence counts only once another backend has answered the same request: then it is not the request that is slow.
//! - When the budget is spent, one that fails takes the place of one that was only silent: silence can be ours.
//! - A longer ejection is never shortened by a later one, nor by answers to requests sent before it.
//! - After an ejection one request at a time is let through until one succeeds.
//! - Each ejection in a row doubles; the row ends when the backend served for as long as its last ejection took.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use tokio::time::Instant;

/// Seconds over which the share of failures is taken.
const WINDOW: usize = 10;

/// When and for how long to eject.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EjectConfig {
    /// Failures in a row that eject.
    pub consecutive_failures: u32,
    /// The first ejection's length.
    pub base: Duration,
    /// The longest an ejection gets by doubling.
    pub max: Duration,
    /// Share of the pool that may be ejected.
    pub max_ejected_percent: u32,
    /// Share of failures over the last `WINDOW` seconds that ejects.
    pub failure_percent: u32,
    /// Requests below which that share says nothing.
    pub failure_min_requests: u32,
    /// The longest time a backend is believed to be busy; a larger Retry-After is cut.
    pub busy_max: Duration,
    /// How long a probe may take before another is let through; covers one whose outcome was never told.
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
    /// Use it.
    Open,
    /// One request may try it: call [`Ejector::begin_probe`] when it is chosen.
    Probe,
    /// Left out, since it failed; when this ends.
    Ejected(Instant),
    /// Left out, since it said it was busy; when this ends.
    Busy(Instant),
}

/// What is known of one backend.
#[derive(Debug, Default)]
struct Backend {
    failures: u32,
    /// Requests in a row that another backend answered first.
    silences: u32,
    recent: Recent,
    /// Ejections in a row.
    row: u32,
    busy_until: Option<Instant>,
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Open,
    /// Left out, and after `until` on probation.
    Ejected {
        until: Instant,
        length: Duration,
        probe_until: Option<Instant>,
        /// For silence alone.
        silent: bool,
    },
    /// Serving again; at `forgiven_at` the row of ejections is forgotten.
    Returned { forgiven_at: Instant },
}

/// Good and bad outcomes of the last [`WINDOW`] seconds, by second.
#[derive(Debug, Default)]
struct Recent {
    seconds: [(u32, u32); WINDOW],
    /// When the newest of them began.
    newest: Option<Instant>,
}

impl Recent {
    fn add(&mut self, good: bool, now: Instant) {
        let newest = *self.newest.get_or_insert(now);
        let passed = now.saturating_duration_since(newest).as_secs();
        if passed > 0 {
            let gone = usize::try_from(passed).map_or(WINDOW, |p| p.min(WINDOW));
            self.seconds.rotate_right(gone);
            self.seconds[..gone].fill((0, 0));
            self.newest = Some(newest + Duration::from_secs(passed));
        }
        let (goods, bads) = &mut self.seconds[0];
        *(if good { goods } else { bads }) += 1;
    }

    fn is_bad(&self, config: &EjectConfig) -> bool {
        let sum = |of: fn(&(u32, u32)) -> u32| self.seconds.iter().map(|s| u64::from(of(s))).sum::<u64>();
        let (good, bad) = (sum(|s| s.0), sum(|s| s.1));
        let all = good + bad;
        all >= u64::from(config.failure_min_requests) && bad * 100 >= all * u64::from(config.failure_percent)
    }
}

/// The ejections of one pool.
#[derive(Debug)]
pub struct Ejector<K> {
    config: EjectConfig,
    backends: HashMap<K, Backend>,
}

impl<K: Clone + Eq + Hash> Ejector<K> {
    /// Starts with every backend open.
    pub fn new(config: EjectConfig) -> Self {
        Self { config, backends: HashMap::new() }
    }

    /// Changes the rules for what happens from now on.
    pub fn set_config(&mut self, config: EjectConfig) {
        self.config = config;
    }

    /// Forgets backends that left the pool.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) {
        self.backends.retain(|key, _| keep(key));
    }

    /// Whether `key` may be used.
    pub fn status(&self, key: &K, now: Instant) -> EjectionStatus {
        let Some(backend) = self.backends.get(key) else {
            return EjectionStatus::Open;
        };
        match (&backend.state, backend.busy_until) {
            (State::Ejected { until, .. }, _) if now < *until => EjectionStatus::Ejected(*until),
            (_, Some(until)) if now < until => EjectionStatus::Busy(until),
            (State::Ejected { probe_until: Some(until), .. }, _) if now < *until => {
                EjectionStatus::Ejected(*until)
            }
            (State::Ejected { .. }, _) => EjectionStatus::Probe,
            (State::Open | State::Returned { .. }, _) => EjectionStatus::Open,
        }
    }

    /// Takes the one probe; false when another request has it already, or the backend is out.
    pub fn begin_probe(&mut self, key: &K, now: Instant) -> bool {
        match self.status(key, now) {
            EjectionStatus::Open => true,
            EjectionStatus::Ejected(_) | EjectionStatus::Busy(_) => false,
            EjectionStatus::Probe => {
                let timeout = self.config.probe_timeout;
                if let Some(Backend { state: State::Ejected { probe_until, .. }, .. }) =
                    self.backends.get_mut(key)
                {
                    *probe_until = Some(now + timeout);
                }
                true
            }
        }
    }

    /// The probe ended with no evidence either way, such as a client that went away: the next request may probe.
    pub fn abandon_probe(&mut self, key: &K) {
        if let Some(Backend { state: State::Ejected { probe_until, .. }, .. }) = self.backends.get_mut(key) {
            *probe_until = None;
        }
    }

    /// `key` began to answer: it is not silent. Whether the answer is good is not known yet.
    pub fn began(&mut self, key: &K) {
        if let Some(backend) = self.backends.get_mut(key) {
            backend.silences = 0;
        }
    }

    /// A request to `key` succeeded.
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
            // A success while ejected answers a request sent before: it proves nothing of now.
            State::Open | State::Ejected { .. } | State::Returned { .. } => {}
        }
    }

    /// A request to `key`, in a pool of `pool_size`, failed by the backend's fault. Says until when the backend is
    /// ejected, if that is what this failure did.
    pub fn failed(&mut self, key: &K, pool_size: usize, now: Instant) -> Option<Instant> {
        let backend = self.backends.entry(key.clone()).or_default();
        backend.failures = backend.failures.saturating_add(1);
        self.judge(key, pool_size, false, now)
    }

    /// `key` was silent for longer than it ever needs, and another backend answered the same request. Says as
    /// [`Self::failed`] does.
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
            // Sent before the ejection: no news.
            State::Ejected { until, .. } if now < until => return None,
            // On probation one failure is enough, and the budget was spent before.
            State::Ejected { .. } => {}
            State::Returned { forgiven_at } if now >= forgiven_at => {
                backend.row = 0;
                backend.state = State::Open;
            }
            State::Open | State::Returned { .. } => {}
        }
        let probation = matches!(backend.state, State::Ejected { .. });
        let in_a_row = backend.failures.max(backend.silences) >= config.consecutive_failures;
        let enough = in_a_row || backend.recent.is_bad(&config);
        if !(probation || enough) {
            return None;
        }
        let budget = ejectable(pool_size, config.max_ejected_percent);
        if !probation && out >= budget && !(budget > 0 && !silent && self.give_place(now)) {
            return None;
        }
        let backend = self.backends.get_mut(key)?;
        let length =
            config.base.saturating_mul(1u32.checked_shl(backend.row).unwrap_or(u32::MAX)).min(config.max);
        backend.row = (backend.row + 1).min(31);
        Some(backend.eject(now, length, silent))
    }

    /// Takes one back that was only silent. False: there is none.
    fn give_place(&mut self, now: Instant) -> bool {
        let silent = |b: &&mut Backend| matches!(b.state, State::Ejected { silent: true, .. });
        let Some(backend) = self.backends.values_mut().find(silent) else { return false };
        backend.state = State::Returned { forgiven_at: now + self.config.base };
        true
    }

    /// Leaves `key` out for `length` on the word of someone else, budget or not. Says until when it is out now.
    pub fn eject_for(&mut self, key: &K, length: Duration, now: Instant) -> Instant {
        self.backends.entry(key.clone()).or_default().eject(now, length, false)
    }

    /// `key` asked to be left alone (429 or 503 with Retry-After). It is busy, not dead. Says until when.
    pub fn busy(&mut self, key: &K, retry_after: Duration, now: Instant) -> Instant {
        let until = now + retry_after.min(self.config.busy_max);
        let backend = self.backends.entry(key.clone()).or_default();
        if let State::Ejected { probe_until, .. } = &mut backend.state {
            *probe_until = None;
        }
        *backend.busy_until.insert(backend.busy_until.map_or(until, |old| old.max(until)))
    }

    /// How many backends are ejected or on probation.
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
        self.state = State::Ejected { until, length, probe_until: None, silent };
        until
    }
}

/// How many of a pool may be out at once.
fn ejectable(pool_size: usize, percent: u32) -> usize {
    let kept = if pool_size > 2 { 2 } else { 1 };
    let share = pool_size.saturating_mul(percent as usize) / 100;
    if percent == 0 { 0 } else { share.max(1).min(pool_size.saturating_sub(kept)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

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
        // Old failures are no news: one good answer and one bad one in ten seconds.
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
            assert!(ejector.begin_probe(&1, now));
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
        assert!(!ejector.begin_probe(&1, now));
        assert_eq!(ejector.status(&1, until), EjectionStatus::Probe);
        assert!(ejector.begin_probe(&1, until));
        assert!(!ejector.begin_probe(&1, until), "the second is turned away");
        ejector.abandon_probe(&1);
        assert!(ejector.begin_probe(&1, until));
        assert!(ejector.begin_probe(&1, until + 10 * SECOND), "a probe that never reports does not lock it");
        ejector.succeeded(&1, until + 10 * SECOND);
        assert_eq!(ejector.status(&1, until + 10 * SECOND), EjectionStatus::Open);
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
