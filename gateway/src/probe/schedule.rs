//! When to look at what. Pure: times are arguments.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::resource::HealthProfile;
use weir_proto::v1::ProbeTier;

/// Between the looks of a confirmation, and after a first failure.
pub(super) const AGAIN: Duration = Duration::from_millis(500);
/// After a look that could not be made.
const UNASKED_AGAIN: Duration = Duration::from_secs(1);
/// Looks at liveness that an order asks for, and that follow a first failure.
const LOOKS: u32 = 2;
/// The first deep probe waits so long: a start is not the time to measure anything.
const DEEP_FIRST: Duration = Duration::from_secs(15);
/// A turn that is nearer than this share of the interval is the one just taken: a clock was set back a little.
const SAME_TURN: f64 = 0.05;
/// Turns are spread by this share of the interval, so that probes of many backends do not march in step.
const JITTER: f64 = 0.05;

/// What is looked at: a backend at a tier.
pub(super) type Key = (String, ProbeTier);

/// The time to our next turn. Turns are counted in Unix time, so that gateways that never speak to each other look
/// one after the other. A clock that is wrong makes turns fall together, which costs only evenness.
fn until_turn(interval: Duration, (turn, turns): (u32, u32), unix: Duration, jitter: f64) -> Duration {
    let interval = interval.as_secs_f64().max(0.001);
    let phase = interval * f64::from(turn) / f64::from(turns.max(1));
    let wait = interval - (unix.as_secs_f64() - phase).rem_euclid(interval);
    let wait = if wait < interval * SAME_TURN { wait + interval } else { wait };
    Duration::from_secs_f64(wait + interval * JITTER * jitter)
}

/// Between two looks of the same gateway.
pub(super) const fn interval(profile: &HealthProfile, tier: ProbeTier) -> Duration {
    match tier {
        ProbeTier::Unspecified | ProbeTier::Liveness => profile.liveness_interval,
        ProbeTier::Readiness => profile.readiness_interval,
        ProbeTier::Deep => profile.deep_interval,
    }
}

#[derive(Debug, Default)]
struct Task {
    /// Whose turn ours is among how many; `None`: we do not look regularly.
    turn: Option<(u32, u32)>,
    due: Option<Instant>,
    /// Looks that follow the one that is due, whether it has been answered or not: one that waits for an answer in
    /// vain must not hold up the next.
    extra: u32,
    failing: u32,
    in_flight: u32,
    /// Some of these were ordered.
    ordered: u32,
}

/// How a look ended, as far as the schedule minds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Good,
    Bad,
    /// Bad, and another look now would say the same: it is loading.
    Patient,
    /// It could not be asked: nothing is known that was not known before.
    Nothing,
}

/// All that this gateway looks at.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    tasks: BTreeMap<Key, Task>,
}

impl Schedule {
    /// Takes over what is assigned. What is new is looked at at once, deeply a little later; whoever got another turn
    /// takes it from this interval on, or nobody would look while turns are given anew.
    pub(super) fn assign(
        &mut self,
        assigned: &BTreeMap<Key, (u32, u32)>,
        interval: impl Fn(&Key) -> Duration,
        (now, unix): (Instant, Duration),
    ) {
        for (key, task) in &mut self.tasks {
            let before = std::mem::replace(&mut task.turn, assigned.get(key).copied());
            match task.turn {
                None if task.ordered == 0 => task.due = None,
                Some(turn) if before.is_some_and(|before| before != turn) => {
                    let next = now + until_turn(interval(key), turn, unix, 0.0);
                    task.due = task.due.map(|due| due.min(next));
                }
                _ => {}
            }
        }
        for (key, turn) in assigned {
            let task = self.tasks.entry(key.clone()).or_default();
            task.turn = Some(*turn);
            let wait = if key.1 == ProbeTier::Deep { DEEP_FIRST } else { Duration::ZERO };
            // What is under way is given its next turn when it ends.
            if task.in_flight == 0 {
                task.due.get_or_insert(now + wait);
            }
        }
        self.tasks.retain(|_, task| task.turn.is_some() || task.due.is_some() || task.in_flight > 0);
    }

