//! Admission: what a request is under, what it reserves, and how long it may wait for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use tokio::time::Instant;
use weir_proto::resource::{AdminState, Priority};
use weir_ratelimit::waiting::{self, Alternatives, Patience, QueueId, SlotPatience, Waited};
use weir_ratelimit::{Acquire, Cost, Decision, Outcome, Scopes};

use super::pipeline::{Call, Slot};
use crate::api::request::RouteKind;
use crate::error::GatewayError;
use crate::http::{attempts, refusal};
use crate::limits::account_groups::Groups;
use crate::limits::ledger::LEASE_TTL;
use crate::limits::reservation::{Asked, Reservation, Subject};
use crate::limits::{price, spend_period};
use crate::metrics::{LimiterLabels, WaitLabels};
use crate::routing::balance::Place;
use crate::routing::entries::ModelEntry;
use crate::routing::scope::ScopeEntry;

/// Headers by which OpenAI's SDKs say how many seconds they will wait for an answer.
const CLIENT_TIMEOUTS: [&str; 2] = ["x-stainless-timeout", "x-stainless-read-timeout"];

impl Call<'_> {
    /// Every limit of the request and a slot at the first candidate that has one, in one limiter call; refused, it
    /// waits in turn and asks again for as long as its limits, its pool's queue and its own time allow. Returns the
    /// index into `places` of the one whose slot is held.
    pub(super) async fn admit(
        &self,
        model: &Arc<ModelEntry>,
        places: &[Place],
        slot: &mut Slot,
    ) -> Result<(Reservation, Decision, usize), GatewayError> {
        let own = self.snapshot.scopes(self.key, &model.name);
        let now = SystemTime::now();
        let budgets = spend_period::scopes(&own, now);
        let mut entries: Vec<&ScopeEntry> = own.into_iter().chain(&budgets).collect();
        let (reserved, least) = self.estimate(model);
        if let Some(never) = refusal::never_fits(&entries, &reserved, &least) {
            return Err(never);
        }
        let own = entries.len();
        let groups = match model.accounts.is_empty() {
            true => None,
            false => Some(refusal::usable_accounts(&model.accounts, places, own, &reserved, &least)?),
        };
        entries.extend(groups.iter().flat_map(|groups| groups.entries(&model.accounts)));
        let scopes: Scopes = entries.iter().map(|e| e.limits.clone()).collect();
        let call = Acquire {
            id: uuid::Uuid::nil(),
            cost: reserved,
            estimated: true,
            scopes,
            candidates: attempts::candidates(model, places),
            lease_ttl: LEASE_TTL,
        };
        let started = slot.as_ref().map_or_else(Instant::now, |c| c.started);
        let mut patience = self.patience(model, &entries, started + model.timeouts.total);
        if let Some(groups) = &groups {
            patience.alternatives = groups.alternatives();
        }
        let began = Instant::now();
        let mut again = false;
        let groups = groups.as_ref();
        let (patience, entries) = (&patience, &entries);
        let ask = |queue: Option<&QueueId>| {
            let call = if again { self.as_of_now(&call, model, places) } else { call.clone() };
            again = true;
            let queue = queue.filter(|_| groups.is_some()).cloned();
            async move {
                match groups {
                    None => self.decide(model, call).await,
                    Some(groups) => {
                        // On the heap: only who has limited accounts pays for this state.
                        let round =
                            self.decide_in_turn(model, groups, &call, queue.as_ref(), patience, entries);
                        Box::pin(round).await
                    }
                }
            }
        };
        let waiting = &self.gateway.ledger.waiting;
        let waited = waiting.acquire(&call, patience, ask).await;
        if let Some(context) = slot {
            let in_queue = waited.as_ref().map_or(Duration::ZERO, |w| w.waited);
            context.limiter += began.elapsed().saturating_sub(in_queue);
            context.waited += in_queue;
        }
        let Waited { mut decision, with, waited, ahead, gave_up } = waited?;
        let metrics = &self.gateway.metrics;
        if let Some(ahead) = ahead {
            let outcome = gave_up.map_or("granted", waiting::GaveUp::name);
            let labels = WaitLabels { outcome, priority: patience.priority.name() };
            metrics.wait.get_or_create(&labels).observe(waited.as_secs_f64());
            metrics.queue_ahead.observe(ahead as f64);
        }
        self.gateway.traffic.decided(entries, &decision);
        let refused = match decision.outcome {
            Outcome::Granted { .. } => None,
            Outcome::Limited { .. } => Some(refusal::limited(&decision, entries, &reserved, now)),
            Outcome::NoSlot { .. } => Some(GatewayError::Busy { retry_after: None }),
        };
        // How an account stands is the operator's to know: headers tell of the caller's limits.
        decision.limits.retain(|limit| limit.scope < own);
        if let Some(context) = slot {
            context.limits = refusal::shown(&decision);
        }
        match (refused, decision.outcome) {
            (None, Outcome::Granted { slot }) => {
                let mut reservation = with.ok_or(GatewayError::Internal)?;
                reservation.under_account(own);
                reservation.granted(slot.map(|s| call.candidates[s].leases.clone()));
                Ok((reservation, decision, slot.unwrap_or(0)))
            }
            (refused, _) => Err(refused.unwrap_or(GatewayError::Internal)),
        }
    }

    /// What to reserve, and what the request needs at the least.
    ///
    /// Reserved is what answers of this model to this tenant usually have, up to what the request allows. Needed is what
    /// it allows explicitly, and of the prompt the half of the estimate, which no real count is below.
    pub(super) fn estimate(&self, model: &ModelEntry) -> (Cost, Cost) {
        let choices = u64::from(self.asked.choices).max(1);
        let prompt = self.prompt_tokens(model);
        let (expected, stated) = match (self.asked.kind, self.asked.max_output_tokens.map(u64::from)) {
            (RouteKind::Embeddings, _) => (0, 0),
            (_, most) => {
                let learned = self.gateway.ledger.estimates.output(&self.key.tenant.queue, &model.queue);
                (learned.min(most.unwrap_or(u64::MAX)), most.unwrap_or(0))
            }
        };
        let reserved = price::cost(model, prompt, expected.saturating_mul(choices));
        (reserved, price::cost(model, prompt / 2, stated.saturating_mul(choices)))
    }

    fn subject(&self, model: &ModelEntry) -> Subject {
        Subject {
            tenant: self.key.tenant.queue.clone(),
            model: model.queue.clone(),
            prompt_bytes: (self.asked.attachments == 0).then_some(self.asked.prompt_bytes),
            choices: self.asked.choices,
        }
    }

    /// How long this request may wait, and as whom.
    fn patience(&self, model: &ModelEntry, entries: &[&ScopeEntry], deadline: Instant) -> Patience {
        let deadline = match client_timeout(&self.headers) {
            Some(timeout) => deadline.min(Instant::now() + timeout),
            None => deadline,
        };
        let queue = &model.pool.spec.queue;
        Patience {
            tenant: self.key.tenant.queue.clone(),
            priority: match self.key.tenant.priority {
                Priority::High => waiting::Priority::High,
                Priority::Normal => waiting::Priority::Normal,
                Priority::Low => waiting::Priority::Low,
            },
            deadline,
            scopes: entries.iter().map(|e| e.max_wait).collect(),
            slots: Some(SlotPatience {
                queue: model.queue.clone(),
                max_wait: queue.max_wait,
                bound: queue.max_waiting as usize,
            }),
            bytes: self.body.len() as u64,
            alternatives: Alternatives::new(),
        }
    }

    /// The call with the slots as they are now: while it waited, an operator may have drained a backend.
    fn as_of_now(&self, call: &Acquire, model: &ModelEntry, places: &[Place]) -> Acquire {
        let mut call = call.clone();
        let live = self.gateway.live.snapshot();
        for (candidate, place) in call.candidates.iter_mut().zip(places) {
            let backend = live.backends.get(&model.backends[place.index].entry.name);
            let active = backend.filter(|b| b.spec.admin_state == AdminState::Active);
            candidate.max_concurrency = active.map_or(0, |b| b.spec.max_concurrency.min(place.slots));
        }
        call
    }

    /// One decision. The admission is armed only if it was granted, or may have been.
    async fn decide(
        &self,
        model: &ModelEntry,
        call: Acquire,
    ) -> Result<(Decision, Reservation), GatewayError> {
        let began = Instant::now();
        // On the heap: the request's future would hold all layers of the limiter.
        let asked = Box::pin(Reservation::ask(&self.gateway.ledger, call, Some(self.subject(model)))).await;
        let Asked { decision, reservation, by_memory } = asked;
        let outcome = match &decision {
            Ok(Decision { outcome: Outcome::Granted { .. }, .. }) => "granted",
            Ok(Decision { outcome: Outcome::Limited { .. }, .. }) => "limited",
            Ok(Decision { outcome: Outcome::NoSlot { .. }, .. }) => "no_slot",
            Err(_) => "error",
        };
        let metrics = &self.gateway.metrics;
        let by = match &decision {
            _ if by_memory => "memory",
            Ok(decision) if decision.degraded => "local",
            _ => "store",
        };
        metrics.limiter.get_or_create(&LimiterLabels { outcome, by }).inc();
        metrics.limiter_duration.observe(began.elapsed().as_secs_f64());
        let decision = decision.map_err(|error| {
            tracing::warn!(%error, "a limit that is closed without its store refused a request");
            GatewayError::LimitStore
        })?;
        Ok((decision, reservation))
    }

    /// One decision where accounts are limited: run by run of the order of preference, until one is granted or the
    /// caller's own limits refuse.
    async fn decide_in_turn(
        &self,
        model: &ModelEntry,
        groups: &Groups,
        whole: &Acquire,
        queue: Option<&QueueId>,
        patience: &Patience,
        entries: &[&ScopeEntry],
    ) -> Result<(Decision, Reservation), GatewayError> {
        let ledger = &self.gateway.ledger;
        let mut round = groups.round(whole, |scopes| ledger.waiting.is_awaited(scopes, queue));
        let mut last = None;
        while let Some((run, call)) = round.next() {
            let (decision, reservation) = self.decide(model, call).await?;
            if let Some(decision) = round.heard(&run, decision) {
                for refused in round.refused() {
                    self.gateway.traffic.decided(entries, refused);
                }
                return Ok((decision, reservation));
            }
            last = Some(reservation);
        }
        let max_wait = |scope: usize| patience.scopes.get(scope).copied().unwrap_or_default();
        Ok((round.refusal(max_wait), last.ok_or(GatewayError::Internal)?))
    }
}

/// How long the client will wait for its answer, where it says so.
fn client_timeout(headers: &HeaderMap) -> Option<Duration> {
    let seconds = CLIENT_TIMEOUTS.iter().find_map(|name| headers.get(*name))?.to_str().ok()?.parse::<f64>();
    Duration::try_from_secs_f64(seconds.ok()?).ok().filter(|timeout| !timeout.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_timeout_is_read_from_the_headers_of_its_sdk() {
        let of = |value: &'static str| {
            let value = http::HeaderValue::from_static(value);
            client_timeout(&HeaderMap::from_iter([(
                http::HeaderName::from_static(CLIENT_TIMEOUTS[0]),
                value,
            )]))
        };
        assert_eq!(of("2.5"), Some(Duration::from_millis(2500)));
        assert_eq!((of("-1"), of("soon"), of("0"), of("NaN")), (None, None, None, None));
    }
}
