//! The memory store's version of the scripts, step for step the same as the files in `scripts/`.

use std::time::Duration;

use super::store::{BucketStates, Reservation, Stage, State, later};
use crate::model::call::{Acquire, Candidate, Decision, Outcome, Renewal, Settle, Settled};
use crate::model::checks::{self, Line, RESERVATION_LIFE, blank_limits, lines, reserved, reset, spent};
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::kind::Kind;
use crate::model::leaky_bucket::Fit;
use crate::model::limits::{LimitState, Mode, ScopeLimits, Verdict, What};

/// The judgement of one scope, before anything is written.
struct Judged {
    lines: smallvec::SmallVec<[Line; Kind::COUNT]>,
    bucket_states: BucketStates,
}

impl State {
    pub(super) fn acquire(&mut self, call: &Acquire, now: u64) -> Decision {
        let at = now as f64;
        if let Some(known) = self.known_decision(call, now) {
            return known;
        }

        let mut limits = self.peek(&call.scopes, now);
        let mut judged: Vec<Judged> = Vec::with_capacity(call.scopes.len());
        let mut refusal: Option<Option<Duration>> = None;
        let mut next = limits.iter_mut();
        for scope in &call.scopes {
            let (lines, bucket_states) =
                (lines(scope, reserved(call)), self.bucket_states(&scope.record, now));
            for (line, limit) in lines.iter().zip(&mut next) {
                limit.verdict =
                    verdict(bucket_states[line.kind as usize].judge(&line.terms, line.amount, at));
                refuse(&mut refusal, scope, limit.verdict);
            }
            if scope.concurrency.is_some()
                && let Some(limit) = next.next()
            {
                refuse(&mut refusal, scope, limit.verdict);
            }
            judged.push(Judged { lines, bucket_states });
        }
        if let Some(wait) = refusal {
            return Decision { outcome: Outcome::Limited { wait }, limits, now_us: now, degraded: false };
        }
        let slot = self.free_slot(&call.candidates, None, now);
        if slot.is_none() && !call.candidates.is_empty() {
            let outcome = Outcome::NoSlot { wait: self.slot_wait(&call.candidates, call.lease_ttl, now) };
            return Decision { outcome, limits, now_us: now, degraded: false };
        }

        let charged = self.charge_scopes(call, judged, now);
        let slot_key = slot.map(|slot| call.candidates[slot].leases.clone());
        if let Some(key) = &slot_key {
            self.take_lease(key, call.id, later(now, call.lease_ttl));
        }
        let expires = later(now, RESERVATION_LIFE);
        let open = Reservation { stage: Stage::Open, slot: slot_key, reserved: charged, expires };
        self.write_reservation(call.id, open, now);
        for (after, limit) in self.peek(&call.scopes, now).into_iter().zip(&mut limits) {
            *limit = LimitState { verdict: limit.verdict, ..after };
        }
        Decision { outcome: Outcome::Granted { slot }, limits, now_us: now, degraded: false }
    }

    /// The decision of a call whose id was decided before.
    fn known_decision(&mut self, call: &Acquire, now: u64) -> Option<Decision> {
        let held = self.reservation(call.id, now)?;
        let outcome = match held.stage {
            Stage::NeverGranted => Outcome::Limited { wait: None },
            Stage::Open | Stage::Settled => Outcome::Granted {
                slot: call.candidates.iter().position(|c| held.slot.as_ref() == Some(&c.leases)),
            },
        };
        let mut limits = self.peek(&call.scopes, now);
        limits.iter_mut().for_each(|limit| limit.verdict = Verdict::Fits);
        Some(Decision { outcome, limits, now_us: now, degraded: false })
    }

    /// Charges every scope and takes its lease. Returns the charge of each scope.
    fn charge_scopes(
        &mut self,
        call: &Acquire,
        judged: Vec<Judged>,
        now: u64,
    ) -> Vec<(Key, [f64; Kind::COUNT])> {
        let (at, expiry) = (now as f64, later(now, call.lease_ttl));
        let mut charged = Vec::with_capacity(call.scopes.len());
        for (scope, Judged { lines, mut bucket_states }) in call.scopes.iter().zip(judged) {
            let mut amounts = [0.0; Kind::COUNT];
            for line in &lines {
                let bucket_state = &mut bucket_states[line.kind as usize];
                let before = bucket_state.level_at(&line.terms, at);
                *bucket_state = bucket_state.apply(&line.terms, line.amount, at);
                if line.amount > 0.0 {
                    amounts[line.kind as usize] = bucket_state.level - before;
                }
            }
            if lines.iter().any(|line| line.amount > 0.0) {
                self.write_record(&scope.record, &lines, bucket_states, now);
            }
            if scope.concurrency.is_some() {
                self.take_lease(&scope.leases, call.id, expiry);
            }
            charged.push((scope.record.clone(), amounts));
        }
        charged
    }

