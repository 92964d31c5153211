//! What `scripts/charge.lua` does, on maps, step for step.

use std::collections::BTreeMap;
use std::time::Duration;

use super::state::verdict;
use super::store::{Meters, State};
use crate::budget::Terms;
use crate::call::{self, reset};
use crate::{Charge, ChargeRule, Decision, Key, Kind, LimitState, Outcome, Verdict, What};

impl State {
    pub(super) fn charge(&mut self, charges: &[Charge], now: u64) -> Decision {
        let at = now as f64;
        let mut before: BTreeMap<&Key, Meters> =
            charges.iter().map(|c| (&c.record, self.meters(&c.record, now))).collect();
        let mut judged = before.clone();
        let (mut refused, mut over, mut wait) = (false, false, Some(Duration::ZERO));
        let mut verdicts = Vec::with_capacity(charges.len());
        for c in charges {
            let (terms, meters) = (Terms::of(c.kind, &c.bucket), judged.entry(&c.record).or_default());
            let meter = &mut meters[c.kind as usize];
            let said = verdict(meter.judge(&terms, call::needed(c), at));
            verdicts.push(said);
            if said != Verdict::Fits && c.rule != ChargeRule::Note {
                refused |= c.rule == ChargeRule::AllOrNothing;
                over |= c.rule == ChargeRule::Always;
                wait = match said {
                    Verdict::Wait(longer) => wait.map(|wait| wait.max(longer)),
                    Verdict::Fits | Verdict::Never => None,
                };
            }
            *meter = meter.apply(&terms, call::added(c), at);
        }
        let mut written: BTreeMap<&Key, [Option<Terms>; Kind::COUNT]> = BTreeMap::new();
        for c in charges {
            if c.added == 0 || refused || (over && c.rule == ChargeRule::AllOrNothing) {
                continue;
            }
            let terms = Terms::of(c.kind, &c.bucket);
            let meter = &mut before.entry(&c.record).or_default()[c.kind as usize];
            *meter = meter.apply(&terms, call::added(c), at);
            written.entry(&c.record).or_default()[c.kind as usize] = Some(terms);
        }
        for (key, kinds) in written {
            self.write_kinds(key, kinds, before.get(key).copied().unwrap_or_default(), now);
        }
        let limits = charges.iter().zip(verdicts).enumerate().map(|(index, (c, verdict))| {
            let terms = Terms::of(c.kind, &c.bucket);
            let meter = before.get(&c.record).copied().unwrap_or_default()[c.kind as usize];
            LimitState {
                scope: index,
                what: What::Bucket(c.kind),
                verdict,
                limit: c.bucket.capacity,
                remaining: meter.remaining(&terms, at),
                reset: reset(meter.reset(&terms, at)),
            }
        });
        let outcome =
            if refused || over { Outcome::Limited { wait } } else { Outcome::Granted { slot: None } };
        Decision { outcome, limits: limits.collect(), now_us: now, degraded: false }
    }
}
