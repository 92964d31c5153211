//! The admin service: every change becomes a plan, a commit and one log line per changed resource.

mod audit;
mod backup;
mod calls;
mod health;
mod operations;
mod probe;
mod questions;
mod tokens;
mod view;
mod watch;

use std::future::Future;
use std::time::Duration;

use prost_types::Timestamp;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use weir_proto::resource::kind_name;
use weir_proto::v1::admin_service_server::AdminService;
use weir_proto::v1::{self, Change};

use super::{Shared, invalid};
use crate::auth::Caller;
use crate::catalog::{Answer, Call};
use crate::encoding::sha256;
use crate::model::audit::{Actor, field_change};
use crate::model::{Options, Plan, Refusal, State};
use crate::reflect::canonical;

/// The service, and of one call its caller.
#[derive(Debug, Clone)]
pub(crate) struct Admin(pub(crate) Shared, Option<Caller>);

/// The stream of a streaming method. Bounded: a caller that does not read holds only its position in the log.
type Answers<T> = ReceiverStream<Result<T, Status>>;

/// Every method: counted, then answered by its namesake.
macro_rules! methods {
    ($($name:ident, $metric:literal, $request:ident -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl AdminService for Admin {
            $(async fn $name(
                &self,
                request: Request<v1::$request>,
            ) -> Result<Response<v1::$response>, Status> {
                let own = self.of(&request);
                own.counted($metric, own.do_call(request.into_inner())).await
            })*

            type WatchStream = Answers<v1::WatchResponse>;

            async fn watch(
                &self,
                request: Request<v1::WatchRequest>,
            ) -> Result<Response<Self::WatchStream>, Status> {
                let own = self.of(&request);
                own.counted("Watch", own.start_watch(request.into_inner())).await
            }

            type BackupStream = Answers<v1::BackupResponse>;

            async fn backup(
                &self,
                request: Request<v1::BackupRequest>,
            ) -> Result<Response<Self::BackupStream>, Status> {
                let own = self.of(&request);
                own.counted("Backup", own.start_backup()).await
            }
        }
    };
}

/// Answers one type of request.
pub(super) trait Handle<Q> {
    /// The answer.
    type Answer;
    /// Executes the call.
    fn do_call(&self, request: Q) -> impl Future<Output = Result<Self::Answer, Status>> + Send;
}

methods! {
    create_resource, "CreateResource", CreateResourceRequest -> CreateResourceResponse;
    get_resource, "GetResource", GetResourceRequest -> GetResourceResponse;
    list_resources, "ListResources", ListResourcesRequest -> ListResourcesResponse;
    update_resource, "UpdateResource", UpdateResourceRequest -> UpdateResourceResponse;
    delete_resource, "DeleteResource", DeleteResourceRequest -> DeleteResourceResponse;
    apply, "Apply", ApplyRequest -> ApplyResponse;
    issue_api_key, "IssueApiKey", IssueApiKeyRequest -> IssueApiKeyResponse;
    rotate_api_key, "RotateApiKey", RotateApiKeyRequest -> RotateApiKeyResponse;
    list_gateways, "ListGateways", ListGatewaysRequest -> ListGatewaysResponse;
    list_backend_status, "ListBackendStatus", ListBackendStatusRequest -> ListBackendStatusResponse;
    explain_backend, "ExplainBackend", ExplainBackendRequest -> ExplainBackendResponse;
    query_usage, "QueryUsage", QueryUsageRequest -> QueryUsageResponse;
    explain_limits, "ExplainLimits", ExplainLimitsRequest -> ExplainLimitsResponse;
    probe_backend, "ProbeBackend", ProbeBackendRequest -> ProbeBackendResponse;
    list_health_events, "ListHealthEvents", ListHealthEventsRequest -> ListHealthEventsResponse;
    wait_applied, "WaitApplied", WaitAppliedRequest -> WaitAppliedResponse;
    history, "History", HistoryRequest -> HistoryResponse;
    rollback, "Rollback", RollbackRequest -> RollbackResponse;
    verify_audit, "VerifyAudit", VerifyAuditRequest -> VerifyAuditResponse;
    drain, "Drain", DrainRequest -> DrainResponse;
    get_operation, "GetOperation", GetOperationRequest -> GetOperationResponse;
    wait_operation, "WaitOperation", WaitOperationRequest -> WaitOperationResponse;
    get_gateway_config, "GetGatewayConfig", GetGatewayConfigRequest -> GetGatewayConfigResponse;
    issue_token, "IssueToken", IssueTokenRequest -> IssueTokenResponse;
    rotate_token, "RotateToken", RotateTokenRequest -> RotateTokenResponse;
    revoke_token, "RevokeToken", RevokeTokenRequest -> RevokeTokenResponse;
    list_tokens, "ListTokens", ListTokensRequest -> ListTokensResponse;
    who_am_i, "WhoAmI", WhoAmIRequest -> WhoAmIResponse;
}

impl Admin {
    pub(crate) const fn new(shared: Shared) -> Self {
        Self(shared, None)
    }

    /// The service as its caller sees it.
    fn of<T>(&self, request: &Request<T>) -> Self {
        Self(self.0.clone(), request.extensions().get::<Caller>().cloned())
    }

    /// The caller, which the gate has authenticated.
    fn caller(&self) -> Result<&Caller, Status> {
        self.1.as_ref().ok_or_else(|| Status::unauthenticated("the caller is not known"))
    }

    async fn counted<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T, Status>>,
    ) -> Result<Response<T>, Status> {
        let result = call.await;
        let code = result.as_ref().map_or_else(Status::code, |_| tonic::Code::Ok);
        self.0.metrics.admin_call(method, code);
        result.map(Response::new)
    }

    /// Commits and logs.
    async fn change<A: Answer>(
        &self,
        call: Call,
        plan: impl Fn(&State) -> Result<Plan, Refusal>,
        answer: impl Fn(&Plan, &State) -> A,
    ) -> Result<A, Status> {
        let committed = self.0.catalog.commit(&call, plan, answer).await?;
        if let Some((plan, revision)) = &committed.done {
            log(&call, plan, *revision);
        }
        Ok(committed.answer)
    }

    /// What identifies a changing call, after checking its request id.
    fn call<M: prost::Message>(
        &self,
        method: &'static str,
        message: &str,
        request: &M,
        request_id: &str,
        validate_only: bool,
    ) -> Result<Call, Status> {
        if !request_id.is_empty() && uuid::Uuid::parse_str(request_id).is_err() {
            return Err(invalid("request_id", "must be a UUID"));
        }
        let mut bytes = method.as_bytes().to_vec();
        bytes.push(0);
        // Without a request id the answer is not kept, so that nobody compares the digest.
        if !request_id.is_empty() {
            let body = canonical(message, request).map_err(|e| Status::invalid_argument(e.to_string()))?;
            bytes.extend_from_slice(&body);
        }
        let call = Call { digest: sha256(&bytes), ..self.unremembered(method, validate_only)? };
        Ok(Call { request_id: request_id.to_owned(), ..call })
    }

    /// A call without a request id.
    fn unremembered(&self, method: &'static str, validate_only: bool) -> Result<Call, Status> {
        let actor = actor(self.caller()?, method);
        Ok(Call { request_id: String::new(), digest: [0; 32], validate_only, actor })
    }
}

