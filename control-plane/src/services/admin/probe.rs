//! Probes on demand: the observers of a backend probe it at once, and the caller is answered with their results.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, timeout_at};
use tonic::Status;
use weir_proto::v1::{self, ResourceKind, probe_backend_response};

use super::view::wait_limit;
use super::{Admin, Handle};
use crate::health::Tier;
use crate::model::{Key, Refusal};
use crate::verdicts::{Observed, view};

/// The longest wait for the verdict on results that have come.
const JUDGED_WITHIN: Duration = Duration::from_secs(1);
/// Probe results in one answer at most.
const RESULTS_MAX: usize = 64;

impl Handle<v1::ProbeBackendRequest> for Admin {
    type Answer = v1::ProbeBackendResponse;

    async fn do_call(&self, request: v1::ProbeBackendRequest) -> Result<Self::Answer, Status> {
        let deadline = Instant::now() + wait_limit(request.timeout)?;
        let tier = view::tier_of(request.tier()).unwrap_or(Tier::Liveness);
        let key = Key::new(ResourceKind::Backend, &request.backend);
        let name = request.backend.as_str();
        if self.0.catalog.state().get(&key).is_none() {
            return Err(Refusal::NotFound(key).into());
        }
        if self.0.leads.borrow().is_none() {
            // On this status the command asks the next control plane.
            return Err(Status::unavailable(
                "this control plane is not the leader, and only the leader can have gateways probe; ask the leader",
            ));
        }
        let _permit = self.0.probes.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("too many backends are being probed on demand; try again in a moment")
        })?;
        let (mut pending, mut observations) = self.0.verdicts.probe_now(name, tier).ok_or_else(|| {
            Refusal::Precondition(format!("{key} is disabled and therefore not probed; enable it first"))
        })?;
        if pending.is_empty() {
            let why = "no gateway is connected, and the control plane makes liveness probes only; connect a gateway or probe liveness";
            return Err(Refusal::Precondition(why.to_owned()).into());
        }
        let mut results = Vec::new();
        while !pending.is_empty() && results.len() < RESULTS_MAX {
            let observed = tokio::select! {
                () = self.0.stop.cancelled() => break,
                observed = timeout_at(deadline, observations.recv()) => observed,
            };
            match observed {
                Ok(Ok(observed)) if observed.backend == name && observed.seen.tier == tier => {
                    pending.remove(&observed.observer);
                    results.push(result(&observed));
                }
                Ok(Ok(_) | Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) | Err(_) => break,
            }
        }
        if results.iter().any(|result| result.outcome() == v1::ProbeOutcome::Pass) {
            self.judged(name, deadline).await;
        }
        let state = self.0.catalog.state();
        Ok(v1::ProbeBackendResponse {
            results,
            pending_observers: pending.iter().map(ToString::to_string).collect(),
            status: state.get(&key).and_then(|stored| self.status(stored)),
        })
    }
}

impl Admin {
    /// Waits a moment until a backend that was not probed before has a verdict: below results that passed, its status would
    /// otherwise still say that it was never probed.
    async fn judged(&self, backend: &str, deadline: Instant) {
        let mut healths = self.0.verdicts.healths();
        let known = |health: &v1::BackendHealth| {
            !matches!(health.state(), v1::HealthState::Unspecified | v1::HealthState::Unknown)
        };
        let judged = healths.wait_for(|healths| healths.get(backend).is_some_and(known));
        let _ = timeout_at(deadline.min(Instant::now() + JUDGED_WITHIN), judged).await;
    }
}

fn result(observed: &Observed) -> probe_backend_response::ObserverResult {
    probe_backend_response::ObserverResult {
        observer: observed.observer.to_string(),
        tier: view::tier(observed.seen.tier).into(),
        outcome: view::outcome(observed.seen.outcome).into(),
        detail: observed.seen.detail.clone(),
        latency: observed.seen.latency.and_then(|latency| prost_types::Duration::try_from(latency).ok()),
    }
}
