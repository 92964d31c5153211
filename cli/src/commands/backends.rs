//! `weir backends`, `weir why` and `weir events`.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};
use weir_proto::v1;

use crate::args::Cli;
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

pub(super) async fn backends(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let backends = read(&client).await?;
    let wide = io.wide();
    io.result(
        || if wide { table_wide(&backends) } else { table(&backends) },
        || Value::Array(backends.iter().map(status_value).collect()),
    )
}

pub(super) async fn why(cli: &Cli, io: &mut Io<'_>, backend: &str) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::ExplainBackendRequest { backend: backend.to_owned() };
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.explain_backend(r).await }).await?;
    io.result(|| why_text(&answer), || why_value(&answer))
}

pub(super) async fn events(cli: &Cli, io: &mut Io<'_>, subject: Option<&str>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::ListHealthEventsRequest { after: 0, subject: subject.unwrap_or_default().to_owned() };
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.list_health_events(r).await }).await?;
    let events = answer.events;
    let text = || match (events.is_empty(), subject) {
        (false, _) => events_table(&events),
        (true, None) => "no health event is remembered\n".to_owned(),
        (true, Some(subject)) => format!("no health event of {subject} is remembered\n"),
    };
    io.result(text, || Value::Array(events.iter().map(event_value).collect()))
}

pub(super) async fn read(client: &Client) -> Result<Vec<v1::BackendStatus>, Error> {
    let request = v1::ListBackendStatusRequest {};
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.list_backend_status(r).await }).await?;
    Ok(answer.backends)
}

pub(super) fn table(backends: &[v1::BackendStatus]) -> String {
    let rows = backends.iter().map(|b| {
        let health = b.health.clone().unwrap_or_default();
        vec![
            b.backend.clone(),
            state_text(b, &health),
            b.weight.to_string(),
            format!("{:.0}", b.effective_weight),
            format!("{}/{}", b.in_flight, b.max_concurrency),
            millis(b.first_byte_mean.as_ref()),
            b.tokens_per_second.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}")),
            list(&probers(b, v1::ProbeTier::Liveness)),
            list(&b.ejected_by),
            tables::time(health.since.as_ref()),
            or_dash(&health.reason),
        ]
    });
    let header = [
        "BACKEND",
        "HEALTH",
        "WEIGHT",
        "EFFECTIVE",
        "IN FLIGHT",
        "FIRST BYTE",
        "TOKENS/S",
        "PROBED BY",
        "EJECTED BY",
        "SINCE",
        "REASON",
    ];
    tables::table(&header, rows.collect())
}

/// The table with the readings of deep probes and their observers in addition.
fn table_wide(backends: &[v1::BackendStatus]) -> String {
    let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |s| format!("{:.0}%", s * 100.0));
    let rows = backends.iter().map(|b| {
        let health = b.health.clone().unwrap_or_default();
        vec![
            b.backend.clone(),
            b.pool.clone(),
            state_text(b, &health),
            or_dash(&health.rule),
            b.weight.to_string(),
            format!("{:.1}", b.effective_weight),
            format!("{}/{}", b.in_flight, b.max_concurrency),
            millis(b.first_byte_mean.as_ref()),
            b.tokens_per_second.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}")),
            share(b.cache_used),
            b.queue.map_or_else(|| "-".to_owned(), |queue| queue.to_string()),
            list(&probers(b, v1::ProbeTier::Liveness)),
            list(&probers(b, v1::ProbeTier::Readiness)),
            list(&probers(b, v1::ProbeTier::Deep)),
            list(&b.ejected_by),
            tables::time(health.since.as_ref()),
            or_dash(&health.reason),
        ]
    });
    let header = [
        "BACKEND",
        "POOL",
        "HEALTH",
        "RULE",
        "WEIGHT",
        "EFFECTIVE",
        "IN FLIGHT",
        "FIRST BYTE",
        "TOKENS/S",
        "CACHE",
        "QUEUE",
        "LIVENESS BY",
        "READINESS BY",
        "DEEP BY",
        "EJECTED BY",
        "SINCE",
        "REASON",
    ];
    tables::table(&header, rows.collect())
}

