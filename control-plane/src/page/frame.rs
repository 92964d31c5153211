//! The frames of the live page as server-sent events with JSON: the current state, one new point of each line, all lines,
//! and the log of events and changes.

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::time::Duration;
use weir_proto::resource::{Spec, kind_name};
use weir_proto::v1::{self, ResourceKind};

use crate::gateways::timeseries::{Line, POINTS, Reader, SAMPLE, SAMPLES};
use crate::health::State as Health;
use crate::services::Shared;
use crate::services::admin::Admin;

/// Events and changes shown.
const LOG_SHOWN: usize = 40;
/// Limits shown: limits that refuse requests, then the fullest.
const LIMITS_SHOWN: usize = 100;
/// Fields shown of one change.
const FIELDS_SHOWN: usize = 6;
/// Resources shown of one change.
const CHANGES_SHOWN: usize = 6;

/// One frame.
#[derive(Debug)]
pub(super) struct Frame {
    closed: u64,
    /// The newest health event and the newest audit entry.
    log_at: (u64, u64),
    state: Bytes,
    point: Bytes,
    lines: Bytes,
    log: Bytes,
}

/// A server-sent event.
pub(super) fn event(name: &str, value: &Value) -> Bytes {
    format!("event: {name}\ndata: {value}\n\n").into()
}

impl Frame {
    /// The current frame. Unchanged parts of the frame before are reused.
    pub(super) async fn of(shared: &Shared, before: Option<&Self>) -> Self {
        let (closed, state, point, lines) = shared.aggregate.timeseries().read(|figures| {
            let fresh = before.is_none_or(|before| before.closed != figures.closed());
            let drawn = match before {
                Some(before) if !fresh => (before.point.clone(), before.lines.clone()),
                _ => (event("point", &point(figures)), event("lines", &lines(figures))),
            };
            (figures.closed(), figures.totals(), drawn.0, drawn.1)
        });
        let state = event("state", &current(shared, state));
        let events = shared.verdicts.events(0, "");
        let log_at = (events.last().map_or(0, |event| event.number), shared.catalog.state().audit.sequence);
        let log = match before {
            Some(before) if before.log_at == log_at => before.log.clone(),
            _ => event("log", &log(shared, &events).await),
        };
        Self { closed, log_at, state, point, lines, log }
    }

    /// The events for a page that received frame `told` last; `None` for a new page.
    pub(super) fn after(&self, told: Option<&Self>) -> Vec<Bytes> {
        let mut pieces = Vec::with_capacity(3);
        match told {
            Some(told) if told.closed == self.closed => {}
            Some(told) if told.closed + 1 == self.closed => pieces.push(self.point.clone()),
            _ => pieces.push(self.lines.clone()),
        }
        pieces.push(self.state.clone());
        if told.is_none_or(|told| told.log_at != self.log_at) {
            pieces.push(self.log.clone());
        }
        pieces
    }
}

impl Reader<'_> {
    /// The figures of the whole cluster, its gateways and its limits.
    fn totals(self) -> Value {
        let traffic = self.traffic();
        let mut limits: Vec<_> = self.limits().collect();
        let rank = |limit: &crate::gateways::timeseries::Limit| {
            (limit.refusals.per_second(self.second), limit.fill(self.second))
        };
        limits.sort_by(|(a_key, a), (b_key, b)| {
            let ((a_refused, a_fill), (b_refused, b_fill)) = (rank(a), rank(b));
            b_refused.total_cmp(&a_refused).then(b_fill.total_cmp(&a_fill)).then(a_key.cmp(b_key))
        });
        let limits = limits.into_iter().take(LIMITS_SHOWN).map(|((scope_kind, scope, kind), limit)| {
            json!({
                "scope_kind": scope_kind, "scope": scope, "kind": kind, "limit": limit.declared,
                "period": limit.period, "burst": limit.limit, "used": limit.used,
                "last_minute": limit.last_minute(self.second), "fill": limit.fill(self.second),
                "refused": limit.refusals.per_second(self.second), "shadow": limit.shadow,
            })
        });
        json!({
            "requests": traffic.requests.per_second(self.second),
            "refused": traffic.refused.per_second(self.second),
            "failed": traffic.failed.per_second(self.second),
            "tokens": traffic.output_tokens.per_second(self.second),
            "in_flight": traffic.in_flight,
            "p50": rounded(self.latency(0.5)), "p99": rounded(self.latency(0.99)),
            "limits": limits.collect::<Vec<_>>(),
        })
    }
}

