//! `probe`: has a backend looked at now.

use std::time::Duration;

use serde_json::{Value, json};
use weir_proto::v1;

use super::backends::{health_name, millis, or_dash, tier_name};
use crate::args::{Cli, ProbeArgs};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

/// Beyond the time that those who look have: for the way there and back.
const SPARE: Duration = Duration::from_secs(5);

pub(super) async fn probe(cli: &Cli, io: &mut Io<'_>, args: &ProbeArgs) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::ProbeBackendRequest {
        backend: args.backend.clone(),
        tier: args.tier.tier().into(),
        timeout: prost_types::Duration::try_from(args.wait).ok(),
    };
    // A control plane that does not lead says so, and then the next one is asked. A look too many does no harm.
    let probe = client.call_within(args.wait + SPARE, Retry::Once, request, |mut c, r| async move {
        c.probe_backend(r).await
    });
    let answer = probe.await?;
    io.result(|| text(&answer), || value(&answer))?;
    let failed = answer.looks.iter().filter(|look| look.outcome() != v1::ProbeOutcome::Pass).count();
    match (failed, answer.pending.len()) {
        (0, 0) => Ok(()),
        (failed, silent) => Err(Error::Probed { backend: args.backend.clone(), failed, silent }),
    }
}

pub(super) fn outcome(outcome: v1::ProbeOutcome) -> String {
    outcome.as_str_name().trim_start_matches("PROBE_OUTCOME_").to_ascii_lowercase()
}

fn text(answer: &v1::ProbeBackendResponse) -> String {
    let row = |look: &v1::probe_backend_response::Look| {
        vec![
            look.vantage.clone(),
            tier_name(look.tier()).to_owned(),
            outcome(look.outcome()),
            millis(look.latency.as_ref()),
            if look.detail.is_empty() { "-".to_owned() } else { look.detail.clone() },
        ]
    };
    let mut rows: Vec<Vec<String>> = answer.looks.iter().map(row).collect();
    let silent = |vantage: &String| {
        vec![vantage.clone(), "-".into(), "no answer in time".into(), "-".into(), "-".into()]
    };
    rows.extend(answer.pending.iter().map(silent));
    let mut text = tables::table(&["VANTAGE", "TIER", "SAW", "AFTER", "DETAIL"], rows);
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
    let look = |look: &v1::probe_backend_response::Look| {
        let latency = look.latency.and_then(|latency| Duration::try_from(latency).ok());
        json!({
            "vantage": look.vantage, "tier": tier_name(look.tier()), "outcome": outcome(look.outcome()),
            "latency_ms": latency.map(|latency| latency.as_secs_f64() * 1e3), "detail": look.detail,
        })
    };
    let health = answer.status.as_ref().and_then(|status| status.health.as_ref());
    json!({
        "looks": answer.looks.iter().map(look).collect::<Vec<_>>(), "pending": answer.pending,
        "health": health.map(|health| health_name(health.state())),
    })
}
