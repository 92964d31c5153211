//! Calls whose keys are in several hash slots of a Cluster: one script call per slot, in a fixed order.
//!
//! Groups are asked from the most selective scope to the widest: tenant, model, account, everything, then the
//! candidate backends one by one. Groups that refused within the last second come first, and backends that were full
//! within the last second are checked before anything is charged. A refusal undoes the groups that had granted: it
//! credits their charges and removes their leases and records. So no limit is ever exceeded. Others can only see a
//! charge that exists between the grant and the undoing. Each group is idempotent by the reservation's id, and so is
//! the whole call.

use std::time::Duration;

use smallvec::SmallVec;

use super::limiter::RedisLimiter;
use super::reply;
use crate::model::call::{
    Acquire, Candidate, Charge, ChargeRule, Decision, Outcome, Renewal, Settle, Settled,
};
use crate::model::checks::{RESERVATION_LIFE, TOMBSTONE_LIFE};
use crate::model::cost::Cost;
use crate::model::error::Error;
use crate::model::id::{OwnerId, ReservationId};
use crate::model::key::Key;
use crate::model::limits::{LimitState, ScopeLimits, Scopes, Verdict};
use crate::model::usage::UsageLines;

/// The scopes in one hash slot, by their positions in the call.
struct Group {
    tag: String,
    scopes: SmallVec<[usize; 6]>,
}

/// The groups in the order in which they are asked. A call without scopes has one empty group, which stores its id.
fn groups(scopes: &[ScopeLimits]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (at, scope) in scopes.iter().enumerate() {
        let tag = scope.record.tag();
        match groups.iter_mut().find(|group| group.tag == tag) {
            Some(group) => group.scopes.push(at),
            None => groups.push(Group { tag: tag.to_owned(), scopes: SmallVec::from_slice(&[at]) }),
        }
    }
    if groups.is_empty() {
        groups.push(Group { tag: "g".into(), scopes: SmallVec::new() });
    }
    groups.sort_by(|a, b| (rank(&a.tag), &a.tag).cmp(&(rank(&b.tag), &b.tag)));
    groups
}

fn rank(tag: &str) -> u8 {
    match tag.split(':').next() {
        Some("t") => 0,
        Some("m") => 1,
        Some("g") => 3,
        _ => 2,
    }
}

fn pick(scopes: &[ScopeLimits], of: &Group) -> Scopes {
    of.scopes.iter().map(|&at| scopes[at].clone()).collect()
}

/// Adds the limits that a group returned and replaces earlier ones.
fn note(all: &mut Vec<LimitState>, limits: Vec<LimitState>) {
    for limit in limits {
        match all.iter_mut().find(|known| known.scope == limit.scope && known.what == limit.what) {
            Some(known) => *known = limit,
            None => all.push(limit),
        }
    }
}

fn in_order(mut limits: Vec<LimitState>, scopes: &[ScopeLimits]) -> Vec<LimitState> {
    // The limits of one scope come from one group in the right order, and the sort is stable.
    limits.sort_by_key(|limit| limit.position_in(scopes));
    limits
}

fn of_group(call: &Acquire, scopes: Scopes, candidates: Vec<Candidate>) -> Acquire {
    Acquire { scopes, candidates, ..call.clone() }
}

