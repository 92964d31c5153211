//! What clients notice of a Redis outage under load, and whether limits hold meanwhile.
//!
//! Two fleets of four gateways in one run under the same load: one with limits in Redis, one without limits. In the
//! middle Redis goes silent (it is stopped: connections stay and nothing answers), or ends and refuses connections;
//! then it returns with its data. One tenant never reaches its limits: each of its requests must be answered, and its
//! additional latency over the fleet without limits is the cost of the outage. The other tenants are far above their
//! limits: their admissions during the outage are compared with what the limits allow.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use tokio::time::{Instant, sleep};
use weir_ratelimit::redis::RedisOptions;

use crate::accuracy::driver::{Caller, End, Plan, Record, drive, key};
use crate::accuracy::judge::Outage;
use crate::accuracy::limits::{Counted, FREE, GATEWAYS, Limit, Scope, limit};
use crate::accuracy::oracle::Span;
use crate::accuracy::scene::{Scene, Setup};
use crate::load::micros;
use crate::report::{Report, Row, progress};
use crate::resources::Resources;
use crate::roles::{Gateway, GatewayArgs};
use crate::store::Topology;

/// Arrivals per second of the tenant that is never refused, at each fleet.
const FREE_PER_SECOND: f64 = 80.0;
/// Arrivals per second of the other tenants.
const LIMITED_PER_SECOND: f64 = 120.0;
/// The load before the outage: limits are used up by then.
const BEFORE: Duration = Duration::from_secs(10);
/// The load after its end: longer than gateways need to return to Redis.
const AFTER: Duration = Duration::from_secs(12);
/// The warm-up, in which connections are opened.
const WARM_UP_US: u64 = 2_000_000;
/// Above the requests in flight of this load.
const SLOTS: u32 = 10_000;
/// The time in which gateways notice that Redis is silent, and some more.
const NOTICED_US: u64 = 1_300_000;

/// Small enough to be used up, large enough that one unit per gateway is little.
const LIMITS: [Limit; 4] = [
    limit(Scope::Tenant("a"), Counted::Requests, 300),
    limit(Scope::Tenant("b"), Counted::Tokens, 12_000),
    limit(Scope::Model("m2"), Counted::Requests, 180),
    limit(Scope::Tenant("c"), Counted::InFlight, 8),
];

/// Answers under the limit of tokens are as long as estimated: what an answer exceeds its estimate by is charged once
/// it is known, with Redis as without, and is not measured here.
const LIMITED: [Caller; 3] = [
    Caller { tenant: "a", percent: 34, tokens: (10, 40), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "b", percent: 33, tokens: (40, 40), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "c", percent: 33, tokens: (300, 600), streams: 100, models: &["m3"] },
];

const UNLIMITED: [Caller; 1] =
    [Caller { tenant: FREE, percent: 100, tokens: (1, 4), streams: 0, models: &[FREE] }];

/// The arguments of `outage`.
#[derive(Debug, Args)]
pub(crate) struct OutageArgs {
    /// Seconds for which Redis is away
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(3..=60), value_name = "SECONDS")]
    seconds: u64,
    /// Seed of the load
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
}

/// The kind of outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Going {
    /// Stopped: its connections stay, and nothing answers.
    Silent,
    /// Ended in order: connections are refused. It returns with the data that it wrote to disk.
    Stopped,
}

impl Going {
    const ALL: [Self; 2] = [Self::Silent, Self::Stopped];

    const fn name(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Stopped => "stopped",
        }
    }
}

