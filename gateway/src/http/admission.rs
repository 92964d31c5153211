//! Admission: what a request is under, what it reserves, and how long it may wait for it.

use std::time::Duration;

use http::{HeaderMap, HeaderName};
use smallvec::SmallVec;
use tokio::time::Instant;
use weir_proto::resource::{AdminState, Priority};
use weir_ratelimit::waiting::{self, Alternatives, QueueId, QueuePolicy, SlotQueue, Waited};
use weir_ratelimit::{Acquire, Decision, Outcome};

use super::call::ModelCall;
use super::context::RequestContext;
use super::{refusal, slot_round};
use crate::error::{GatewayError, RETRY_SOON};
use crate::limits::account_groups::CandidateGroups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::reservation::{Asked, Reservation};
use crate::metrics::{LimiterLabels, WaitLabels};
use crate::routing::balance::Candidate;
use crate::routing::model_use::ModelUse;
use crate::routing::scope::ScopeEntry;

/// Headers by which OpenAI's SDKs say how many seconds they will wait for an answer.
static CLIENT_TIMEOUTS: [HeaderName; 2] =
    [HeaderName::from_static("x-stainless-timeout"), HeaderName::from_static("x-stainless-read-timeout")];

/// A request that was admitted.
pub(super) struct Admitted {
    pub(super) reservation: Reservation,
    pub(super) decision: Decision,
    /// The candidates after the first ones, if those were full.
    pub(super) rest: Vec<Candidate>,
    /// The one whose slot is held.
    pub(super) chosen: Candidate,
}

/// Every limit of the request and a slot at the first candidate that has one, in one limiter call, and at the backends after
/// these in further calls if none has; refused, it waits in turn and asks again for as long as its limits, its pool's queue
/// and its own time allow.
pub(super) async fn admit(
    call: &ModelCall<'_>,
    candidates: &[Candidate],
    context: &mut RequestContext,
) -> Result<Admitted, GatewayError> {
    let now = weir_runtime::wall_clock();
    let model_use = call.call.snapshot.model_use(call.call.key, call.model, now);
    context.model_use = Some(model_use.clone());
    let limits = Limits::of(call, &model_use, candidates)?;
    let admission = Admission {
        acquire: limits.acquire(call, candidates),
        patience: limits.patience(call),
        call,
        candidates,
        limits: &limits,
    };
    let began = Instant::now();
    let waited = admission.ask_in_turn().await;
    let in_queue = waited.as_ref().map_or(Duration::ZERO, |waited| waited.waited);
    context.limiter += began.elapsed().saturating_sub(in_queue);
    context.waited += in_queue;
    let waited = waited?;
    admission.count(&waited);
    let Waited { mut decision, with: asked, .. } = waited;
    let refused = match decision.outcome {
        Outcome::Granted { .. } => None,
        Outcome::Limited { .. } => {
            Some(refusal::limited(&decision, &limits.entries, &call.reserved, now, next_free(call)))
        }
        Outcome::NoSlot { .. } => Some(GatewayError::Busy { retry_after: None }),
    };
    // How an account stands is the operator's to know: headers tell of the caller's limits.
    decision.limits.retain(|limit| limit.scope_in(&admission.acquire.scopes[..limits.own]).is_some());
    context.limits = refusal::shown(&decision, &admission.acquire.scopes);
    match (refused, decision.outcome) {
        (None, Outcome::Granted { slot }) => {
            let (mut reservation, rest) = asked.ok_or(GatewayError::Internal)?;
            let chosen = candidates.iter().chain(&rest).nth(slot.unwrap_or(0)).copied();
            let chosen = chosen.ok_or(GatewayError::Internal)?;
            let slots = &call.model.backends[chosen.index].entry.slots;
            reservation.under_account(limits.own);
            reservation.granted(slot.map(|_| slots.clone()));
            Ok(Admitted { reservation, decision, rest, chosen })
        }
        (refused, _) => Err(refused.unwrap_or(GatewayError::Internal)),
    }
}

/// When one of so many leases is likely free that this request would hold.
fn next_free(call: &ModelCall<'_>) -> impl Fn(u64) -> Duration {
    move |places| {
        let (tenant, model) = (&call.call.key.tenant.queue, &call.model.queue);
        let known = call.call.gateway.ledger.estimates.next_free(tenant, model, places);
        known.unwrap_or(RETRY_SOON)
    }
}

/// The limits that a request is under.
struct Limits<'a> {
    model_use: &'a ModelUse,
    /// The request's own, and after them those of its candidates' provider accounts.
    entries: SmallVec<[&'a ScopeEntry; 8]>,
    /// How many of them are the request's own.
    own: usize,
    /// The candidates by account; `None` when no account of the model is limited.
    groups: Option<CandidateGroups>,
}

