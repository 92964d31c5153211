//! Groups the candidates of a request by the provider account that they bill. Pure: which call to ask next, and the
//! result of all decisions.
//!
//! An order of preference is cut into groups of one account each, so that the order is kept. The limiter decides the
//! first group with the request's own limits and those of the group's account, in one call. The next group is asked
//! only if the account refuses or no backend of the group has a free slot. So limited accounts cost nothing while the
//! account of the first choice has room.

use std::ops::Range;
use std::time::Duration;

use smallvec::SmallVec;
use weir_ratelimit::waiting::Alternatives;
use weir_ratelimit::{Acquire, Decision, LimitState, Outcome, ScopeLimits, Scopes, Verdict, What};

use crate::routing::accounts::Accounts;
use crate::routing::balance::Candidate;
use crate::routing::scope::ScopeEntry;

/// Consecutive backends in the order of preference, under one account or under none; as many as one call may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CandidateGroup {
    /// Their range in the candidates.
    pub(crate) candidates: Range<usize>,
    /// The index of the account in the model's [`Accounts`]; `None` if no account limits them.
    pub(crate) account: Option<usize>,
}

/// All groups of an order of preference, and the scopes of their accounts.
#[derive(Debug, Default)]
pub(crate) struct CandidateGroups {
    groups: SmallVec<[CandidateGroup; 4]>,
    /// The number of scopes of the full call that are the request's own.
    own: usize,
    /// Each account once: its index and the range of its scopes in the full call, behind the request's own scopes.
    accounts: SmallVec<[(usize, Range<usize>); 2]>,
}

impl CandidateGroups {
    /// The groups of these candidates, for a call with `own` scopes of its own. Backends of accounts that are not
    /// `usable` are left out.
    pub(crate) fn of(
        accounts: &Accounts,
        candidates: &[Candidate],
        own: usize,
        usable: impl Fn(usize) -> bool,
    ) -> Self {
        let mut groups = Self { groups: SmallVec::new(), own, accounts: SmallVec::new() };
        let mut end = own;
        for (at, candidate) in candidates.iter().enumerate() {
            let account = accounts.of(candidate.index);
            if account.is_some_and(|account| !usable(account)) {
                continue;
            }
            match groups.groups.last_mut() {
                Some(group)
                    if group.account == account
                        && group.candidates.end == at
                        && group.candidates.len() < weir_ratelimit::MAX_CANDIDATES =>
                {
                    group.candidates.end += 1;
                }
                _ => groups.groups.push(CandidateGroup { candidates: at..at + 1, account }),
            }
            if let Some(account) = account
                && !groups.accounts.iter().any(|(known, _)| *known == account)
            {
                let scopes = accounts[account].scopes.len();
                groups.accounts.push((account, end..end + scopes));
                end += scopes;
            }
        }
        groups
    }

    /// Whether there is no backend to ask for.
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// The limits of the accounts, in the order of the full call.
    pub(crate) fn entries<'a>(&self, accounts: &'a Accounts) -> impl Iterator<Item = &'a ScopeEntry> {
        self.accounts.iter().flat_map(|(account, _)| &accounts[*account].scopes)
    }

    /// The scopes that can stand in for each other; empty if there is one account only, or no choice.
    pub(crate) fn alternatives(&self) -> Alternatives {
        let free = self.groups.iter().any(|group| group.account.is_none()).then_some(self.own..self.own);
        let groups: Alternatives =
            self.accounts.iter().map(|(_, scopes)| scopes.clone()).chain(free).collect();
        if groups.len() > 1 { groups } else { Alternatives::new() }
    }

    /// One round of asking for `full`, the call with every scope and every candidate. Accounts that other requests
    /// wait for are passed over, unless no account would be left.
    pub(crate) fn round<'a>(
        &'a self,
        full: &'a Acquire,
        awaited: impl Fn(&[ScopeLimits]) -> bool,
    ) -> Round<'a> {
        let choice = !self.alternatives().is_empty();
        let waited =
            self.accounts.iter().filter(|(_, scopes)| choice && awaited(&full.scopes[scopes.clone()]));
        let mut closed: SmallVec<[usize; 2]> = waited.map(|(account, _)| *account).collect();
        if self.groups.iter().all(|group| group.account.is_some_and(|account| closed.contains(&account))) {
            closed.clear();
        }
        Round {
            groups: self,
            full,
            next: 0,
            closed,
            refused: SmallVec::new(),
            last: None,
            no_slot: None,
            choice,
        }
    }

    fn scopes(&self, account: Option<usize>) -> Range<usize> {
        let known = account.and_then(|account| self.accounts.iter().find(|(known, _)| *known == account));
        known.map_or(self.own..self.own, |(_, scopes)| scopes.clone())
    }
}

/// One round of asking, group by group.
#[derive(Debug)]
pub(crate) struct Round<'a> {
    groups: &'a CandidateGroups,
    full: &'a Acquire,
    next: usize,
    /// Accounts that are not asked any more.
    closed: SmallVec<[usize; 2]>,
    /// The refusals of accounts.
    refused: SmallVec<[Decision; 2]>,
    last: Option<Decision>,
    /// The shortest wait for a slot.
    no_slot: Option<Duration>,
    /// Whether accounts can stand in for each other.
    choice: bool,
}

