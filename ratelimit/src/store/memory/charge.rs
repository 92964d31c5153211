//! The memory store's version of `scripts/charge.lua`, step for step.

use std::collections::BTreeMap;
use std::time::Duration;

use super::state::verdict;
use super::store::{BucketStates, State};
use crate::model::call::{Charge, ChargeRule, Decision, Outcome};
use crate::model::checks::{self, reset};
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::Terms;
use crate::model::limits::{LimitState, Verdict, What};

impl State {
    pub(super) fn charge(&mut self, charges: &[Charge], now: u64) -> Decision {
        let at = now as f64;
        let mut before: BTreeMap<&Key, BucketStates> =
            charges.iter().map(|c| (&c.record, self.bucket_states(&c.record, now))).collect();
        let mut judged = before.clone();
        let (mut refused, mut over, mut wait) = (false, false, Some(Duration::ZERO));
        let mut verdicts = Vec::with_capacity(charges.len());
        for c in charges {
            let (terms, bucket_states) = (Terms::of(c.kind, &c.bucket), judged.entry(&c.record).or_default());
            let bucket_state = &mut bucket_states[c.kind as usize];
            let said = verdict(bucket_state.judge(&terms, checks::needed(c), at));
            verdicts.push(said);
            if said != Verdict::Fits && c.rule != ChargeRule::Note {
                refused |= c.rule == ChargeRule::AllOrNothing;
                over |= c.rule == ChargeRule::Always;
                wait = match said {
                    Verdict::Wait(longer) => wait.map(|wait| wait.max(longer)),
                    Verdict::Fits | Verdict::Never => None,
                };
            }
            *bucket_state = bucket_state.apply(&terms, checks::added(c), at);
        }
        let mut written: BTreeMap<&Key, [Option<Terms>; Kind::COUNT]> = BTreeMap::new();
        for c in charges {
            if c.added == 0 || refused || (over && c.rule == ChargeRule::AllOrNothing) {
                continue;
            }
            let terms = Terms::of(c.kind, &c.bucket);
            let bucket_state = &mut before.entry(&c.record).or_default()[c.kind as usize];
            *bucket_state = bucket_state.apply(&terms, checks::added(c), at);
            written.entry(&c.record).or_default()[c.kind as usize] = Some(terms);
        }
        for (key, kinds) in written {
            self.write_kinds(key, kinds, before.get(key).copied().unwrap_or_default(), now);
        }
        let limits = charges.iter().zip(verdicts).map(|(c, verdict)| {
            let terms = Terms::of(c.kind, &c.bucket);
            let bucket_state = before.get(&c.record).copied().unwrap_or_default()[c.kind as usize];
            LimitState {
                scope: c.record.clone(),
                what: What::Bucket(c.kind),
                verdict,
                limit: c.bucket.capacity,
                remaining: bucket_state.remaining(&terms, at),
                reset: reset(bucket_state.reset(&terms, at)),
            }
        });
        let outcome =
            if refused || over { Outcome::Limited { wait } } else { Outcome::Granted { slot: None } };
        Decision { outcome, limits: limits.collect(), now_us: now, degraded: false }
    }
}