impl RedisLimiter {
    pub(super) async fn acquire_split(&self, call: &Acquire) -> Result<Decision, Error> {
        let mut groups = groups(&call.scopes);
        groups.sort_by_key(|group| !self.recent_refusals.lately(&group.tag));
        if let Some(refusal) = self.refused_for_slots(call, &groups).await? {
            return Ok(refusal);
        }
        let mut limits = Vec::new();
        let (mut now_us, mut again) = (0, false);
        for (n, group) in groups.iter().enumerate() {
            let part = of_group(call, pick(&call.scopes, group), Vec::new());
            let (decision, before) = self.ask_group(&part, &group.tag, RESERVATION_LIFE).await?;
            again |= before;
            now_us = now_us.max(decision.now_us);
            note(&mut limits, decision.limits);
            let Outcome::Limited { mut wait } = decision.outcome else { continue };
            self.recent_refusals.note(&group.tag);
            self.undo(call, &groups[..n], &mut limits).await?;
            for group in &groups[n + 1..] {
                let part = of_group(call, pick(&call.scopes, group), Vec::new());
                let (looked, _) = self.ask_group(&part, &group.tag, Duration::ZERO).await?;
                note(&mut limits, looked.limits);
                if let Outcome::Limited { wait: more } = looked.outcome {
                    wait = wait.zip(more).map(|(a, b)| a.max(b));
                }
            }
            return Ok(decided(call, Outcome::Limited { wait }, limits, now_us));
        }
        if call.candidates.is_empty() {
            return Ok(decided(call, Outcome::Granted { slot: None }, limits, now_us));
        }
        if again {
            // The call was granted before: it holds a slot or is settled, and must not take another slot.
            for (at, candidate) in call.candidates.iter().enumerate() {
                if self.ask_slot(call, candidate, Duration::ZERO).await?.1 {
                    return Ok(decided(call, Outcome::Granted { slot: Some(at) }, limits, now_us));
                }
            }
        }
        let mut soonest = None;
        for (at, candidate) in call.candidates.iter().enumerate() {
            let (decision, _) = self.ask_slot(call, candidate, TOMBSTONE_LIFE).await?;
            match decision.outcome {
                Outcome::Granted { .. } => {
                    return Ok(decided(call, Outcome::Granted { slot: Some(at) }, limits, now_us));
                }
                Outcome::NoSlot { wait } => {
                    self.recent_refusals.note(candidate.leases.tag());
                    soonest = Some(soonest.map_or(wait, |s: Duration| s.min(wait)));
                }
                // A settlement came before the grant.
                Outcome::Limited { wait } => {
                    return Ok(decided(call, Outcome::Limited { wait }, limits, now_us));
                }
            }
        }
        self.undo(call, &groups, &mut limits).await?;
        let wait = soonest.unwrap_or(call.lease_ttl);
        Ok(decided(call, Outcome::NoSlot { wait }, limits, now_us))
    }

    /// Refuses a call whose candidates were all full within the last second and still are. Charges nothing.
    async fn refused_for_slots(&self, call: &Acquire, groups: &[Group]) -> Result<Option<Decision>, Error> {
        let lately = |candidate: &Candidate| self.recent_refusals.lately(candidate.leases.tag());
        if call.candidates.is_empty() || !call.candidates.iter().all(lately) {
            return Ok(None);
        }
        let mut soonest = call.lease_ttl;
        for candidate in &call.candidates {
            match self.ask_slot(call, candidate, Duration::ZERO).await?.0.outcome {
                Outcome::NoSlot { wait } => soonest = soonest.min(wait),
                Outcome::Granted { .. } | Outcome::Limited { .. } => return Ok(None),
            }
        }
        let (mut limits, mut now_us, mut outcome) = (Vec::new(), 0, Outcome::NoSlot { wait: soonest });
        for group in groups {
            let part = of_group(call, pick(&call.scopes, group), Vec::new());
            let (looked, _) = self.ask_group(&part, &group.tag, Duration::ZERO).await?;
            now_us = now_us.max(looked.now_us);
            note(&mut limits, looked.limits);
            if let Outcome::Limited { wait } = looked.outcome {
                let wait = match outcome {
                    Outcome::Limited { wait: known } => known.zip(wait).map(|(a, b)| a.max(b)),
                    _ => wait,
                };
                outcome = Outcome::Limited { wait };
            }
        }
        Ok(Some(decided(call, outcome, limits, now_us)))
    }

    async fn ask_slot(
        &self,
        call: &Acquire,
        candidate: &Candidate,
        life: Duration,
    ) -> Result<(Decision, bool), Error> {
        let part = of_group(call, Scopes::new(), vec![candidate.apart()]);
        self.ask_group(&part, candidate.leases.tag(), life).await
    }

