//! The calls that change something.

use std::time::Duration;

use tonic::Status;
use weir_proto::resource::kind_of;
use weir_proto::v1::resource::Spec;
use weir_proto::v1::{self, ResourceKind};

use super::{Admin, Handle, changes, duration, made, options};
use crate::catalog::Answer;
use crate::model::{Edit, Key, Plan, Refusal, State, apply_edits, plan, update_edit};
use crate::services::invalid;
use crate::services::keys::{new_key, rotated};

/// How long the old secret of a rotated key stays valid.
const GRACE: Duration = Duration::from_secs(24 * 60 * 60);
/// A grace longer than that is not a rotation.
const GRACE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const APPLY_SET: &str = "default";

macro_rules! answers_with_resource {
    ($($answer:ident),*) => {
        $(impl Answer for v1::$answer {
            fn set_revision(&mut self, revision: u64) {
                if let Some(resource) = &mut self.resource {
                    resource.revision = revision;
                }
            }
        })*
    };
}
answers_with_resource!(
    CreateResourceResponse,
    UpdateResourceResponse,
    IssueApiKeyResponse,
    RotateApiKeyResponse
);

impl Answer for v1::DeleteResourceResponse {
    fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }
}

impl Answer for v1::ApplyResponse {
    fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }
}

/// The plan of a resource that must not be there yet.
fn create(state: &State, wire: &v1::Resource) -> Result<Plan, Refusal> {
    let key = Key::new(kind_of(wire), &wire.name);
    if state.get(&key).is_some() {
        return Err(Refusal::AlreadyExists(key));
    }
    // Made singly, it belongs to no set.
    let single = v1::Resource { apply_set: String::new(), ..wire.clone() };
    plan(state, vec![Edit::Put(Box::new(single))], options(false, false))
}

impl Handle<v1::CreateResourceRequest> for Admin {
    type Answer = v1::CreateResourceResponse;

    async fn do_call(&self, request: v1::CreateResourceRequest) -> Result<Self::Answer, Status> {
        let call = self.call(
            "CreateResource",
            "weir.v1.CreateResourceRequest",
            &request,
            &request.request_id,
            request.validate_only,
        )?;
        let wire = request.resource.ok_or_else(|| invalid("resource", "must be set"))?;
        let answer = |plan: &Plan, _: &State| v1::CreateResourceResponse { resource: made(plan) };
        self.change(call, |state| create(state, &wire), answer).await
    }
}

/// What operators may change: how much a backend gets, not what it is.
const OPERATORS_PATHS: [&str; 2] = ["weight", "admin_state"];

fn operators_part(wire: &v1::Resource, paths: Option<&[String]>) -> Result<(), Status> {
    let allowed = |path: &String| OPERATORS_PATHS.contains(&path.as_str());
    if kind_of(wire) == ResourceKind::Backend && paths.is_some_and(|paths| paths.iter().all(allowed)) {
        return Ok(());
    }
    Err(Status::permission_denied(
        "the role operator changes weight and admin_state of backends, named in update_mask; the rest needs editor",
    ))
}

impl Handle<v1::UpdateResourceRequest> for Admin {
    type Answer = v1::UpdateResourceResponse;

    async fn do_call(&self, request: v1::UpdateResourceRequest) -> Result<Self::Answer, Status> {
        let call = self.call(
            "UpdateResource",
            "weir.v1.UpdateResourceRequest",
            &request,
            &request.request_id,
            request.validate_only,
        )?;
        let wire = request.resource.ok_or_else(|| invalid("resource", "must be set"))?;
        let paths = request.update_mask.map(|mask| mask.paths).filter(|paths| !paths.is_empty());
        if self.caller()?.role == v1::Role::Operator {
            operators_part(&wire, paths.as_deref())?;
        }
        let plan = |state: &State| {
            let edit = update_edit(state, &wire, paths.as_deref())?;
            plan(state, vec![edit], options(false, false))
        };
        let answer = |plan: &Plan, _: &State| v1::UpdateResourceResponse { resource: made(plan) };
        self.change(call, plan, answer).await
    }
}

impl Handle<v1::DeleteResourceRequest> for Admin {
    type Answer = v1::DeleteResourceResponse;

