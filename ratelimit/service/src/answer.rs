//! What Envoy is told: a status per descriptor, and headers and a body for its client.

use std::sync::Arc;
use std::time::Duration;

use weir_proto::envoy::config::core::v3::HeaderValue;
use weir_proto::envoy::service::ratelimit::v3::RateLimitResponse;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::rate_limit::Unit;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::{Code, DescriptorStatus, RateLimit};
use weir_proto::resource::TimeUnit;
use weir_ratelimit::{Charge, ChargeRule, Decision, FOREVER, LimitState, Outcome, Verdict};

use crate::rules::Rule;
use crate::wire::duration;

/// A descriptor, the rule it matched and the limits it met.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) rule: Option<Arc<Rule>>,
    met: Vec<Met>,
}

/// A limit that a descriptor met: an index into the charges, and what to call it.
#[derive(Debug)]
struct Met {
    charge: usize,
    name: String,
    unit: TimeUnit,
}

/// A limit as it stands after the decision.
struct Standing<'a> {
    met: &'a Met,
    charge: &'a Charge,
    limit: &'a LimitState,
}

impl Standing<'_> {
    /// Of what needs no room, nothing is exceeded: credits, and reports into debt.
    fn exceeded(&self) -> bool {
        self.limit.verdict != Verdict::Fits
            && (self.charge.needed > 0 || self.charge.rule != ChargeRule::Note)
    }

    fn refuses(&self) -> bool {
        self.exceeded() && self.charge.rule != ChargeRule::Note
    }

    /// Until what was asked for fits; never is longest.
    fn wait(&self) -> Duration {
        match self.limit.verdict {
            Verdict::Fits => Duration::ZERO,
            Verdict::Wait(wait) => wait,
            Verdict::Never => FOREVER,
        }
    }

    /// Greater is tighter: what refuses, by its wait; else by the share that is used up.
    fn tightness(&self) -> (bool, Duration, u64) {
        let free = self.limit.remaining.saturating_mul(1_000_000) / self.limit.limit.max(1);
        (self.refuses(), if self.refuses() { self.wait() } else { Duration::ZERO }, u64::MAX - free)
    }
}

impl Asked {
    pub(super) const fn new(rule: Option<Arc<Rule>>) -> Self {
        Self { rule, met: Vec::new() }
    }

    pub(super) fn meets(&mut self, charge: usize, name: &str, unit: TimeUnit) {
        self.met.push(Met { charge, name: name.to_owned(), unit });
    }

    fn standings<'a>(
        &'a self,
        charges: &'a [Charge],
        limits: &'a [LimitState],
    ) -> impl Iterator<Item = Standing<'a>> {
        let standing = |met: &'a Met| {
            let (charge, limit) = (charges.get(met.charge)?, limits.get(met.charge)?);
            Some(Standing { met, charge, limit })
        };
        self.met.iter().filter_map(standing)
    }

    fn tightest<'a>(&'a self, charges: &'a [Charge], limits: &'a [LimitState]) -> Option<Standing<'a>> {
        self.standings(charges, limits).max_by_key(Standing::tightness)
    }

    /// "over" when it refuses, "noted" when only its mode keeps it from that, else "ok".
    pub(super) fn verdict(&self, charges: &[Charge], limits: &[LimitState]) -> &'static str {
        if self.standings(charges, limits).any(|standing| standing.refuses()) {
            "over"
        } else if self.standings(charges, limits).any(|standing| standing.exceeded()) {
            "noted"
        } else {
            "ok"
        }
    }

    fn status(&self, charges: &[Charge], limits: &[LimitState]) -> DescriptorStatus {
        let Some(tightest) = self.tightest(charges, limits) else {
            let unlimited = self.rule.as_ref().is_some_and(|rule| rule.unlimited);
            return DescriptorStatus {
                code: Code::Ok.into(),
                limit_remaining: if unlimited { u32::MAX } else { 0 },
                ..DescriptorStatus::default()
            };
        };
        let code = if tightest.refuses() { Code::OverLimit } else { Code::Ok };
        DescriptorStatus {
            code: code.into(),
            current_limit: Some(RateLimit {
                name: tightest.met.name.clone(),
                requests_per_unit: narrow(tightest.charge.bucket.rate),
                unit: unit(tightest.met.unit).into(),
            }),
            limit_remaining: narrow(tightest.limit.remaining),
            duration_until_reset: duration(tightest.limit.reset),
        }
    }
}

