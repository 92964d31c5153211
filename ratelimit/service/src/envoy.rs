//! `envoy.service.ratelimit.v3.RateLimitService`: descriptors are matched to rules, and everything the request hits is
//! decided in one call of the limiter. Statuses are one to one with the descriptors.
//!
//! Envoy says nothing afterwards, so a decision is final: there is no reservation. An answer that comes too late for
//! Envoy leaves its charge standing, since Envoy then admits unless it is told not to.

use std::sync::Arc;

use arc_swap::ArcSwap;
use smallvec::SmallVec;
use tokio::time::Instant;
use tonic::{Code as Grpc, Request, Response, Status};
use weir_proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_server::RateLimitService;
use weir_proto::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use weir_proto::resource::{RuleMode, TimeUnit};
use weir_ratelimit::{Bucket, Charge, ChargeRule, Key, Kind, Mode, Outcome, ServiceStack};

use crate::answer::{Asked, answer};
use crate::charges::charge;
use crate::metrics::Metrics;
use crate::rules::{Entry, Rule, Rules};
use crate::wire::{Check, refusal};

/// Most descriptors of a request. How many there are is the proxy's configuration and not in a stranger's hand, as the
/// lengths of keys and values are: those have no bound but the message's, since a proxy takes an error for an admission.
const DESCRIPTORS_MAX: usize = 1024;

/// Envoy's rate limit service: descriptors are matched with rules and charged.
#[derive(Debug, Clone)]
pub(super) struct Envoy {
    pub(super) stack: Arc<ServiceStack>,
    pub(super) rules: Arc<ArcSwap<Rules>>,
    pub(super) metrics: Metrics,
    /// Checks with no hits need room for one.
    pub(super) strict_zero_hits: bool,
}

/// The hits of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hits {
    count: u64,
    back: bool,
}

#[tonic::async_trait]
impl RateLimitService for Envoy {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let since = Instant::now();
        let decided = self.decide(request.get_ref()).await;
        let outcome = match &decided {
            Ok((_, true)) => "limited",
            Ok((_, false)) => "ok",
            Err(status) if status.code() == Grpc::InvalidArgument => "invalid",
            Err(_) => "unavailable",
        };
        self.metrics.called("should_rate_limit", outcome, since.elapsed());
        decided.map(|(answer, _)| Response::new(answer))
    }
}

impl Envoy {
    /// The answer, and whether it is a refusal.
    async fn decide(&self, request: &RateLimitRequest) -> Result<(RateLimitResponse, bool), Status> {
        check(request)?;
        let rules = self.rules.load_full();
        let mut charges: Vec<Charge> = Vec::new();
        let mut asked = Vec::with_capacity(request.descriptors.len());
        for descriptor in &request.descriptors {
            asked.push(self.ask(&rules, request, descriptor, &mut charges));
        }
        let decision = charge(&self.stack.limiter, &charges).await.map_err(|e| refusal(&e))?;
        for asked in &asked {
            self.metrics.ruled(asked.rule.as_deref(), asked.verdict(&charges, &decision.limits));
        }
        let limited = !matches!(decision.outcome, Outcome::Granted { .. });
        Ok((answer(&asked, &charges, &decision), limited))
    }