    async fn do_call(&self, request: v1::DeleteResourceRequest) -> Result<Self::Answer, Status> {
        let call = self.call(
            "DeleteResource",
            "weir.v1.DeleteResourceRequest",
            &request,
            &request.request_id,
            request.validate_only,
        )?;
        let key = super::view::key(request.r#ref.as_ref())?;
        let plan = |state: &State| {
            let present = state.get(&key).ok_or_else(|| Refusal::NotFound(key.clone()))?;
            if !request.etag.is_empty() && request.etag != present.wire.etag {
                let (found, sent) = (present.wire.etag.clone(), request.etag.clone());
                return Err(Refusal::EtagMismatch { key: key.clone(), found, sent });
            }
            plan(state, vec![Edit::Delete(key.clone())], options(request.allow_mass_removal, false))
        };
        let answer = |_: &Plan, state: &State| v1::DeleteResourceResponse { revision: state.revision };
        self.change(call, plan, answer).await
    }
}

impl Handle<v1::ApplyRequest> for Admin {
    type Answer = v1::ApplyResponse;

    async fn do_call(&self, request: v1::ApplyRequest) -> Result<Self::Answer, Status> {
        let call =
            self.call("Apply", "weir.v1.ApplyRequest", &request, &request.request_id, request.validate_only)?;
        let set = if request.apply_set.is_empty() { APPLY_SET } else { &request.apply_set };
        if set.len() > 63 {
            return Err(invalid("apply_set", "must be at most 63 bytes"));
        }
        let plan = |state: &State| {
            let edits = apply_edits(state, &request.resources, set, request.prune, request.take_over)?;
            plan(state, edits, options(request.allow_mass_removal, true))
        };
        let answer = |plan: &Plan, state: &State| v1::ApplyResponse {
            changes: changes(plan),
            revision: state.revision,
        };
        self.change(call, plan, answer).await
    }
}

impl Handle<v1::IssueApiKeyRequest> for Admin {
    type Answer = v1::IssueApiKeyResponse;

    async fn do_call(&self, request: v1::IssueApiKeyRequest) -> Result<Self::Answer, Status> {
        let call = self.unremembered("IssueApiKey", request.validate_only)?;
        let (secret, digest) = new_key(request.expire_time)?;
        let shown = if request.validate_only { String::new() } else { secret };
        let spec = v1::ApiKeySpec {
            tenant: request.tenant,
            digests: vec![digest],
            revoked: false,
            allowed_models: request.allowed_models,
            limits: request.limits,
        };
        let spec = Some(Spec::ApiKey(spec));
        let wire = v1::Resource { name: request.name, spec, ..v1::Resource::default() };
        let answer =
            |plan: &Plan, _: &State| v1::IssueApiKeyResponse { resource: made(plan), secret: shown.clone() };
        self.change(call, |state| create(state, &wire), answer).await
    }
}

impl Handle<v1::RotateApiKeyRequest> for Admin {
    type Answer = v1::RotateApiKeyResponse;

    async fn do_call(&self, request: v1::RotateApiKeyRequest) -> Result<Self::Answer, Status> {
        let call = self.unremembered("RotateApiKey", request.validate_only)?;
        let grace = duration(request.grace, GRACE)
            .filter(|grace| *grace <= GRACE_MAX)
            .ok_or_else(|| invalid("grace", "must be 0 to 365 days"))?;
        let (secret, digest) = new_key(None)?;
        let shown = if request.validate_only { String::new() } else { secret };
        let key = Key::new(ResourceKind::ApiKey, &request.name);
        let plan = |state: &State| {
            let present = state.get(&key).ok_or_else(|| Refusal::NotFound(key.clone()))?;
            let Some(Spec::ApiKey(spec)) = &present.wire.spec else {
                return Err(Refusal::NotFound(key.clone()));
            };
            if spec.revoked {
                return Err(Refusal::Precondition(format!("{key} is revoked")));
            }
            let now = weir_runtime::wall_clock();
            let digests = rotated(digest.clone(), &spec.digests, now, now + grace);
            let spec = Some(Spec::ApiKey(v1::ApiKeySpec { digests, ..spec.clone() }));
            let wire = v1::Resource { spec, ..present.wire.clone() };
            plan(state, vec![Edit::Put(Box::new(wire))], options(false, false))
        };
        let answer =
            |plan: &Plan, _: &State| v1::RotateApiKeyResponse { resource: made(plan), secret: shown.clone() };
        self.change(call, plan, answer).await
    }
}
