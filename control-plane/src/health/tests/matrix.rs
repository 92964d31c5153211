//! The failure matrix: what fails, and what the cluster must make of it.

use super::world::*;
use crate::health::Tier;
use crate::health::evidence::{Cause, Observer, Outcome, Passive, Seen};
use crate::health::params::HOLD_MAX;
use crate::health::{Rule, State, Timestamp};
use weir_proto::resource::HealthProfile;

const PASS: Option<Outcome> = Some(Outcome::Pass);

/// The longest time from a death to the verdict, over the moments within an interval at which it may die. Every second
/// prober is late by all that turns are spread by, and of those who are asked `mute` says nothing at all.
fn slowest(gateways: usize, outcome: Outcome, mute: Option<&Observer>) -> Timestamp {
    let profile = HealthProfile::default();
    let died = |after: u64| {
        let death = secs(20) + ms(after);
        let mute = mute.cloned();
        let behave = move |observer: &Observer, backend: &str, _: Tier, at: Timestamp| {
            let dead = backend == "b0" && at >= death;
            (!dead || mute.as_ref() != Some(observer)).then_some(if dead { outcome } else { Outcome::Pass })
        };
        let late = profile.liveness_interval.mul_f64(TURN_JITTER);
        let mut world = World::uneven(gateways, 3, profile, Box::new(behave), late);
        world.run_until(death);
        assert_eq!(world.state("b0"), State::Healthy);
        let found = world.run_to(death + secs(30), |w| w.state("b0") == State::Unhealthy);
        assert_eq!(world.ejections("b1") + world.ejections("b2"), 0);
        found.expect("it is found") - death
    };
    (0..5000).step_by(50).map(died).max().expect("some")
}

/// By so much of an interval a prober may be late in its turn: as in the gateway's and the control plane's schedule.
const TURN_JITTER: f64 = 0.05;

/// Until the next of three probers looks, its answer, half a second and the second answers; and the ways there and back.
fn bound(answer: Timestamp) -> Timestamp {
    let interval = HealthProfile::default().liveness_interval;
    interval / 3 + interval.mul_f64(TURN_JITTER) + answer + ms(500) + answer + ms(30)
}

#[test]
fn a_backend_that_dies_idle_is_found_within_three_seconds_refused_and_seven_in_silence() {
    let timeout = HealthProfile::default().timeout;
    assert!(bound(timeout) < ms(6500) && bound(ms(1)) < ms(2500), "as docs/health.md says");
    for gateways in [2, 3, 5, 30] {
        let (refused, silent) = (slowest(gateways, REFUSED, None), slowest(gateways, SILENT, None));
        println!("{gateways} gateways: refused {refused:?}, silent {silent:?}");
        assert!(refused <= bound(ms(1)), "{gateways} gateways, refused: {refused:?}");
        assert!(silent <= bound(timeout), "{gateways} gateways, silent: {silent:?}");
    }
}

#[test]
fn one_who_is_asked_and_says_nothing_holds_no_verdict_up_that_it_cannot_change() {
    let world = World::new(5, 3);
    let assigned = world.cluster.probers("b0").expect("assigned").of(Tier::Liveness).to_vec();
    let mute = (0..5).map(gateway).find(|gateway| !assigned.contains(gateway)).expect("two are not assigned");
    let silent = slowest(5, SILENT, Some(&mute));
    assert!(silent <= bound(HealthProfile::default().timeout), "{silent:?}");
}

#[test]
fn one_gateway_of_five_cut_off_from_a_healthy_backend_ejects_nothing() {
    for cut in 0..5 {
        let mut world = World::new(5, 3);
        world.run_until(secs(20));
        world.behave = Box::new(move |observer, backend, _, _| {
            Some(if *observer == gateway(cut) && backend == "b0" { SILENT } else { Outcome::Pass })
        });
        world.run_until(secs(1200));
        assert_eq!(world.ejections("b0"), 0, "gateway {cut}");
        assert_eq!(world.state("b0"), State::Healthy);
    }
}

