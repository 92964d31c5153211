//! `drain`, `undrain`, `disable`, `enable`, `weight` and `backends`.

use serde_json::{Value, json};
use weir_proto::v1;
use weir_proto::v1::resource::Spec;

use super::{update, wait};
use crate::args::{BackendRef, Cli, WaitArgs};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::{Io, time};
use crate::tables;

pub(super) async fn set_state(
    cli: &Cli,
    io: &mut Io<'_>,
    args: &BackendRef,
    state: v1::AdminState,
) -> Result<(), Error> {
    let spec = v1::BackendSpec { admin_state: state.into(), ..Default::default() };
    let said = format!("backend {} is {}", args.backend, tables::state(state));
    change(cli, io, &args.backend, spec, "admin_state", said, &args.wait).await
}

pub(super) async fn set_weight(
    cli: &Cli,
    io: &mut Io<'_>,
    backend: &str,
    weight: u32,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let spec = v1::BackendSpec { weight: Some(weight), ..Default::default() };
    let said = format!("backend {backend} has weight {weight}");
    change(cli, io, backend, spec, "weight", said, wait).await
}

async fn change(
    cli: &Cli,
    io: &mut Io<'_>,
    backend: &str,
    spec: v1::BackendSpec,
    mask: &str,
    said: String,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let resource = update(&client, backend, Spec::Backend(spec), mask).await?;
    let revision = resource.revision;
    io.result(
        || said + "\n",
        || json!({"kind": "backend", "name": backend, "action": "update", "revision": revision}),
    )?;
    wait::applied(&client, io, wait, revision).await
}

pub(super) async fn status(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let backends = read_status(&client).await?;
    io.result(|| status_table(&backends), || Value::Array(backends.iter().map(status_value).collect()))
}

pub(super) async fn read_status(client: &Client) -> Result<Vec<v1::BackendStatus>, Error> {
    let request = v1::ListBackendStatusRequest {};
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.list_backend_status(r).await }).await?;
    Ok(answer.backends)
}

pub(super) fn status_table(backends: &[v1::BackendStatus]) -> String {
    let rows = backends.iter().map(|b| {
        let health = b.health.clone().unwrap_or_default();
        let ejected = if b.ejected_by.is_empty() { "-".to_owned() } else { b.ejected_by.join(",") };
        let reason = if health.reason.is_empty() { "-".to_owned() } else { health.reason.clone() };
        vec![
            b.backend.clone(),
            health_name(health.state()).to_owned(),
            b.in_flight.to_string(),
            ejected,
            time(health.since.as_ref()),
            reason,
        ]
    });
    tables::table(&["BACKEND", "HEALTH", "IN FLIGHT", "EJECTED BY", "SINCE", "REASON"], rows.collect())
}

fn status_value(b: &v1::BackendStatus) -> Value {
    let health = b.health.clone().unwrap_or_default();
    json!({
        "backend": b.backend,
        "health": health_name(health.state()),
        "reason": health.reason,
        "since": health.since.as_ref().map(|t| time(Some(t))),
        "in_flight": b.in_flight,
        "ejected_by": b.ejected_by,
    })
}

const fn health_name(state: v1::HealthState) -> &'static str {
    match state {
        v1::HealthState::Unspecified | v1::HealthState::Unknown => "unknown",
        v1::HealthState::Healthy => "healthy",
        v1::HealthState::Degraded => "degraded",
        v1::HealthState::Unhealthy => "unhealthy",
        v1::HealthState::Recovering => "recovering",
    }
}