    /// Adds what a descriptor charges.
    fn ask(
        &self,
        rules: &Rules,
        request: &RateLimitRequest,
        descriptor: &RateLimitDescriptor,
        charges: &mut Vec<Charge>,
    ) -> Asked {
        let entries: SmallVec<[Entry<'_>; 8]> =
            descriptor.entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_str())).collect();
        let rule = rules.find(&request.domain, &entries).cloned();
        let hits = hits(request, descriptor);
        let mut asked = Asked::new(rule.clone());
        let mode = rule.as_ref().map_or(RuleMode::Enforce, |rule| rule.mode);
        let kind = rule.as_ref().map_or(Kind::Requests, |rule| rule.kind);
        let mut charge = |record: Key, bucket: Bucket, name: &str, unit: TimeUnit, mode: RuleMode| {
            asked.meets(charges.len(), name, unit);
            charges.push(self.charge(record, kind, bucket, hits, mode));
        };
        if rule.as_ref().is_some_and(|rule| rule.unlimited) {
            return asked;
        }
        if let Some((bucket, unit, name, record)) = own(rule.as_deref(), request, descriptor, &entries) {
            charge(record, bucket, &name, unit, mode);
        }
        for named in rule.iter().flat_map(|rule| rules.consumed(rule, &entries)) {
            let mode = match (named.limits.mode, mode) {
                (Mode::Shadow, RuleMode::Enforce | RuleMode::Meter) => RuleMode::Shadow,
                (_, mode) => mode,
            };
            if let Some(bucket) = named.limits.buckets[kind as usize] {
                charge(named.limits.record.clone(), bucket, &named.name, TimeUnit::Minute, mode);
            }
        }
        asked
    }

    fn charge(&self, record: Key, kind: Kind, bucket: Bucket, hits: Hits, mode: RuleMode) -> Charge {
        let count = i64::try_from(hits.count).unwrap_or(i64::MAX);
        let at_least = u64::from(self.strict_zero_hits);
        let (needed, added, rule) = match mode {
            _ if hits.back => (0, -count, ChargeRule::Note),
            RuleMode::Enforce => (hits.count.max(at_least), count, ChargeRule::AllOrNothing),
            // Refuses while less than one hit is left, whatever this one costs.
            RuleMode::Meter => (1, count, ChargeRule::Always),
            RuleMode::Report => (0, count, ChargeRule::Note),
            RuleMode::Shadow => (hits.count.max(at_least), count, ChargeRule::Note),
        };
        Charge { record, kind, bucket, needed, added, rule }
    }
}

/// The limit of the rule's own, or the one the proxy brings: its rates on the rule's bucket, or on one of the
/// descriptor's where the rule has none. What a rule consumes holds beside it: a proxy can tighten, not lift.
fn own(
    rule: Option<&Rule>,
    request: &RateLimitRequest,
    descriptor: &RateLimitDescriptor,
    entries: &[Entry<'_>],
) -> Option<(Bucket, TimeUnit, String, Key)> {
    let own = rule.filter(|rule| rule.own.is_some());
    let record = || match own {
        Some(rule) => rule.record(entries),
        None => Key::descriptor_override(&request.domain, entries.iter().copied()),
    };
    if let Some(limit) = &descriptor.limit
        && let Some(unit) = unit(limit.unit)
    {
        let bucket = Bucket::per(limit.requests_per_unit.into(), unit.duration(), 1.0);
        let name = rule.map_or_else(|| "override".to_owned(), |rule| rule.name.clone());
        return Some((bucket, unit, name, record()));
    }
    let rule = own?;
    let (bucket, unit) = rule.own?;
    Some((bucket, unit, rule.name.clone(), record()))
}

fn hits(request: &RateLimitRequest, descriptor: &RateLimitDescriptor) -> Hits {
    let count = match descriptor.hits_addend {
        Some(own) => own,
        None => u64::from(request.hits_addend).max(1),
    };
    Hits { count, back: descriptor.is_negative_hits }
}

/// The wire's units; it has no week.
const fn unit(wire: i32) -> Option<TimeUnit> {
    Some(match wire {
        1 => TimeUnit::Second,
        2 => TimeUnit::Minute,
        3 => TimeUnit::Hour,
        4 => TimeUnit::Day,
        5 => TimeUnit::Month,
        6 => TimeUnit::Year,
        _ => return None,
    })
}

fn check(request: &RateLimitRequest) -> Result<(), Status> {
    let mut check = Check::default();
    if request.domain.is_empty() {
        check.wrong("domain", "must not be empty");
    }
    if request.descriptors.is_empty() || request.descriptors.len() > DESCRIPTORS_MAX {
        check.wrong(
            "descriptors",
            format!("must be 1 to {DESCRIPTORS_MAX}, are {}", request.descriptors.len()),
        );
    }
    for (i, descriptor) in request.descriptors.iter().take(DESCRIPTORS_MAX).enumerate() {
        if descriptor.entries.is_empty() {
            check.wrong(format!("descriptors[{i}].entries"), "must not be empty");
        }
        if descriptor.limit.is_some_and(|limit| unit(limit.unit).is_none()) {
            check.wrong(
                format!("descriptors[{i}].limit.unit"),
                "must be SECOND, MINUTE, HOUR, DAY, MONTH or YEAR",
            );
        }
    }
    check.finish(())
}
