//! Rules for the descriptors of a proxy: what they match and what they consume.

use std::time::Duration;

use super::check::Check;
use super::{Name, Rates};
use crate::v1;

/// Longest domain, key or value, bytes.
const TEXT_MAX_BYTES: usize = 128;

/// Which descriptors consume which limits.
#[derive(Debug, Clone, PartialEq)]
pub struct DescriptorRule {
    /// The domain of the proxy's configuration.
    pub domain: String,
    /// What a descriptor must be like, entry by entry.
    pub entries: Vec<EntryPattern>,
    /// Whose limits are consumed.
    pub consumes: Vec<ScopePattern>,
    /// A limit of the rule's own.
    pub limit: Option<DescriptorLimit>,
    /// Limits nothing.
    pub unlimited: bool,
    /// What hits count.
    pub counts: HitKind,
    /// What happens when it does not fit.
    pub mode: RuleMode,
}

/// A key and the values it may have.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EntryPattern {
    /// The key.
    pub key: String,
    /// The values.
    pub value: ValuePattern,
}

/// Which values match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ValuePattern {
    /// This one.
    Exact(String),
    /// Those that begin with this.
    Prefix(String),
    /// All.
    Any,
}

/// A scope whose names may come from the descriptor. No field set is everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ScopePattern {
    /// The tenant.
    pub tenant: Option<NamePattern>,
    /// The model.
    pub model: Option<NamePattern>,
    /// The API key, with its tenant.
    pub api_key: Option<NamePattern>,
}

/// A name, or where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamePattern {
    /// This name.
    Literal(Name),
    /// The value of the entry at this index.
    Entry(usize),
}

/// A limit of a rule's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DescriptorLimit {
    /// Hits per unit.
    pub requests_per_unit: u64,
    /// The unit.
    pub unit: TimeUnit,
    /// Units' worth that may be used at once: 1.
    pub burst_multiplier: f64,
}

/// A unit of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TimeUnit {
    /// A second.
    Second,
    /// A minute.
    Minute,
    /// An hour.
    Hour,
    /// A day.
    Day,
    /// Seven days.
    Week,
    /// 30 days.
    Month,
    /// 365 days.
    Year,
}

impl TimeUnit {
    /// How long it is.
    pub const fn duration(self) -> Duration {
        const DAY: u64 = 24 * 60 * 60;
        Duration::from_secs(match self {
            Self::Second => 1,
            Self::Minute => 60,
            Self::Hour => 60 * 60,
            Self::Day => DAY,
            Self::Week => 7 * DAY,
            Self::Month => 30 * DAY,
            Self::Year => 365 * DAY,
        })
    }
}

/// What hits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum HitKind {
    /// Requests.
    #[default]
    Requests,
    /// Tokens, prompt and completion together.
    Tokens,
    /// Prompt tokens.
    InputTokens,
    /// Completion tokens.
    OutputTokens,
}

/// What a rule does with hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RuleMode {
    /// Refuses hits that do not fit; a refusal charges nothing.
    #[default]
    Enforce,
    /// Refuses while nothing is left, and charges all the same.
    Meter,
    /// Charges and never refuses.
    Report,
    /// As report, and counts what enforce would have refused.
    Shadow,
}

impl DescriptorRule {
    /// Most entries of a rule.
    pub const MAX_ENTRIES: usize = 16;
    /// Most scopes one rule consumes.
    pub const MAX_CONSUMES: usize = 8;

    pub(super) fn judge(w: &v1::DescriptorRuleSpec, check: &mut Check) -> Self {
        text(check, "domain", &w.domain);
        if w.entries.is_empty() || w.entries.len() > Self::MAX_ENTRIES {
            check
                .violation("entries", format!("must be 1 to {}, are {}", Self::MAX_ENTRIES, w.entries.len()));
        }
        if w.consumes.len() > Self::MAX_CONSUMES {
            check.violation("consumes", format!("must be at most {}", Self::MAX_CONSUMES));
        }
        match (w.consumes.is_empty() && w.limit.is_none(), w.unlimited) {
            (true, false) => {
                check.violation("limit", "set it, or consumes, or unlimited: the rule would say nothing");
            }
            (false, true) => check.violation("unlimited", "excludes limit and consumes"),
            (true, true) | (false, false) => {}
        }
        let entries = w.entries.iter().enumerate().map(|(i, entry)| {
            text(check, &format!("entries[{i}].key"), &entry.key);
            check.text(&format!("entries[{i}].value"), &entry.value, TEXT_MAX_BYTES);
            EntryPattern { key: entry.key.clone(), value: ValuePattern::of(&entry.value) }
        });
        let entries: Vec<_> = entries.collect();
        let consumes = w.consumes.iter().enumerate();
        Self {
            domain: w.domain.clone(),
            consumes: consumes
                .map(|(i, scope)| ScopePattern::judge(&format!("consumes[{i}]"), scope, &entries, check))
                .collect(),
            entries,
            limit: w.limit.as_ref().and_then(|limit| DescriptorLimit::judge(limit, check)),
            unlimited: w.unlimited,
            counts: hit_kind(w.counts, check),
            mode: rule_mode(w.mode, check),
        }
    }
}

