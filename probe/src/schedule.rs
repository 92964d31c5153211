//! The schedule of an observer's probes. Pure: times are arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::resource::HealthProfile;
use weir_proto::v1::{ProbeOutcome, ProbeTier};

use crate::answer::Finding;

/// The pause between the probes of a confirmation, and after a first failure.
const AGAIN: Duration = Duration::from_millis(500);
/// The pause after a probe that could not be made.
const NOT_MADE_AGAIN: Duration = Duration::from_secs(1);
/// The number of liveness probes of an order, and after a first failure.
const CONFIRMATION: u32 = 2;
/// The delay of the first deep probe, because measurements during a start are not representative.
const DEEP_FIRST: Duration = Duration::from_secs(15);
/// A time that is nearer than this share of the interval belongs to the last probe: the clock was set back slightly.
const SAME_PROBE: f64 = 0.05;
/// The random share of the interval that spreads the probes of many backends.
const JITTER: f64 = 0.05;

/// A backend at a tier.
pub type Key = (String, ProbeTier);

/// The current time of both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The monotonic time, by which probes are due.
    pub instant: Instant,
    /// The Unix time, by which observers probe one after the other.
    pub unix: Duration,
}

/// The time to this observer's next probe. Probes are aligned to Unix time, so that observers probe one after the other
/// without communication. With a wrong clock two observers may probe at the same time, which does no harm.
fn until_next_probe(interval: Duration, (turn, turns): (u32, u32), unix: Duration, jitter: f64) -> Duration {
    let interval = interval.as_secs_f64().max(0.001);
    let phase = interval * f64::from(turn) / f64::from(turns.max(1));
    let wait = interval - (unix.as_secs_f64() - phase).rem_euclid(interval);
    let wait = if wait < interval * SAME_PROBE { wait + interval } else { wait };
    Duration::from_secs_f64(wait + interval * JITTER * jitter)
}

/// The interval between two probes of one observer.
pub const fn interval(profile: &HealthProfile, tier: ProbeTier) -> Duration {
    match tier {
        ProbeTier::Unspecified | ProbeTier::Liveness => profile.liveness_interval,
        ProbeTier::Readiness => profile.readiness_interval,
        ProbeTier::Deep => profile.deep_interval,
    }
}

#[derive(Debug, Default)]
struct Task {
    /// The index of this observer and the number of probers; `None` without an assignment.
    turn: Option<(u32, u32)>,
    due: Option<Instant>,
    /// Probes that follow the due one, even if it is not answered yet, because a probe that times out must not delay the next
    /// one.
    extra: u32,
    failing: u32,
    in_flight: u32,
    /// The number of ordered probes among them.
    ordered: u32,
    /// This observer itself wants to know, whether it is assigned or not.
    wanted: bool,
}

/// The end of a probe, as far as the schedule needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The backend passed.
    Good,
    /// The probe failed.
    Bad,
    /// The backend is loading its model; another probe now would have the same outcome.
    Loading,
    /// The probe could not be made.
    NotMade,
}

impl End {
    /// The end of a probe with this finding.
    pub const fn of(finding: &Finding) -> Self {
        match finding.outcome {
            _ if finding.is_good() => Self::Good,
            ProbeOutcome::Loading => Self::Loading,
            _ => Self::Bad,
        }
    }
}

/// All probes of one observer.
#[derive(Debug, Default)]
pub struct Schedule {
    tasks: BTreeMap<Key, Task>,
}