    /// Looks now.
    pub(super) fn order(&mut self, key: Key, now: Instant) {
        let looks = if key.1 == ProbeTier::Liveness { LOOKS } else { 1 };
        // One that is under way was begun before it was asked for.
        let task = self.tasks.entry(key).or_default();
        (task.extra, task.due) = (looks - 1, Some(now));
        task.ordered = task.in_flight + looks;
    }

    /// Forgets backends that are gone.
    pub(super) fn retain(&mut self, backends: &BTreeSet<String>) {
        self.tasks.retain(|(backend, _), _| backends.contains(backend));
    }

    /// Takes what is due, at most so many.
    pub(super) fn take_due(&mut self, now: Instant, most: usize) -> Vec<Key> {
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

    /// A look ended. `unix` is the time of day, `jitter` a random number of `[0, 1)`. Says whether it is news.
    pub(super) fn finished(
        &mut self,
        key: &Key,
        end: End,
        profile: &HealthProfile,
        (now, unix): (Instant, Duration),
        jitter: f64,
    ) -> bool {
        let Some(task) = self.tasks.get_mut(key) else { return false };
        task.in_flight = task.in_flight.saturating_sub(1);
        let before = task.failing;
        task.failing = match end {
            End::Good => 0,
            End::Bad | End::Patient => before.saturating_add(1),
            End::Nothing => before,
        };
        if end == End::Nothing {
            if task.turn.is_some() || task.ordered > 0 {
                task.due.get_or_insert(now + UNASKED_AGAIN);
            } else if task.due.is_none() && task.in_flight == 0 {
                self.tasks.remove(key);
            }
            return false;
        }
        let asked = task.ordered > 0;
        task.ordered = task.ordered.saturating_sub(1);
        // After a first failure it looks again at once; one that keeps failing gets its regular turns. Deep probes
        // never condemn, so they need no second look.
        let again = end == End::Bad && key.1 != ProbeTier::Deep && (1..=LOOKS).contains(&task.failing);
        if task.in_flight == 0 && task.due.is_none() {
            task.due = if again && !asked {
                Some(now + AGAIN)
            } else {
                task.turn.map(|turn| now + until_turn(interval(profile, key.1), turn, unix, jitter))
            };
        }
        let news = asked || end != End::Good || before > 0;
        if task.due.is_none() && task.in_flight == 0 {
            self.tasks.remove(key);
        }
        news
    }

    /// When the next look is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.tasks.values().filter_map(|task| task.due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tier: ProbeTier) -> Key {
        ("b".into(), tier)
    }

    fn assign(schedule: &mut Schedule, assigned: &BTreeMap<Key, (u32, u32)>, now: Instant) {
        let profile = HealthProfile::default();
        schedule.assign(assigned, |key| interval(&profile, key.1), (now, Duration::from_secs(1_000_000)));
    }

    fn assigned(tier: ProbeTier, turn: (u32, u32)) -> BTreeMap<Key, (u32, u32)> {
        [(key(tier), turn)].into()
    }

    #[test]
    fn turns_of_three_gateways_divide_the_interval() {
        let interval = Duration::from_secs(5);
        // At 1000 s, a multiple of the interval: each gateway waits for its own third.
        let at = Duration::from_secs(1000);
        let waits: Vec<f64> = (0..3).map(|t| until_turn(interval, (t, 3), at, 0.0).as_secs_f64()).collect();
        assert!((waits[0] - 5.0).abs() < 1e-6, "{waits:?}");
        assert!((waits[1] - 5.0 / 3.0).abs() < 1e-6, "{waits:?}");
        assert!((waits[2] - 10.0 / 3.0).abs() < 1e-6, "{waits:?}");
        // A little early or late for the turn: not twice in one.
        let early = until_turn(interval, (0, 3), at - Duration::from_millis(100), 0.0);
        assert!(early > interval, "{early:?}");
    }