fn text(check: &mut Check, path: &str, text: &str) {
    check.text(path, text, TEXT_MAX_BYTES);
    if text.is_empty() {
        check.violation(path, "must not be empty");
    }
}

impl ValuePattern {
    fn of(text: &str) -> Self {
        match text.strip_suffix('*') {
            _ if text.is_empty() || text == "*" => Self::Any,
            Some(prefix) => Self::Prefix(prefix.to_owned()),
            None => Self::Exact(text.to_owned()),
        }
    }
}

impl ScopePattern {
    /// The resources that it names, by field.
    pub(super) fn named(&self) -> impl Iterator<Item = (&'static str, v1::ResourceKind, &Name)> {
        let fields = [
            ("tenant", v1::ResourceKind::Tenant, &self.tenant),
            ("model", v1::ResourceKind::Model, &self.model),
            ("api_key", v1::ResourceKind::ApiKey, &self.api_key),
        ];
        fields.into_iter().filter_map(|(field, kind, pattern)| match pattern {
            Some(NamePattern::Literal(name)) => Some((field, kind, name)),
            Some(NamePattern::Entry(_)) | None => None,
        })
    }

    fn judge(path: &str, w: &v1::LimitSelector, entries: &[EntryPattern], check: &mut Check) -> Self {
        let mut name = |field: &str, text: &str| {
            let path = format!("{path}.{field}");
            let key = text.strip_prefix('{').and_then(|text| text.strip_suffix('}'));
            match key {
                _ if text.is_empty() => None,
                None => check.name(&path, text).map(NamePattern::Literal),
                Some(key) => {
                    let index = entries.iter().position(|entry| entry.key == key);
                    if index.is_none() {
                        check.violation(&path, format!("the rule has no entry with the key {key}"));
                    }
                    index.map(NamePattern::Entry)
                }
            }
        };
        let pattern = Self {
            tenant: name("tenant", &w.tenant),
            model: name("model", &w.model),
            api_key: name("api_key", &w.api_key),
        };
        if !w.account.is_empty() {
            check.violation(
                &format!("{path}.account"),
                "cannot be consumed by a rule: a proxy does not say which backend it will use",
            );
        }
        if !w.limit.is_empty() {
            check.violation(
                &format!("{path}.limit"),
                "cannot be chosen: every limit over what is selected is consumed",
            );
        }
        match (w.tenant.is_empty(), w.model.is_empty(), w.api_key.is_empty()) {
            (true, _, false) => {
                check.violation(&format!("{path}.tenant"), "must be set with api_key: whose key it is");
            }
            (false, false, false) => check.violation(path, "no scope is of a model and an api_key together"),
            _ => {}
        }
        pattern
    }
}

impl DescriptorLimit {
    fn judge(w: &v1::DescriptorLimit, check: &mut Check) -> Option<Self> {
        let burst = w.burst_multiplier.unwrap_or(1.0);
        let burst = check.range("limit.burst_multiplier", burst, 1.0, 1000.0);
        let path = "limit.requests_per_unit";
        let rate = check.range(path, w.requests_per_unit, 0, Rates::MAX_UNITS);
        if rate as f64 * burst > Rates::MAX_UNITS as f64 {
            check.violation(path, format!("times burst_multiplier must be at most {}", Rates::MAX_UNITS));
        }
        let unit = match v1::TimeUnit::try_from(w.unit) {
            Ok(v1::TimeUnit::Second) => TimeUnit::Second,
            Ok(v1::TimeUnit::Minute) => TimeUnit::Minute,
            Ok(v1::TimeUnit::Hour) => TimeUnit::Hour,
            Ok(v1::TimeUnit::Day) => TimeUnit::Day,
            Ok(v1::TimeUnit::Week) => TimeUnit::Week,
            Ok(v1::TimeUnit::Month) => TimeUnit::Month,
            Ok(v1::TimeUnit::Year) => TimeUnit::Year,
            Ok(v1::TimeUnit::Unspecified) | Err(_) => {
                check.violation("limit.unit", "must be one of second, minute, hour, day, week, month, year");
                return None;
            }
        };
        Some(Self { requests_per_unit: rate, unit, burst_multiplier: burst })
    }
}