impl Schedule {
    /// Applies assignments with the index of this observer and the number of probers. New backends are probed at once, deep
    /// probes follow later. A changed index applies from the current interval on. Otherwise no observer would probe while
    /// assignments change.
    pub fn assign(
        &mut self,
        assigned: &BTreeMap<Key, (u32, u32)>,
        interval: impl Fn(&Key) -> Duration,
        now: Now,
    ) {
        for (key, task) in &mut self.tasks {
            let before = std::mem::replace(&mut task.turn, assigned.get(key).copied());
            match task.turn {
                None if task.ordered == 0 && !task.wanted => task.due = None,
                Some(turn) if before.is_some_and(|before| before != turn) => {
                    let next = now.instant + until_next_probe(interval(key), turn, now.unix, 0.0);
                    task.due = task.due.map(|due| due.min(next));
                }
                _ => {}
            }
        }
        for (key, turn) in assigned {
            let task = self.tasks.entry(key.clone()).or_default();
            task.turn = Some(*turn);
            let wait = if key.1 == ProbeTier::Deep { DEEP_FIRST } else { Duration::ZERO };
            // A probe in progress is scheduled again when it ends.
            if task.in_flight == 0 {
                task.due.get_or_insert(now.instant + wait);
            }
        }
        self.tasks.retain(|_, task| task.turn.is_some() || task.due.is_some() || task.in_flight > 0);
    }

    /// Schedules a probe now, whether the backend is assigned or not.
    pub fn order(&mut self, key: Key, now: Instant) {
        let probes = if key.1 == ProbeTier::Liveness { CONFIRMATION } else { 1 };
        // A probe in progress started before the order and does not count for it.
        let task = self.tasks.entry(key).or_default();
        (task.extra, task.due) = (probes - 1, Some(now));
        task.ordered = task.in_flight + probes;
    }

    /// Schedules one probe now for this observer's own use, and its confirmation if it fails. An observer that is assigned
    /// learns as much in its turn.
    pub fn want(&mut self, key: Key, now: Instant) {
        let task = self.tasks.entry(key).or_default();
        if task.turn.is_none() && task.in_flight == 0 {
            task.due.get_or_insert(now);
            task.wanted = true;
        }
    }

    /// Whether this observer has a turn there.
    pub fn is_assigned(&self, key: &Key) -> bool {
        self.tasks.get(key).is_some_and(|task| task.turn.is_some())
    }

    /// Removes deleted backends.
    pub fn retain(&mut self, backends: &BTreeSet<String>) {
        self.tasks.retain(|(backend, _), _| backends.contains(backend));
    }

    /// Removes one backend, whose identity changed.
    pub fn forget(&mut self, backend: &str) {
        self.tasks.retain(|(of, _), _| of != backend);
    }

    /// A backend is asked in another way from now on: it is probed anew at once, by who is assigned. Deep probes follow in
    /// their turn.
    pub fn renew(&mut self, backend: &str, now: Instant) {
        for ((of, tier), task) in &mut self.tasks {
            if of == backend && *tier != ProbeTier::Deep && task.turn.is_some() {
                // What a probe in progress finds is of before.
                (task.failing, task.due) = (0, Some(now));
            }
        }
    }

    /// Takes what is due, at most so many. Each must be given back to [`Self::finished`].
    pub fn take_due(&mut self, now: Instant, most: usize) -> Vec<Key> {
        let due = |task: &Task| task.due.is_some_and(|due| due <= now);
        let mut taken = Vec::new();
        for (key, task) in self.tasks.iter_mut().filter(|(_, task)| due(task)).take(most) {
            task.in_flight += 1;
            task.due = (task.extra > 0).then_some(now + AGAIN);
            task.extra = task.extra.saturating_sub(1);
            taken.push(key.clone());
        }
        taken
    }

