//! Operations: work that continues after its call. The progress of a drain is computed from the resources and the reports of
//! gateways, so nothing is stored for it, and it survives a restart.

use std::time::Duration;

use tokio::time::{Instant, interval, timeout_at};
use tonic::Status;
use weir_proto::v1::resource::Spec;
use weir_proto::v1::{self, AdminState, ResourceKind};

use super::view::wait_limit;
use super::{Admin, Handle, options};
use crate::catalog::Answer;
use crate::model::{Key, Plan, Refusal, State, plan, update_edit};

/// How often a waiting call reads the progress; reports come about once a second.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
const DRAIN: &str = "drain/";

impl Answer for v1::DrainResponse {
    fn set_revision(&mut self, revision: u64) {
        if let Some(progress) = self.operation.as_mut().and_then(|operation| operation.drain.as_mut()) {
            progress.revision = revision;
        }
    }
}

impl Handle<v1::DrainRequest> for Admin {
    type Answer = v1::DrainResponse;

    async fn do_call(&self, request: v1::DrainRequest) -> Result<Self::Answer, Status> {
        let call =
            self.call("Drain", "weir.v1.DrainRequest", &request, &request.request_id, request.validate_only)?;
        let spec = v1::BackendSpec { admin_state: AdminState::Draining.into(), ..Default::default() };
        let wire = v1::Resource {
            name: request.backend.clone(),
            spec: Some(Spec::Backend(spec)),
            ..Default::default()
        };
        let mask = ["admin_state".to_owned()];
        let drained = |state: &State| {
            let edit = update_edit(state, &wire, Some(&mask))?;
            plan(state, vec![edit], options(false, false))
        };
        let answer = |plan: &Plan, _: &State| v1::DrainResponse {
            operation: Some(v1::Operation {
                name: format!("{DRAIN}{}", request.backend),
                done: false,
                drain: Some(v1::DrainProgress {
                    backend: request.backend.clone(),
                    revision: plan.steps.first().map_or(0, |step| step.resource.wire.revision),
                    ..Default::default()
                }),
            }),
        };
        let mut answer = self.change(call, drained, answer).await?;
        if !request.validate_only {
            answer.operation = Some(self.drain_of(&request.backend)?);
        }
        Ok(answer)
    }
}

impl Admin {
    fn operation(&self, name: &str) -> Result<v1::Operation, Status> {
        match name.strip_prefix(DRAIN) {
            Some(backend) => self.drain_of(backend),
            None => Err(Status::not_found(format!("there is no operation {name}"))),
        }
    }

    /// The progress of a drain. It is done when every connected gateway has applied the revision, has reported since then, and
    /// has no request in flight at the backend.
    fn drain_of(&self, backend: &str) -> Result<v1::Operation, Status> {
        let state = self.0.catalog.state();
        let key = Key::new(ResourceKind::Backend, backend);
        let stored = state.get(&key).ok_or_else(|| Refusal::NotFound(key.clone()))?;
        let Some(Spec::Backend(spec)) = &stored.wire.spec else {
            return Err(Refusal::NotFound(key).into());
        };
        if !matches!(spec.admin_state(), AdminState::Draining | AdminState::Disabled) {
            return Err(Status::not_found(format!("{key} is not draining: it is active")));
        }
        let revision = stored.wire.revision;
        let reports = self.0.aggregate.in_flight_at(backend);
        let (mut applied, mut connected, mut waiting_for) = (0, 0, Vec::new());
        for (id, since) in self.0.registry.applied_since(revision) {
            connected += 1;
            applied += u32::from(since.is_some());
            let reported = reports.get(&id).map(|(_, at)| *at);
            if since.is_none_or(|since| reported.is_none_or(|at| at < since)) {
                waiting_for.push(id);
            }
        }
        let in_flight = reports.values().fold(0_u32, |sum, (n, _)| sum.saturating_add(*n));
        let done = waiting_for.is_empty() && in_flight == 0;
        let backend = backend.to_owned();
        let name = format!("{DRAIN}{backend}");
        let progress = v1::DrainProgress { backend, revision, applied, connected, in_flight, waiting_for };
        Ok(v1::Operation { name, done, drain: Some(progress) })
    }
}

impl Handle<v1::GetOperationRequest> for Admin {
    type Answer = v1::GetOperationResponse;

    async fn do_call(&self, request: v1::GetOperationRequest) -> Result<Self::Answer, Status> {
        Ok(v1::GetOperationResponse { operation: Some(self.operation(&request.name)?) })
    }
}

impl Handle<v1::WaitOperationRequest> for Admin {
    type Answer = v1::WaitOperationResponse;

    async fn do_call(&self, request: v1::WaitOperationRequest) -> Result<Self::Answer, Status> {
        let deadline = Instant::now() + wait_limit(request.timeout)?;
        let mut polls = interval(POLL_INTERVAL);
        loop {
            let operation = self.operation(&request.name)?;
            let further = request.last_seen.is_some() && operation.drain != request.last_seen;
            let late = tokio::select! {
                () = self.0.stop.cancelled() => true,
                late = timeout_at(deadline, polls.tick()) => late.is_err(),
            };
            if operation.done || further || late {
                return Ok(v1::WaitOperationResponse { operation: Some(operation) });
            }
        }
    }
}
