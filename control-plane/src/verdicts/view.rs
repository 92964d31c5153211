//! Between the machine and the wire.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use weir_proto::v1;

use super::Verdicts;
use crate::health::event::Event;
use crate::health::evidence::Vote;
use crate::health::record::HealthRecord;
use crate::health::{
    Cause, Cluster, Observation, Observer, Outcome, Passive, Reading, Seen, State, Tier, Timestamp,
};

/// Events shown with one backend.
const EVENTS_SHOWN: usize = 20;

pub(crate) const fn tier(tier: Tier) -> v1::ProbeTier {
    match tier {
        Tier::Liveness => v1::ProbeTier::Liveness,
        Tier::Readiness => v1::ProbeTier::Readiness,
        Tier::Deep => v1::ProbeTier::Deep,
    }
}

pub(crate) const fn tier_of(wire: v1::ProbeTier) -> Option<Tier> {
    match wire {
        v1::ProbeTier::Unspecified => None,
        v1::ProbeTier::Liveness => Some(Tier::Liveness),
        v1::ProbeTier::Readiness => Some(Tier::Readiness),
        v1::ProbeTier::Deep => Some(Tier::Deep),
    }
}

pub(crate) const fn outcome(outcome: Outcome) -> v1::ProbeOutcome {
    use v1::ProbeOutcome as W;
    match outcome {
        Outcome::Pass => W::Pass,
        Outcome::Busy => W::Busy,
        Outcome::Loading => W::Loading,
        Outcome::Failed(Cause::Refused) => W::Refused,
        Outcome::Failed(Cause::Timeout) => W::Timeout,
        Outcome::Failed(Cause::Broken) => W::Broken,
        Outcome::Failed(Cause::Status) => W::Status,
        Outcome::Failed(Cause::WrongModel) => W::WrongModel,
        Outcome::Failed(Cause::BadAnswer) => W::BadAnswer,
        Outcome::Failed(Cause::QuotaUsedUp) => W::QuotaUsedUp,
    }
}

pub(crate) const fn outcome_of(wire: v1::ProbeOutcome) -> Option<Outcome> {
    use v1::ProbeOutcome as W;
    Some(match wire {
        W::Unspecified => return None,
        W::Pass => Outcome::Pass,
        W::Busy => Outcome::Busy,
        W::Loading => Outcome::Loading,
        W::Refused => Outcome::Failed(Cause::Refused),
        W::Timeout => Outcome::Failed(Cause::Timeout),
        W::Broken => Outcome::Failed(Cause::Broken),
        W::Status => Outcome::Failed(Cause::Status),
        W::WrongModel => Outcome::Failed(Cause::WrongModel),
        W::BadAnswer => Outcome::Failed(Cause::BadAnswer),
        W::QuotaUsedUp => Outcome::Failed(Cause::QuotaUsedUp),
    })
}

/// An observation as the machine takes it; `None` when this version does not know what it is.
pub(super) fn observation(wire: &v1::ProbeResult) -> Option<Observation> {
    Some(Observation {
        tier: tier_of(wire.tier())?,
        outcome: outcome_of(wire.outcome())?,
        detail: wire.detail.clone(),
        latency: wire.latency.and_then(|latency| Duration::try_from(latency).ok()),
        reading: Reading {
            tokens_per_second: wire.tokens_per_second,
            cache_used: wire.cache_used,
            queue: wire.queue,
        },
    })
}

/// Most reports say nothing of most backends.
pub(super) const fn is_news(wire: &v1::BackendReport) -> bool {
    wire.successes > 0
        || wire.connect_failures > 0
        || wire.server_errors > 0
        || wire.timeouts > 0
        || wire.busy > 0
        || wire.ejected
        || wire.in_flight > 0
        || wire.answering
        || wire.suspected_failures > 0
}

/// What a failed request saw, in words that are the same for the same fault.
fn seen(failure: &v1::AttemptFailure) -> Seen {
    match (u16::try_from(failure.status), failure.outcome.as_str()) {
        (Ok(status @ 400..), _) => Seen::Status(status),
        (_, "connect_failure") => Seen::Said("no connection"),
        (_, "timeout" | "overtaken") => Seen::Said("no answer in time"),
        (_, "invalid_answer") => Seen::Said("an answer that is none"),
        (_, "no_model") => Seen::Said("an unknown model"),
        _ => Seen::Said("a failure"),
    }
}

pub(super) fn passive(wire: &v1::BackendReport) -> Passive {
    Passive {
        successes: wire.successes,
        connect_failures: wire.connect_failures,
        server_errors: wire.server_errors,
        timeouts: wire.timeouts,
        busy: wire.busy,
        ejected: wire.ejected,
        in_flight: wire.in_flight,
        answering: wire.answering,
        suspected: wire.suspected_failures,
        seen: wire.last_failure.as_ref().map(seen),
    }
}

