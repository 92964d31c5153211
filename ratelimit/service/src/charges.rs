//! Any number of charges as one decision. The limiter takes a bounded number at once, and how many limits a request meets
//! depends on what a stranger writes into it: an error there would be an admission, since proxies admit when they get none.

use std::time::Duration;

use weir_ratelimit::{
    Charge, ChargeRule, Decision, Error, LimitState, Limiter, MAX_CHARGES, Outcome, Verdict,
};

/// Charges all or none, as [`Limiter::charge`] does. More than it takes at once are judged first and written then; where
/// somebody else was faster in between, what was written is given back.
pub(super) async fn charge(limiter: &impl Limiter, charges: &[Charge]) -> Result<Decision, Error> {
    match charges.len() {
        0 => Ok(Decision {
            outcome: Outcome::Granted { slot: None },
            limits: Vec::new(),
            now_us: 0,
            degraded: false,
        }),
        1..=MAX_CHARGES => limiter.charge(charges).await,
        _ => charge_in_parts(limiter, charges).await,
    }
}

async fn charge_in_parts(limiter: &impl Limiter, charges: &[Charge]) -> Result<Decision, Error> {
    let asked: Vec<Charge> = charges.iter().map(|charge| Charge { added: 0, ..charge.clone() }).collect();
    let mut decision = joined(limiter, &asked).await?;
    let refuses = |rule: ChargeRule, limits: &[LimitState]| {
        charges
            .iter()
            .zip(limits)
            .any(|(charge, limit)| charge.rule == rule && limit.verdict != Verdict::Fits)
    };
    if refuses(ChargeRule::AllOrNothing, &decision.limits) {
        return Ok(decision);
    }
    let over = refuses(ChargeRule::Always, &decision.limits);
    let mut written: Vec<Charge> = Vec::new();
    for (part, limits) in charges.chunks(MAX_CHARGES).zip(decision.limits.chunks_mut(MAX_CHARGES)) {
        let wanted = |charge: &Charge| !over || charge.rule != ChargeRule::AllOrNothing;
        let (places, part): (Vec<usize>, Vec<Charge>) =
            part.iter().cloned().enumerate().filter(|(_, charge)| wanted(charge)).unzip();
        if part.is_empty() {
            continue;
        }
        let wrote = limiter.charge(&part).await?;
        for (place, limit) in places.into_iter().zip(wrote.limits) {
            let verdict = if over { limits[place].verdict } else { limit.verdict };
            limits[place] = LimitState { verdict, ..limit };
        }
        if !over && matches!(wrote.outcome, Outcome::Limited { .. }) {
            for part in written.chunks(MAX_CHARGES) {
                let back: Vec<Charge> = part.iter().cloned().map(given_back).collect();
                limiter.charge(&back).await?;
            }
            decision.outcome = wrote.outcome;
            break;
        }
        written.extend(part);
    }
    Ok(decision)
}

/// The decisions of all parts as one: it waits for the last.
async fn joined(limiter: &impl Limiter, charges: &[Charge]) -> Result<Decision, Error> {
    let mut all =
        Decision { outcome: Outcome::Granted { slot: None }, limits: Vec::new(), now_us: 0, degraded: false };
    for part in charges.chunks(MAX_CHARGES) {
        let decision = limiter.charge(part).await?;
        all.limits.extend(decision.limits);
        all.now_us = all.now_us.max(decision.now_us);
        all.degraded |= decision.degraded;
        all.outcome = match (all.outcome, decision.outcome) {
            (Outcome::Limited { wait: one }, Outcome::Limited { wait: other }) => Outcome::Limited {
                wait: one.zip(other).map(|(one, other): (Duration, Duration)| one.max(other)),
            },
            (Outcome::Granted { .. }, other) => other,
            (known, _) => known,
        };
    }
    Ok(all)
}

fn given_back(charge: Charge) -> Charge {
    Charge { needed: 0, added: charge.added.saturating_neg(), rule: ChargeRule::Note, ..charge }
}

