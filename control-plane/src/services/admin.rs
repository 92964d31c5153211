//! What operators do: every call becomes a plan, a commit and one log line per resource changed.

mod calls;
mod view;

use std::future::Future;
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;
use tonic::{Request, Response, Status};
use weir_proto::resource::kind_name;
use weir_proto::v1::admin_service_server::AdminService;
use weir_proto::v1::{self, Change, FieldChange};

use super::Shared;
use crate::catalog::{Answer, Call};
use crate::encoding::sha256;
use crate::model::{Options, Plan, Refusal, State};
use crate::tree::canonical;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Admin(pub(crate) Shared);

/// Every method: counted, then answered by its namesake.
macro_rules! methods {
    ($($name:ident, $metric:literal, $request:ident -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl AdminService for Admin {
            $(async fn $name(
                &self,
                request: Request<v1::$request>,
            ) -> Result<Response<v1::$response>, Status> {
                self.counted($metric, self.do_call(request.into_inner())).await
            })*
        }
    };
}

/// Answers one type of request.
pub(super) trait Handle<Q> {
    /// The answer.
    type Answer;
    /// Does what is asked.
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
    wait_applied, "WaitApplied", WaitAppliedRequest -> WaitAppliedResponse;
}

impl Admin {
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
        method: &'static str,
        call: Call,
        plan: impl Fn(&State) -> Result<Plan, Refusal>,
        answer: impl Fn(&Plan, &State) -> A,
    ) -> Result<A, Status> {
        let committed = self.0.catalog.commit(&call, plan, answer).await?;
        if let Some((plan, revision)) = &committed.done {
            log(method, &call.request_id, plan, *revision);
        }
        Ok(committed.answer)
    }
}

pub(crate) fn log(method: &'static str, request_id: &str, plan: &Plan, revision: u64) {
    for step in plan.steps.iter().filter(|step| step.action != v1::ChangeAction::Unchanged) {
        let fields: Vec<&str> = step.fields.iter().map(|(path, _, _)| path.as_str()).collect();
        tracing::info!(
            target: "weir::audit",
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

/// What identifies a changing call, after checking its request id.
fn call<M: prost::Message>(
    method: &str,
    message: &str,
    request: &M,
    request_id: &str,
    validate_only: bool,
) -> Result<Call, Status> {
    if !request_id.is_empty() && uuid::Uuid::parse_str(request_id).is_err() {
        return Err(Status::invalid_argument("request_id: must be a UUID"));
    }
    let mut bytes = method.as_bytes().to_vec();
    bytes.push(0);
    let body = canonical(message, request).map_err(|e| Status::invalid_argument(e.to_string()))?;
    bytes.extend_from_slice(&body);
    Ok(Call { request_id: request_id.to_owned(), digest: sha256(&bytes), validate_only })
}

pub(crate) fn options(allow_mass_removal: bool, numbered: bool) -> Options {
    Options { allow_mass_removal, now: Timestamp::from(SystemTime::now()), numbered }
}

/// The changes of a plan, as an apply reports them.
fn changes(plan: &Plan) -> Vec<Change> {
    let field = |(path, before, after): &(String, String, String)| FieldChange {
        path: path.clone(),
        before: before.clone(),
        after: after.clone(),
    };
    plan.steps
        .iter()
        .map(|step| Change {
            r#ref: Some(step.key.to_ref()),
            action: step.action.into(),
            fields: step.fields.iter().map(field).collect(),
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