/// Rounds to the precision that the page shows.
fn rounded(value: Option<f64>) -> Option<f64> {
    value.map(|value| if value < 10.0 { (value * 100.0).round() / 100.0 } else { value.round() })
}

fn drawn(line: &Line) -> Vec<Option<f64>> {
    line.values().map(rounded).collect()
}

fn lines(figures: Reader<'_>) -> Value {
    let all = figures.lines();
    let backends: serde_json::Map<_, _> = figures
        .backends()
        .map(|(name, b)| (name.clone(), json!({ "load": drawn(&b.load), "p50": drawn(&b.p50) })))
        .collect();
    json!({
        "points": POINTS, "seconds": (SAMPLE * SAMPLES).as_secs(),
        "requests": drawn(&all.requests), "refused": drawn(&all.refused), "failed": drawn(&all.failed),
        "in_flight": drawn(&all.in_flight), "p50": drawn(&all.p50), "p99": drawn(&all.p99),
        "backends": backends,
    })
}

fn point(figures: Reader<'_>) -> Value {
    let (all, last) = (figures.lines(), |line: &Line| rounded(line.last()));
    let backends: serde_json::Map<_, _> = figures
        .backends()
        .map(|(name, b)| (name.clone(), json!({ "load": last(&b.load), "p50": last(&b.p50) })))
        .collect();
    json!({
        "requests": last(&all.requests), "refused": last(&all.refused), "failed": last(&all.failed),
        "in_flight": last(&all.in_flight), "p50": last(&all.p50), "p99": last(&all.p99),
        "backends": backends,
    })
}

fn ms(time: Option<prost_types::Timestamp>) -> Option<i64> {
    time.map(|time| time.seconds.saturating_mul(1000) + i64::from(time.nanos / 1_000_000))
}

/// The current state.
fn current(shared: &Shared, mut totals: Value) -> Value {
    let state = shared.catalog.state();
    let revision = state.revision;
    let limits = totals["limits"].take();
    let timeseries = shared.aggregate.timeseries();
    let gateways: Vec<Value> = shared
        .registry
        .list(revision)
        .iter()
        .map(|gateway| timeseries.read(|figures| gateway_row(gateway, revision, figures)))
        .collect();
    let admin = Admin::new(shared.clone());
    let backends: Vec<Value> = state
        .of_kind(ResourceKind::Backend)
        .filter_map(|stored| {
            let status = admin.status(stored)?;
            let Spec::Backend(spec) = &stored.checked.spec else { return None };
            let (p50, p99) = timeseries.read(|figures| {
                let of = |q| figures.latency_of(&status.backend, q);
                (of(0.5), of(0.99))
            });
            let mut row = backend_row(&status);
            row["region"] = spec.region.clone().into();
            row["etag"] = stored.wire.etag.clone().into();
            row["p50"] = rounded(p50).into();
            row["p99"] = rounded(p99).into();
            Some(row)
        })
        .collect();
    json!({
        "time": ms(Some(weir_runtime::wall_clock().into())),
        "revision": revision, "epoch": &*state.epoch, "build": weir_runtime::version(),
        "totals": totals, "limits": limits, "gateways": gateways, "backends": backends,
    })
}

