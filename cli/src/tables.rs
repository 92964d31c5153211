//! Resources and reports as columns. No frames and no colours: the same on a terminal and in a pipe.

use comfy_table::{Table, presets};
use weir_proto::manifest::format_duration;
use weir_proto::money::dollars;
use weir_proto::v1;
use weir_proto::v1::resource::Spec;

/// A table of a header and rows, without trailing blanks.
pub(crate) fn table(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

/// The table of resources of a kind.
pub(crate) fn resources(kind: v1::ResourceKind, resources: &[v1::Resource]) -> String {
    columns(kind, resources, &[], |_| Vec::new())
}

/// The table with the output-only fields in addition.
pub(crate) fn resources_wide(kind: v1::ResourceKind, resources: &[v1::Resource]) -> String {
    columns(kind, resources, &["SET", "ETAG", "CREATED", "UPDATED"], |r| {
        vec![text(&r.apply_set), text(&r.etag), time(r.create_time.as_ref()), time(r.update_time.as_ref())]
    })
}

fn columns(
    kind: v1::ResourceKind,
    resources: &[v1::Resource],
    more: &[&'static str],
    cells_of_more: impl Fn(&v1::Resource) -> Vec<String>,
) -> String {
    use v1::ResourceKind as K;
    let header: &[&str] = match kind {
        K::Pool => &["NAME", "POLICY", "REGIONS", "REVISION"],
        K::Backend => {
            &["NAME", "POOL", "REGION", "WEIGHT", "CONCURRENCY", "STATE", "URL", "ACCOUNT", "REVISION"]
        }
        K::Model => &["NAME", "CLIENT NAME", "POOL", "FALLBACKS", "LIMITS", "REVISION"],
        K::Tenant => &["NAME", "DISPLAY NAME", "MODELS", "LIMITS", "REVISION"],
        K::ApiKey => &["NAME", "TENANT", "KEY", "STATE", "EXPIRES", "MODELS", "REVISION"],
        K::Limit => &["NAME", "TENANT", "MODEL", "KEY", "ACCOUNT", "LIMITS", "REVISION"],
        K::DescriptorRule => {
            &["NAME", "DOMAIN", "DESCRIPTOR", "LIMIT", "CONSUMES", "COUNTS", "MODE", "REVISION"]
        }
        K::Unspecified => &["NAME", "REVISION"],
    };
    let rows = resources.iter().map(|r| {
        let mut row = vec![r.name.clone()];
        row.extend(r.spec.as_ref().map(cells).unwrap_or_default());
        row.push(r.revision.to_string());
        row.extend(cells_of_more(r));
        row
    });
    table(&[header, more].concat(), rows.collect())
}

/// The cells between name and revision.
fn cells(spec: &Spec) -> Vec<String> {
    match spec {
        Spec::Pool(s) => {
            let policy = match s.balancing_policy() {
                v1::BalancingPolicy::Unspecified | v1::BalancingPolicy::WeightedRoundRobin => {
                    "weighted_round_robin"
                }
                v1::BalancingPolicy::RoundRobin => "round_robin",
                v1::BalancingPolicy::Random => "random",
                v1::BalancingPolicy::LeastRequest => "least_request",
                v1::BalancingPolicy::PrefixAffinity => "prefix_affinity",
                v1::BalancingPolicy::Priority => "priority",
            };
            vec![policy.to_owned(), list(&s.regions, "all")]
        }
        Spec::Backend(s) => vec![
            s.pool.clone(),
            text(&s.region),
            s.weight.unwrap_or(100).to_string(),
            s.max_concurrency.unwrap_or(50).to_string(),
            state(s.admin_state()).to_owned(),
            s.url.clone(),
            text(&s.account),
        ],
        Spec::Model(s) => {
            vec![text(&s.client_name), s.pool.clone(), list(&s.fallbacks, "-"), rates(s.limits.as_ref())]
        }
        Spec::Tenant(s) => {
            vec![text(&s.display_name), list(&s.allowed_models, "all"), rates(s.limits.as_ref())]
        }
        Spec::ApiKey(s) => {
            let prefixes: Vec<String> = s.digests.iter().map(|d| format!("{}...", d.prefix)).collect();
            let last = s.digests.iter().map(|d| d.expire_time.as_ref());
            // The key that lives longest; a digest without an end lives for ever.
            let expires = last.max_by_key(|t| t.map_or(i64::MAX, |t| t.seconds)).flatten();
            vec![
                s.tenant.clone(),
                list(&prefixes, "-"),
                if s.revoked { "revoked" } else { "active" }.to_owned(),
                time(expires),
                list(&s.allowed_models, "all"),
            ]
        }
        Spec::Limit(s) => {
            let scope = s.selector.clone().unwrap_or_default();
            vec![
                list(&[scope.tenant], "all"),
                list(&[scope.model], "all"),
                list(&[scope.api_key], "all"),
                text(&scope.account),
                rates(s.rates.as_ref()),
            ]
        }
        Spec::DescriptorRule(s) => rule(s),
    }
}

/// The cells between name and revision of a descriptor rule.
fn rule(s: &v1::DescriptorRuleSpec) -> Vec<String> {
    let entries: Vec<_> = s
        .entries
        .iter()
        .map(|e| format!("{}={}", e.key, if e.value.is_empty() { "*" } else { &e.value }))
        .collect();
    let limit = s.limit.as_ref().map(|l| {
        let unit = l.unit().as_str_name().trim_start_matches("TIME_UNIT_").to_ascii_lowercase();
        format!("{}/{unit}", l.requests_per_unit)
    });
    let scopes = s.consumes.iter().map(|scope| {
        let names = [&scope.tenant, &scope.model, &scope.api_key];
        let names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).cloned().collect();
        if names.is_empty() { "all".to_owned() } else { names.join("/") }
    });
    let counts = match s.counts() {
        v1::HitKind::Unspecified | v1::HitKind::Requests => "requests",
        v1::HitKind::Tokens => "tokens",
        v1::HitKind::InputTokens => "input_tokens",
        v1::HitKind::OutputTokens => "output_tokens",
    };
    let mode = match s.mode() {
        v1::RuleMode::Unspecified | v1::RuleMode::Enforce => "enforce",
        v1::RuleMode::Meter => "meter",
        v1::RuleMode::Report => "report",
        v1::RuleMode::Shadow => "shadow",
    };
    vec![
        s.domain.clone(),
        list(&entries, "-"),
        if s.unlimited { "unlimited".to_owned() } else { limit.unwrap_or_else(|| "-".to_owned()) },
        list(&scopes.collect::<Vec<_>>(), "-"),
        counts.to_owned(),
        mode.to_owned(),
    ]
}

/// The name of an admin state.
pub(crate) const fn state(state: v1::AdminState) -> &'static str {
    match state {
        v1::AdminState::Unspecified | v1::AdminState::Active => "active",
        v1::AdminState::Draining => "draining",
        v1::AdminState::Disabled => "disabled",
    }
}

