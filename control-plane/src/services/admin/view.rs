//! The calls that only read.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Status;
use weir_proto::v1::{self, ResourceKind};

use super::{Admin, Handle, duration};
use crate::encoding::{hex, unhex};
use crate::model::{Key, Refusal, wanted};
use crate::services::invalid;

const PAGE_DEFAULT: usize = 100;
const PAGE_MAX: usize = 1000;
const WAIT_DEFAULT: Duration = Duration::from_secs(10);
const WAIT_MAX: Duration = Duration::from_secs(60);

pub(super) fn key(reference: Option<&v1::ResourceRef>) -> Result<Key, Status> {
    reference.and_then(Key::of_ref).ok_or_else(|| invalid("ref", "kind and name must be set"))
}

impl Handle<v1::GetResourceRequest> for Admin {
    type Answer = v1::GetResourceResponse;

    async fn do_call(&self, request: v1::GetResourceRequest) -> Result<Self::Answer, Status> {
        let key = key(request.r#ref.as_ref())?;
        let state = self.0.catalog.state();
        let stored = state.get(&key).ok_or(Refusal::NotFound(key))?;
        Ok(v1::GetResourceResponse { resource: Some(stored.wire.clone()) })
    }
}

impl Handle<v1::ListResourcesRequest> for Admin {
    type Answer = v1::ListResourcesResponse;

    async fn do_call(&self, request: v1::ListResourcesRequest) -> Result<Self::Answer, Status> {
        let kind = request.kind();
        if kind == ResourceKind::Unspecified {
            return Err(invalid("kind", "must be set"));
        }
        let size = page_size(request.page_size)?;
        let (state, after) = if request.page_token.is_empty() {
            (self.0.catalog.state(), None)
        } else {
            let token = Token::parse(&request.page_token)
                .filter(|token| token.kind == kind)
                .ok_or_else(|| invalid("page_token", "is not from an answer to this request"))?;
            // All pages are of the revision of the first.
            (self.0.catalog.at(token.revision).await?, Some(token.last))
        };
        let mut rest =
            state.of_kind(kind).skip_while(|s| after.as_ref().is_some_and(|last| s.wire.name <= *last));
        let resources: Vec<v1::Resource> = rest.by_ref().take(size).map(|s| s.wire.clone()).collect();
        let next_page_token = match (rest.next(), resources.last()) {
            (Some(_), Some(last)) => Token { revision: state.revision, kind, last: last.name.clone() }.text(),
            _ => String::new(),
        };
        Ok(v1::ListResourcesResponse { resources, next_page_token, revision: state.revision })
    }
}

/// The size of a page, as it was asked for and within bounds.
pub(super) fn page_size(asked: i32) -> Result<usize, Status> {
    match usize::try_from(asked) {
        Ok(0) => Ok(PAGE_DEFAULT),
        Ok(size) => Ok(size.min(PAGE_MAX)),
        Err(_) => Err(invalid("page_size", "must not be negative")),
    }
}

/// How long a waiting call may take.
pub(super) fn wait_limit(asked: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let limit = duration(asked, WAIT_DEFAULT).ok_or_else(|| invalid("timeout", "must not be negative"))?;
    Ok(limit.min(WAIT_MAX))
}

/// The position at which a list continues.
struct Token {
    revision: u64,
    kind: ResourceKind,
    last: String,
}

impl Token {
    fn text(&self) -> String {
        hex(format!("{}/{}/{}", self.revision, i32::from(self.kind), self.last).as_bytes())
    }

    fn parse(text: &str) -> Option<Self> {
        let text = String::from_utf8(unhex(text)?).ok()?;
        let (revision, rest) = text.split_once('/')?;
        let (kind, last) = rest.split_once('/')?;
        let kind = ResourceKind::try_from(kind.parse::<i32>().ok()?).ok()?;
        Some(Self { revision: revision.parse().ok()?, kind, last: last.to_owned() })
    }
}

impl Handle<v1::ListGatewaysRequest> for Admin {
    type Answer = v1::ListGatewaysResponse;