#[cfg(test)]
mod tests {
    use weir_ratelimit::memory::MemoryLimiter;
    use weir_ratelimit::{Bucket, Key, Kind};

    use super::*;

    /// One hit at a bucket of this value, which has room for so many in a year.
    fn hit(value: &str, room: u64, rule: ChargeRule) -> Charge {
        let year = Duration::from_secs(365 * 24 * 60 * 60);
        Charge {
            record: Key::descriptor("rule", [value]),
            kind: Kind::Requests,
            bucket: Bucket::per(room, year, 1.0),
            needed: 1,
            added: 1,
            rule,
        }
    }

    fn hits(count: usize, room: u64) -> Vec<Charge> {
        (0..count).map(|n| hit(&format!("v{n}"), room, ChargeRule::AllOrNothing)).collect()
    }

    fn left(decision: &Decision) -> Vec<u64> {
        decision.limits.iter().map(|limit| limit.remaining).collect()
    }

    async fn passes(limiter: &MemoryLimiter, charges: &[Charge]) -> bool {
        let decision = charge(limiter, charges).await.expect("decided");
        assert_eq!(decision.limits.len(), charges.len(), "one state for each charge, in order");
        matches!(decision.outcome, Outcome::Granted { .. })
    }

    #[tokio::test(start_paused = true)]
    async fn more_charges_than_a_call_takes_are_one_decision() {
        for count in [0, 1, MAX_CHARGES, MAX_CHARGES + 1, 5 * MAX_CHARGES + 3] {
            let limiter = MemoryLimiter::new();
            let charges = hits(count, 2);
            assert!(passes(&limiter, &charges).await && passes(&limiter, &charges).await, "{count}");
            assert_eq!(passes(&limiter, &charges).await, count == 0, "{count}: used up");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_over_refuses_all_and_charges_none_wherever_it_stands() {
        for at in [0, MAX_CHARGES - 1, MAX_CHARGES, 2 * MAX_CHARGES] {
            let limiter = MemoryLimiter::new();
            let mut charges = hits(2 * MAX_CHARGES + 1, 2);
            charges[at] = hit("full", 0, ChargeRule::AllOrNothing);
            for _ in 0..5 {
                assert!(!passes(&limiter, &charges).await, "{at}");
            }
            charges.remove(at);
            let decision = charge(&limiter, &charges).await.expect("decided");
            assert!(left(&decision).iter().all(|left| *left == 1), "{at}: nothing was charged before");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_same_bucket_in_two_parts_is_charged_twice_or_not_at_all() {
        let limiter = MemoryLimiter::new();
        let mut charges = hits(2 * MAX_CHARGES, 9);
        charges[0] = hit("one", 1, ChargeRule::AllOrNothing);
        charges[2 * MAX_CHARGES - 1] = hit("one", 1, ChargeRule::AllOrNothing);
        assert!(!passes(&limiter, &charges).await, "there is room for one");
        charges.pop();
        let decision = charge(&limiter, &charges).await.expect("decided");
        assert!(matches!(decision.outcome, Outcome::Granted { .. }));
        assert_eq!(
            (left(&decision)[0], left(&decision)[1]),
            (0, 8),
            "what was written before was given back"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_only_counts_is_charged_unless_all_or_nothing_refuses() {
        let limiter = MemoryLimiter::new();
        let mut charges = hits(MAX_CHARGES, 9);
        charges.push(hit("metered", 1, ChargeRule::Always));
        charges.push(hit("noted", 9, ChargeRule::Note));
        assert!(passes(&limiter, &charges).await);
        let over = charge(&limiter, &charges).await.expect("decided");
        assert!(matches!(over.outcome, Outcome::Limited { .. }), "the meter is used up");
        let read: Vec<Charge> = charges
            .iter()
            .map(|c| Charge { needed: 0, added: 0, rule: ChargeRule::Note, ..c.clone() })
            .collect();
        let state = left(&charge(&limiter, &read).await.expect("decided"));
        assert_eq!((state[0], state[MAX_CHARGES + 1]), (8, 7), "the note went on, all or nothing did not");
    }
}
