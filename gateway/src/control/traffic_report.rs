//! The traffic report: the results of this gateway's requests and the levels of the limits that they met. Counted beside
//! the metrics, because a report contains only the difference to the report before.
//!
//! A report removes the scopes whose levels are unknown by then, because it is the last one that tells their refusals.
//!
//! What requests used is counted when they are settled: with a limit store by the worker that settles, so that no request
//! waits for that count.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::v1::{LimitReport, TrafficReport};
use weir_ratelimit::{Cost, Decision, KeyMap, Kind, LimitState, Mode, Outcome, ScopeLimits, Verdict, What};

use crate::routing::declared::{DeclaredLimit, declared};
use crate::routing::scope::{ScopeEntry, ScopeKind, what_name};

/// The maximum of scopes; further ones are not reported.
const SCOPES_MAX: usize = 2048;
/// Limits in one report.
const REPORTED_MAX: usize = 64;
/// After this time without a request the level of a limit is unknown, because other gateways may have used it.
const KNOWN_FOR: Duration = Duration::from_secs(60);
/// The same for concurrency, which changes with every request.
const SLOTS_KNOWN_FOR: Duration = Duration::from_secs(5);
/// Budgets told at once: each is a series of metrics.
const BUDGETS_MAX: usize = 100;
/// Each kind of bucket, and concurrency.
const WHATS: usize = Kind::COUNT + 1;

/// Counts since the last report. Shared by all requests; no call waits.
#[derive(Debug, Default)]
pub struct TrafficCounter {
    succeeded: AtomicU64,
    rate_limited: AtomicU64,
    client_errors: AtomicU64,
    server_errors: AtomicU64,
    cancelled: AtomicU64,
    in_flight: AtomicI64,
    input_tokens: AtomicU64,
    output_tokens: AtomicU64,
    scopes: Mutex<Scopes>,
    /// What requests that ended used since the last report, by record; at most [`SCOPES_MAX`] of them. A lock of its own,
    /// which is held for some additions.
    consumed: Mutex<KeyMap<[u64; Kind::COUNT]>>,
}

/// By kind, then by name.
#[derive(Debug, Default)]
struct Scopes {
    by_kind: HashMap<ScopeKind, HashMap<String, LastSeen>>,
    count: usize,
}

#[derive(Debug, Default)]
struct LastSeen {
    shadow: bool,
    limits: [Option<Limit>; WHATS],
}

/// One limit as the last decision left it.
#[derive(Debug, Clone)]
struct Limit {
    state: LimitState,
    declared: DeclaredLimit,
    at: Instant,
    refusals: u64,
}