#[test]
fn three_of_five_cut_off_eject_nothing_while_two_still_reach_it() {
    for (a, b, c) in [(0, 1, 2), (0, 1, 3), (0, 1, 4), (0, 2, 3), (0, 2, 4), (0, 3, 4), (1, 2, 3), (1, 3, 4)]
    {
        for outcome in [REFUSED, SILENT] {
            let mut world = World::new(5, 1);
            world.run_until(secs(20));
            let cut = [gateway(a), gateway(b), gateway(c)];
            world.behave = Box::new(move |observer, _, _, _| {
                Some(if cut.contains(observer) { outcome } else { Outcome::Pass })
            });
            world.run_until(secs(600));
            assert_eq!(world.ejections("b0"), 0, "{a} {b} {c} {outcome:?}");
        }
    }
}

#[test]
fn all_three_assigned_of_ten_cut_off_eject_nothing() {
    let mut world = World::new(10, 1);
    world.run_until(secs(20));
    let assigned = world.cluster.probers("b0").expect("assigned").of(Tier::Liveness).to_vec();
    assert_eq!(assigned.len(), 3);
    world.behave = Box::new(move |observer, _, _, _| {
        Some(if assigned.contains(observer) { SILENT } else { Outcome::Pass })
    });
    world.run_until(secs(600));
    assert_eq!(world.ejections("b0"), 0);
}

#[test]
fn with_one_observer_three_failures_in_a_row_eject() {
    // No gateway: only the control plane looks.
    let mut world = World::new(0, 2);
    world.run_until(secs(20));
    assert_eq!(world.state("b0"), State::Healthy, "liveness is enough where nobody can ask for completions");
    world.behave = Box::new(|_, backend, _, _| Some(if backend == "b0" { REFUSED } else { Outcome::Pass }));
    world.run_to(secs(40), |w| w.state("b0") == State::Unhealthy).expect("found");
    assert_eq!(world.health_record("b0").rule, Rule::LivenessAlone);
    assert_eq!(world.health_record("b0").votes.iter().map(|(_, _, vote)| vote.failures).max(), Some(3));
}

#[test]
fn all_failing_readiness_is_panic_that_keeps_serving_and_an_alarm() {
    let mut world = World::new(5, 4);
    world.run_until(secs(40));
    world.behave =
        Box::new(|_, _, tier, _| Some(if tier == Tier::Readiness { BROKEN } else { Outcome::Pass }));
    world.run_until(secs(200));
    for b in 0..4 {
        let name = format!("b{b}");
        assert_eq!(world.state(&name), State::Unhealthy, "the verdict tells the truth");
        assert_eq!(world.health_record(&name).rule, Rule::ReadinessQuorum);
        let weighting = world.weighting(&name);
        assert!(
            weighting.overridden && weighting.factor == 1.0,
            "and it is used all the same: {weighting:?}"
        );
    }
    assert!(world.alarms().contains("panic"), "{:?}", world.alarms());
    let flips = world.cluster.events(0).filter(|e| e.message.starts_with("correlated_flip")).count();
    assert!(flips > 0, "an alarm says that it is rather something they share");
    world.behave = Box::new(|_, _, _, _| PASS);
    world.run_until(secs(400));
    assert!((0..4).all(|b| world.state(&format!("b{b}")) == State::Healthy));
    assert!(world.alarms().is_empty(), "{:?}", world.alarms());
}

#[test]
fn a_backend_that_hangs_with_a_living_health_page_falls_by_readiness_within_a_minute() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave = Box::new(|_, backend, tier, _| {
        Some(if backend == "b0" && tier == Tier::Readiness { SILENT } else { Outcome::Pass })
    });
    world.run_to(secs(100), |w| w.state("b0") == State::Unhealthy).expect("found within a minute");
    assert_eq!(world.weighting("b0").factor, 0.0);
}

#[test]
fn requests_that_fail_at_one_gateway_have_the_others_look_at_once() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave = Box::new(|_, backend, tier, _| {
        Some(if backend == "b0" && tier == Tier::Readiness { BROKEN } else { Outcome::Pass })
    });
    let died = world.now;
    let passive = Passive { server_errors: 3, ..Passive::default() };
    world.cluster.requests(&gateway(0), "b0", &passive, died);
    let found = world.run_to(died + secs(30), |w| w.state("b0") == State::Unhealthy);
    assert!(found.expect("found") - died < secs(3), "not only at the next readiness round");
}