fn hit_kind(wire: i32, check: &mut Check) -> HitKind {
    match v1::HitKind::try_from(wire) {
        Ok(v1::HitKind::Unspecified | v1::HitKind::Requests) => HitKind::Requests,
        Ok(v1::HitKind::Tokens) => HitKind::Tokens,
        Ok(v1::HitKind::InputTokens) => HitKind::InputTokens,
        Ok(v1::HitKind::OutputTokens) => HitKind::OutputTokens,
        Err(_) => {
            check.violation("counts", "is not a kind this version knows");
            HitKind::default()
        }
    }
}

fn rule_mode(wire: i32, check: &mut Check) -> RuleMode {
    match v1::RuleMode::try_from(wire) {
        Ok(v1::RuleMode::Unspecified | v1::RuleMode::Enforce) => RuleMode::Enforce,
        Ok(v1::RuleMode::Meter) => RuleMode::Meter,
        Ok(v1::RuleMode::Report) => RuleMode::Report,
        Ok(v1::RuleMode::Shadow) => RuleMode::Shadow,
        Err(_) => {
            check.violation("mode", "is not a mode this version knows");
            RuleMode::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest;
    use crate::resource::{Resource, Spec};

    fn rule(spec: &str) -> Result<DescriptorRule, String> {
        let text = format!("kind: descriptor_rule\nname: r\nspec: {spec}\n");
        let wire = manifest::parse(&text, "r.yaml").map_err(|e| e.to_string())?;
        let printed = manifest::to_yaml(&wire);
        assert_eq!(manifest::parse(&printed, "r.yaml").as_ref(), Ok(&wire), "{printed}");
        match Resource::try_from(&wire[0]).expect("parse judged it").spec {
            Spec::DescriptorRule(rule) => Ok(rule),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_an_operator_writes_is_what_is_meant() {
        let read = rule(
            "{domain: edge, entries: [{key: tenant}, {key: path, value: /v1/*}, {key: model, value: m}], counts: tokens,
              consumes: [{}, {tenant: '{tenant}', model: gpt-4.1}], mode: meter,
              limit: {requests_per_unit: 5, unit: hour}}",
        )
        .expect("valid");
        let values: Vec<_> = read.entries.iter().map(|e| e.value.clone()).collect();
        let expected =
            [ValuePattern::Any, ValuePattern::Prefix("/v1/".into()), ValuePattern::Exact("m".into())];
        assert_eq!(values, expected);
        assert_eq!(read.consumes[0], ScopePattern::default());
        assert_eq!(read.consumes[1].tenant, Some(NamePattern::Entry(0)));
        assert_eq!((read.counts, read.mode), (HitKind::Tokens, RuleMode::Meter));
        let limit = read.limit.expect("a limit");
        assert_eq!((limit.unit.duration(), limit.burst_multiplier), (Duration::from_secs(3600), 1.0));
    }

    #[test]
    fn every_mistake_is_told() {
        for (spec, says) in [
            ("{domain: d, entries: [{key: a}]}", "would say nothing"),
            ("{entries: [{key: a}], unlimited: true}", "domain: must not be empty"),
            ("{domain: d, unlimited: true}", "entries: must be 1 to 16"),
            ("{domain: d, entries: [{key: a}], unlimited: true, consumes: [{}]}", "unlimited: excludes"),
            ("{domain: d, entries: [{key: a}], consumes: [{tenant: '{b}'}]}", "no entry with the key b"),
            ("{domain: d, entries: [{key: a}], consumes: [{api_key: '{a}'}]}", "consumes[0].tenant"),
            ("{domain: d, entries: [{key: a}], limit: {requests_per_unit: 1}}", "limit.unit: must be one of"),
            (
                "{domain: d, entries: [{key: a}], limit: {requests_per_unit: 1, unit: fortnight}}",
                "must be one of",
            ),
        ] {
            let error = rule(spec).expect_err(spec);
            assert!(error.contains(says), "{spec}: {error}");
        }
    }
}