    /// Undoes the grants of groups. If that fails, the outcome is unknown and the error says so.
    async fn undo(
        &self,
        call: &Acquire,
        granted: &[Group],
        limits: &mut Vec<LimitState>,
    ) -> Result<(), Error> {
        for group in granted.iter().rev() {
            let scopes = pick(&call.scopes, group);
            let part = Settle { id: call.id, actual: Cost::default(), scopes, slot: None, usage: None };
            let settled = match self.settle_group(&part, &group.tag, Duration::ZERO).await {
                Err(error) if error.trouble() != crate::model::error::Trouble::Caller => {
                    self.settle_group(&part, &group.tag, Duration::ZERO).await.map_err(|_| Error::Lost)?
                }
                settled => settled?,
            };
            let mut after = settled.limits;
            after.iter_mut().for_each(|limit| limit.verdict = Verdict::Fits);
            note(limits, after);
        }
        Ok(())
    }

    /// If a part of it is done and another fails, the outcome is unknown, whatever the error of that one says: a caller that took
    /// the settlement for one that never was would count it again.
    pub(super) async fn settle_split(&self, call: &Settle) -> Result<Settled, Error> {
        let mut in_part = false;
        let settled = self.settle_groups(call, &mut in_part).await;
        settled.map_err(|error| if in_part { Error::Lost } else { error })
    }

    async fn settle_groups(&self, call: &Settle, in_part: &mut bool) -> Result<Settled, Error> {
        let mut limits = Vec::new();
        let (mut applied, mut now_us) = (false, 0);
        let mut usage = call.usage.clone();
        for group in &groups(&call.scopes) {
            // Usage goes with the group whose hash slot stores it, if there is one.
            let usage = usage.take_if(|usage| usage.record.tag() == group.tag);
            let part = Settle { scopes: pick(&call.scopes, group), slot: None, usage, ..call.clone() };
            let settled = self.settle_group(&part, &group.tag, TOMBSTONE_LIFE).await?;
            *in_part = true;
            applied |= settled.applied;
            now_us = now_us.max(settled.now_us);
            note(&mut limits, settled.limits);
        }
        if let Some(slot) = &call.slot {
            let part = Settle { scopes: Scopes::new(), usage: None, ..call.clone() };
            self.settle_group(&part, slot.tag(), TOMBSTONE_LIFE).await?;
        }
        if let Some(usage) = usage {
            let tag = usage.record.tag().to_owned();
            let part = Settle { scopes: Scopes::new(), slot: None, usage: Some(usage), ..call.clone() };
            self.settle_group(&part, &tag, TOMBSTONE_LIFE).await?;
        }
        Ok(Settled { applied, limits: in_order(limits, &call.scopes), now_us })
    }

    pub(super) async fn move_split(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let mut taken = None;
        for (at, candidate) in candidates.iter().enumerate() {
            let stays = from.filter(|from| **from == candidate.leases);
            if self.move_one_slot(id, stays, std::slice::from_ref(candidate), lease_ttl).await?.is_some() {
                taken = Some(at);
                break;
            }
        }
        if let Some(from) = from.filter(|from| taken.is_none_or(|at| candidates[at].leases != **from)) {
            self.release_one_slot(id, std::slice::from_ref(from)).await?;
        }
        Ok(taken)
    }

    pub(super) async fn renew_split(
        &self,
        renewals: &[Renewal],
        lease_ttl: Duration,
    ) -> Result<Vec<ReservationId>, Error> {
        let mut by_tag: std::collections::BTreeMap<String, Vec<Renewal>> = Default::default();
        for renewal in renewals {
            for key in &renewal.leases {
                let of_tag = by_tag.entry(key.tag().to_owned()).or_default();
                match of_tag.last_mut() {
                    Some(last) if last.id == renewal.id => last.leases.push(key.clone()),
                    _ => of_tag.push(Renewal { id: renewal.id, leases: smallvec::smallvec![key.clone()] }),
                }
            }
        }
        let mut lost = Vec::new();
        for renewals in by_tag.values() {
            for id in self.renew_one_slot(renewals, lease_ttl).await? {
                if !lost.contains(&id) {
                    lost.push(id);
                }
            }
        }
        Ok(lost)
    }

