//! What holds whatever happens.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::world::*;
use crate::health::evidence::{Observation, Observer, Outcome, Passive, Reading};
use crate::health::guard::budget;
use crate::health::no_isolated_observers;
use crate::health::record::HealthRecord;
use crate::health::tally::Context;
use crate::health::{State, Tier, Timestamp};
use weir_proto::resource::HealthProfile;

fn seen(outcome: Outcome) -> Observation {
    Observation {
        tier: Tier::Liveness,
        outcome,
        detail: outcome.name().into(),
        latency: None,
        reading: Reading::default(),
    }
}

/// Three observers, each of which passes, fails or is silent in each of four rounds: all 531 441 histories.
#[test]
fn one_observer_of_three_never_ejects_alone() {
    let observers: Vec<Observer> = (0..3).map(gateway).collect();
    let isolated = no_isolated_observers();
    let context = Context { isolated: &isolated, ready_capable: false, gateways: 3, endpoint: "http://b/v1" };
    let mut healthy = HealthRecord::new(HealthProfile::default(), Timestamp::ZERO);
    for observer in &observers {
        healthy.observe(observer, &seen(Outcome::Pass), ms(1));
    }
    healthy.judge(ms(1), &context);
    assert_eq!(healthy.state, State::Healthy);
    let (mut fallen, mut all) = (0, 0);
    // Depth first, so that what histories share is played once.
    let mut open: Vec<(HealthRecord, usize, [[u8; 3]; 4])> = vec![(healthy, 0, [[2; 3]; 4])];
    while let Some((record, round, history)) = open.pop() {
        if round == 4 {
            all += 1;
            let failed = |v: usize| history.iter().filter(|round| round[v] == 1).count();
            let passed = |v: usize| history.iter().filter(|round| round[v] == 0).count();
            let failing = (0..3).filter(|v| failed(*v) > 0).count();
            let others_pass = (0..3).any(|v| failed(v) == 0 && passed(v) == 4);
            if record.state == State::Unhealthy {
                fallen += 1;
                assert!(failing > 1 || !others_pass, "{history:?}");
            }
            if history.iter().all(|round| *round == [1; 3]) {
                assert_eq!(record.state, State::Unhealthy, "all fail all the time");
            }
            if history.iter().all(|round| *round == [2; 3]) {
                assert_eq!(record.state, State::Healthy, "silence changes nothing");
            }
            continue;
        }
        for code in 0..27 {
            let outcomes = [code % 3, code / 3 % 3, code / 9];
            let now = secs(1) + ms(600) * round as u32;
            let mut next = record.clone();
            for (observer, outcome) in observers.iter().zip(outcomes) {
                let outcome = match outcome {
                    0 => Outcome::Pass,
                    1 => SILENT,
                    _ => continue,
                };
                next.observe(observer, &seen(outcome), now);
                next.judge(now, &context);
                // Whoever judges has everybody asked.
                next.asked(Tier::Liveness, observers.iter().cloned());
            }
            next.judge(now, &context);
            let mut history = history;
            history[round] = outcomes;
            open.push((next, round + 1, history));
        }
    }
    assert_eq!(all, 531_441);
    assert!(fallen > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// While two gateways reach it, it stays; when nobody does, it goes, within the bound.
    #[test]
    fn who_reaches_it_keeps_it_and_who_agrees_ejects_it(
        gateways in 3_usize..9,
        cut in proptest::collection::btree_set(0_usize..9, 0..9),
        refused in any::<bool>(),
        moment in 0_u64..5000,
    ) {
        let cut: BTreeSet<usize> = cut.into_iter().filter(|g| *g < gateways).collect();
        let outcome = if refused { REFUSED } else { SILENT };
        let death = secs(20) + ms(moment);
        let mut world = World::new(gateways, 2);
        world.run_until(death);
        let dead: BTreeSet<Observer> = cut.iter().map(|g| gateway(*g)).collect();
        let everybody = cut.len() == gateways;
        world.behave = Box::new(move |observer, backend, _, _| {
            let gone = backend == "b0" && (dead.contains(observer) || everybody);
            Some(if gone { outcome } else { Outcome::Pass })
        });
        if everybody {
            let found = world.run_to(death + secs(8), |w| w.state("b0") == State::Unhealthy);
            prop_assert!(found.is_some());
        } else {
            world.run_until(death + secs(120));
            if gateways - cut.len() >= 2 {
                prop_assert_eq!(world.ejections("b0"), 0);
            }
        }
        prop_assert_eq!(world.ejections("b1"), 0);
    }

    /// An engine at work is not ejected, however long it takes to an answer and whatever keeps its probes waiting; one that
    /// answers nobody any more is, within twice its silence and a round of probes.
    #[test]
    fn who_answers_requests_is_not_dead_and_who_stops_is(
        gateways in 1_usize..5,
        every in 1_u64..26,
        mute_health_page in any::<bool>(),
        moment in 0_u64..40,
    ) {
        let mut world = World::new(gateways, 1);
        world.run_until(secs(20 + moment));
        let start = 20 + moment;
        world.behave = Box::new(move |_, _, tier, _| {
            // With several gateways that takes the word of two, which have it only after a while.
            let mute = mute_health_page && gateways == 1;
            let silent = tier == Tier::Readiness || mute && tier == Tier::Liveness;
            Some(if silent { SILENT } else { Outcome::Pass })
        });
        let asks = |world: &mut World, second: u64, answered: bool| {
            world.run_until(secs(second));
            for n in 0..gateways {
                let its_turn = (second - start) / every % gateways as u64 == n as u64;
                let answers = answered && its_turn && (second - start).is_multiple_of(every) && second > start;
                let passive = Passive { in_flight: 2, successes: u64::from(answers), ..Passive::default() };
                world.cluster.requests(&gateway(n), "b0", &passive, world.now);
            }
        };
        for second in start..start + 400 {
            asks(&mut world, second, true);
        }
        prop_assert_eq!(world.ejections("b0"), 0);
        let stopped = start + 400;
        let bound = (2 * every).max(30) + 60;
        for second in stopped..stopped + bound {
            asks(&mut world, second, false);
        }
        prop_assert_eq!(world.state("b0"), State::Unhealthy);
    }

    /// Whatever dies how, a pool keeps what its budget leaves it, refused connections aside, and is never empty; and
    /// every verdict says by which rule.
    #[test]
    fn no_pool_is_left_with_less_than_its_budget(
        fates in proptest::collection::vec((0_u8..5, 0_u64..60), 1..9),
    ) {
        let backends = fates.len();
        let mut world = World::new(5, backends);
        world.run_until(secs(40));
        let fate = fates;
        world.behave = Box::new(move |_, backend, tier, at| {
            let index: usize = backend[1..].parse().expect("b and a number");
            let (kind, begins) = fate[index];
            if at < secs(60 + begins) {
                return Some(Outcome::Pass);
            }
            Some(match (kind, tier) {
                (0, _) => REFUSED,
                (1, _) => SILENT,
                (2, Tier::Readiness) => BROKEN,
                (3, Tier::Readiness) => Outcome::Busy,
                _ => Outcome::Pass,
            })
        });
        for second in 41..260 {
            world.run_until(secs(second));
            let (mut out, mut used) = (0, 0);
            for (name, record) in world.cluster.records() {
                let weighting = world.weighting(name);
                prop_assert!(!record.rule.name().is_empty() && !record.detail.is_empty());
                prop_assert!(!record.conditions(world.now, true).is_empty());
                if weighting.factor > 0.0 {
                    used += 1;
                } else {
                    out += usize::from(!record.refused);
                }
            }
            prop_assert!(out <= budget(backends, 50), "{} of {} out at {} s", out, backends, second);
            prop_assert!(used >= 1);
        }
    }
}