/// The state, with the flags that decide whether the backend is used.
fn state_text(b: &v1::BackendStatus, health: &v1::BackendHealth) -> String {
    let mut text = health_name(health.state()).to_owned();
    let marks = [
        (health.suspect, "suspect"),
        (health.stale, "stale"),
        (health.overridden, "overridden"),
        (b.admin_state() == v1::AdminState::Draining, "draining"),
        (b.admin_state() == v1::AdminState::Disabled, "disabled"),
    ];
    let marks: Vec<&str> = marks.into_iter().filter(|(on, _)| *on).map(|(_, mark)| mark).collect();
    if !marks.is_empty() {
        let _ = write!(text, " ({})", marks.join(", "));
    }
    text
}

fn probers(b: &v1::BackendStatus, tier: v1::ProbeTier) -> Vec<String> {
    b.probers.iter().filter(|p| p.tier() == tier).map(|p| p.observer.clone()).collect()
}

fn status_value(b: &v1::BackendStatus) -> Value {
    let health = b.health.clone().unwrap_or_default();
    let seconds = |d: &prost_types::Duration| d.seconds as f64 + f64::from(d.nanos) / 1e9;
    json!({
        "backend": b.backend,
        "pool": b.pool,
        "admin_state": tables::state(b.admin_state()),
        "health": health_name(health.state()),
        "rule": health.rule,
        "reason": health.reason,
        "since": health.since.as_ref().map(|t| tables::time(Some(t))),
        "suspect": health.suspect,
        "stale": health.stale,
        "overridden": health.overridden,
        "weight": b.weight,
        "effective_weight": b.effective_weight,
        "in_flight": b.in_flight,
        "max_concurrency": b.max_concurrency,
        "first_byte_seconds": b.first_byte_mean.as_ref().map(seconds),
        "tokens_per_second": b.tokens_per_second,
        "cache_used": b.cache_used,
        "queue": b.queue,
        "probed_by": {
            "liveness": probers(b, v1::ProbeTier::Liveness),
            "readiness": probers(b, v1::ProbeTier::Readiness),
            "deep": probers(b, v1::ProbeTier::Deep),
        },
        "ejected_by": b.ejected_by,
    })
}

fn why_text(answer: &v1::ExplainBackendResponse) -> String {
    let status = answer.status.clone().unwrap_or_default();
    let health = status.health.clone().unwrap_or_default();
    let mut text = String::new();
    let since = tables::time(health.since.as_ref());
    let _ = writeln!(text, "{} is {} since {since}", status.backend, state_text(&status, &health));
    let _ = writeln!(text, "  rule          {} ({})", or_dash(&health.rule), or_dash(&health.reason));
    let _ = writeln!(
        text,
        "  weight        {} configured, {:.0} effective; {} of {} in flight",
        status.weight, status.effective_weight, status.in_flight, status.max_concurrency
    );
    if answer.may_return_time.is_some() {
        let _ = writeln!(
            text,
            "  may recover   {} at the earliest",
            tables::time(answer.may_return_time.as_ref())
        );
    }
    for (i, condition) in answer.conditions.iter().enumerate() {
        let _ = writeln!(text, "  {}{condition}", if i == 0 { "requires      " } else { "              " });
    }
    for suspect in &answer.suspect_tiers {
        let asked = list(&suspect.asked_observers);
        let tier = tier_name(suspect.tier());
        let _ = writeln!(
            text,
            "  suspect       at {tier} since {} saw a failure; asked: {asked}",
            suspect.first_observer
        );
    }
    if !status.ejected_by.is_empty() {
        let _ = writeln!(text, "  ejected by    {} locally", list(&status.ejected_by));
    }
    if !answer.votes.is_empty() {
        let rows = answer.votes.iter().map(|vote| {
            vec![
                vote.observer.clone(),
                tier_name(vote.tier()).to_owned(),
                or_dash(&vote.detail),
                vote.passes.to_string(),
                vote.failures.to_string(),
                tables::time(vote.time.as_ref()),
                if vote.ignored.is_empty() { "yes".to_owned() } else { format!("no: {}", vote.ignored) },
            ]
        });
        let header = ["OBSERVER", "TIER", "OUTCOME", "PASSES", "FAILURES", "LAST", "COUNTS"];
        let _ = write!(text, "\n{}", tables::table(&header, rows.collect()));
    }
    if !answer.failures.is_empty() {
        let rows = answer.failures.iter().map(|of| {
            let failure = of.failure.clone().unwrap_or_default();
            vec![
                tables::time(failure.time.as_ref()),
                of.gateway_id.clone(),
                failure.model,
                failure.outcome,
                if failure.status == 0 { "-".to_owned() } else { failure.status.to_string() },
                or_dash(&failure.message),
            ]
        });
        let header = ["LAST FAILED ATTEMPT", "GATEWAY", "MODEL", "OUTCOME", "STATUS", "SAW"];
        let _ = write!(text, "\n{}", tables::table(&header, rows.collect()));
    }
    if !answer.events.is_empty() {
        let _ = write!(text, "\n{}", events_table(&answer.events));
    }
    text
}