impl Round<'_> {
    /// The next group and its call: the request's own scopes, those of the group's account, and the candidates of the
    /// group.
    pub(crate) fn next(&mut self) -> Option<(CandidateGroup, Acquire)> {
        let groups = self.groups.groups.iter().enumerate().skip(self.next);
        let open = |account: Option<usize>| account.is_none_or(|account| !self.closed.contains(&account));
        let (at, group) = groups.into_iter().find(|(_, group)| open(group.account))?;
        self.next = at + 1;
        let own = 0..self.groups.own;
        let scopes: Scopes =
            own.chain(self.groups.scopes(group.account)).map(|at| self.full.scopes[at].clone()).collect();
        let candidates = self.full.candidates[group.candidates.clone()].iter();
        let candidates = match self.groups.groups.len() {
            1 => candidates.cloned().collect(),
            // No single call sees all candidates, so bounds over several of them cannot be checked.
            _ => candidates.map(weir_ratelimit::Candidate::apart).collect(),
        };
        Some((group.clone(), Acquire { scopes, candidates, ..self.full.clone() }))
    }

    /// Takes the decision on a group. Returns the decision on the full call, or `None` if the next group must be
    /// asked.
    pub(crate) fn decided(&mut self, group: &CandidateGroup, mut decision: Decision) -> Option<Decision> {
        let own = &self.full.scopes[..self.groups.own];
        match &mut decision.outcome {
            Outcome::Granted { slot } => {
                *slot = slot.map(|slot| group.candidates.start + slot);
                return Some(decision);
            }
            Outcome::NoSlot { wait } => {
                self.no_slot = Some(self.no_slot.map_or(*wait, |soonest| soonest.min(*wait)));
            }
            Outcome::Limited { wait } => {
                let (of_own, of_account): (Vec<&LimitState>, _) = decision
                    .limits
                    .iter()
                    .filter(|limit| self.refuses(limit))
                    .partition(|l| l.scope_in(own).is_some());
                if !self.choice || of_account.is_empty() {
                    return Some(decision);
                }
                if !of_own.is_empty() {
                    // Another account would not help, so the caller's wait is that of its own limits.
                    *wait = longest(&of_own);
                    decision.limits.retain(|limit| limit.scope_in(own).is_some());
                    return Some(decision);
                }
                self.closed.extend(group.account);
                self.refused.push(decision.clone());
            }
        }
        self.last = Some(decision);
        None
    }

    /// The refusals of accounts that were passed over.
    pub(crate) fn refused(&self) -> &[Decision] {
        &self.refused
    }

    /// The refusal of the full call if no group was granted. If a group had room but no free slot, it is the refusal
    /// for want of a slot. Otherwise it is that of the account that fits soonest, if possible of those that may be
    /// waited for so long.
    pub(crate) fn refusal(self, max_wait: impl Fn(usize) -> Duration) -> Decision {
        let max_wait =
            |limit: &LimitState| limit.position_in(&self.full.scopes).map_or(Duration::ZERO, &max_wait);
        let patient = |decision: &Decision| {
            let mut refusing = decision.limits.iter().filter(|limit| self.refuses(limit));
            refusing.all(|limit| match (limit.what, limit.verdict) {
                (_, Verdict::Fits) => true,
                (What::Bucket(_), Verdict::Wait(wait)) => wait <= max_wait(limit),
                (What::Concurrency, Verdict::Wait(_)) => !max_wait(limit).is_zero(),
                (_, Verdict::Never) => false,
            })
        };
        let wait = |decision: &Decision| match decision.outcome {
            Outcome::Limited { wait } => wait.unwrap_or(Duration::MAX),
            _ => Duration::MAX,
        };
        let soonest = self.refused.iter().min_by_key(|decision| (!patient(decision), wait(decision)));
        if let Some(no_slot) = self.no_slot {
            let wait = soonest.map_or(no_slot, |decision| no_slot.min(wait(decision)));
            let outcome = Outcome::NoSlot { wait };
            let none = Decision { outcome, limits: Vec::new(), now_us: 0, degraded: false };
            let mut decision = self.last.unwrap_or(none);
            decision.outcome = outcome;
            decision.limits.retain(|limit| limit.scope_in(&self.full.scopes[..self.groups.own]).is_some());
            return decision;
        }
        let nothing = || Decision {
            outcome: Outcome::NoSlot { wait: self.full.lease_ttl },
            limits: Vec::new(),
            now_us: 0,
            degraded: false,
        };
        soonest.cloned().unwrap_or_else(nothing)
    }

    fn refuses(&self, limit: &LimitState) -> bool {
        limit.refuses(&self.full.scopes)
    }
}

/// The longest wait of these limits; `None` if one of them can never fit.
fn longest(limits: &[&LimitState]) -> Option<Duration> {
    limits.iter().try_fold(Duration::ZERO, |longest, limit| match limit.verdict {
        Verdict::Fits => Some(longest),
        Verdict::Wait(wait) => Some(longest.max(wait)),
        Verdict::Never => None,
    })
}

#[cfg(test)]
mod tests;