    async fn do_call(&self, _: v1::ListGatewaysRequest) -> Result<Self::Answer, Status> {
        let revision = self.0.catalog.state().revision;
        Ok(v1::ListGatewaysResponse { gateways: self.0.registry.list(revision), revision })
    }
}

impl Handle<v1::WaitAppliedRequest> for Admin {
    type Answer = v1::WaitAppliedResponse;

    async fn do_call(&self, request: v1::WaitAppliedRequest) -> Result<Self::Answer, Status> {
        let limit = wait_limit(request.timeout)?;
        let (start, mut changes) = (Instant::now(), self.0.registry.watch());
        loop {
            changes.borrow_and_update();
            let changed = self.0.registry.is_pending(request.revision)
                && tokio::select! {
                    // When the process stops, the answer has the progress so far.
                    () = self.0.stop.cancelled() => false,
                    changed = tokio::time::timeout_at(start + limit, changes.changed()) => {
                        matches!(changed, Ok(Ok(())))
                    }
                };
            if !changed {
                let applied = self.0.registry.applied(request.revision);
                let elapsed = prost_types::Duration::try_from(start.elapsed()).ok();
                return Ok(v1::WaitAppliedResponse { elapsed, ..applied });
            }
        }
    }
}

impl Handle<v1::GetGatewayConfigRequest> for Admin {
    type Answer = v1::GetGatewayConfigResponse;

    async fn do_call(&self, request: v1::GetGatewayConfigRequest) -> Result<Self::Answer, Status> {
        let state = self.0.catalog.state();
        let (held, errors) = self.0.registry.held(&request.gateway_id).ok_or_else(|| {
            Status::not_found(format!(
                "gateway {} is not connected and has not been for an hour",
                request.gateway_id
            ))
        })?;
        let mut differences = Vec::new();
        let refusal = |key: &Key| {
            let of = |error: &&v1::gateway::ResourceError| error.r#ref.as_ref() == Some(&key.to_ref());
            errors.iter().find(of).map(|error| error.message.clone()).unwrap_or_default()
        };
        let mut differs = |key: &Key, held: &str, desired: &str| {
            let refusal = refusal(key);
            if held != desired || !refusal.is_empty() {
                differences.push(v1::ConfigDifference {
                    r#ref: Some(key.to_ref()),
                    applied_version: held.to_owned(),
                    desired_version: desired.to_owned(),
                    refusal,
                });
            }
        };
        for (key, stored) in state.resources.iter().filter(|(key, _)| wanted(held.role, key.kind)) {
            differs(key, held.versions.get(key).map_or("", |v| &**v), &stored.published.version);
        }
        for (key, version) in held.versions.iter().filter(|(key, _)| !state.resources.contains_key(key)) {
            differs(key, version, "");
        }
        let row = |(key, version): (&Key, &std::sync::Arc<str>)| v1::ResourceVersion {
            kind: key.kind.into(),
            name: key.name.to_string(),
            version: version.to_string(),
        };
        Ok(v1::GetGatewayConfigResponse {
            store_epoch: held.epoch.to_string(),
            applied_revision: held.revision,
            revision: state.revision,
            resource_versions: held.versions.iter().map(row).collect(),
            differences,
        })
    }
}

impl Handle<v1::WhoAmIRequest> for Admin {
    type Answer = v1::WhoAmIResponse;

    async fn do_call(&self, _: v1::WhoAmIRequest) -> Result<Self::Answer, Status> {
        let (caller, state) = (self.caller()?, self.0.catalog.state());
        Ok(v1::WhoAmIResponse {
            name: caller.name.to_string(),
            role: caller.role.into(),
            build: weir_runtime::version().to_owned(),
            store_epoch: state.epoch.to_string(),
            revision: state.revision,
            leader: self.0.leads.borrow().is_some(),
        })
    }
}