    #[test]
    fn an_hour_has_as_many_looks_as_intervals() {
        let profile = HealthProfile::default();
        for (tier, expected) in
            [(ProbeTier::Liveness, 720), (ProbeTier::Readiness, 120), (ProbeTier::Deep, 12)]
        {
            let (mut schedule, start) = (Schedule::default(), Instant::now());
            assign(&mut schedule, &assigned(tier, (1, 3)), start);
            let (mut looks, mut jitter) = (0_i32, 0.0);
            while let Some(now) = schedule.next().filter(|next| *next < start + Duration::from_secs(3600)) {
                for key in schedule.take_due(now, 10) {
                    looks += 1;
                    jitter = (jitter + 0.37) % 1.0;
                    let unix = Duration::from_secs(1_000_000) + (now - start);
                    schedule.finished(&key, End::Good, &profile, (now, unix), jitter);
                }
            }
            // The first look is at once, before the first turn.
            assert!((expected..=expected + 2).contains(&looks), "{tier:?}: {looks}");
        }
    }

    #[test]
    fn a_first_failure_is_looked_at_again_at_once_and_a_lasting_one_in_its_turn() {
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
                (at, Duration::ZERO),
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
    fn an_order_is_two_looks_at_liveness_one_elsewhere_and_then_over() {
        for (tier, looks) in [(ProbeTier::Liveness, 2), (ProbeTier::Readiness, 1)] {
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
                    (now, Duration::ZERO),
                    0.0,
                );
                assert!(news || seen == looks);
            }
            assert_eq!(seen, looks);
        }
    }

    #[test]
    fn a_look_that_waits_in_vain_does_not_hold_up_the_next() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 3)), now);
        let liveness = key(ProbeTier::Liveness);
        assert_eq!(schedule.take_due(now, 10).len(), 1, "a regular look that hangs");
        schedule.order(liveness.clone(), now + AGAIN);
        assert_eq!(schedule.take_due(now + AGAIN, 10).len(), 1);
        assert_eq!(schedule.take_due(now + 2 * AGAIN, 10).len(), 1);
        assert_eq!(schedule.next(), None, "three are under way, and no more are wanted");
        for late in 4..7 {
            let at = (now + late * AGAIN, Duration::ZERO);
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
            assert!(!schedule.finished(&readiness, End::Nothing, &profile, (at, Duration::ZERO), 0.0));
            assert_eq!(schedule.next(), Some(at + UNASKED_AGAIN));
            at += UNASKED_AGAIN;
        }
        assert_eq!(schedule.take_due(at, 10).len(), 1);
        assert!(
            schedule.finished(&readiness, End::Good, &profile, (at, Duration::ZERO), 0.0),
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
        schedule.finished(&liveness, End::Good, &profile, (now, Duration::from_secs(1_000_000)), 0.0);
        assign(&mut schedule, &all, now);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
    }

    #[test]
    fn another_turn_is_taken_at_once_and_never_puts_a_look_off() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        let (liveness, profile) = (key(ProbeTier::Liveness), HealthProfile::default());
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (0, 1)), now);
        schedule.take_due(now, 10);
        schedule.finished(&liveness, End::Good, &profile, (now, Duration::from_secs(1_000_000)), 0.0);
        assert_eq!(schedule.next(), Some(now + profile.liveness_interval));
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (1, 3)), now);
        assert_eq!(schedule.next().map(|next| (next - now).as_millis()), Some(1666));
        assign(&mut schedule, &assigned(ProbeTier::Liveness, (2, 3)), now);
        assert_eq!(schedule.next().map(|next| (next - now).as_millis()), Some(1666));
    }

    #[test]
    fn what_is_taken_away_is_no_longer_looked_at() {
        let (mut schedule, now) = (Schedule::default(), Instant::now());
        assign(&mut schedule, &assigned(ProbeTier::Deep, (0, 1)), now);
        assert_eq!(schedule.next(), Some(now + DEEP_FIRST));
        assign(&mut schedule, &BTreeMap::new(), now);
        assert_eq!(schedule.next(), None);
        assign(&mut schedule, &assigned(ProbeTier::Deep, (0, 1)), now);
        schedule.retain(&BTreeSet::new());
        assert_eq!(schedule.next(), None);
    }
}