#[test]
fn failing_requests_of_one_of_many_gateways_eject_nothing_and_are_shown() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    for i in 0..600 {
        let passive = Passive { connect_failures: 5, ejected: true, ..Passive::default() };
        world.cluster.requests(&gateway(1), "b0", &passive, world.now);
        world.run_until(secs(40 + i));
    }
    assert_eq!(world.ejections("b0"), 0, "what only one gateway sees is its own problem");
    for i in 600..660 {
        let passive = Passive { server_errors: 5, ejected: true, ..Passive::default() };
        world.cluster.requests(&gateway(1), "b0", &passive, world.now);
        world.run_until(secs(40 + i));
    }
    assert_eq!(world.ejections("b0"), 0);
    assert_eq!((world.state("b0"), world.health_record("b0").rule), (State::Degraded, Rule::RequestsFail));
}

/// What a gateway of the product does with a backend whose every request fails: it tries while the verdict allows, a few times at
/// once and then one by one, seldom.
fn fails_every_request(world: &mut World, gateways: usize, from: u64, until: u64) {
    for second in from..until {
        world.run_until(secs(second));
        if world.weighting("b0").factor == 0.0 {
            continue;
        }
        for n in 0..gateways {
            let turn = (second - from + n as u64) % 20;
            let passive = Passive {
                server_errors: if second - from < 3 || turn == 0 { 1 } else { 0 },
                ejected: second > from + 3,
                seen: Some(Seen::Status(404)),
                ..Passive::default()
            };
            world.cluster.requests(&gateway(n), "b0", &passive, world.now);
        }
    }
}

#[test]
fn what_answers_probes_and_no_request_is_ejected_with_its_cause_and_probed_no_oftener() {
    for gateways in [1, 2, 5] {
        let mut world = World::new(gateways, 3);
        world.run_until(secs(40));
        let before = world.looks.clone();
        fails_every_request(&mut world, gateways, 40, 70);
        assert_eq!(world.state("b0"), State::Unhealthy, "{gateways}");
        let record = world.health_record("b0");
        assert_eq!(record.rule, Rule::RequestsFail);
        let whom = if gateways == 1 { "gateway-0" } else { "several gateways" };
        let cause = format!(
            "404 to every request of {whom}; is the path in its url right? requests go to http://b0/v1/chat/completions"
        );
        assert_eq!(record.reason(), cause);
        fails_every_request(&mut world, gateways, 70, 640);
        assert!(world.ejections("b0") <= 8, "{gateways}: {} falls in ten minutes", world.ejections("b0"));
        assert!(
            matches!(world.state("b0"), State::Unhealthy | State::Recovering),
            "no probe calls it healthy"
        );
        let of = |tier| (world.looks[&tier] - before[&tier]) as f64;
        // All three backends: the other two are probed on schedule.
        assert!(
            of(Tier::Liveness) <= 1.2 * 3.0 * 360.0,
            "{gateways}: {} liveness probes",
            of(Tier::Liveness)
        );
        assert!(of(Tier::Readiness) <= 1.2 * 3.0 * 40.0, "{gateways}: {} readiness", of(Tier::Readiness));
        let mut messages: Vec<_> =
            world.cluster.events(0).map(|event| (&event.subject, &event.message)).collect();
        let all = messages.len();
        messages.sort();
        messages.dedup();
        assert_eq!(messages.len(), all, "each event is there once: {messages:#?}");
        assert_eq!(world.ejections("b1") + world.ejections("b2"), 0);
    }
}

#[test]
fn what_fails_every_request_returns_with_the_first_that_succeeds_and_not_by_probes() {
    let mut world = World::new(2, 3);
    world.run_until(secs(40));
    fails_every_request(&mut world, 2, 40, 50);
    assert_eq!(world.state("b0"), State::Unhealthy);
    let trial = world.run_to(secs(120), |w| w.state("b0") == State::Recovering).expect("it is tried");
    assert!(trial >= secs(70), "and not as soon as a probe passes: {trial:?}");
    world.run_until(trial + secs(300));
    assert_eq!(world.state("b0"), State::Recovering, "no request has told");
    assert!((world.health_record("b0").ramp(world.now) - 1.0).abs() < 1e-9, "and none is kept from it");
    let passive = Passive { successes: 1, ..Passive::default() };
    world.cluster.requests(&gateway(1), "b0", &passive, world.now);
    assert_eq!(world.state("b0"), State::Healthy);
}

/// The requests of an engine that answers one at a time: `last` says when the last one was answered.
fn one_at_a_time(world: &mut World, gateways: usize, every: u64, from: u64, until: u64) {
    for second in from..until {
        world.run_until(secs(second));
        for n in 0..gateways {
            let its_turn = (second / every) as usize % gateways == n && second % every == 0;
            let passive = Passive { in_flight: 4, successes: u64::from(its_turn), ..Passive::default() };
            world.cluster.requests(&gateway(n), "b0", &passive, world.now);
        }
    }
}

