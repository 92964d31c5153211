//! Do limits hold over several gateways, to the request, while things break?
//!
//! Four gateways as processes of their own, a control plane, a real Redis, two simulated servers. Three tenants ask for
//! two models, streams and unary, far above their limits; in the middle of each run something happens. What the
//! clients saw is judged offline ([`oracle`]): admitted in any window against `capacity + rate x length`, refusals
//! that were wrong, and leases that nobody holds any more. Concurrency is read where it cannot be wrong: from the
//! servers' own count of requests at the same time.

mod driver;
mod oracle;
mod scene;

use std::time::Duration;

use clap::Args;

use self::driver::{End, Plan, Record, drive};
use self::oracle::{Span, crowd_refused_wrongly};
use self::scene::{CALLERS, Event, LIMITS, Limit, Scene};
use crate::load::micros;
use crate::report::{Report, Row, progress};

/// Arrivals per second over all gateways.
const PER_SECOND: f64 = 160.0;
/// What a refusal may be off by: the stated slack of one unit per bucket, and for tokens what the estimate of one
/// request may differ.
const SLACK_REQUESTS: u64 = 1;
const SLACK_TOKENS: u64 = 80;
/// A slot is free for others this long after its stream ended; a refusal within it is not held against the limiter.
const RELEASE_LAG_US: u64 = 300_000;
/// Leases of a gateway that is gone end by themselves within this.
const LEASE_TTL: Duration = Duration::from_secs(15);

/// The arguments of `accuracy`.
#[derive(Debug, Args)]
pub(crate) struct AccuracyArgs {
    /// Seconds of load in each scenario
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(6..=120), value_name = "SECONDS")]
    seconds: u64,
    /// Only these scenarios, by name; all without it
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
    /// Seed of the load
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// Runs the bench.
pub(crate) async fn run(args: &AccuracyArgs) -> anyhow::Result<Report> {
    for name in &args.only {
        let known = Event::ALL.map(Event::name);
        anyhow::ensure!(known.contains(&name.as_str()), "--only {name}: it is one of {}", known.join(", "));
    }
    let machine = crate::machine::describe();
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    for event in Event::ALL {
        if !args.only.is_empty() && !args.only.iter().any(|name| name == event.name()) {
            continue;
        }
        progress(&format!("accuracy: {}, {} s of load", event.name(), args.seconds));
        scenario(event, args, &mut rows, &mut notes).await?;
    }
    notes.push(
        "admitted: certainly, by the clients' record. allowed: capacity + rate x length of the run (and the stated \
         bound of an outage). over_admission: the worst of all windows, not only of the whole run."
            .into(),
    );
    notes.push(format!(
        "false refusals: beyond {SLACK_REQUESTS} request or {SLACK_TOKENS} tokens of slack; leases leaked: still \
         counted {} s after the last request",
        LEASE_TTL.as_secs() + 1
    ));
    Ok(Report { bench: "accuracy", machine, rows, notes })
}

async fn scenario(
    event: Event,
    args: &AccuracyArgs,
    rows: &mut Vec<Row>,
    notes: &mut Vec<String>,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let mut scene = Scene::start(directory.path()).await?;
    let length = Duration::from_secs(args.seconds);
    let addresses: Vec<_> = scene.gateways.iter().map(|g| g.address).collect();
    let prompt_tokens = scene.prompt_tokens().await?;
    let plan = Plan { callers: &CALLERS, per_second: PER_SECOND, length, seed: args.seed, prompt_tokens };
    let (records, happened) = tokio::join!(drive(&addresses, plan), scene.happen(event, length.mul_f64(0.4)));
    let (records, outage) = (records?, happened?);
    let leaked = scene.leaked_leases(LEASE_TTL + Duration::from_secs(1)).await?;
    let run_us = records.iter().map(|r| r.decided.until_us).max().unwrap_or(0);
    for limit in &LIMITS {
        let leaked = leaked.iter().find(|(scope, _)| *scope == limit.scope).map_or(0, |(_, n)| *n);
        let row = Row::default().text("scenario", event.name()).text("scope", limit.to_string());
        let found = match limit.envelope() {
            Some(_) => judge_bucket(limit, &records, run_us, outage),
            None => judge_crowd(limit, &records, scene.most_in_flight(limit).await?, event),
        };
        rows.push(
            row.count("admitted", found.admitted)
                .count("allowed", found.allowed)
                .count("over_admission", found.over_admission)
                .count("refused", found.refused)
                .count("false_refusals", found.false_refusals)
                .count("leases_leaked", leaked),
        );
    }
    let alone = scene.decided_alone().await;
    notes.push(format!(
        "{}: {}; {alone} times a gateway had no answer of Redis in time",
        event.name(),
        summary(&records)
    ));
    scene.end().await
}

