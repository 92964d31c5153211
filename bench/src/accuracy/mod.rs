//! Whether limits hold over several gateways, exactly, during faults.
//!
//! Four gateways as processes, a control plane, a real Redis (one server, a primary and its replica, or a Cluster of
//! three), three simulated servers. Three tenants ask for three models, streams and unary, far above their limits; in
//! the middle of each run there is a fault. The records of the clients are judged offline ([`oracle`]): admissions in
//! any window against `capacity + rate x length`, wrong refusals, and leases without a holder. Concurrency is read
//! from the servers' own count of concurrent requests.

mod books;
pub(crate) mod driver;
mod event;
pub(crate) mod judge;
pub(crate) mod limits;
pub(crate) mod oracle;
pub(crate) mod scene;

use std::time::Duration;

use clap::Args;
use tokio::time::Instant;

use self::driver::{End, Plan, Record, drive};
use self::event::Event;
use self::judge::{Run, SLACK_REQUESTS, SLACK_TOKENS};
use self::limits::{CALLERS, LIMITS, SLOTS};
use self::scene::{Scene, Setup};
use crate::load::micros;
use crate::report::{Report, Row, progress};

/// Arrivals per second over all gateways.
const PER_SECOND: f64 = 160.0;
/// Leases of a dead gateway expire within this time.
const LEASE_TTL: Duration = Duration::from_secs(15);
/// The last settlement is made within this time after the last lease was freed.
const BOOKS_CLOSED: Duration = Duration::from_secs(3);

/// The arguments of `accuracy`.
#[derive(Debug, Args)]
pub(crate) struct AccuracyArgs {
    /// Seconds of load in each scenario
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(6..=120), value_name = "SECONDS")]
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
        "admitted: certainly, by the clients' record. allowed: capacity + rate x length of the run, and what an outage \
         may add. beyond_envelope and over_admission: the worst of all windows, not only of the whole run; against \
         the envelope alone, and against what is allowed."
            .into(),
    );
    notes.push(
        "an outage may add: with a lost data set and cold_start burst each capacity once more; with a failover what was \
         admitted in the last second before it; of a backend's slots what the other gateways' shares allow beside those \
         that one of them holds"
            .into(),
    );
    notes.push(format!(
        "false refusals: while Redis serves, beyond {SLACK_REQUESTS} request or {SLACK_TOKENS} tokens of slack; leases \
         leaked: still counted {} s after the last request",
        LEASE_TTL.as_secs() + 1
    ));
    notes.push(
        "ledger_tokens: what weir usage shows of the scope; ledger_off: by how much that differs from what its servers \
         billed, of a tenant from what its clients got. A killed gateway takes along what it had not settled, a lost \
         data set its account."
            .into(),
    );
    Ok(Report { bench: "accuracy", machine, rows, notes })
}

async fn scenario(
    event: Event,
    args: &AccuracyArgs,
    rows: &mut Vec<Row>,
    notes: &mut Vec<String>,
) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let setup =
        Setup { topology: event.topology(), strict: event.is_strict(), limits: &LIMITS, slots: SLOTS };
    let mut scene = Scene::start(directory.path(), setup).await?;
    let length = Duration::from_secs(args.seconds);
    let addresses = scene.addresses();
    let prompt_tokens = scene.prompt_tokens().await?;
    let plan = Plan { callers: &CALLERS, per_second: PER_SECOND, length, seed: args.seed, prompt_tokens };
    let started = Instant::now();
    let (records, happened) =
        tokio::join!(drive(&addresses, plan, started), scene.happen(event, length.mul_f64(0.4), started));
    let (records, outage) = (records?, happened?);
    let leaked = scene.leaked_leases(LEASE_TTL + Duration::from_secs(1)).await?;
    let books = scene.books(&records, BOOKS_CLOSED).await?;
    let run = Run {
        records: &records,
        outage: outage.zip(event.bound()),
        full_at_us: if event.is_strict() { scene.born_us(started).await? } else { None },
        lease_us: micros(LEASE_TTL),
    };
    for limit in &LIMITS {
        let leaked = leaked.iter().find(|(scope, _)| *scope == limit.scope).map_or(0, |(_, n)| *n);
        let row = Row::default().text("scenario", event.name()).text("scope", limit.to_string());
        let found = match limit.envelope() {
            Some(_) => run.bucket(limit),
            None => run.crowd(limit, scene.most_in_flight(limit).await?),
        };
        rows.push(
            row.count("admitted", found.admitted)
                .count("allowed", found.allowed)
                .count("beyond_envelope", found.beyond_envelope)
                .count("over_admission", found.over_admission)
                .count("refused", found.refused)
                .count("false_refusals", found.false_refusals)
                .count("leases_leaked", leaked)
                .count("ledger_tokens", books.noted(limit))
                .figure("ledger_off", books.off(limit) as f64, 0),
        );
    }
    let away = outage.map_or_else(String::new, |outage| {
        let s = |us: u64| us.saturating_sub(outage.began_us) as f64 / 1e6;
        format!(
            "; Redis away for {:.1} s, everybody back after {:.1} s",
            s(outage.back_us),
            s(outage.over_us)
        )
    });
    notes.push(format!(
        "{}: {}; {} decisions on a gateway's own{away}",
        event.name(),
        summary(&records),
        scene.decided_alone().await
    ));
    scene.end().await
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
        "{} requests: {} answered, {} refused by a limit, {} for want of a slot, {} failed {failures:?}, {} cut with \
         the gateway that held them",
        records.len(),
        count(&|e| *e == End::Answered),
        count(&|e| matches!(e, End::Limited(..))),
        count(&|e| *e == End::NoSlot),
        count(&|e| matches!(e, End::Failed(..))),
        count(&|e| *e == End::Unknown),
    )
}
