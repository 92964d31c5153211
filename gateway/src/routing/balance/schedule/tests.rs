use proptest::prelude::*;

use super::super::weight::tests::uniform;
use super::*;

fn picks(scheduler: &mut Scheduler<u32>, entries: &[(u32, f64)], n: usize, seed: u64) -> Vec<u32> {
    let mut phase = uniform(seed);
    (0..n).map(|_| entries[scheduler.order(entries, &mut phase)[0]].0).collect()
}

fn share(picks: &[u32], key: u32) -> f64 {
    picks.iter().filter(|&&pick| pick == key).count() as f64 / picks.len() as f64
}

#[test]
fn shares_follow_weights() {
    let entries = [(1, 100.0), (2, 80.0), (3, 70.0), (4, 0.0)];
    let picks = picks(&mut Scheduler::default(), &entries, 25_000, 1);
    for (key, weight) in entries {
        assert!((share(&picks, key) - weight / 250.0).abs() < 0.0005, "{key}");
    }
    assert!(picks.windows(3).all(|run| run[0] != run[1] || run[1] != run[2]), "smooth: no run of three");
}

#[test]
fn one_percent_stays_one_percent_under_constant_rebuilds() {
    let mut scheduler = Scheduler::default();
    let mut all = Vec::new();
    for round in 0..2000u64 {
        let scale = 1.0 + (round % 7) as f64;
        let mut entries = vec![(1, 99.0 * scale), (2, scale)];
        if round % 2 == 0 {
            entries.reverse();
        }
        scheduler.retain(|_| true);
        all.extend(picks(&mut scheduler, &entries, 50, round));
    }
    let rare = share(&all, 2);
    assert!((rare - 0.01).abs() < 0.001, "{rare}");
}

#[test]
fn one_percent_survives_coming_and_going() {
    let mut scheduler = Scheduler::default();
    let mut with = Vec::new();
    for round in 0..4000u64 {
        with.extend(picks(&mut scheduler, &[(1, 99.0), (2, 1.0)], 25, round));
        picks(&mut scheduler, &[(1, 99.0)], 10, round);
        if round % 2 == 0 {
            // Removed and added again: the random phase neither favours nor starves the backend.
            scheduler.retain(|key| *key != 2);
        }
    }
    let rare = share(&with, 2);
    assert!((rare - 0.01).abs() < 0.001, "{rare}");
}

#[test]
fn a_backend_that_was_full_returns_without_a_burst() {
    let mut scheduler = Scheduler::default();
    let entries = [(1, 1.0), (2, 1.0)];
    for _ in 0..1000 {
        let order = scheduler.order(&entries, || 0.5);
        if entries[order[0]].0 == 1 {
            scheduler.reassign(&1, &2);
        }
    }
    let after = picks(&mut scheduler, &entries, 100, 1);
    assert!(share(&after, 1) < 0.56, "{after:?}");
}

#[test]
fn first_picks_of_many_gateways_spread() {
    let entries: Vec<(u32, f64)> = (0..4).map(|key| (key, 1.0)).collect();
    let firsts: Vec<u32> =
        (0..1000).map(|seed| picks(&mut Scheduler::default(), &entries, 1, seed + 1)[0]).collect();
    let chi: f64 = (0..4).map(|key| (share(&firsts, key) * 1000.0 - 250.0).powi(2) / 250.0).sum();
    assert!(chi < 16.27, "chi-square {chi} with 3 degrees of freedom, p = 0.001");
}

#[test]
fn every_entry_is_in_the_order_once() {
    let mut scheduler = Scheduler::default();
    let entries = [(1, f64::NAN), (2, -3.0), (3, 1.0), (4, f64::INFINITY)];
    let mut order = scheduler.order(&entries, || 0.0);
    assert_eq!(order[0], 2);
    order.sort_unstable();
    assert_eq!(order.as_slice(), [0, 1, 2, 3]);
    assert_eq!(scheduler.order(&[(1, 0.0), (2, 0.0)], || 0.0).len(), 2);
    assert!(scheduler.order(&[], || 0.0).is_empty());
}

#[test]
fn baselines_order_everything() {
    assert_eq!(round_robin(3, 4).collect::<Vec<_>>(), [1, 2, 0]);
    assert_eq!(round_robin(0, 4).count(), 0);
    let mut chance = uniform(7);
    let firsts: Vec<u32> = (0..20_000).map(|_| random([3.0, 1.0, 0.0], &mut chance)[0] as u32).collect();
    assert!((share(&firsts, 0) - 0.75).abs() < 0.015);
    assert!(share(&firsts, 2) < f64::EPSILON);
}

/// Smooth weighted round-robin as it was first written, with one look-up per entry and pick.
#[derive(Default)]
struct Plain(HashMap<u32, f64>);