#[test]
fn an_engine_whose_answers_keep_probes_waiting_is_busy_and_not_dead() {
    for (gateways, backends, every) in
        [(1, 1, 12), (3, 1, 12), (1, 2, 12), (3, 2, 12), (3, 2, 25), (1, 1, 14)]
    {
        let mut world = World::new(gateways, backends);
        world.run_until(secs(20));
        world.behave = Box::new(|_, backend, tier, _| {
            Some(if backend == "b0" && tier == Tier::Readiness { SILENT } else { Outcome::Pass })
        });
        one_at_a_time(&mut world, gateways, every, 20, 620);
        assert_eq!(world.ejections("b0"), 0, "{gateways} gateways, an answer every {every} s");
        assert_eq!(world.state("b0"), State::Healthy);
        assert!(world.alarms().is_empty(), "{:?}", world.alarms());
        // It hangs: nobody is answered any more.
        for second in 620..740 {
            world.run_until(secs(second));
            let passive = Passive { in_flight: 4, ..Passive::default() };
            (0..gateways).for_each(|n| world.cluster.requests(&gateway(n), "b0", &passive, world.now));
        }
        assert_eq!(world.state("b0"), State::Unhealthy, "{gateways} gateways, an answer every {every} s");
    }
}

/// The same where the server says nothing at all meanwhile.
#[test]
fn a_server_that_answers_nothing_else_while_it_works_is_busy_and_not_dead() {
    for gateways in [1, 3] {
        let mut world = World::new(gateways, 1);
        world.run_until(secs(20));
        // Answers come, and then it is known how long it takes to one.
        one_at_a_time(&mut world, gateways, 12, 20, 60);
        world.behave =
            Box::new(|_, _, _, at| Some(if at.as_secs() % 12 == 0 { Outcome::Pass } else { SILENT }));
        one_at_a_time(&mut world, gateways, 12, 60, 620);
        assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Healthy));
        world.behave = Box::new(|_, _, _, _| Some(REFUSED));
        one_at_a_time(&mut world, gateways, 1000, 620, 640);
        assert_eq!(world.state("b0"), State::Unhealthy, "one that refuses connections is dead at once");
    }
}

#[test]
fn a_change_of_what_failures_rest_on_makes_the_evidence_new() {
    let mut world = World::new(3, 2);
    world.run_until(secs(40));
    world.behave =
        Box::new(|_, _, tier, _| Some(if tier == Tier::Readiness { BROKEN } else { Outcome::Pass }));
    world.run_until(secs(120));
    assert!(world.all_are(State::Unhealthy));
    world.behave = Box::new(|_, _, _, _| PASS);
    world.change_terms("b0");
    assert_eq!((world.state("b0"), world.state("b1")), (State::Unknown, State::Unhealthy));
    let seen = world.now;
    world.look(&gateway(0), "b0");
    assert_eq!(world.state("b0"), State::Healthy, "with the first probe, and nothing is held against it");
    assert_eq!(world.now, seen);
    world.change_terms("b0");
    assert_eq!(world.state("b0"), State::Healthy, "what is in use stays so");
}

#[test]
fn a_backend_returns_by_liveness_and_readiness_and_slowly() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave = Box::new(|_, backend, _, _| Some(if backend == "b0" { REFUSED } else { Outcome::Pass }));
    world.run_to(secs(60), |w| w.state("b0") == State::Unhealthy).expect("found");
    world.behave = Box::new(|_, backend, tier, _| {
        Some(if backend == "b0" && tier == Tier::Readiness { BROKEN } else { Outcome::Pass })
    });
    world.run_until(secs(200));
    assert_eq!(world.state("b0"), State::Unhealthy, "that it can be reached restores nothing");
    world.behave = Box::new(|_, _, _, _| PASS);
    let back = world.run_to(secs(260), |w| w.state("b0") == State::Recovering).expect("returns");
    assert!((world.health_record("b0").ramp(back) - 0.1).abs() < 1e-9);
    assert!((world.health_record("b0").ramp(back + secs(30)) - 0.5).abs() < 1e-9);
    let whole = world.run_to(back + secs(70), |w| w.state("b0") == State::Healthy).expect("ramps");
    assert_eq!(whole - back, secs(60));
}