fn gateway_row(gateway: &v1::Gateway, revision: u64, figures: Reader<'_>) -> Value {
    let traffic = figures.gateway(&gateway.id);
    let role = match gateway.role() {
        v1::SubscriberRole::LimitService => "limit service",
        v1::SubscriberRole::Gateway | v1::SubscriberRole::Unspecified => "gateway",
    };
    let sync = match gateway.sync() {
        v1::SyncState::Synced => "in sync",
        v1::SyncState::Pending => "pending",
        v1::SyncState::Stale => "stale",
        v1::SyncState::Error => "error",
        v1::SyncState::Disconnected => "disconnected",
        v1::SyncState::Unspecified => "unknown",
    };
    let refuses = gateway.errors.iter().take(CHANGES_SHOWN).map(|error| {
        let of = error.r#ref.clone().unwrap_or_default();
        format!("{} {}: {}", kind_name(of.kind()), of.name, error.message)
    });
    json!({
        "id": gateway.id, "role": role, "zone": gateway.region, "build": gateway.build, "sync": sync,
        "revision": gateway.applied_revision, "lag": revision.saturating_sub(gateway.applied_revision),
        "seen": ms(gateway.last_seen_time), "refuses": refuses.collect::<Vec<_>>(),
        "requests": traffic.map(|own| own.requests.per_second(figures.second)),
        "failed": traffic.map(|own| own.failed.per_second(figures.second)),
        "in_flight": traffic.map(|own| own.in_flight),
    })
}

fn backend_row(status: &v1::BackendStatus) -> Value {
    let health = status.health.clone().unwrap_or_default();
    let admin = match status.admin_state() {
        v1::AdminState::Draining => "draining",
        v1::AdminState::Disabled => "disabled",
        v1::AdminState::Active | v1::AdminState::Unspecified => "active",
    };
    let slow_start = health.slow_start_elapsed.zip(health.slow_start).and_then(|(elapsed, total)| {
        let (elapsed, total) = (Duration::try_from(elapsed).ok()?, Duration::try_from(total).ok()?);
        (!total.is_zero()).then(|| elapsed.as_secs_f64() / total.as_secs_f64())
    });
    json!({
        "name": status.backend, "pool": status.pool, "state": Health::of_wire(health.state()).name(),
        "reason": health.reason, "since": ms(health.since), "admin": admin, "weight": status.weight,
        "effective": (status.effective_weight * 10.0).round() / 10.0,
        "in_flight": status.in_flight, "max": status.max_concurrency,
        "tokens": rounded(status.tokens_per_second), "ejected_by": status.ejected_by,
        "stale": health.stale, "suspect": health.suspect, "overridden": health.overridden, "slow_start": slow_start,
    })
}

/// Health events and changes, newest first.
async fn log(shared: &Shared, events: &[v1::HealthEvent]) -> Value {
    let events = events.iter().rev().take(LOG_SHOWN).map(|event| {
        json!({
            "number": event.number, "time": ms(event.time), "subject": event.subject, "kind": event.kind,
            "message": event.message, "count": event.count,
        })
    });
    // If the log cannot be read it is shown as empty; `weir audit` reports the error.
    let records = shared.catalog.records_before(u64::MAX, LOG_SHOWN).await.unwrap_or_default();
    let changes = records.iter().map(|record| change(&record.to_wire()));
    json!({ "events": events.collect::<Vec<_>>(), "changes": changes.collect::<Vec<_>>() })
}

fn change(entry: &v1::AuditEntry) -> Value {
    let changes = entry.changes.iter().take(CHANGES_SHOWN).map(|change| {
        let what = match &change.r#ref {
            Some(of) => format!("{} {}", kind_name(of.kind()), of.name),
            None => format!("token {}", change.token),
        };
        let action = match change.action() {
            v1::ChangeAction::Create => "created",
            v1::ChangeAction::Update => "changed",
            v1::ChangeAction::Delete => "deleted",
            v1::ChangeAction::Unchanged | v1::ChangeAction::Unspecified => "",
        };
        // Fields are shown for updates only; created and deleted resources are shown by name.
        let shown = if change.action() == v1::ChangeAction::Update { FIELDS_SHOWN } else { 0 };
        let fields = change.fields.iter().take(shown);
        let fields = fields.map(|f| json!({ "path": f.path, "before": f.before, "after": f.after }));
        json!({ "what": what, "action": action, "fields": fields.collect::<Vec<_>>() })
    });
    json!({
        "sequence": entry.sequence, "revision": entry.revision, "time": ms(entry.time), "actor": entry.actor,
        "method": entry.method, "more": entry.changes.len().saturating_sub(CHANGES_SHOWN),
        "changes": changes.collect::<Vec<_>>(),
    })
}