/// What every observer is to probe.
pub(super) fn assignments(cluster: &Cluster) -> BTreeMap<Observer, Arc<v1::ProbeAssignments>> {
    let mut by_observer: BTreeMap<Observer, v1::ProbeAssignments> = BTreeMap::new();
    for (backend, probers) in cluster.assignments() {
        for of in Tier::ALL {
            let chosen = probers.of(of);
            for (index, observer) in chosen.iter().enumerate() {
                let assignment = v1::ProbeAssignment {
                    backend: backend.clone(),
                    tier: tier(of).into(),
                    prober_index: index as u32,
                    prober_count: chosen.len() as u32,
                };
                by_observer.entry(observer.clone()).or_default().assignments.push(assignment);
            }
        }
    }
    by_observer.into_iter().map(|(observer, assignments)| (observer, Arc::new(assignments))).collect()
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

impl Verdicts {
    pub(super) fn health(&self, cluster: &Cluster, name: &str, record: &HealthRecord) -> v1::BackendHealth {
        let weighting = cluster.weighting(name);
        v1::BackendHealth {
            backend: name.to_owned(),
            state: record.state.wire().into(),
            reason: record.reason(),
            since: Some(self.wall(record.since)),
            rule: record.rule.name().to_owned(),
            factor: Some(weighting.factor),
            overridden: weighting.overridden,
            stale: record.stale,
            suspect: record.suspects.iter().any(Option::is_some),
            slow_start: (record.state == State::Recovering)
                .then(|| duration(record.profile.slow_start))
                .flatten(),
            slow_start_elapsed: None,
        }
    }

    /// A verdict as it is sent now: the progress of a slow start is that of now.
    pub(crate) fn at_present(&self, health: &v1::BackendHealth) -> v1::BackendHealth {
        let since = health.since.and_then(|since| std::time::SystemTime::try_from(since).ok());
        let slow_start = health.slow_start.and_then(|slow_start| Duration::try_from(slow_start).ok());
        let elapsed = slow_start.zip(since).map(|(slow_start, since)| {
            let now = self.inner.origin_wall + self.now();
            now.duration_since(since).unwrap_or_default().min(slow_start)
        });
        v1::BackendHealth { slow_start_elapsed: elapsed.and_then(duration), ..health.clone() }
    }

    /// What the machine adds to a backend's status: who probes it, its weight as its state leaves it, tokens per
    /// second as the last deep probe read them.
    pub(crate) fn fill(&self, status: &mut v1::BackendStatus) {
        let (now, machine) = (self.now(), self.machine());
        let cluster = &machine.cluster;
        let Some(record) = cluster.record(&status.backend) else { return };
        status.effective_weight =
            f64::from(status.weight) * cluster.weighting(&status.backend).factor * record.ramp(now);
        status.tokens_per_second = status.tokens_per_second.or(record.signs.tokens_per_second());
        (status.cache_used, status.queue) = (record.signs.cache_used(), record.signs.queue());
        if let Some(probers) = cluster.probers(&status.backend) {
            status.probers = Tier::ALL
                .into_iter()
                .flat_map(|of| probers.of(of).iter().map(move |observer| (of, observer)))
                .map(|(of, observer)| v1::backend_status::Prober {
                    observer: observer.to_string(),
                    tier: tier(of).into(),
                })
                .collect();
        }
    }

    /// What a verdict rests on. `None` for a backend that is not probed.
    pub(crate) fn explain(&self, backend: &str) -> Option<v1::ExplainBackendResponse> {
        let (now, machine) = (self.now(), self.machine());
        let cluster = &machine.cluster;
        let record = cluster.record(backend)?;
        let votes = record.votes.iter().map(|(tier, observer, vote)| {
            self.vote(tier, observer, vote, ignored(cluster, record, tier, observer, vote, now))
        });
        let suspects = [Tier::Liveness, Tier::Readiness].into_iter().zip(&record.suspects);
        let suspects = suspects.filter_map(|(of, suspect)| {
            let suspect = suspect.as_ref()?;
            Some(v1::explain_backend_response::SuspectTier {
                tier: tier(of).into(),
                first_observer: suspect.reporter.to_string(),
                asked_observers: suspect.asked.iter().map(ToString::to_string).collect(),
                deadline: Some(self.wall(suspect.deadline)),
            })
        });
        let events: Vec<&Event> = cluster.events(0).filter(|event| event.subject == backend).collect();
        let shown = events.len().saturating_sub(EVENTS_SHOWN);
        Some(v1::ExplainBackendResponse {
            status: None,
            votes: votes.collect(),
            suspect_tiers: suspects.collect(),
            may_return_time: record.may_return(now).map(|at| self.wall(at)),
            conditions: record.conditions(now, cluster.is_ready_capable(record)),
            events: events[shown..].iter().map(|event| self.event(event)).collect(),
            failures: Vec::new(),
        })
    }

    fn vote(
        &self,
        of: Tier,
        observer: &Observer,
        vote: &Vote,
        ignored: &str,
    ) -> v1::explain_backend_response::Vote {
        v1::explain_backend_response::Vote {
            observer: observer.to_string(),
            tier: tier(of).into(),
            outcome: outcome(vote.last).into(),
            detail: vote.detail.clone(),
            failures: vote.failures,
            passes: vote.passes,
            time: Some(self.wall(vote.at)),
            ignored: ignored.to_owned(),
        }
    }

    fn event(&self, event: &Event) -> v1::HealthEvent {
        v1::HealthEvent {
            number: event.number,
            time: Some(self.wall(event.at)),
            subject: event.subject.clone(),
            kind: event.kind.as_str().to_owned(),
            message: event.message.clone(),
            count: event.count,
            first_time: Some(self.wall(event.first)),
        }
    }

    /// What happened after an event, of one subject or of all.
    pub(crate) fn events(&self, after: u64, subject: &str) -> Vec<v1::HealthEvent> {
        let machine = self.machine();
        let wanted = |event: &&Event| subject.is_empty() || event.subject == subject;
        machine.cluster.events(after).filter(wanted).map(|event| self.event(event)).collect()
    }
}

/// Why a vote does not count; empty when it does.
fn ignored(
    cluster: &Cluster,
    record: &HealthRecord,
    tier: Tier,
    observer: &Observer,
    vote: &Vote,
    now: Timestamp,
) -> &'static str {
    if cluster.isolated_observers().contains(observer, now) {
        "the observer is isolated: it sees most backends fail while others do not"
    } else if record.is_cleared(tier, observer) {
        "the other observers outvoted it"
    } else if !record.votes.is_able(observer, vote) {
        "the observer has never reached this backend, others have"
    } else {
        ""
    }
}