/// Runs the bench.
pub(crate) async fn run(args: &OutageArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let (mut waits, mut limits, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for going in Going::ALL {
        progress(&format!("outage: {}, {} s", going.name(), args.seconds));
        let directory = tempfile::tempdir()?;
        let found = scenario(going, args, directory.path()).await?;
        waits.extend(found.waits());
        notes.push(found.summary());
        limits.extend(found.limits(&mut notes));
    }
    notes.push(format!(
        "waits: of requests that no limit refuses, from the client's sending to the first byte, beside the same load on a \
         fleet without limits; noticed: the first {:.1} s of the outage, in which a request may wait until Redis \
         has been silent for {:?}; open: from then to the return of Redis; return: until every gateway asks it again",
        NOTICED_US as f64 / 1e6,
        RedisOptions::default().silence,
    ));
    notes.push(
        "admitted_in_outage: until every gateway asks Redis again; allowed_in_outage: what was left of the limit when \
         Redis went, and rate x length. beyond_envelope: the worst of all windows of the whole run, the return \
         included. In flight: the most its server ever saw"
            .into(),
    );
    waits.append(&mut limits);
    Ok(Report { bench: "outage", machine, rows: waits, notes })
}

/// The results of a scenario.
struct Found {
    going: Going,
    outage: Outage,
    with: Vec<Record>,
    without: Vec<Record>,
    /// The maximum of concurrent requests of tenant `c`.
    most_in_flight: u64,
    alone: u64,
}

async fn scenario(going: Going, args: &OutageArgs, directory: &Path) -> anyhow::Result<Found> {
    let topology = if going == Going::Stopped { Topology::Durable } else { Topology::One };
    let setup = Setup { topology, strict: false, limits: &LIMITS, slots: SLOTS };
    let mut scene = Scene::start(directory, setup).await?;
    let mut resources = Resources::default();
    resources.tenant(FREE, &key(FREE), None).model_at(FREE, scene.mock(FREE)?.address);
    let mut unlimited = Vec::new();
    for k in 0..GATEWAYS {
        let args = GatewayArgs { id: format!("unlimited-{k}"), ..GatewayArgs::default() };
        unlimited.push(Gateway::start(&args, &resources, directory).await?);
    }
    let without: Vec<_> = unlimited.iter().map(|gateway| gateway.address).collect();
    let with = scene.addresses();
    let away = Duration::from_secs(args.seconds);
    let prompt_tokens = scene.prompt_tokens().await?;
    let plan = |callers, per_second, seed| Plan {
        callers,
        per_second,
        length: BEFORE + away + AFTER,
        seed: args.seed + seed,
        prompt_tokens,
    };
    let started = Instant::now();
    let (limited, free, without, outage) = tokio::join!(
        drive(&with, plan(&LIMITED[..], LIMITED_PER_SECOND, 0), started),
        drive(&with, plan(&UNLIMITED[..], FREE_PER_SECOND, 1), started),
        drive(&without, plan(&UNLIMITED[..], FREE_PER_SECOND, 2), started),
        go(&mut scene, going, away, started),
    );
    let (mut with, outage) = (limited?, outage?);
    with.extend(free?);
    let crowd = LIMITS.iter().find(|limit| limit.counted == Counted::InFlight);
    let most_in_flight = match crowd {
        Some(limit) => scene.most_in_flight(limit).await?,
        None => 0,
    };
    let alone = scene.decided_alone().await;
    scene.end().await?;
    Ok(Found { going, outage, with, without: without?, most_in_flight, alone })
}

async fn go(scene: &mut Scene, going: Going, away: Duration, started: Instant) -> anyhow::Result<Outage> {
    sleep(BEFORE).await;
    let began_us = micros(started.elapsed());
    match going {
        Going::Silent => scene.pause(away).await?,
        Going::Stopped => {
            scene.store.shut_down().await?;
            sleep(away.saturating_sub(started.elapsed().saturating_sub(BEFORE))).await;
            scene.start_again().await?;
        }
    }
    let back_us = micros(started.elapsed());
    Ok(Outage { began_us, back_us, over_us: scene.decided_together(started).await })
}

impl Found {
    /// The latencies of requests that no limit refuses.
    fn waits(&self) -> Vec<Row> {
        let Outage { began_us, back_us, over_us } = self.outage;
        let end_us = self.with.iter().map(|r| r.decided.from_us).max().unwrap_or(over_us);
        let phases = [
            ("before", WARM_UP_US, began_us),
            ("noticed", began_us, began_us + NOTICED_US),
            ("open", began_us + NOTICED_US, back_us),
            ("return", back_us, over_us),
            ("after", over_us, end_us),
        ];
        phases.into_iter().map(|(name, from, until)| self.phase(name, from..until)).collect()
    }

    fn phase(&self, name: &str, within: std::ops::Range<u64>) -> Row {
        let mut row = Row::default().text("scenario", self.going.name()).text("phase", name);
        for (at, records) in [&self.with, &self.without].into_iter().enumerate() {
            let of: Vec<&Record> =
                records.iter().filter(|r| r.tenant == FREE && within.contains(&r.decided.from_us)).collect();
            let mut waited = crate::load::latencies();
            for record in of.iter().filter(|r| r.end == End::Answered) {
                waited.saturating_record(record.decided.until_us - record.decided.from_us);
            }
            let ms = |percent: f64| waited.value_at_percentile(percent) as f64 / 1000.0;
            let names = [
                ["requests", "failed", "p50_ms", "p99_ms", "max_ms"],
                ["", "", "without_limits_p50_ms", "without_limits_p99_ms", "without_limits_max_ms"],
            ][at];
            if at == 0 {
                let failed = of.iter().filter(|r| r.end != End::Answered).count();
                row = row.count(names[0], of.len() as u64).count(names[1], failed as u64);
            }
            row = row.figure(names[2], ms(50.0), 2).figure(names[3], ms(99.0), 2).figure(
                names[4],
                ms(100.0),
                2,
            );
        }
        row
    }

    /// The admissions under each limit while gateways decided alone. A note says when one was exceeded.
    fn limits(&self, notes: &mut Vec<String>) -> Vec<Row> {
        let Outage { began_us, over_us, .. } = self.outage;
        let rows = LIMITS.iter().map(|limit| {
            let admitted: Vec<(Span, u64)> = self
                .with
                .iter()
                .filter(|r| limit.covers(r) && r.end == End::Answered)
                .map(|r| (r.decided, limit.cost(r)))
                .collect();
            let (in_outage, allowed, beyond) = match limit.envelope() {
                Some(envelope) => {
                    let drained = envelope.allowed(over_us - began_us) - envelope.capacity;
                    let of = admitted
                        .iter()
                        .filter(|(span, _)| span.from_us >= began_us && span.until_us <= over_us);
                    let worst = envelope.worst_window(&admitted);
                    notes.extend(worst.map(|(beyond, window)| {
                        let at = |us: u64| (us as f64 - began_us as f64) / 1e6;
                        let (from, until) = (at(window.from_us), at(window.until_us));
                        format!(
                            "{}, {limit}: {beyond} beyond the envelope from {from:.2} to {until:.2} s",
                            self.going.name()
                        )
                    }));
                    (
                        of.map(|(_, cost)| cost).sum(),
                        envelope.room(&admitted, began_us) + drained,
                        worst.map_or(0, |(beyond, _)| beyond),
                    )
                }
                None => (self.most_in_flight, limit.most, self.most_in_flight.saturating_sub(limit.most)),
            };
            Row::default()
                .text("scenario", self.going.name())
                .text("scope", limit.to_string())
                .count("admitted_in_outage", in_outage)
                .count("allowed_in_outage", allowed)
                .figure("of_the_limit", in_outage as f64 / allowed.max(1) as f64, 3)
                .count("beyond_envelope", beyond)
        });
        rows.collect()
    }

    fn summary(&self) -> String {
        let Outage { began_us, back_us, over_us } = self.outage;
        let seconds = |us: u64| us.saturating_sub(began_us) as f64 / 1e6;
        let failed = |r: &&Record| !matches!(r.end, End::Answered | End::Limited(..));
        let failures: std::collections::BTreeSet<String> =
            self.with.iter().filter(failed).map(|r| format!("{:?}", r.end)).collect();
        // A refusal waits for no server, so its latency is that of the decision.
        let refused = self.with.iter().filter(|r| matches!(r.end, End::Limited(..)));
        let during = refused
            .filter(|r| r.decided.from_us >= began_us && r.decided.from_us < began_us + NOTICED_US)
            .map(|r| r.decided.until_us - r.decided.from_us);
        format!(
            "{}: Redis away for {:.1} s, every gateway back after {:.1} s; {} decisions on a gateway's own; {} of {} \
             requests failed {failures:?}; the slowest refusal until it was noticed took {:.1} ms",
            self.going.name(),
            seconds(back_us),
            seconds(over_us),
            self.alone,
            self.with.iter().filter(failed).count(),
            self.with.len(),
            during.max().unwrap_or(0) as f64 / 1000.0,
        )
    }
}