#[test]
fn a_dead_backend_that_comes_back_is_used_within_ten_seconds() {
    let slowest = (0..50).map(|i| {
        let mut world = World::new(5, 3);
        world.run_until(secs(40));
        world.behave =
            Box::new(|_, backend, _, _| Some(if backend == "b0" { REFUSED } else { Outcome::Pass }));
        world.run_until(secs(60) + ms(i * 100));
        world.behave = Box::new(|_, _, _, _| PASS);
        let alive = world.now;
        world.run_to(alive + secs(60), |w| w.state("b0") == State::Recovering).expect("returns") - alive
    });
    let slowest = slowest.max().expect("some");
    assert!(slowest < secs(10), "{slowest:?}");
}

#[test]
fn flapping_doubles_the_hold_down_and_bounds_the_falls() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave = Box::new(|_, backend, _, at| {
        Some(if backend == "b0" && (at.as_secs() / 20) % 2 == 0 { REFUSED } else { Outcome::Pass })
    });
    world.run_until(secs(3640));
    let first_hour = world.ejections("b0");
    world.run_until(secs(7240));
    let second_hour = world.ejections("b0") - first_hour;
    assert!(first_hour <= 18, "{first_hour}");
    assert!(second_hour <= 12, "{second_hour}");
    assert!(world.health_record("b0").hold_until - world.health_record("b0").ejected_at <= HOLD_MAX);
}

#[test]
fn a_model_that_loads_for_ten_minutes_is_unknown_not_dead() {
    let loading = |until: Timestamp| -> Behaviour {
        Box::new(move |_, backend, _, at| {
            Some(if backend == "b0" && at < until { Outcome::Loading } else { Outcome::Pass })
        })
    };
    let mut world = World::with(5, 3, HealthProfile::default(), loading(secs(600)));
    world.run_until(secs(599));
    assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Unknown));
    assert_eq!(world.health_record("b0").rule, Rule::Loading);
    assert_eq!(world.weighting("b0").factor, 0.0, "not used while others are");
    assert!(world.alarms().is_empty());
    world.run_until(secs(660));
    assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Healthy));

    let mut world = World::with(5, 3, HealthProfile::default(), loading(secs(10_000)));
    world.run_to(secs(1400), |w| w.state("b0") == State::Unhealthy).expect("patience ends after 20 min");
    assert!(world.now >= secs(1200));
    assert_eq!(world.health_record("b0").rule, Rule::LoadingTooLong);
}

#[test]
fn one_that_loads_again_after_it_served_is_left_out_without_being_called_dead() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave =
        Box::new(|_, backend, _, _| Some(if backend == "b0" { Outcome::Loading } else { Outcome::Pass }));
    world.run_until(secs(80));
    assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Unknown));
    assert_eq!(world.weighting("b0").factor, 0.0);
    world.behave = Box::new(|_, _, _, _| PASS);
    world.run_until(secs(120));
    assert_eq!(world.state("b0"), State::Recovering, "its caches are cold: a slow start");
}

#[test]
fn busy_degrades_and_never_kills() {
    let mut world = World::new(5, 3);
    world.run_until(secs(40));
    world.behave = Box::new(|_, backend, tier, _| {
        Some(if backend == "b0" && tier == Tier::Readiness { Outcome::Busy } else { Outcome::Pass })
    });
    for i in 0..600 {
        let passive = Passive { busy: 20, ..Passive::default() };
        world.cluster.requests(&gateway(0), "b0", &passive, world.now);
        world.run_until(secs(40 + i));
    }
    assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Degraded));
    assert_eq!(world.health_record("b0").rule, Rule::Busy);
    assert!((world.weighting("b0").factor - 0.5).abs() < 1e-9);
    world.behave = Box::new(|_, _, _, _| PASS);
    world.run_until(secs(700));
    assert_eq!(world.state("b0"), State::Healthy);
}