/// The author of a change, for the audit log.
pub(crate) fn actor(caller: &Caller, method: &'static str) -> Actor {
    Actor { name: caller.name.clone(), role: caller.role, method }
}

pub(crate) fn log(call: &Call, plan: &Plan, revision: u64) {
    let (method, actor, request_id) = (call.actor.method, &*call.actor.name, call.request_id.as_str());
    for step in &plan.tokens {
        tracing::info!(target: "weir::audit", actor, method, revision, token = &*step.name, "changed");
    }
    for step in plan.steps.iter().filter(|step| step.action != v1::ChangeAction::Unchanged) {
        let fields: Vec<&str> = step.fields.iter().map(|(path, _, _)| path.as_str()).collect();
        tracing::info!(
            target: "weir::audit",
            actor,
            method,
            request_id,
            revision,
            kind = kind_name(step.key.kind),
            name = &*step.key.name,
            action = step.action.as_str_name(),
            fields = fields.join(","),
            "changed"
        );
    }
}

pub(crate) fn options(allow_mass_removal: bool, numbered: bool) -> Options {
    Options { allow_mass_removal, now: Timestamp::from(weir_runtime::wall_clock()), numbered }
}

/// The changes of a plan, as an apply reports them.
fn changes(plan: &Plan) -> Vec<Change> {
    plan.steps
        .iter()
        .map(|step| Change {
            r#ref: Some(step.key.to_ref()),
            action: step.action.into(),
            fields: step.fields.iter().cloned().map(field_change).collect(),
        })
        .collect()
}

/// A duration of a request; `None` when it is negative or out of range.
fn duration(wire: Option<prost_types::Duration>, default: Duration) -> Option<Duration> {
    wire.map_or(Some(default), |wire| Duration::try_from(wire).ok())
}

/// The resource that a plan of one edit makes.
fn made(plan: &Plan) -> Option<v1::Resource> {
    plan.steps.first().map(|step| step.resource.wire.clone())
}