/// What became of a limit.
#[derive(Default)]
struct Found {
    admitted: u64,
    allowed: u64,
    over_admission: u64,
    refused: u64,
    false_refusals: u64,
}

fn judge_bucket(limit: &Limit, records: &[Record], run_us: u64, outage: Duration) -> Found {
    let Some(mut envelope) = limit.envelope() else { return Found::default() };
    let exact = envelope;
    if !outage.is_zero() {
        // While Redis is away each gateway enforces its share from an empty meter: once more the capacity, and what
        // drains meanwhile.
        envelope.capacity += envelope.allowed(micros(outage));
    }
    let under = |r: &&Record| limit.covers(r);
    let costs = |r: &Record| (r.decided, limit.cost(r));
    let admitted: Vec<(Span, u64)> =
        records.iter().filter(under).filter(|r| r.end == End::Answered).map(costs).collect();
    // Refused by a limit, a request was certainly not charged; in any other case it may have been.
    let maybe: Vec<(Span, u64)> =
        records.iter().filter(under).filter(|r| !matches!(r.end, End::Limited(..))).map(costs).collect();
    let refused: Vec<&Record> = records.iter().filter(|r| limit.refused(r)).collect();
    let slack = if limit.counts_tokens() { SLACK_TOKENS } else { SLACK_REQUESTS };
    let wrong = |r: &&&Record| exact.refused_wrongly(r.decided, limit.cost(r), slack, &maybe);
    Found {
        admitted: admitted.iter().map(|(_, cost)| cost).sum(),
        allowed: envelope.allowed(run_us),
        over_admission: envelope.over_admission(&admitted),
        refused: refused.len() as u64,
        false_refusals: refused.iter().filter(wrong).count() as u64,
    }
}

fn judge_crowd(limit: &Limit, records: &[Record], most: u64, event: Event) -> Found {
    let allowed = limit.most;
    let in_flight: Vec<Span> = records
        .iter()
        .filter(|r| limit.covers(r) && !matches!(r.end, End::Limited(..)))
        .map(|r| {
            // What a dead gateway held stands until its leases run out.
            let held = if r.end == End::Unknown { micros(LEASE_TTL) } else { RELEASE_LAG_US };
            Span { from_us: r.decided.from_us, until_us: r.ended_us + held }
        })
        .collect();
    let refused: Vec<&Record> = records.iter().filter(|r| limit.refused(r)).collect();
    let wrong = |r: &&&Record| crowd_refused_wrongly(r.decided, allowed, &in_flight);
    // Without Redis each gateway enforces its share, from none.
    let allowed_now = if event.is_outage() { allowed * 2 } else { allowed };
    Found {
        admitted: most,
        allowed: allowed_now,
        over_admission: most.saturating_sub(allowed_now),
        refused: refused.len() as u64,
        false_refusals: refused.iter().filter(wrong).count() as u64,
    }
}

fn summary(records: &[Record]) -> String {
    let count = |wanted: &dyn Fn(&End) -> bool| records.iter().filter(|r| wanted(&r.end)).count();
    let mut failures = std::collections::BTreeMap::<String, usize>::new();
    for record in records {
        if let End::Failed(status, code) = &record.end {
            *failures.entry(format!("{status} {code}")).or_default() += 1;
        }
    }
    format!(
        "{} requests: {} answered, {} refused by a limit, {} failed {failures:?}, {} cut with the gateway that held \
         them",
        records.len(),
        count(&|e| *e == End::Answered),
        count(&|e| matches!(e, End::Limited(..))),
        count(&|e| matches!(e, End::Failed(..))),
        count(&|e| *e == End::Unknown),
    )
}
