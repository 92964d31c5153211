//! The answers about limits and usage as JSON: as the operations port of a gateway serves them, and as `weir` prints them.

use serde_json::{Value, json};

use crate::v1;

/// The answer about usage.
pub fn usage_value(answer: &v1::QueryUsageResponse) -> Value {
    let total = answer.total.clone().unwrap_or_default();
    json!({
        "from": answer.from, "to": answer.to,
        "rows": answer.sums.iter().map(sum_value).collect::<Vec<_>>(), "total": sum_value(&total),
    })
}

fn sum_value(sum: &v1::UsageSum) -> Value {
    let mut row = json!({
        "requests": sum.requests, "input_tokens": sum.input_tokens, "output_tokens": sum.output_tokens,
        "cost_micro_dollars": sum.cost_micro_dollars, "unpriced": sum.unpriced,
    });
    for (field, text) in [("tenant", &sum.tenant), ("model", &sum.model), ("day", &sum.day)] {
        if !text.is_empty() {
            row[field] = text.as_str().into();
        }
    }
    row
}

/// The answer about limits.
pub fn limits_value(answer: &v1::ExplainLimitsResponse) -> Value {
    json!({
        "key": answer.key, "tenant": answer.tenant, "model": answer.model, "allowed": answer.allowed,
        "input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens, "waiting": answer.waiting,
        "refuses": text(&answer.refuses),
        "limits": answer.limits.iter().map(limit_value).collect::<Vec<_>>(),
        "backends": answer.backends.iter().map(backend_value).collect::<Vec<_>>(),
    })
}

fn limit_value(limit: &v1::ExplainedLimit) -> Value {
    json!({
        "scope": { "kind": limit.scope_kind, "name": limit.scope }, "kind": limit.kind,
        "limit": limit.limit, "period": text(&limit.period), "burst": limit.burst,
        "remaining": limit.remaining, "last_minute": limit.last_minute, "needs": limit.needs,
        "decision": limit.decision, "wait_ms": limit.wait_ms, "reset_ms": limit.reset_ms,
        "max_wait_ms": limit.max_wait_ms, "shadow": limit.shadow,
    })
}

fn backend_value(backend: &v1::BackendSlots) -> Value {
    json!({
        "backend": backend.backend, "slots": backend.slots, "free": backend.free, "active": backend.active,
        "account": text(&backend.account), "unused": text(&backend.unused),
    })
}

/// A text; `None` for an empty one, which is null in JSON.
fn text(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}
