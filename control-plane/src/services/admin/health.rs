//! The health of backends, as the cluster sees it.

use tonic::Status;
use weir_proto::resource::{AdminState, Spec};
use weir_proto::v1::{self, ResourceKind};

use super::{Admin, Handle};
use crate::gateways::questions::line;
use crate::model::{Key, Refusal, Stored};

impl Handle<v1::ListBackendStatusRequest> for Admin {
    type Answer = v1::ListBackendStatusResponse;

    async fn do_call(&self, _: v1::ListBackendStatusRequest) -> Result<Self::Answer, Status> {
        let state = self.0.catalog.state();
        let backends = state.of_kind(ResourceKind::Backend).filter_map(|stored| self.status(stored));
        Ok(v1::ListBackendStatusResponse { backends: backends.collect() })
    }
}

impl Admin {
    /// A backend as the cluster sees it.
    pub(crate) fn status(&self, stored: &Stored) -> Option<v1::BackendStatus> {
        let Spec::Backend(spec) = &stored.checked.spec else { return None };
        let (shared, name) = (&self.0, &stored.wire.name);
        let health =
            shared.verdicts.healths().borrow().get(name).map(|health| shared.verdicts.at_present(health));
        let in_flight = shared.aggregate.loads().borrow().get(name).copied().unwrap_or_default();
        let pace = shared.aggregate.pace(name);
        let admin_state = match spec.admin_state {
            AdminState::Active => v1::AdminState::Active,
            AdminState::Draining => v1::AdminState::Draining,
            AdminState::Disabled => v1::AdminState::Disabled,
        };
        let mut status = v1::BackendStatus {
            backend: name.clone(),
            health: Some(health.unwrap_or_else(|| unknown(name))),
            in_flight,
            ejected_by: shared.aggregate.ejected_by(name),
            pool: spec.pool.to_string(),
            weight: spec.weight,
            effective_weight: 0.0,
            admin_state: admin_state.into(),
            max_concurrency: spec.max_concurrency,
            first_byte_mean: pace.first_byte().and_then(|mean| prost_types::Duration::try_from(mean).ok()),
            tokens_per_second: pace.tokens_per_second(),
            probers: Vec::new(),
            cache_used: None,
            queue: None,
        };
        shared.verdicts.fill(&mut status);
        let load = 1.0 - f64::from(in_flight) / f64::from(spec.max_concurrency);
        status.effective_weight *= load.clamp(0.0, 1.0);
        if spec.admin_state != AdminState::Active {
            status.effective_weight = 0.0;
        }
        Some(status)
    }
}

impl Handle<v1::ExplainBackendRequest> for Admin {
    type Answer = v1::ExplainBackendResponse;

    async fn do_call(&self, request: v1::ExplainBackendRequest) -> Result<Self::Answer, Status> {
        let state = self.0.catalog.state();
        let key = Key::new(ResourceKind::Backend, &request.backend);
        let stored = state.get(&key).ok_or(Refusal::NotFound(key))?;
        let disabled = || v1::ExplainBackendResponse {
            conditions: vec!["the operator has disabled it: it is neither used nor probed".into()],
            ..Default::default()
        };
        let explained = self.0.verdicts.explain(&request.backend).unwrap_or_else(disabled);
        let failures = self.0.aggregate.failures_at(&request.backend);
        Ok(v1::ExplainBackendResponse { status: self.status(stored), failures, ..explained })
    }
}

impl Handle<v1::ListHealthEventsRequest> for Admin {
    type Answer = v1::ListHealthEventsResponse;

    async fn do_call(&self, request: v1::ListHealthEventsRequest) -> Result<Self::Answer, Status> {
        let events = self.0.verdicts.events(request.after, &request.subject);
        if events.is_empty() && !self.is_subject(&request.subject) {
            let why = format!("no backend, pool or gateway is called {}", line(&request.subject));
            return Err(Status::not_found(why));
        }
        Ok(v1::ListHealthEventsResponse { events })
    }
}

impl Admin {
    /// Whether there can be health events of a subject; without one they are of everything.
    fn is_subject(&self, subject: &str) -> bool {
        let state = self.0.catalog.state();
        let known = |kind| state.get(&Key::new(kind, subject)).is_some();
        subject.is_empty()
            || known(ResourceKind::Backend)
            || known(ResourceKind::Pool)
            || self.0.registry.list(state.revision).iter().any(|gateway| gateway.id == subject)
    }
}

/// The verdict on a backend that is not looked at.
fn unknown(backend: &str) -> v1::BackendHealth {
    v1::BackendHealth {
        backend: backend.to_owned(),
        state: v1::HealthState::Unknown.into(),
        reason: "not probed".into(),
        rule: "not_probed".into(),
        ..Default::default()
    }
}