fn failure_value(of: &v1::explain_backend_response::GatewayFailure) -> Value {
    let failure = of.failure.clone().unwrap_or_default();
    json!({
        "gateway": of.gateway_id,
        "time": tables::time(failure.time.as_ref()),
        "model": failure.model,
        "outcome": failure.outcome,
        "status": (failure.status != 0).then_some(failure.status),
        "message": failure.message,
    })
}

fn why_value(answer: &v1::ExplainBackendResponse) -> Value {
    let votes = answer.votes.iter().map(|vote| {
        json!({
            "observer": vote.observer,
            "tier": tier_name(vote.tier()),
            "outcome": vote.outcome().as_str_name().trim_start_matches("PROBE_OUTCOME_").to_ascii_lowercase(),
            "detail": vote.detail,
            "passes": vote.passes,
            "failures": vote.failures,
            "time": tables::time(vote.time.as_ref()),
            "ignored": vote.ignored,
        })
    });
    let suspect_tiers = answer.suspect_tiers.iter().map(|s| {
        json!({
            "tier": tier_name(s.tier()),
            "first_observer": s.first_observer,
            "asked_observers": s.asked_observers,
        })
    });
    json!({
        "status": status_value(&answer.status.clone().unwrap_or_default()),
        "votes": votes.collect::<Vec<_>>(),
        "suspect_tiers": suspect_tiers.collect::<Vec<_>>(),
        "may_return_time": answer.may_return_time.as_ref().map(|t| tables::time(Some(t))),
        "conditions": answer.conditions,
        "failures": answer.failures.iter().map(failure_value).collect::<Vec<_>>(),
        "events": answer.events.iter().map(event_value).collect::<Vec<_>>(),
    })
}

fn events_table(events: &[v1::HealthEvent]) -> String {
    let rows = events.iter().map(|event| {
        vec![
            tables::time(event.time.as_ref()),
            event.kind.clone(),
            or_dash(&event.subject),
            match event.count {
                0 | 1 => event.message.clone(),
                count => {
                    let first = tables::time(event.first_time.as_ref());
                    format!("{} ({count} times since {first})", event.message)
                }
            },
        ]
    });
    tables::table(&["TIME", "KIND", "SUBJECT", "WHAT"], rows.collect())
}

fn event_value(event: &v1::HealthEvent) -> Value {
    json!({
        "number": event.number,
        "time": tables::time(event.time.as_ref()),
        "kind": event.kind,
        "subject": event.subject,
        "message": event.message,
        "count": event.count,
        "first_time": event.first_time.as_ref().map(|t| tables::time(Some(t))),
    })
}

pub(super) fn millis(duration: Option<&prost_types::Duration>) -> String {
    let duration = duration.and_then(|d| Duration::try_from(*d).ok());
    duration.map_or_else(|| "-".to_owned(), |d| format!("{} ms", d.as_millis()))
}

fn list(items: &[String]) -> String {
    or_dash(&items.join(","))
}

pub(super) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

pub(super) const fn tier_name(tier: v1::ProbeTier) -> &'static str {
    match tier {
        v1::ProbeTier::Unspecified => "unspecified",
        v1::ProbeTier::Liveness => "liveness",
        v1::ProbeTier::Readiness => "readiness",
        v1::ProbeTier::Deep => "deep",
    }
}

pub(super) const fn health_name(state: v1::HealthState) -> &'static str {
    match state {
        v1::HealthState::Unspecified | v1::HealthState::Unknown => "unknown",
        v1::HealthState::Healthy => "healthy",
        v1::HealthState::Degraded => "degraded",
        v1::HealthState::Unhealthy => "unhealthy",
        v1::HealthState::Recovering => "recovering",
    }
}