    pub(super) async fn release_split(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        for key in leases {
            self.release_one_slot(id, std::slice::from_ref(key)).await?;
        }
        Ok(())
    }

    /// Reads the membership set first and then frees the leases slot by slot. A process that becomes a member in
    /// between finds its leases lost.
    pub(super) async fn free_orphans_split(
        &self,
        owner: OwnerId,
        members: &Key,
        leases: &[Key],
    ) -> Result<Option<u64>, Error> {
        if self.free_orphans_one_slot(owner, Some(members), &[]).await?.is_none() {
            return Ok(None);
        }
        let mut freed = 0;
        for same_slot in leases.chunk_by(|a, b| a.tag() == b.tag()) {
            freed += self.free_orphans_one_slot(owner, None, same_slot).await?.unwrap_or(0);
        }
        Ok(Some(freed))
    }

    /// Judges every slot first, then writes. If a slot refuses after all because another call came between, the
    /// earlier charges are undone.
    pub(super) async fn charge_split(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let mut tags: Vec<&str> = charges.iter().map(|charge| charge.record.tag()).collect();
        tags.sort_by_key(|tag| (rank(tag), *tag));
        tags.dedup();
        let (mut limits, now_us) = self.judge_charges(charges, &tags).await?;
        let refuses = |rule: ChargeRule| {
            charges.iter().zip(&limits).any(|(charge, limit)| {
                charge.rule == rule && limit.as_ref().is_some_and(|limit| limit.verdict != Verdict::Fits)
            })
        };
        let (refused, over) = (refuses(ChargeRule::AllOrNothing), refuses(ChargeRule::Always));
        let mut outcome = match refused || over {
            true => Outcome::Limited { wait: wait_of(charges, &limits) },
            false => Outcome::Granted { slot: None },
        };
        let mut written: Vec<Charge> = Vec::new();
        for tag in tags.iter().filter(|_| !refused) {
            let part = part_of(charges, tag, |charge| !over || charge.rule != ChargeRule::AllOrNothing);
            if part.is_empty() {
                continue;
            }
            let part_charges: Vec<Charge> = part.iter().map(|(_, charge)| (*charge).clone()).collect();
            let decision = self.charge_one_slot(&part_charges).await?;
            for ((at, _), limit) in part.iter().zip(decision.limits) {
                let judged = limits[*at].as_ref().filter(|_| over).map(|judged| judged.verdict);
                limits[*at] = Some(LimitState { verdict: judged.unwrap_or(limit.verdict), ..limit });
            }
            if !over && matches!(decision.outcome, Outcome::Limited { .. }) {
                self.give_back(written, &tags).await?;
                outcome = decision.outcome;
                break;
            }
            written.extend(part_charges);
        }
        Ok(Decision { outcome, limits: limits.into_iter().flatten().collect(), now_us, degraded: false })
    }

    /// The state of each limit and the store's time. Writes nothing.
    async fn judge_charges(
        &self,
        charges: &[Charge],
        tags: &[&str],
    ) -> Result<(Vec<Option<LimitState>>, u64), Error> {
        let mut limits: Vec<Option<LimitState>> = vec![None; charges.len()];
        let mut now_us = 0;
        for tag in tags {
            let part = part_of(charges, tag, |_| true);
            let judged: Vec<Charge> = part.iter().map(|(_, c)| Charge { added: 0, ..(*c).clone() }).collect();
            let decision = self.charge_one_slot(&judged).await?;
            now_us = now_us.max(decision.now_us);
            for ((at, _), limit) in part.iter().zip(decision.limits) {
                limits[*at] = Some(limit);
            }
        }
        Ok((limits, now_us))
    }

