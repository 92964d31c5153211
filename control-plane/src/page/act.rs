//! Changes from the page: each is a call of the admin service by the holder of the token, so it is checked, refused,
//! counted and written to the audit log as if it came by gRPC.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use prost_types::FieldMask;
use serde_json::{Value, json};
use tonic::{Request, Status};
use weir_proto::resource::kind_name;
use weir_proto::v1::admin_service_server::AdminService;
use weir_proto::v1::{self, AdminState};

use super::{CHANGES, Page, Refused};
use crate::auth::Caller;
use crate::services::admin::Admin;

/// How long the answer waits until the gateways have applied the change.
const APPLIED_WITHIN: Duration = Duration::from_secs(5);
const DRAIN: &str = "/weir.v1.AdminService/Drain";

/// A change of a backend.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Weight(u32),
    Drain,
    State(AdminState),
}

impl Action {
    /// Parses the body, which contains the etag that the page showed.
    pub(crate) fn parse(body: &[u8]) -> Result<(Self, String), Status> {
        let wrong = |what: &str| Status::invalid_argument(what);
        let value: Value =
            serde_json::from_slice(body).map_err(|_| wrong("the body must be a JSON object"))?;
        let fields = value.as_object().ok_or_else(|| wrong("the body must be a JSON object"))?;
        if let Some(unknown) = fields.keys().find(|key| !["action", "weight", "etag"].contains(&key.as_str()))
        {
            return Err(wrong(&format!("{unknown}: there is no such field")));
        }
        let etag = match fields.get("etag") {
            None => String::new(),
            Some(etag) => etag.as_str().ok_or_else(|| wrong("etag: must be text"))?.to_owned(),
        };
        let action = match fields.get("action").and_then(Value::as_str) {
            Some("weight") => {
                let weight = fields.get("weight").and_then(Value::as_u64);
                let weight = weight.and_then(|weight| u32::try_from(weight).ok());
                Self::Weight(weight.ok_or_else(|| wrong("weight: must be a whole number"))?)
            }
            Some("drain") => Self::Drain,
            Some("undrain" | "enable") => Self::State(AdminState::Active),
            Some("disable") => Self::State(AdminState::Disabled),
            _ => return Err(wrong("action: must be weight, drain, undrain, enable or disable")),
        };
        Ok((action, etag))
    }
}

pub(super) async fn act(
    State(page): State<Page>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Refused> {
    let caller = page.caller(&headers, &[CHANGES, DRAIN])?;
    let (action, etag) = Action::parse(&body)?;
    let admin = Admin::new(page.shared.clone());
    let revision = change(&admin, &caller, name, action, etag).await?;
    page.feed.refresh();
    let timeout = prost_types::Duration::try_from(APPLIED_WITHIN).ok();
    let applied = admin.wait_applied(called(&caller, v1::WaitAppliedRequest { revision, timeout })).await?;
    page.feed.refresh();
    let applied = applied.into_inner();
    let refused = applied.refused.iter().flat_map(|refusal| {
        refusal.errors.iter().map(|error| {
            let of = error.r#ref.clone().unwrap_or_default();
            format!("{}: {} {}: {}", refusal.gateway_id, kind_name(of.kind()), of.name, error.message)
        })
    });
    let elapsed = applied.elapsed.and_then(|elapsed| Duration::try_from(elapsed).ok()).unwrap_or_default();
    let answer = json!({
        "revision": revision, "applied": applied.applied, "connected": applied.connected,
        "elapsed_ms": elapsed.as_millis() as u64, "pending": applied.pending,
        "refused": refused.collect::<Vec<_>>(),
    });
    Ok(([(header::CONTENT_TYPE, "application/json")], answer.to_string()).into_response())
}

fn called<T>(caller: &Caller, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller.clone());
    request
}

/// Makes the change; returns its revision.
async fn change(
    admin: &Admin,
    caller: &Caller,
    name: String,
    action: Action,
    etag: String,
) -> Result<u64, Status> {
    let (spec, path) = match action {
        Action::Drain => {
            let drain = v1::DrainRequest { backend: name, ..Default::default() };
            let answer = admin.drain(called(caller, drain)).await?.into_inner();
            let drain = answer.operation.and_then(|operation| operation.drain);
            return Ok(drain.map_or(0, |drain| drain.revision));
        }
        Action::Weight(weight) => (v1::BackendSpec { weight: Some(weight), ..Default::default() }, "weight"),
        Action::State(state) => {
            (v1::BackendSpec { admin_state: state.into(), ..Default::default() }, "admin_state")
        }
    };
    let spec = Some(v1::resource::Spec::Backend(spec));
    let update = v1::UpdateResourceRequest {
        resource: Some(v1::Resource { name, etag, spec, ..Default::default() }),
        update_mask: Some(FieldMask { paths: vec![path.to_owned()] }),
        ..Default::default()
    };
    let answer = admin.update_resource(called(caller, update)).await?.into_inner();
    Ok(answer.resource.map_or(0, |resource| resource.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_understood_is_refused() {
        let parse = |text: &str| Action::parse(text.as_bytes()).map_err(|status| status.message().to_owned());
        assert_eq!(
            parse(r#"{"action":"weight","weight":7,"etag":"e"}"#),
            Ok((Action::Weight(7), "e".into()))
        );
        assert_eq!(parse(r#"{"action":"enable"}"#), Ok((Action::State(AdminState::Active), String::new())));
        for wrong in [
            "",
            "[]",
            "{}",
            r#"{"action":"delete"}"#,
            r#"{"action":"weight"}"#,
            r#"{"action":"weight","weight":-1}"#,
            r#"{"action":"weight","weight":1e99}"#,
            r#"{"action":"drain","etag":1}"#,
            r#"{"action":"drain","x":1}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
