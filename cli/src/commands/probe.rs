//! `weir probe`: has the observers of a backend probe it now.

use std::time::Duration;

use serde_json::{Value, json};
use weir_proto::v1;

use super::backends::{health_name, millis, or_dash, tier_name};
use crate::args::{Cli, ProbeArgs};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

/// Added to the time the observers have: for the way of the call and of its answer.
const SPARE: Duration = Duration::from_secs(5);

pub(super) async fn probe(cli: &Cli, io: &mut Io<'_>, args: &ProbeArgs) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::ProbeBackendRequest {
        backend: args.backend.clone(),
        tier: args.tier.tier().into(),
        timeout: prost_types::Duration::try_from(args.wait).ok(),
    };
    // A control plane that is not the leader says so, and the next one is asked. One probe too many does no harm.
    let probe = client.call_within(args.wait + SPARE, Retry::Once, request, |mut c, r| async move {
        c.probe_backend(r).await
    });
    let answer = probe.await?;
    io.result(|| text(&answer), || value(&answer))?;
    let failed = answer.results.iter().filter(|result| result.outcome() != v1::ProbeOutcome::Pass).count();
    match (failed, answer.pending_observers.len()) {
        (0, 0) => Ok(()),
        (failed, silent) => Err(Error::Probed { backend: args.backend.clone(), failed, silent }),
    }
}

pub(super) fn outcome(outcome: v1::ProbeOutcome) -> String {
    outcome.as_str_name().trim_start_matches("PROBE_OUTCOME_").to_ascii_lowercase()
}

fn text(answer: &v1::ProbeBackendResponse) -> String {
    let row = |result: &v1::probe_backend_response::ObserverResult| {
        vec![
            result.observer.clone(),
            tier_name(result.tier()).to_owned(),
            outcome(result.outcome()),
            millis(result.latency.as_ref()),
            if result.detail.is_empty() { "-".to_owned() } else { result.detail.clone() },
        ]
    };
    let mut rows: Vec<Vec<String>> = answer.results.iter().map(row).collect();
    let silent = |observer: &String| {
        vec![observer.clone(), "-".into(), "no answer in time".into(), "-".into(), "-".into()]
    };
    rows.extend(answer.pending_observers.iter().map(silent));
    let mut text = tables::table(&["OBSERVER", "TIER", "OUTCOME", "LATENCY", "DETAIL"], rows);
    if let Some(health) = answer.status.as_ref().and_then(|status| status.health.as_ref()) {
        text.push_str(&format!(
            "backend {} is {}: {}\n",
            health.backend,
            health_name(health.state()),
            or_dash(&health.reason)
        ));
    }
    text
}

fn value(answer: &v1::ProbeBackendResponse) -> Value {
    let result = |result: &v1::probe_backend_response::ObserverResult| {
        let latency = result.latency.and_then(|latency| Duration::try_from(latency).ok());
        json!({
            "observer": result.observer, "tier": tier_name(result.tier()), "outcome": outcome(result.outcome()),
            "latency_ms": latency.map(|latency| latency.as_secs_f64() * 1e3), "detail": result.detail,
        })
    };
    let health = answer.status.as_ref().and_then(|status| status.health.as_ref());
    json!({
        "results": answer.results.iter().map(result).collect::<Vec<_>>(),
        "pending_observers": answer.pending_observers,
        "health": health.map(|health| health_name(health.state())),
    })
}