    async fn give_back(&self, written: Vec<Charge>, tags: &[&str]) -> Result<(), Error> {
        let back: Vec<Charge> = written.into_iter().map(given_back).collect();
        for tag in tags {
            let part = part_of(&back, tag, |_| true);
            let part: Vec<Charge> = part.into_iter().map(|(_, charge)| charge.clone()).collect();
            if !part.is_empty() {
                self.charge_one_slot(&part).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn peek_split(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let mut limits = Vec::new();
        for group in groups(scopes).iter().filter(|group| !group.scopes.is_empty()) {
            note(&mut limits, self.peek_one_slot(&pick(scopes, group)).await?);
        }
        Ok(in_order(limits, scopes))
    }

    pub(super) async fn usage_split(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let mut lines = Vec::with_capacity(records.len());
        for same_slot in records.chunk_by(|a, b| a.tag() == b.tag()) {
            lines.extend(self.usage_one_slot(same_slot).await?);
        }
        Ok(lines)
    }

    async fn ask_group(&self, call: &Acquire, tag: &str, life: Duration) -> Result<(Decision, bool), Error> {
        let reply = self.acquire_raw(call, &Key::reservation(tag, call.id), life).await?;
        Ok((reply::Reader::new(&reply).decision(&call.scopes)?, reply.first() == Some(&3)))
    }

    async fn settle_group(&self, call: &Settle, tag: &str, life: Duration) -> Result<Settled, Error> {
        self.settle_one_slot(call, &Key::reservation(tag, call.id), life).await
    }
}

fn part_of<'a>(
    charges: &'a [Charge],
    tag: &str,
    wanted: impl Fn(&Charge) -> bool,
) -> Vec<(usize, &'a Charge)> {
    charges.iter().enumerate().filter(|(_, charge)| charge.record.tag() == tag && wanted(charge)).collect()
}

/// The time until every charge that can refuse would fit; `None` if one of them can never fit.
fn wait_of(charges: &[Charge], limits: &[Option<LimitState>]) -> Option<Duration> {
    let limits = charges.iter().zip(limits).filter(|(charge, _)| charge.rule != ChargeRule::Note);
    limits.filter_map(|(_, limit)| limit.as_ref()).try_fold(Duration::ZERO, |wait, limit| {
        match limit.verdict {
            Verdict::Fits => Some(wait),
            Verdict::Wait(more) => Some(wait.max(more)),
            Verdict::Never => None,
        }
    })
}

fn given_back(charge: Charge) -> Charge {
    Charge { needed: 0, added: charge.added.saturating_neg(), rule: ChargeRule::Note, ..charge }
}

fn decided(call: &Acquire, outcome: Outcome, limits: Vec<LimitState>, now_us: u64) -> Decision {
    Decision { outcome, limits: in_order(limits, &call.scopes), now_us, degraded: false }
}

#[cfg(test)]
mod tests {
    use super::super::client::is_one_slot;
    use super::*;
    use crate::model::key::{Scope, scope_keys};
    use crate::model::kind::Kind;
    use crate::model::limits::{Mode, WithoutStore};

    #[test]
    fn groups_go_from_the_most_selective_to_the_widest() {
        let of = |scope: Scope<'_>| {
            let (record, leases) = scope_keys(scope);
            let buckets = [None; Kind::COUNT];
            let (mode, without_store) = (Mode::Enforce, WithoutStore::LocalShare);
            ScopeLimits {
                record,
                leases,
                buckets,
                concurrency: None,
                mode,
                without_store,
                prefetch: [0; Kind::COUNT],
            }
        };
        let scopes = [
            of(Scope::Global),
            of(Scope::Account("x")),
            of(Scope::Model("m")),
            of(Scope::AccountModel { account: "x", model: "m" }),
            of(Scope::ApiKey { tenant: "t", key: "k" }),
            of(Scope::Tenant("t")),
        ];
        let groups = groups(&scopes);
        let order: Vec<_> = groups.iter().map(|g| (g.tag.as_str(), g.scopes.as_slice())).collect();
        assert_eq!(order, [("t:t", &[4, 5][..]), ("m:m", &[2]), ("a:x", &[1, 3]), ("g", &[0])]);
        assert!(is_one_slot(scopes[4..].iter().map(|s| &s.record)));
        assert!(!is_one_slot(scopes.iter().map(|s| &s.record)));
    }
}