#[test]
fn an_account_without_quota_is_no_matter_of_seconds() {
    for gateways in [1, 5] {
        let mut world = World::new(gateways, 3);
        world.run_until(secs(40));
        let quota = Outcome::Failed(Cause::QuotaUsedUp);
        world.behave = Box::new(move |_, backend, tier, _| {
            Some(if backend == "b0" && tier == Tier::Readiness { quota } else { Outcome::Pass })
        });
        world.run_to(secs(180), |w| w.state("b0") == State::Unhealthy).expect("it is out");
        assert_eq!(world.health_record("b0").rule, Rule::QuotaUsedUp, "{gateways}");
        assert_eq!(world.ejections("b1") + world.ejections("b2"), 0);
        world.run_until(world.now + secs(600));
        assert_eq!(world.state("b0"), State::Unhealthy, "for as long as probes say so");
        world.behave = Box::new(|_, _, _, _| PASS);
        world.run_to(world.now + secs(120), |w| w.state("b0") == State::Recovering).expect("it is back");
    }
}

#[test]
fn silence_keeps_the_last_state_and_marks_it_stale() {
    for dead in [false, true] {
        let mut world = World::new(5, 3);
        world.run_until(secs(40));
        if dead {
            world.behave = Box::new(|_, _, _, _| Some(REFUSED));
            world.run_until(secs(60));
        }
        let before = world.state("b0");
        world.behave = Box::new(|_, _, _, _| None);
        world.run_until(secs(2000));
        assert_eq!(world.state("b0"), before);
        assert!(world.health_record("b0").stale);
        assert!(world.weighting("b0").factor > 0.0, "all of the pool being dead, it is used");
        world.behave = Box::new(|_, _, _, _| PASS);
        world.run_until(secs(2050));
        assert!(!world.health_record("b0").stale);
    }
}

/// A gateway that lost the control plane has no vote any more: its last votes expire, failures included, other
/// observers probe in its place, and nothing of that changes a verdict.
#[test]
fn the_votes_of_a_gateway_that_left_expire_and_others_look_instead() {
    for accuses in [false, true] {
        let mut world = World::new(5, 3);
        world.run_until(secs(40));
        let probers = world.cluster.probers("b0").expect("assigned").of(Tier::Liveness).to_vec();
        let is_gateway = |observer: &&Observer| matches!(observer, Observer::Gateway(_));
        let gone = probers.iter().find(is_gateway).expect("a gateway looks").clone();
        let own = gone.clone();
        world.behave = Box::new(move |observer, backend, _, _| {
            let accused = accuses && backend == "b0" && *observer == own;
            Some(if accused { REFUSED } else { Outcome::Pass })
        });
        world.run_until(secs(50));
        let voted =
            |world: &World| world.health_record("b0").votes.iter().any(|(_, observer, _)| *observer == gone);
        assert!(voted(&world));
        let left = gone.clone();
        world.behave = Box::new(move |observer, _, _, _| (*observer != left).then_some(Outcome::Pass));
        let rest = (0..5).map(gateway).filter(|observer| *observer != gone);
        world.cluster.set_gateways(rest.map(|observer| (observer, String::new())).collect());
        assert!(!world.cluster.probers("b0").expect("assigned").of(Tier::Liveness).contains(&gone));
        world.run_until(secs(400));
        assert!(!voted(&world), "accuses: {accuses}");
        assert_eq!((0..3).map(|b| world.ejections(&format!("b{b}"))).sum::<usize>(), 0);
        assert_eq!(world.state("b0"), State::Healthy);
    }
}

#[test]
fn a_gateway_that_alone_sees_most_backends_fail_loses_its_vote_for_a_while() {
    let mut world = World::new(3, 8);
    world.run_until(secs(40));
    world.behave =
        Box::new(|observer, _, _, _| Some(if *observer == gateway(1) { SILENT } else { Outcome::Pass }));
    world.run_until(secs(60));
    assert!(world.cluster.isolated_observers().contains(&gateway(1), world.now));
    assert!(world.alarms().contains("isolated"));
    world.run_until(secs(900));
    assert_eq!((0..8).map(|b| world.ejections(&format!("b{b}"))).sum::<usize>(), 0);
    world.behave = Box::new(|_, _, _, _| PASS);
    world.run_until(secs(1100));
    assert!(!world.cluster.isolated_observers().contains(&gateway(1), world.now));
    assert!(!world.alarms().contains("isolated"));
}