impl TrafficCounter {
    /// Counts a request that arrived.
    pub fn began(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that is not in flight any more.
    pub fn left(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Counts the result of a request: its status, and "ok" or the code of the error.
    pub fn ended(&self, status: u16, code: &str) {
        let counter = match status {
            499 => &self.cancelled,
            429 => &self.rate_limited,
            400..=498 => &self.client_errors,
            ..400 if code == "ok" => &self.succeeded,
            // 5xx, or a stream that broke after its 200 was sent.
            _ => &self.server_errors,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts the tokens of a request.
    pub fn tokens(&self, input: u64, output: u64) {
        // The sums saturate, so that absurd counts do not wrap to small ones.
        for (sum, count) in [(&self.input_tokens, input), (&self.output_tokens, output)] {
            let add = |now: u64| Some(now.saturating_add(count));
            let _ = sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        }
    }

    /// Records the limits that a request met.
    pub fn decided(&self, entries: &[&ScopeEntry], decision: &Decision) {
        let limited = matches!(decision.outcome, Outcome::Limited { .. });
        let now = Instant::now();
        let mut scopes = self.scopes();
        // Those of one scope stand together.
        for of_scope in decision.limits.chunk_by(|a, b| a.scope == b.scope) {
            let Some(entry) = entries.iter().find(|e| e.limits.record == of_scope[0].scope) else { continue };
            let Some(seen) = scopes.last_seen(entry.kind, &entry.name) else { continue };
            seen.shadow = entry.limits.mode == Mode::Shadow;
            for state in of_scope {
                let refused = state.verdict != Verdict::Fits && (limited || seen.shadow);
                let limit = &mut seen.limits[index(state.what)];
                let refusals = limit.as_ref().map_or(0, |limit| limit.refusals) + u64::from(refused);
                *limit =
                    Some(Limit { state: state.clone(), declared: declared(entry, state), at: now, refusals });
            }
        }
    }

    /// Counts what a request that ended used of the limits of these scopes.
    pub fn consumed(&self, scopes: &[ScopeLimits], cost: &Cost) {
        let mut consumed = self.consumed.lock().unwrap_or_else(PoisonError::into_inner);
        for scope in scopes.iter().filter(|scope| scope.buckets.iter().any(Option::is_some)) {
            if consumed.len() >= SCOPES_MAX && !consumed.contains_key(&scope.record) {
                continue;
            }
            let sums = consumed.entry(scope.record.clone()).or_default();
            for kind in Kind::ALL {
                sums[kind as usize] = sums[kind as usize].saturating_add(cost.get(kind));
            }
        }
    }

    fn scopes(&self) -> std::sync::MutexGuard<'_, Scopes> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the results of requests since the last call.
    pub fn take_traffic(&self) -> TrafficReport {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        TrafficReport {
            succeeded: take(&self.succeeded),
            rate_limited: take(&self.rate_limited),
            client_errors: take(&self.client_errors),
            server_errors: take(&self.server_errors),
            cancelled: take(&self.cancelled),
            in_flight: u32::try_from(self.in_flight.load(Ordering::Relaxed)).unwrap_or_default(),
            input_tokens: take(&self.input_tokens),
            output_tokens: take(&self.output_tokens),
        }
    }

    /// Takes the limits to report with their refusals since the last call, and removes limits with an unknown level.
    pub fn take_limits(&self) -> Vec<LimitReport> {
        let now = Instant::now();
        let consumed = std::mem::take(&mut *self.consumed.lock().unwrap_or_else(PoisonError::into_inner));
        let mut reports = self.scopes().take(now, &consumed);
        let fill = |report: &LimitReport| report.used.unwrap_or(0) as f64 / report.limit.max(1) as f64;
        // A bucket may drain faster than it fills, so what is used of the rate counts as well.
        let fill =
            |report: &LimitReport| fill(report).max(report.consumed as f64 / report.declared.max(1) as f64);
        reports.sort_by(|a, b| {
            (Reverse(a.refusals).cmp(&Reverse(b.refusals))).then_with(|| fill(b).total_cmp(&fill(a)))
        });
        reports.truncate(REPORTED_MAX);
        reports
    }
}

/// How full a budget is.
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetUse {
    /// What it is of: "tenant", "api_key" and so on.
    pub scope: &'static str,
    /// The name of that.
    pub name: String,
    /// "day", "week" or "month".
    pub period: &'static str,
    /// The used part, 0 to 1.
    pub used: f64,
}

impl TrafficCounter {
    /// The 100 fullest budgets that requests met within a minute, fullest first. What is only counted (shadow mode) is among
    /// them.
    pub fn budgets(&self) -> Vec<BudgetUse> {
        let now = Instant::now();
        let mut budgets = Vec::new();
        for (kind, names) in &self.scopes().by_kind {
            for (name, seen) in names {
                let known = seen.limits[Kind::Spend as usize].as_ref();
                let Some((limit, period)) = known.and_then(|limit| Some((limit, limit.declared.period?)))
                else {
                    continue;
                };
                let age = now.saturating_duration_since(limit.at);
                let Some(used) = used(&limit.state, age) else { continue };
                let used = used as f64 / limit.state.limit.max(1) as f64;
                budgets.push(BudgetUse { scope: kind.as_str(), name: name.clone(), period, used });
            }
        }
        budgets.sort_by(|a, b| b.used.total_cmp(&a.used));
        budgets.truncate(BUDGETS_MAX);
        budgets
    }
}

impl Scopes {
    /// The entry of a scope; `None` above the maximum.
    fn last_seen(&mut self, kind: ScopeKind, name: &str) -> Option<&mut LastSeen> {
        let names = self.by_kind.entry(kind).or_default();
        // Looked up twice, so that a name is copied only once.
        if !names.contains_key(name) {
            if self.count >= SCOPES_MAX {
                return None;
            }
            self.count += 1;
            names.insert(name.to_owned(), LastSeen::default());
        }
        names.get_mut(name)
    }

    fn take(&mut self, now: Instant, consumed: &KeyMap<[u64; Kind::COUNT]>) -> Vec<LimitReport> {
        let mut reports = Vec::new();
        for (kind, names) in &mut self.by_kind {
            names.retain(|name, seen| {
                for limit in &mut seen.limits {
                    let Some(known) = limit else { continue };
                    let age = now.saturating_duration_since(known.at);
                    let used = used(&known.state, age);
                    reports.push(LimitReport {
                        scope_kind: kind.as_str().to_owned(),
                        scope: name.clone(),
                        kind: what_name(known.state.what).to_owned(),
                        limit: known.state.limit,
                        used,
                        refusals: std::mem::take(&mut known.refusals),
                        shadow: seen.shadow,
                        declared: known.declared.amount,
                        period: known.declared.period.unwrap_or_default().to_owned(),
                        consumed: match known.state.what {
                            What::Bucket(kind) => {
                                consumed.get(&known.state.scope).map_or(0, |sums| sums[kind as usize])
                            }
                            What::Concurrency => 0,
                        },
                    });
                    if used.is_none() {
                        *limit = None;
                    }
                }
                seen.limits.iter().any(Option::is_some)
            });
        }
        self.count = self.by_kind.values().map(HashMap::len).sum();
        reports
    }
}

/// The used part of a limit, `age` after the decision that returned its state; `None` if that is too long ago.
fn used(state: &LimitState, age: Duration) -> Option<u64> {
    let known_for = if state.what == What::Concurrency { SLOTS_KNOWN_FOR } else { KNOWN_FOR };
    if age > known_for {
        return None;
    }
    let used = state.limit.saturating_sub(state.remaining);
    if state.what == What::Concurrency {
        return Some(used);
    }
    // A bucket drains evenly until its reset; one that does not drain has its reset far away.
    let left = state.reset.saturating_sub(age).as_secs_f64() / state.reset.as_secs_f64().max(1e-9);
    // Rounds up, as what remains was rounded down. At most `used`, so the cast cannot go wrong.
    Some((used as f64 * left.min(1.0)).ceil() as u64)
}

const fn index(what: What) -> usize {
    match what {
        What::Bucket(kind) => kind as usize,
        What::Concurrency => Kind::COUNT,
    }
}

#[cfg(test)]
mod tests {
    use weir_ratelimit::Bucket;

    use weir_ratelimit::Key;

    use super::*;

    fn state(what: What, remaining: u64, reset: u64) -> LimitState {
        let reset = Duration::from_secs(reset);
        LimitState { scope: Key::global(), what, verdict: Verdict::Fits, limit: 100, remaining, reset }
    }

    #[test]
    fn what_is_used_drains_as_the_bucket_does_and_is_forgotten_in_time() {
        let bucket = state(What::Bucket(Kind::Requests), 40, 30);
        let after = |seconds| used(&bucket, Duration::from_secs(seconds));
        assert_eq!((after(0), after(15), after(30), after(59)), (Some(60), Some(30), Some(0), Some(0)));
        assert_eq!(after(61), None);
        let slots = state(What::Concurrency, 99, 0);
        assert_eq!(used(&slots, Duration::from_secs(4)), Some(1));
        assert_eq!(used(&slots, Duration::from_secs(6)), None);
    }

    #[test]
    fn every_end_is_counted_once() {
        let traffic_counter = TrafficCounter::default();
        let ends =
            [(200, "ok"), (200, "upstream_broken"), (400, "bad"), (429, "limit"), (499, "gone"), (503, "x")];
        for (status, code) in ends {
            traffic_counter.began();
            traffic_counter.ended(status, code);
            traffic_counter.left();
        }
        traffic_counter.began();
        let traffic = traffic_counter.take_traffic();
        let counts = [
            traffic.succeeded,
            traffic.server_errors,
            traffic.client_errors,
            traffic.rate_limited,
            traffic.cancelled,
        ];
        assert_eq!((counts, traffic.in_flight), ([1, 2, 1, 1, 1], 1));
        assert_eq!(traffic_counter.take_traffic(), TrafficReport { in_flight: 1, ..Default::default() });
    }

    #[tokio::test(start_paused = true)]
    async fn the_fullest_budgets_are_told_until_nobody_knows_them() {
        let counter = TrafficCounter::default();
        for i in 0..BUDGETS_MAX + 10 {
            let (limit, month) = (1_000_000, Duration::from_secs(30 * 86_400));
            let what = What::Bucket(Kind::Spend);
            let remaining = limit - i as u64 * 1000;
            let state = LimitState {
                scope: Key::global(),
                what,
                verdict: Verdict::Fits,
                limit,
                remaining,
                reset: month,
            };
            let declared = DeclaredLimit { amount: limit, period: Some("month"), burst: limit };
            let mut scopes = counter.scopes();
            let seen = scopes.last_seen(ScopeKind::Tenant, &format!("t{i}")).expect("room");
            seen.limits[Kind::Spend as usize] =
                Some(Limit { state, declared, at: Instant::now(), refusals: 0 });
        }
        let budgets = counter.budgets();
        assert_eq!(budgets.len(), BUDGETS_MAX);
        let fullest = BudgetUse { scope: "tenant", name: "t109".into(), period: "month", used: 0.109 };
        assert_eq!(budgets[0], fullest);
        tokio::time::advance(KNOWN_FOR * 2).await;
        assert_eq!(counter.budgets(), []);
    }

    #[tokio::test(start_paused = true)]
    async fn scopes_are_bounded_and_forgotten() {
        let mut scopes = Scopes::default();
        for i in 0..SCOPES_MAX + 10 {
            if let Some(seen) = scopes.last_seen(ScopeKind::Tenant, &i.to_string()) {
                let state = state(What::Bucket(Kind::Requests), 40, 30);
                let declared = DeclaredLimit { amount: 20, period: Some("minute"), burst: 100 };
                seen.limits[0] = Some(Limit { state, declared, at: Instant::now(), refusals: 0 });
            }
        }
        let nothing = KeyMap::default();
        assert_eq!(scopes.take(Instant::now(), &nothing).len(), SCOPES_MAX);
        tokio::time::advance(KNOWN_FOR * 2).await;
        // Reported once more without a level, then removed.
        assert!(scopes.take(Instant::now(), &nothing).iter().all(|report| report.used.is_none()));
        assert!(scopes.take(Instant::now(), &nothing).is_empty());
        assert!(scopes.last_seen(ScopeKind::Tenant, "new").is_some());
    }

    fn entry() -> ScopeEntry {
        let mut buckets = [None; Kind::COUNT];
        buckets[Kind::Requests as usize] = Some(Bucket::per_minute(20, 5.0));
        let limits = ScopeLimits {
            record: Key::global(),
            leases: Key::global(),
            buckets,
            concurrency: None,
            mode: Mode::Enforce,
            without_store: Default::default(),
            prefetch: Default::default(),
        };
        let (kind, name, max_wait) = (ScopeKind::Global, String::new(), Duration::ZERO);
        ScopeEntry { limits, kind, name, max_wait, budget: None, renews: None }
    }

    #[test]
    fn a_report_tells_rate_burst_and_what_ended_requests_used_once() {
        let (counter, entry) = (TrafficCounter::default(), entry());
        let granted = Decision {
            outcome: Outcome::Granted { slot: None },
            limits: vec![state(What::Bucket(Kind::Requests), 99, 3)],
            now_us: 0,
            degraded: false,
        };
        for _ in 0..3 {
            counter.decided(&[&entry], &granted);
            counter.consumed(std::slice::from_ref(&entry.limits), &Cost::of_request(5, 7, 0));
        }
        let report = counter.take_limits().remove(0);
        assert_eq!((report.limit, report.declared, report.period.as_str()), (100, 20, "minute"));
        assert_eq!((report.consumed, report.used), (3, Some(1)));
        assert_eq!(counter.take_limits().remove(0).consumed, 0);
    }

    #[test]
    fn what_is_counted_of_limits_that_nobody_asks_for_is_bounded() {
        let counter = TrafficCounter::default();
        for i in 0..SCOPES_MAX + 10 {
            let (record, leases) = weir_ratelimit::scope_keys(weir_ratelimit::Scope::Tenant(&i.to_string()));
            let limits = ScopeLimits { record, leases, ..entry().limits };
            counter.consumed(&[limits], &Cost::of_request(1, 1, 1));
        }
        assert_eq!(counter.consumed.lock().expect("not poisoned").len(), SCOPES_MAX);
        assert!(
            counter.take_limits().is_empty() && counter.consumed.lock().expect("not poisoned").is_empty()
        );
    }
}