    /// A probe ended. `jitter` is a random number from 0 to 1. Says whether it is news.
    pub fn finished(&mut self, key: &Key, end: End, profile: &HealthProfile, now: Now, jitter: f64) -> bool {
        let Some(task) = self.tasks.get_mut(key) else { return false };
        task.in_flight = task.in_flight.saturating_sub(1);
        let before = task.failing;
        task.failing = match end {
            End::Good => 0,
            End::Bad | End::Loading => before.saturating_add(1),
            End::NotMade => before,
        };
        if end == End::NotMade {
            if task.turn.is_some() || task.ordered > 0 || task.wanted {
                task.due.get_or_insert(now.instant + NOT_MADE_AGAIN);
            } else if task.due.is_none() && task.in_flight == 0 {
                self.tasks.remove(key);
            }
            return false;
        }
        let asked = task.ordered > 0;
        task.ordered = task.ordered.saturating_sub(1);
        // A first failure is probed again at once, a lasting one in its regular turns. Deep probes eject nothing, so
        // they need no confirmation.
        let again = end == End::Bad && key.1 != ProbeTier::Deep && (1..=CONFIRMATION).contains(&task.failing);
        task.wanted &= again;
        if task.in_flight == 0 && task.due.is_none() {
            task.due = if again && !asked {
                Some(now.instant + AGAIN)
            } else {
                let next = |turn| until_next_probe(interval(profile, key.1), turn, now.unix, jitter);
                task.turn.map(|turn| now.instant + next(turn))
            };
        }
        let news = asked || end != End::Good || before > 0;
        if task.due.is_none() && task.in_flight == 0 {
            self.tasks.remove(key);
        }
        news
    }

    /// When the next probe is due.
    pub fn next(&self) -> Option<Instant> {
        self.tasks.values().filter_map(|task| task.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A time of day.
    const DAYS: Duration = Duration::from_secs(1_000_000);

    fn key(tier: ProbeTier) -> Key {
        ("b".into(), tier)
    }

    fn both(instant: Instant, unix: Duration) -> Now {
        Now { instant, unix }
    }

    fn assign(schedule: &mut Schedule, assigned: &BTreeMap<Key, (u32, u32)>, now: Instant) {
        let profile = HealthProfile::default();
        schedule.assign(assigned, |key| interval(&profile, key.1), both(now, DAYS));
    }

    fn assigned(tier: ProbeTier, turn: (u32, u32)) -> BTreeMap<Key, (u32, u32)> {
        [(key(tier), turn)].into()
    }

    #[test]
    fn probes_of_three_gateways_divide_the_interval() {
        let interval = Duration::from_secs(5);
        // At 1000 s, a multiple of the interval: each gateway waits for its own third.
        let at = Duration::from_secs(1000);
        let waits: Vec<f64> =
            (0..3).map(|t| until_next_probe(interval, (t, 3), at, 0.0).as_secs_f64()).collect();
        assert!((waits[0] - 5.0).abs() < 1e-6, "{waits:?}");
        assert!((waits[1] - 5.0 / 3.0).abs() < 1e-6, "{waits:?}");
        assert!((waits[2] - 10.0 / 3.0).abs() < 1e-6, "{waits:?}");
        // A little early or late for the turn: not twice in one.
        let early = until_next_probe(interval, (0, 3), at - Duration::from_millis(100), 0.0);
        assert!(early > interval, "{early:?}");
    }

    #[test]
    fn an_hour_has_as_many_probes_as_intervals() {
        let profile = HealthProfile::default();
        for (tier, expected) in
            [(ProbeTier::Liveness, 720), (ProbeTier::Readiness, 120), (ProbeTier::Deep, 12)]
        {
            let (mut schedule, start) = (Schedule::default(), Instant::now());
            assign(&mut schedule, &assigned(tier, (1, 3)), start);
            let (mut probes, mut jitter) = (0_i32, 0.0);
            while let Some(now) = schedule.next().filter(|next| *next < start + Duration::from_secs(3600)) {
                for key in schedule.take_due(now, 10) {
                    probes += 1;
                    jitter = (jitter + 0.37) % 1.0;
                    let now = both(now, DAYS + (now - start));
                    schedule.finished(&key, End::Good, &profile, now, jitter);
                }
            }
            // The first probe is at once, before the first turn.
            assert!((expected..=expected + 2).contains(&probes), "{tier:?}: {probes}");
        }
    }

    #[test]
    fn a_first_failure_is_probed_again_at_once_and_a_lasting_one_in_its_turn() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let profile = HealthProfile::default();
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        let mut waits = Vec::new();
        let mut at = now;
        for _ in 0..4 {
            assert_eq!(schedule.take_due(at, 10).len(), 1);
            assert!(schedule.finished(
                &key(ProbeTier::Liveness),
                End::Bad,
                &profile,
                both(at, Duration::ZERO),
                0.0
            ));
            let next = schedule.next().unwrap();
            waits.push(next - at);
            at = next;
        }
        assert_eq!(waits[..2], [AGAIN, AGAIN]);
        assert!(waits[2] > Duration::from_secs(1) && waits[3] > Duration::from_secs(1), "{waits:?}");
    }

    #[test]
    fn what_is_asked_in_another_way_is_probed_at_once_by_who_is_assigned() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let profile = HealthProfile::default();
        let all =
            [ProbeTier::Liveness, ProbeTier::Readiness, ProbeTier::Deep].map(|tier| (key(tier), (0, 1)));
        assign(&mut schedule, &all.into(), now);
        for key in schedule.take_due(now, 10) {
            schedule.finished(&key, End::Bad, &profile, both(now, DAYS), 0.0);
        }
        let later = now + AGAIN / 2;
        assert!(schedule.take_due(later, 10).is_empty());
        schedule.renew("another", later);
        assert!(schedule.take_due(later, 10).is_empty());
        schedule.renew("b", later);
        let due: Vec<ProbeTier> = schedule.take_due(later, 10).into_iter().map(|(_, tier)| tier).collect();
        assert_eq!(due, [ProbeTier::Liveness, ProbeTier::Readiness]);
    }