/// The whole answer.
pub(super) fn answer(asked: &[Asked], charges: &[Charge], decision: &Decision) -> RateLimitResponse {
    let limits = &decision.limits;
    let limited = !matches!(decision.outcome, Outcome::Granted { .. });
    let tightest =
        asked.iter().filter_map(|asked| asked.tightest(charges, limits)).max_by_key(Standing::tightness);
    let mut headers = tightest.as_ref().map(draft03).unwrap_or_default();
    let mut body = String::new();
    if limited {
        let wait = match decision.outcome {
            Outcome::Limited { wait } => wait,
            Outcome::Granted { .. } | Outcome::NoSlot { .. } => None,
        };
        if let Some(wait) = wait {
            headers.push(header("retry-after", seconds(wait)));
            headers.push(header("retry-after-ms", wait.as_micros().div_ceil(1000)));
        }
        if let Some(tightest) = &tightest {
            headers.push(header("content-type", "application/json"));
            body = refusal_body(tightest, wait);
        }
    }
    if decision.degraded {
        headers.push(header("x-ratelimit-degraded", true));
    }
    RateLimitResponse {
        overall_code: if limited { Code::OverLimit } else { Code::Ok }.into(),
        statuses: asked.iter().map(|asked| asked.status(charges, limits)).collect(),
        response_headers_to_add: headers,
        request_headers_to_add: Vec::new(),
        raw_body: body.into_bytes(),
    }
}

/// `x-ratelimit-limit`, `-remaining` and `-reset` as in draft-polli-ratelimit-headers-03: the limit with its window, and
/// whole seconds.
fn draft03(standing: &Standing<'_>) -> Vec<HeaderValue> {
    let Standing { met, charge, limit } = standing;
    let rate = charge.bucket.rate;
    let window = met.unit.duration().as_secs();
    let mut headers = vec![
        header("x-ratelimit-limit", format_args!("{rate}, {rate};w={window};name=\"{}\"", met.name)),
        header("x-ratelimit-remaining", limit.remaining),
    ];
    if limit.reset < FOREVER {
        headers.push(header("x-ratelimit-reset", seconds(limit.reset)));
    }
    headers
}

/// An error in OpenAI's shape, which the clients of LLM gateways know.
fn refusal_body(standing: &Standing<'_>, wait: Option<Duration>) -> String {
    // Names of rules and resources hold letters, digits, '-', '.' and spaces: nothing that JSON escapes.
    let Standing { met, charge, limit } = standing;
    let advice = match wait {
        Some(wait) => format!("Please try again in {} s.", seconds(wait)),
        None => "This request can never fit this limit.".to_owned(),
    };
    let (name, kind, rate, left) = (&met.name, charge.kind.name(), charge.bucket.rate, limit.remaining);
    let unit = unit(met.unit).as_str_name().to_ascii_lowercase();
    format!(
        "{{\"error\":{{\"message\":\"Rate limit reached for {kind} of {name}: {rate} per {unit}, remaining {left}. \
         {advice}\",\"type\":\"rate_limit_error\",\"param\":null,\"code\":\"rate_limit_exceeded\"}}}}"
    )
}

fn header(key: &str, value: impl ToString) -> HeaderValue {
    HeaderValue { key: key.to_owned(), value: value.to_string(), raw_value: Vec::new() }
}

/// Whole seconds, rounded up, at least one: "retry after 0" would be asked again at once.
fn seconds(duration: Duration) -> u64 {
    (duration + Duration::from_nanos(999_999_999)).as_secs().max(1)
}

fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

const fn unit(unit: TimeUnit) -> Unit {
    match unit {
        TimeUnit::Second => Unit::Second,
        TimeUnit::Minute => Unit::Minute,
        TimeUnit::Hour => Unit::Hour,
        TimeUnit::Day => Unit::Day,
        TimeUnit::Week => Unit::Week,
        TimeUnit::Month => Unit::Month,
        TimeUnit::Year => Unit::Year,
    }
}
