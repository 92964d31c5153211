//! `gateways`, `gateway config` and `gateway diff`.

use serde_json::{Value, json};
use weir_proto::resource::kind_name;
use weir_proto::v1;
use weir_runtime::exit;

use crate::args::{Cli, GatewayCommand};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

pub(super) async fn gateways(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let answer = read(&client).await?;
    let wide = io.wide();
    io.result(|| text(&answer, wide), || value(&answer))
}

pub(super) async fn read(client: &Client) -> Result<v1::ListGatewaysResponse, Error> {
    let request = v1::ListGatewaysRequest {};
    client.call(Retry::Once, request, |mut c, r| async move { c.list_gateways(r).await }).await
}

/// `gateway config` and `gateway diff`; the exit code of the latter says whether anything differs.
pub(super) async fn one(cli: &Cli, io: &mut Io<'_>, command: &GatewayCommand) -> Result<u8, Error> {
    let (GatewayCommand::Config { id } | GatewayCommand::Diff { id }) = command;
    let client = Client::connect(cli).await?;
    let request = v1::GetGatewayConfigRequest { gateway_id: id.clone() };
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.get_gateway_config(r).await }).await?;
    if matches!(command, GatewayCommand::Config { .. }) {
        io.result(|| config_text(&answer), || config_value(&answer))?;
        return Ok(exit::DONE);
    }
    io.result(
        || differences_text(&answer),
        || {
            let rows = answer.differences.iter().map(difference_value);
            json!({"applied_revision": answer.applied_revision, "revision": answer.revision,
                   "differences": rows.collect::<Vec<_>>()})
        },
    )?;
    Ok(if answer.differences.is_empty() { exit::DONE } else { exit::FAILED })
}

fn config_text(answer: &v1::GetGatewayConfigResponse) -> String {
    let row = |applied: &v1::ResourceVersion| {
        vec![kind_name(applied.kind()).to_owned(), applied.name.clone(), applied.version.clone()]
    };
    let rows = answer.resource_versions.iter().map(row).collect();
    let (at, newest) = (answer.applied_revision, answer.revision);
    format!("{}at revision {at} of {newest}\n", tables::table(&["KIND", "NAME", "VERSION"], rows))
}

fn config_value(answer: &v1::GetGatewayConfigResponse) -> Value {
    let row = |applied: &v1::ResourceVersion| json!({"kind": kind_name(applied.kind()), "name": applied.name, "version": applied.version});
    json!({
        "store_epoch": answer.store_epoch,
        "applied_revision": answer.applied_revision,
        "revision": answer.revision,
        "resource_versions": answer.resource_versions.iter().map(row).collect::<Vec<_>>(),
    })
}

fn differences_text(answer: &v1::GetGatewayConfigResponse) -> String {
    let mut text = String::new();
    for difference in &answer.differences {
        let of = difference.r#ref.clone().unwrap_or_default();
        let sign = match (difference.applied_version.is_empty(), difference.desired_version.is_empty()) {
            (true, _) => '+',
            (false, true) => '-',
            (false, false) => '~',
        };
        text.push_str(&format!("{sign} {} {}\n", kind_name(of.kind()), of.name));
        if !difference.refusal.is_empty() {
            text.push_str(&format!("    refused: {}\n", difference.refusal));
        }
    }
    if text.is_empty() { "the gateway has applied the newest revision completely\n".to_owned() } else { text }
}

fn difference_value(difference: &v1::ConfigDifference) -> Value {
    let of = difference.r#ref.clone().unwrap_or_default();
    json!({
        "kind": kind_name(of.kind()),
        "name": of.name,
        "applied_version": difference.applied_version,
        "desired_version": difference.desired_version,
        "refusal": difference.refusal,
    })
}

/// How long ago a time was, in the largest unit that says something.
fn ago(time: Option<&prost_types::Timestamp>) -> String {
    let Some(time) = time else { return "-".to_owned() };
    let seconds = jiff::Timestamp::now().as_second().saturating_sub(time.seconds).max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

const fn sync(state: v1::SyncState) -> &'static str {
    match state {
        v1::SyncState::Unspecified => "-",
        v1::SyncState::Synced => "synced",
        v1::SyncState::Pending => "pending",
        v1::SyncState::Stale => "stale",
        v1::SyncState::Error => "error",
        v1::SyncState::Disconnected => "disconnected",
    }
}

fn text(answer: &v1::ListGatewaysResponse, wide: bool) -> String {
    let rows = answer.gateways.iter().map(|g| {
        let behind = answer.revision.saturating_sub(g.applied_revision);
        let mut row = vec![
            g.id.clone(),
            role(g).to_owned(),
            if g.region.is_empty() { "-".to_owned() } else { g.region.clone() },
            sync(g.sync()).to_owned(),
            g.applied_revision.to_string(),
            behind.to_string(),
            ago(g.last_seen_time.as_ref()),
            g.build.clone(),
        ];
        if wide {
            let unanswered = g.unanswered_since.as_ref();
            row.extend([g.incarnation.clone(), g.errors.len().to_string(), ago(unanswered)]);
        }
        row
    });
    let mut header = vec!["GATEWAY", "ROLE", "REGION", "STATE", "REVISION", "BEHIND", "AGE", "BUILD"];
    if wide {
        header.extend(["INCARNATION", "REFUSES", "UNANSWERED FOR"]);
    }
    let mut text = tables::table(&header, rows.collect());
    for gateway in &answer.gateways {
        for error in &gateway.errors {
            text.push_str(&format!("{} refuses {}: {}\n", gateway.id, refused(error), error.message));
        }
    }
    text
}

/// The role as shown; unspecified is a gateway.
fn role(gateway: &v1::Gateway) -> &'static str {
    match gateway.role() {
        v1::SubscriberRole::Unspecified | v1::SubscriberRole::Gateway => "gateway",
        v1::SubscriberRole::LimitService => "limit-service",
    }
}

pub(super) fn refused(error: &v1::gateway::ResourceError) -> String {
    error
        .r#ref
        .as_ref()
        .map_or_else(|| "the change".to_owned(), |r| format!("{} {}", kind_name(r.kind()), r.name))
}

fn value(answer: &v1::ListGatewaysResponse) -> Value {
    let gateways = answer.gateways.iter().map(|g| {
        let errors = g.errors.iter().map(|e| json!({"resource": refused(e), "message": e.message}));
        json!({
            "id": g.id,
            "role": role(g),
            "incarnation": g.incarnation,
            "region": g.region,
            "build": g.build,
            "connected": g.connected,
            "sync": sync(g.sync()),
            "unanswered_since": g.unanswered_since.as_ref().map(|t| tables::time(Some(t))),
            "applied_revision": g.applied_revision,
            "last_seen_time": g.last_seen_time.as_ref().map(|t| tables::time(Some(t))),
            "errors": errors.collect::<Vec<_>>(),
        })
    });
    json!({"revision": answer.revision, "gateways": gateways.collect::<Vec<_>>()})
}