impl<'a> Limits<'a> {
    /// # Errors
    /// The refusal of a limit that the request can never fit.
    fn of(
        call: &ModelCall<'a>,
        model_use: &'a ModelUse,
        candidates: &[Candidate],
    ) -> Result<Self, GatewayError> {
        let ModelCall { reserved, least, .. } = call;
        let mut entries: SmallVec<[&ScopeEntry; 8]> = model_use.entries.iter().collect();
        if let Some(never) = refusal::never_fits(&entries, reserved, least) {
            return Err(never);
        }
        let (own, accounts) = (entries.len(), &call.model.accounts);
        let groups = match accounts.is_empty() {
            true => None,
            false => Some(refusal::usable_accounts(accounts, candidates, own, reserved, least)?),
        };
        entries.extend(groups.iter().flat_map(|groups| groups.entries(accounts)));
        Ok(Self { model_use, entries, own, groups })
    }

    /// The call for all of them and a slot at one of the candidates.
    fn acquire(&self, call: &ModelCall<'_>, candidates: &[Candidate]) -> Acquire {
        let scopes = match self.entries.len() > self.own {
            true => self.entries.iter().map(|entry| entry.limits.clone()).collect(),
            false => self.model_use.scopes.clone(),
        };
        Acquire {
            id: uuid::Uuid::nil(),
            cost: call.reserved,
            estimated: true,
            scopes,
            candidates: slot_round::limiter_candidates(call.model, candidates),
            lease_ttl: LEASE_TTL,
        }
    }

    /// How long the request may wait, and as whom.
    fn patience(&self, call: &ModelCall<'_>) -> QueuePolicy {
        let (tenant, queue) = (&call.call.key.tenant, &call.model.pool.spec.queue);
        let deadline = match client_timeout(&call.call.headers) {
            Some(timeout) => call.deadline.min(Instant::now() + timeout),
            None => call.deadline,
        };
        QueuePolicy {
            tenant: tenant.queue.clone(),
            priority: match tenant.priority {
                Priority::High => waiting::Priority::High,
                Priority::Normal => waiting::Priority::Normal,
                Priority::Low => waiting::Priority::Low,
            },
            deadline,
            scopes: self.entries.iter().map(|entry| entry.max_wait).collect(),
            slots: Some(SlotQueue {
                queue: call.model.queue.clone(),
                max_wait: queue.max_wait,
                bound: queue.max_waiting as usize,
                places: Some(call.model.places()),
            }),
            bytes: call.call.body.len() as u64,
            alternatives: self.groups.as_ref().map_or_else(Alternatives::new, CandidateGroups::alternatives),
        }
    }
}

/// A reservation, and the candidates after the first ones if those were full.
type Asking = (Reservation, Vec<Candidate>);

/// One request that asks to be admitted.
struct Admission<'a, 'l> {
    call: &'a ModelCall<'a>,
    candidates: &'a [Candidate],
    limits: &'a Limits<'l>,
    acquire: Acquire,
    patience: QueuePolicy,
}

impl Admission<'_, '_> {
    /// Asks, and again in turn while waiting can help.
    async fn ask_in_turn(&self) -> Result<Waited<Asking>, GatewayError> {
        let mut again = false;
        let ask = |queue: Option<&QueueId>| {
            let acquire = if again { self.acquire_for(self.candidates) } else { self.acquire.clone() };
            again = true;
            let queue = queue.filter(|_| self.limits.groups.is_some()).cloned();
            async move {
                match &self.limits.groups {
                    None => self.decide_for_slots(acquire).await,
                    // On the heap: only who has limited accounts pays for this state.
                    Some(groups) => {
                        let decided = Box::pin(self.decide_by_account(groups, &acquire, queue.as_ref()));
                        let (decision, reservation) = decided.await?;
                        Ok((decision, (reservation, Vec::new())))
                    }
                }
            }
        };
        self.call.call.gateway.ledger.waiting.acquire(&self.acquire, &self.patience, ask).await
    }

    /// The call for these candidates with the slots as they are now: while it waited, an operator may have drained a backend.
    fn acquire_for(&self, candidates: &[Candidate]) -> Acquire {
        let mut at_limiter = slot_round::limiter_candidates(self.call.model, candidates);
        let snapshot = self.call.call.gateway.live.snapshot();
        for (at_limiter, candidate) in at_limiter.iter_mut().zip(candidates) {
            let backend = snapshot.backends.get(&self.call.model.backends[candidate.index].entry.name);
            let active = backend.filter(|backend| backend.spec.admin_state == AdminState::Active);
            at_limiter.max_concurrency =
                active.map_or(0, |backend| backend.spec.max_concurrency.min(candidate.slots));
        }
        Acquire { candidates: at_limiter, ..self.acquire.clone() }
    }

    /// One decision where no account is limited: on a slot at the first candidates, and if these are full on one at all
    /// others. So a refusal for want of a slot means that all backends are full, and hardly any request asks for all.
    async fn decide_for_slots(&self, acquire: Acquire) -> Result<(Decision, Asking), GatewayError> {
        let (decision, reservation) = self.decide(acquire).await?;
        if matches!(decision.outcome, Outcome::NoSlot { .. }) {
            let rest = self.call.rest(self.candidates);
            if !rest.is_empty() {
                // On the heap: few requests come here.
                return Box::pin(self.decide_for_rest((decision, reservation), rest.into_vec())).await;
            }
        }
        Ok((decision, (reservation, Vec::new())))
    }