fn text(text: &str) -> String {
    list(&[text.to_owned()], "-")
}

fn list(items: &[String], none: &str) -> String {
    let joined = items.join(",");
    if joined.is_empty() { none.to_owned() } else { joined }
}

fn rates(rates: Option<&v1::Rates>) -> String {
    let Some(r) = rates else { return "-".to_owned() };
    let mut parts = Vec::new();
    let mut add = |value: Option<u64>, unit| parts.extend(value.map(|v| format!("{v} {unit}")));
    add(r.requests_per_minute, "req/min");
    add(r.tokens_per_minute, "tok/min");
    add(r.input_tokens_per_minute, "in tok/min");
    add(r.output_tokens_per_minute, "out tok/min");
    add(r.concurrency.map(u64::from), "concurrent");
    if let Some(budget) = &r.budget {
        parts.push(format!("{}/{}", dollars(budget.micro_dollars), period(budget.period())));
    }
    if let Some(wait) = r.max_wait.and_then(|d| std::time::Duration::try_from(d).ok()) {
        parts.push(format!("wait {}", format_duration(wait)));
    }
    if let Some(percent) = r.prefetch_percent.filter(|percent| *percent > 0) {
        parts.push(format!("{percent} % prefetched"));
    }
    if r.shadow {
        parts.push("shadow".to_owned());
    }
    list(&parts, "-").replace(',', ", ")
}

fn period(period: v1::BudgetPeriod) -> &'static str {
    match period {
        v1::BudgetPeriod::Day => "day",
        v1::BudgetPeriod::Week => "week",
        v1::BudgetPeriod::Unspecified | v1::BudgetPeriod::Month => "month",
    }
}

/// A point in time, RFC 3339 to the second; "-" for none.
pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> String {
    let second = time.and_then(|t| jiff::Timestamp::from_second(t.seconds).ok());
    second.map_or_else(|| "-".to_owned(), |t| t.to_string())
}

#[cfg(test)]
mod tests {
    use weir_proto::manifest;

    use super::*;

    const TEXT: &str = "
kind: backend
name: sgp-1
spec: {pool: chat, url: 'http://10.0.0.5:8000', region: sgp, admin_state: draining, models: {m: }, account: x}
---
kind: backend
name: fra-1
spec: {pool: chat, url: 'http://10.0.0.6:8000', weight: 0, models: {m: }}
---
kind: limit
name: all
spec: {rates: {requests_per_minute: 2000, max_wait: 30s, shadow: true}}
---
kind: descriptor_rule
name: edge
spec:
  domain: edge
  entries: [{key: tenant}, {key: path, value: /v1/*}]
  consumes: [{}, {tenant: '{tenant}', model: m}]
  limit: {requests_per_unit: 5, unit: second}
";

    #[test]
    fn resources_are_plain_columns() {
        let all = manifest::parse(TEXT, "t").expect("valid");
        assert_eq!(
            resources(v1::ResourceKind::Backend, &all[..2]),
            "NAME   POOL  REGION  WEIGHT  CONCURRENCY  STATE     URL                   ACCOUNT  REVISION\n\
             sgp-1  chat  sgp     100     50           draining  http://10.0.0.5:8000  x        0\n\
             fra-1  chat  -       0       50           active    http://10.0.0.6:8000  -        0\n"
        );
        assert_eq!(
            resources(v1::ResourceKind::Limit, &all[2..3]),
            "NAME  TENANT  MODEL  KEY  ACCOUNT  LIMITS                          REVISION\n\
             all   all     all    all  -        2000 req/min, wait 30s, shadow  0\n"
        );
        assert_eq!(
            resources(v1::ResourceKind::DescriptorRule, &all[3..]),
            "NAME  DOMAIN  DESCRIPTOR           LIMIT     CONSUMES        COUNTS    MODE     REVISION\n\
             edge  edge    tenant=*,path=/v1/*  5/second  all,{tenant}/m  requests  enforce  0\n"
        );
    }
}