/// With two gateways the control plane probes too, and stops when a third gateway comes, which lies. When the
/// backends die, the last passes of the control plane are still valid: with the liar's they would make two votes
/// against two.
#[test]
fn a_liar_beside_the_last_passes_of_who_probes_no_longer_silences_nobody() {
    for dies_after in (0..10_000).step_by(250).map(ms) {
        let mut world = World::new(2, 8);
        world.run_until(secs(20));
        let all = (0..3).map(|n| (gateway(n), String::new()));
        world.cluster.set_gateways(all.collect());
        let death = secs(20) + dies_after;
        world.behave = Box::new(move |observer, _, _, at| {
            let dead = if at >= death { REFUSED } else { Outcome::Pass };
            (*observer != Observer::ControlPlane).then_some(if *observer == gateway(2) {
                Outcome::Pass
            } else {
                dead
            })
        });
        let mut found = None;
        while found.is_none() && world.now < death + secs(10) {
            world.run_until(world.now + ms(100));
            world.say(&gateway(2), Outcome::Pass);
            let isolated = world.cluster.isolated_observers();
            assert!((0..3).all(|n| !isolated.contains(&gateway(n), world.now)), "{dies_after:?}");
            found = world.all_are(State::Unhealthy).then_some(world.now);
        }
        // Two of three turns are honest gateways'.
        let found = found.expect("all are found") - death;
        assert!(found <= secs(5), "died after {dies_after:?}, found after {found:?}");
        world.run_until(death + secs(120));
        assert!(world.all_are(State::Unhealthy), "and the liar alone brings none back");
    }
}

#[test]
fn two_of_four_cut_off_lose_their_votes_and_hide_no_death_from_the_others() {
    let mut world = World::new(4, 8);
    world.run_until(secs(20));
    let cut = |observer: &Observer| [gateway(0), gateway(1)].contains(observer);
    world.behave =
        Box::new(move |observer, _, _, _| Some(if cut(observer) { SILENT } else { Outcome::Pass }));
    world.run_until(secs(300));
    let isolated = |world: &World| {
        [0, 1, 2, 3].map(|n| world.cluster.isolated_observers().contains(&gateway(n), world.now))
    };
    assert_eq!(isolated(&world), [true, true, false, false]);
    assert_eq!((0..8).map(|b| world.ejections(&format!("b{b}"))).sum::<usize>(), 0);
    world.behave = Box::new(|_, _, _, _| Some(REFUSED));
    world.run_to(secs(308), |world| world.all_are(State::Unhealthy)).expect("both that are left say so");
    assert_eq!(isolated(&world)[2..], [false, false]);
}

/// The last prober after a common failure still has failures as its last votes. These are old and nobody contradicts
/// them.
#[test]
fn backends_that_come_back_together_isolate_nobody() {
    for back_after in (0..5000).step_by(250).map(ms) {
        let mut world = World::new(3, 8);
        world.run_until(secs(20));
        world.behave = Box::new(|_, _, _, _| Some(REFUSED));
        world.run_until(secs(60) + back_after);
        assert!(world.all_are(State::Unhealthy));
        world.behave = Box::new(|_, _, _, _| PASS);
        while world.now < secs(80) {
            world.run_until(world.now + ms(100));
            let mut isolated = world.cluster.isolated_observers().iter();
            assert_eq!(isolated.next(), None, "back after {back_after:?}");
        }
    }
}

#[test]
fn an_observer_without_a_route_to_the_backend_ejects_nothing() {
    // The control plane's network does not reach the backend; one of two gateways is cut off later.
    let mut world = World::with(
        2,
        1,
        HealthProfile::default(),
        Box::new(|observer, _, _, _| {
            Some(if *observer == Observer::ControlPlane { SILENT } else { Outcome::Pass })
        }),
    );
    world.run_until(secs(120));
    assert_eq!((world.ejections("b0"), world.state("b0")), (0, State::Healthy));
    world.behave =
        Box::new(|observer, _, _, _| Some(if *observer == gateway(1) { Outcome::Pass } else { SILENT }));
    world.run_until(secs(600));
    assert_eq!(world.ejections("b0"), 0);
}

#[test]
fn the_cost_of_an_hour_is_the_same_with_3_30_and_300_gateways() {
    for gateways in [3, 30, 300] {
        let mut world = World::new(gateways, 4);
        world.run_until(secs(3600));
        let per_backend = |tier| (world.looks[&tier] as f64 / 4.0).round() as u64;
        let looks = Tier::ALL.map(per_backend);
        println!("{gateways} gateways, per backend and hour: {looks:?}");
        // One look more of each, on taking up the assignment.
        assert_eq!(looks, [2160 + 3, 240 + 2, 12 + 1]);
    }
}