    #[test]
    fn an_order_is_two_liveness_probes_or_one_of_another_tier_and_then_over() {
        for (tier, probes) in [(ProbeTier::Liveness, 2), (ProbeTier::Readiness, 1)] {
            let (mut schedule, mut now) = (Schedule::default(), Instant::now());
            schedule.order(key(tier), now);
            let mut seen = 0;
            while let Some(next) = schedule.next() {
                now = next;
                seen += schedule.take_due(now, 10).len();
                let news = schedule.finished(
                    &key(tier),
                    End::Good,
                    &HealthProfile::default(),
                    both(now, Duration::ZERO),
                    0.0,
                );
                assert!(news || seen == probes);
            }
            assert_eq!(seen, probes);
        }
    }

    #[test]
    fn a_probe_that_waits_in_vain_does_not_hold_up_the_next() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 3)), now);
        let liveness = key(ProbeTier::Liveness);
        assert_eq!(schedule.take_due(now, 10).len(), 1, "a regular probe that hangs");
        schedule.order(liveness.clone(), now + AGAIN);
        assert_eq!(schedule.take_due(now + AGAIN, 10).len(), 1);
        assert_eq!(schedule.take_due(now + 2 * AGAIN, 10).len(), 1);
        assert_eq!(schedule.next(), None, "three are under way, and no more are wanted");
        for late in 4..7 {
            let at = both(now + late * AGAIN, Duration::ZERO);
            assert!(schedule.finished(&liveness, End::Bad, &HealthProfile::default(), at, 0.0));
        }
        assert!(schedule.next().is_some_and(|next| next > now + 6 * AGAIN), "back to its turn");
    }

    #[test]
    fn what_could_not_be_asked_is_asked_soon_and_is_no_news() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (readiness, profile) = (key(ProbeTier::Readiness), HealthProfile::default());
        schedule.order(readiness.clone(), now);
        let mut at = now;
        for _ in 0..3 {
            assert_eq!(schedule.take_due(at, 10).len(), 1);
            assert!(!schedule.finished(&readiness, End::NotMade, &profile, both(at, Duration::ZERO), 0.0));
            assert_eq!(schedule.next(), Some(at + NOT_MADE_AGAIN));
            at += NOT_MADE_AGAIN;
        }
        assert_eq!(schedule.take_due(at, 10).len(), 1);
        assert!(
            schedule.finished(&readiness, End::Good, &profile, both(at, Duration::ZERO), 0.0),
            "what was ordered"
        );
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn what_is_under_way_is_not_begun_again_by_being_assigned_still() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        let all = assigned(ProbeTier::Liveness, (0, 1));
        assign(&mut schedule, &all, now);
        assert_eq!(schedule.take_due(now, 10).len(), 1);
        assign(&mut schedule, &all, now);
        assert_eq!(schedule.next(), None);
        schedule.finished(&liveness, End::Good, &profile, both(now, DAYS), 0.0);
        assign(&mut schedule, &all, now);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
    }

    #[test]
    fn another_turn_is_taken_at_once_and_never_puts_a_probe_off() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        schedule.take_due(now, 10);
        schedule.finished(&liveness, End::Good, &profile, both(now, DAYS), 0.0);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (1, 3)), now);
        assert_eq!(schedule.next().map(|next| (next - now).as_millis()), Some(1666));
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (2, 3)), now);
        assert_eq!(schedule.next().map(|next| (next - now).as_millis()), Some(1666));
    }

    #[test]
    fn what_this_observer_wants_to_know_is_probed_once_and_confirmed_if_it_fails() {
        let profile = HealthProfile::default();
        for (end, probes) in [(End::Good, 1), (End::Loading, 1), (End::Bad, 3)] {
            let (mut schedule, mut now) = (Schedule::default(), Instant::now());
            let liveness = key(ProbeTier::Liveness);
            schedule.want(liveness.clone(), now);
            let mut seen = 0;
            while let Some(next) = schedule.next() {
                now = next;
                // Assignments of others change nothing, and one probe at a time is enough.
                assign(&mut schedule, &BTreeMap::new(), now);
                assert_eq!(schedule.take_due(now, 10).len(), 1);
                schedule.want(liveness.clone(), now);
                seen += 1;
                let news = schedule.finished(&liveness, end, &profile, both(now, DAYS), 0.0);
                assert_eq!(news, end != End::Good);
            }
            assert_eq!(seen, probes, "{end:?}");
            assert!(!schedule.is_assigned(&liveness));
        }
    }

    #[test]
    fn an_observer_with_a_turn_wants_no_other_probe() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        schedule.take_due(now, 10);
        schedule.finished(&liveness, End::Good, &profile, both(now, DAYS), 0.0);
        schedule.want(liveness.clone(), now);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
        assert!(schedule.is_assigned(&liveness));
    }

    #[test]
    fn what_is_taken_away_is_no_longer_probed() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assign(&mut schedule, &assigned(ProbeTier::Deep, (0, 1)), now);
        assert_eq!(schedule.next(), Some(now + DEEP_FIRST));
        assign(&mut schedule, &BTreeMap::new(), now);
        assert_eq!(schedule.next(), None);
        assign(&mut schedule, &assigned(ProbeTier::Deep, (0, 1)), now);
        schedule.retain(&BTreeSet::new());
        assert_eq!(schedule.next(), None);
    }

    #[test]
    fn both_probes_of_an_order_are_made_while_the_first_is_not_answered_whatever_else_changes() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        schedule.order(liveness.clone(), now);
        assert_eq!((schedule.take_due(now, 10).len(), schedule.take_due(now, 10).len()), (1, 0));
        // Orders and assignments of others come in between.
        assign(&mut schedule, &BTreeMap::new(), now);
        assert_eq!(
            schedule.take_due(now + AGAIN, 10).len(),
            1,
            "it does not wait for the answer to the first"
        );
        for late in [4, 5] {
            assert!(schedule.finished(&liveness, End::Bad, &profile, both(now + AGAIN * late, DAYS), 0.0));
        }
        assert_eq!(schedule.next(), None, "and no more: it has no turn");
    }

    #[test]
    fn a_backend_that_moved_is_probed_anew() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        schedule.take_due(now, 10);
        schedule.finished(&liveness, End::Good, &profile, both(now, DAYS), 0.0);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
        schedule.forget("b");
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        assert_eq!(schedule.next(), Some(now));
    }
}
