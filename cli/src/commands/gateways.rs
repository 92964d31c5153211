//! `gateways`.

use serde_json::{Value, json};
use weir_proto::resource::kind_name;
use weir_proto::v1;

use crate::args::Cli;
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::{Io, time};
use crate::tables;

pub(super) async fn gateways(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::ListGatewaysRequest {};
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.list_gateways(r).await }).await?;
    io.result(|| text(&answer), || value(&answer))
}

fn text(answer: &v1::ListGatewaysResponse) -> String {
    let rows = answer.gateways.iter().map(|g| {
        let behind = answer.revision.saturating_sub(g.applied_revision);
        vec![
            g.id.clone(),
            role(g).to_owned(),
            if g.region.is_empty() { "-".to_owned() } else { g.region.clone() },
            if g.connected { "connected" } else { "gone" }.to_owned(),
            g.applied_revision.to_string(),
            behind.to_string(),
            time(g.last_seen_time.as_ref()),
            g.build.clone(),
        ]
    });
    let header = ["GATEWAY", "ROLE", "REGION", "STATE", "REVISION", "BEHIND", "LAST SEEN", "BUILD"];
    let mut text = tables::table(&header, rows.collect());
    for gateway in &answer.gateways {
        for error in &gateway.errors {
            text.push_str(&format!("{} refuses {}: {}\n", gateway.id, refused(error), error.message));
        }
    }
    text
}

/// Control planes of before there were others do not say.
fn role(gateway: &v1::Gateway) -> &'static str {
    match gateway.role() {
        v1::SubscriberRole::Unspecified | v1::SubscriberRole::Gateway => "gateway",
        v1::SubscriberRole::LimitService => "limit-service",
    }
}

fn refused(error: &v1::gateway::ResourceError) -> String {
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
            "applied_revision": g.applied_revision,
            "last_seen_time": g.last_seen_time.as_ref().map(|t| time(Some(t))),
            "errors": errors.collect::<Vec<_>>(),
        })
    });
    json!({"revision": answer.revision, "gateways": gateways.collect::<Vec<_>>()})
}