    /// The same for all others, after the decision on the first ones.
    async fn decide_for_rest(
        &self,
        (mut decision, mut reservation): (Decision, Reservation),
        rest: Vec<Candidate>,
    ) -> Result<(Decision, Asking), GatewayError> {
        let mut before = self.candidates.len();
        for part in rest.chunks(weir_ratelimit::MAX_CANDIDATES) {
            let Outcome::NoSlot { wait: soonest } = decision.outcome else { break };
            let mut acquire = self.acquire_for(part);
            // No single call sees all of them, so bounds over all cannot be checked.
            acquire.candidates.iter_mut().for_each(|candidate| *candidate = candidate.apart());
            (decision, reservation) = self.decide(acquire).await?;
            match &mut decision.outcome {
                Outcome::Granted { slot } => *slot = slot.map(|at| before + at),
                Outcome::NoSlot { wait } => *wait = soonest.min(*wait),
                Outcome::Limited { .. } => {}
            }
            before += part.len();
        }
        Ok((decision, (reservation, rest)))
    }

    /// One decision. The reservation is armed only if it was granted, or may have been.
    async fn decide(&self, acquire: Acquire) -> Result<(Decision, Reservation), GatewayError> {
        let gateway = self.call.call.gateway;
        let began = Instant::now();
        // On the heap: the request's future would hold all layers of the limiter.
        let asked = Box::pin(Reservation::ask(
            &gateway.ledger,
            acquire,
            Some(self.call.subject(self.limits.model_use)),
        ))
        .await;
        let Asked { decision, reservation, from_deny_cache } = asked;
        let outcome = match &decision {
            Ok(Decision { outcome: Outcome::Granted { .. }, .. }) => "granted",
            Ok(Decision { outcome: Outcome::Limited { .. }, .. }) => "limited",
            Ok(Decision { outcome: Outcome::NoSlot { .. }, .. }) => "no_slot",
            Err(_) => "error",
        };
        let by = match &decision {
            _ if from_deny_cache => "memory",
            Ok(decision) if decision.degraded => "local",
            _ => "store",
        };
        gateway.metrics.limiter.get_or_create(&LimiterLabels { outcome, by }).inc();
        gateway.metrics.limiter_duration.observe(began.elapsed().as_secs_f64());
        let decision = decision.map_err(|error| {
            tracing::warn!(%error, "a limit that is closed without its store refused a request");
            GatewayError::LimitStore
        })?;
        Ok((decision, reservation))
    }

    /// One decision where accounts are limited: group by group of the order of preference, until one is granted or the
    /// caller's own limits refuse.
    async fn decide_by_account(
        &self,
        groups: &CandidateGroups,
        full: &Acquire,
        queue: Option<&QueueId>,
    ) -> Result<(Decision, Reservation), GatewayError> {
        let gateway = self.call.call.gateway;
        let mut round = groups.round(full, |scopes| gateway.ledger.waiting.is_awaited(scopes, queue));
        let mut last = None;
        while let Some((group, acquire)) = round.next() {
            let (decision, reservation) = self.decide(acquire).await?;
            if let Some(decision) = round.decided(&group, decision) {
                for refused in round.refused() {
                    gateway.traffic.decided(&self.limits.entries, refused);
                }
                return Ok((decision, reservation));
            }
            last = Some(reservation);
        }
        let max_wait = |scope: usize| self.patience.scopes.get(scope).copied().unwrap_or_default();
        Ok((round.refusal(max_wait), last.ok_or(GatewayError::Internal)?))
    }

    /// Counts how long it waited and what the limits said.
    fn count<T>(&self, waited: &Waited<T>) {
        let gateway = self.call.call.gateway;
        if let Some(ahead) = waited.ahead {
            let outcome = waited.gave_up.map_or("granted", waiting::GaveUp::name);
            let labels = WaitLabels { outcome, priority: self.patience.priority.name() };
            gateway.metrics.wait.get_or_create(&labels).observe(waited.waited.as_secs_f64());
            gateway.metrics.queue_position.observe(ahead as f64);
        }
        gateway.traffic.decided(&self.limits.entries, &waited.decision);
    }
}

/// How long the client will wait for its answer, where it says so.
fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    let seconds = CLIENT_TIMEOUTS.iter().find_map(|name| headers.get(name))?.to_str().ok()?.parse::<f64>();
    Duration::try_from_secs_f64(seconds.ok()?).ok().filter(|timeout| !timeout.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_timeout_is_read_from_the_headers_of_its_sdk() {
        let of = |value: &'static str| {
            let value = http::HeaderValue::from_static(value);
            client_timeout(&HeaderMap::from_iter([(CLIENT_TIMEOUTS[0].clone(), value)]))
        };
        assert_eq!(of("2.5"), Some(Duration::from_millis(2500)));
        assert_eq!((of("-1"), of("soon"), of("0"), of("NaN")), (None, None, None, None));
    }
}