impl Plain {
    fn order(&mut self, entries: &[(u32, f64)], mut phase: impl FnMut() -> f64) -> Vec<usize> {
        let total: f64 = entries.iter().map(|(_, weight)| usable(*weight)).sum();
        let mut ranked = Vec::new();
        for (index, (key, weight)) in entries.iter().enumerate() {
            let share = if total > 0.0 { usable(*weight) / total } else { 1.0 / entries.len() as f64 };
            let lag = self.0.entry(*key).or_insert_with(|| phase() - 1.0);
            *lag = (*lag + share).clamp(-LAG_MAX, LAG_MAX);
            ranked.push((if share > 0.0 { *lag } else { f64::NEG_INFINITY }, index));
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        if let Some(&(_, first)) = ranked.first() {
            self.charge(entries[first].0, 1.0);
        }
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    fn charge(&mut self, key: u32, picks: f64) {
        if let Some(lag) = self.0.get_mut(&key) {
            *lag -= picks;
        }
    }
}

/// What happens to a scheduler.
#[derive(Debug, Clone)]
enum Event {
    /// So many picks under the same weights.
    Picks(usize),
    /// Another weight for each backend.
    Weights(u64),
    /// The first choice had no slot, and the second was used.
    Reassigned,
    /// One of so many is deleted, and comes back with the next weights.
    Deleted(u32),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => (1usize..30).prop_map(Event::Picks),
        2 => any::<u64>().prop_map(Event::Weights),
        1 => Just(Event::Reassigned),
        1 => (2u32..7).prop_map(Event::Deleted),
    ];
    proptest::collection::vec(event, 1..20)
}

proptest! {
    /// Pick for pick the same sequence, whatever happens to weights and members.
    #[test]
    fn the_first_few_are_those_of_the_plain_scheduler(
        backends in 1u32..150,
        most in 1usize..10,
        events in events(),
        seed in 1u64..1000,
    ) {
        let (mut plain, mut scheduler) = (Plain::default(), Scheduler::default());
        let (mut phases, mut same_phases) = (uniform(seed), uniform(seed));
        let mut entries: Vec<(u32, f64)> = (0..backends).map(|key| (key, f64::from(key % 5))).collect();
        let (mut prepared, mut due) = (Entries::default(), true);
        let mut last = None;
        for event in events {
            match event {
                Event::Picks(picks) => for _ in 0..picks {
                    if std::mem::take(&mut due) {
                        scheduler.prepare(&entries, &mut prepared, &mut phases);
                    }
                    let first = scheduler.first(&prepared, most).expect("nothing was deleted since");
                    let whole = plain.order(&entries, &mut same_phases);
                    prop_assert_eq!(first.as_slice(), &whole[..most.min(whole.len())]);
                    last = whole.get(1).map(|second| (entries[whole[0]].0, entries[*second].0));
                },
                Event::Weights(seed) => {
                    let mut weight = uniform(seed);
                    entries.iter_mut().for_each(|(_, old)| *old = (weight() * 4.0).floor() * 100.0);
                    due = true;
                }
                Event::Reassigned => if let Some((picked, used)) = last.take() {
                    scheduler.reassign(&picked, &used);
                    plain.charge(picked, -1.0);
                    plain.charge(used, 1.0);
                },
                Event::Deleted(every) => {
                    let before = plain.0.len();
                    scheduler.retain(|key| !key.is_multiple_of(every));
                    plain.0.retain(|key, _| !key.is_multiple_of(every));
                    let stale = scheduler.first(&prepared, most).is_none();
                    prop_assert!(due || stale == (plain.0.len() < before), "positions may be others' now");
                    due = true;
                    // The pick above was for the question only.
                    if !stale && !prepared.positions.is_empty() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The whole order is the same too.
    #[test]
    fn the_whole_order_is_that_of_the_plain_scheduler(
        weights in proptest::collection::vec(0u32..100, 1..20),
        seed in 1u64..1000,
    ) {
        let (mut plain, mut scheduler) = (Plain::default(), Scheduler::default());
        let (mut phases, mut same_phases) = (uniform(seed), uniform(seed));
        let entries: Vec<(u32, f64)> = weights.iter().zip(0..).map(|(w, key)| (key, f64::from(*w))).collect();
        for _ in 0..50 {
            let peeked = scheduler.peek(&entries);
            let order = scheduler.order(&entries, &mut phases);
            let plain = plain.order(&entries, &mut same_phases);
            prop_assert_eq!(order.as_slice(), plain);
            prop_assert_eq!(peeked.len(), order.len());
        }
        prop_assert_eq!(scheduler.peek(&entries), scheduler.order(&entries, &mut phases));
    }
}

#[test]
fn an_urn_draws_in_proportion_and_each_once() {
    let mut urn = Urn::default();
    urn.refill([3.0, 1.0, 0.0, 0.0]);
    let mut chance = uniform(7);
    let firsts: Vec<u32> = (0..20_000).map(|_| urn.draw(2, &mut chance)[0] as u32).collect();
    assert!((share(&firsts, 0) - 0.75).abs() < 0.015);
    assert!(share(&firsts, 2) < f64::EPSILON);
    // Among the rest, once the heavy one is out: also where it takes too long to draw again.
    for heavy in [10.0, 1e9] {
        urn.refill([heavy, 1.0, 3.0, 0.0]);
        let seconds: Vec<u32> = (0..20_000)
            .map(|_| {
                let mut drawn = urn.draw(4, &mut chance);
                let second = drawn.iter().copied().find(|index| *index != 0).expect("two of them");
                drawn.sort_unstable();
                assert_eq!(drawn.as_slice(), [0, 1, 2, 3]);
                second as u32
            })
            .collect();
        assert!((share(&seconds, 2) - 0.75).abs() < 0.015, "{heavy}");
    }
    urn.refill([0.0, f64::NAN]);
    assert_eq!(urn.draw(8, &mut chance).len(), 2);
    urn.refill([]);
    assert!(urn.draw(8, &mut chance).is_empty());
}