    pub(super) fn settle(&mut self, call: &Settle, now: u64) -> Settled {
        let held = self.reservation(call.id, now);
        let (stage, slot, charged) = match held {
            Some(held) => (Some(held.stage), held.slot.clone(), std::mem::take(&mut held.reserved)),
            None => (None, None, Vec::new()),
        };
        for scope in &call.scopes {
            let lines = lines(scope, spent(&call.actual));
            let mut bucket_states = self.bucket_states(&scope.record, now);
            let before = charged.iter().find(|(record, _)| *record == scope.record);
            let mut changed = false;
            for line in &lines {
                let delta = match stage {
                    Some(Stage::Open) => line.amount - before.map_or(0.0, |(_, by)| by[line.kind as usize]),
                    Some(Stage::Settled | Stage::NeverGranted) => 0.0,
                    None => line.amount,
                };
                let bucket_state = &mut bucket_states[line.kind as usize];
                *bucket_state = bucket_state.apply(&line.terms, delta, now as f64);
                changed |= delta != 0.0;
            }
            if changed {
                self.write_record(&scope.record, &lines, bucket_states, now);
            }
        }
        if let (Some(usage), Some(Stage::Open) | None) = (&call.usage, stage) {
            self.note_usage(usage, now);
        }
        for key in call.scopes.iter().map(|scope| &scope.leases).chain(&call.slot) {
            self.drop_lease(key, call.id);
        }
        let expires = later(now, self.tombstone_life);
        let ended = match stage {
            Some(Stage::Open) => Some(Stage::Settled),
            None => Some(Stage::NeverGranted),
            Some(Stage::Settled | Stage::NeverGranted) => None,
        };
        if let Some(stage) = ended {
            self.write_reservation(call.id, Reservation { stage, slot, reserved: Vec::new(), expires }, now);
        }
        Settled { applied: stage == Some(Stage::Open), limits: self.peek(&call.scopes, now), now_us: now }
    }

    pub(super) fn move_slot(
        &mut self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        ttl: Duration,
        now: u64,
    ) -> Option<usize> {
        let held =
            candidates.iter().position(|c| Some(&c.leases) != from && self.live(&c.leases, now).holds(id));
        let slot = held.or_else(|| self.free_slot(candidates, Some(id), now));
        if let Some(from) = from {
            self.drop_lease(from, id);
        }
        if let Some(slot) = slot {
            self.take_lease(&candidates[slot].leases, id, later(now, ttl));
        }
        slot
    }

    /// Returns false if a lease was lost.
    pub(super) fn renew(&mut self, renewal: &Renewal, ttl: Duration, now: u64) -> bool {
        let mut whole = true;
        for key in &renewal.leases {
            if self.leases.get_mut(key).is_some_and(|set| {
                set.prune(now);
                set.holds(renewal.id)
            }) {
                self.take_lease(key, renewal.id, later(now, ttl));
            } else {
                whole = false;
            }
        }
        if let Some(held) = self.reservation(renewal.id, now)
            && held.stage == Stage::Open
        {
            held.expires = later(now, RESERVATION_LIFE);
        }
        whole
    }

    pub(super) fn release(&mut self, id: ReservationId, leases: &[Key]) {
        leases.iter().for_each(|key| self.drop_lease(key, id));
    }

    /// Returns `None` if the owner is a member.
    pub(super) fn free_orphans(&mut self, owner: OwnerId, leases: &[Key], now: u64) -> Option<u64> {
        if self.live(&Key::membership(), now).holds(owner.membership_entry()) {
            return None;
        }
        let mut freed = 0;
        for key in leases {
            if let Some(set) = self.leases.get_mut(key) {
                freed += set.remove_all(|id| owner.made(id));
            }
        }
        Some(freed)
    }

    pub(super) fn peek(&mut self, scopes: &[ScopeLimits], now: u64) -> Vec<LimitState> {
        let at = now as f64;
        let mut limits = blank_limits(scopes);
        for limit in &mut limits {
            let Some(scope) = limit.scope_in(scopes) else { continue };
            match limit.what {
                What::Bucket(kind) => {
                    let Some(line) = lines(scope, |_, _| 0.0).into_iter().find(|line| line.kind == kind)
                    else {
                        continue;
                    };
                    let bucket_state = self.bucket_states(&scope.record, now)[kind as usize];
                    limit.verdict = verdict(bucket_state.judge(&line.terms, 0.0, at));
                    limit.remaining = bucket_state.remaining(&line.terms, at);
                    limit.reset = reset(bucket_state.reset(&line.terms, at));
                }
                What::Concurrency => {
                    let most = scope.concurrency.unwrap_or_default();
                    let Some(set) = self.leases.get_mut(&scope.leases) else {
                        limit.verdict = if most == 0 { Verdict::Never } else { Verdict::Fits };
                        limit.remaining = limit.limit;
                        continue;
                    };
                    set.prune(now);
                    if set.len() >= most as usize {
                        let wait =
                            set.opens_at(most).map(|at| Duration::from_micros(at.saturating_sub(now).max(1)));
                        limit.verdict = wait.map_or(Verdict::Never, Verdict::Wait);
                    }
                    limit.remaining = limit.limit.saturating_sub(set.len() as u64);
                }
            }
        }
        limits
    }
}

pub(super) fn verdict(fit: Fit) -> Verdict {
    match fit {
        Fit::Now => Verdict::Fits,
        Fit::After(us) => Verdict::Wait(checks::micros(us)),
        Fit::Never => Verdict::Never,
    }
}

/// Adds a verdict to the refusal: its wait is the longest one, and `None` if one of the limits can never fit.
fn refuse(refusal: &mut Option<Option<Duration>>, scope: &ScopeLimits, verdict: Verdict) {
    let wait = match verdict {
        _ if scope.mode == Mode::Shadow => return,
        Verdict::Fits => return,
        Verdict::Wait(wait) => Some(wait),
        Verdict::Never => None,
    };
    *refusal = Some(match refusal {
        Some(before) => before.zip(wait).map(|(a, b)| a.max(b)),
        None => wait,
    });
}
