//! What is in force for descriptors: rules to match and limits to consume, compiled from resources.

use std::collections::HashMap;
use std::sync::Arc;

use weir_discovery::Refused;
use weir_proto::resource::{
    DescriptorRule, EntryPattern, HitKind, Limit, Name, NamePattern, Resource, RuleMode, ScopePattern, Spec,
    TimeUnit, ValuePattern,
};
use weir_proto::v1::ResourceKind;
use weir_ratelimit::{Bucket, DeclaredLimits, Key, Kind, Scope, ScopeLimits, scope_keys, scope_limits};

/// One entry of a descriptor.
pub(super) type Entry<'a> = (&'a str, &'a str);

/// Rules and limits. Immutable; a change makes another.
#[derive(Debug, Default)]
pub(super) struct Rules {
    domains: HashMap<String, Node>,
    /// By the record of the scope.
    limits: HashMap<Key, Vec<Named>>,
    /// How many rules there are.
    pub(super) count: usize,
}

/// The limits of a scope and what to call them.
#[derive(Debug)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) limits: ScopeLimits,
}

/// A rule, compiled.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) mode: RuleMode,
    pub(super) unlimited: bool,
    /// The limit of its own.
    pub(super) own: Option<(Bucket, TimeUnit)>,
    consumes: Vec<ScopePattern>,
    /// The entries whose values make buckets of their own.
    varying: Vec<usize>,
}

/// A place in the tree of a domain: what comes after some entries.
#[derive(Debug, Default)]
struct Node {
    rule: Option<Arc<Rule>>,
    keys: HashMap<String, Branch>,
}

/// The values of one key, most specific first.
#[derive(Debug, Default)]
struct Branch {
    exact: HashMap<String, Node>,
    /// The longest first.
    prefixes: Vec<(String, Node)>,
    any: Option<Box<Node>>,
}

impl Rules {
    /// Compiles resources; kinds that play no part are passed over.
    pub(super) fn compile(resources: &[Resource]) -> (Self, Vec<Refused>) {
        let mut rules = Self::default();
        let mut unused = rules.add_limits(resources);
        for resource in resources {
            let Spec::DescriptorRule(rule) = &resource.spec else { continue };
            if let Err(message) = rules.add_rule(resource.name.as_str(), rule) {
                unused.push(Refused { kind: resource.kind(), name: resource.name.to_string(), message });
            }
        }
        (rules, unused)
    }

    fn add_rule(&mut self, name: &str, spec: &DescriptorRule) -> Result<(), String> {
        let mut node = self.domains.entry(spec.domain.clone()).or_default();
        for entry in &spec.entries {
            node = node.keys.entry(entry.key.clone()).or_default().child(&entry.value);
        }
        if let Some(other) = &node.rule {
            return Err(format!("descriptor_rule.entries: {} matches the same descriptors", other.name));
        }
        node.rule = Some(Arc::new(Rule::new(name, spec)));
        self.count += 1;
        Ok(())
    }

    fn add_limits(&mut self, resources: &[Resource]) -> Vec<Refused> {
        let limits = DeclaredLimits::of(resources);
        for (scope, over) in limits.scopes() {
            let Some(what) = name_of(scope) else { continue };
            let named = over.iter().map(|declared| Named {
                name: declared.limit.map_or_else(|| what.clone(), |limit| format!("limit {limit}")),
                limits: scope_limits(scope, declared.limit.map(Name::as_str), declared.rates),
            });
            self.limits.insert(scope_keys(scope).0, named.collect());
        }
        let surplus = limits.surplus().iter().map(|name| Refused {
            kind: ResourceKind::Limit,
            name: name.to_string(),
            message: format!("limit.selector: {} limits have this selector already", Limit::PER_SELECTOR_MAX),
        });
        surplus.collect()
    }

    /// The rule for a descriptor: the most specific that matches.
    pub(super) fn find(&self, domain: &str, entries: &[Entry<'_>]) -> Option<&Arc<Rule>> {
        if entries.len() > DescriptorRule::MAX_ENTRIES {
            return None;
        }
        self.domains.get(domain)?.find(entries)
    }

    /// The limits that a matched rule consumes. Scopes without limits, and names that nobody has, are passed over, so
    /// that strangers cannot make keys.
    pub(super) fn consumed<'a>(
        &'a self,
        rule: &'a Rule,
        entries: &'a [Entry<'a>],
    ) -> impl Iterator<Item = &'a Named> {
        let scopes = rule.consumes.iter().filter_map(|pattern| scope(pattern, entries));
        scopes.filter_map(|scope| self.limits.get(&scope_keys(scope).0)).flatten()
    }
}

impl Rule {
    fn new(name: &str, spec: &DescriptorRule) -> Self {
        let varying = spec.entries.iter().enumerate();
        Self {
            name: name.to_owned(),
            kind: match spec.counts {
                HitKind::Requests => Kind::Requests,
                HitKind::Tokens => Kind::Tokens,
                HitKind::InputTokens => Kind::InputTokens,
                HitKind::OutputTokens => Kind::OutputTokens,
            },
            mode: spec.mode,
            unlimited: spec.unlimited,
            own: spec.limit.map(|limit| {
                (
                    Bucket::per(limit.requests_per_unit, limit.unit.duration(), limit.burst_multiplier),
                    limit.unit,
                )
            }),
            consumes: spec.consumes.clone(),
            varying: varying.filter(|(_, e)| varies(e)).map(|(i, _)| i).collect(),
        }
    }

    /// The record of its own limit for a descriptor it matches.
    pub(super) fn record(&self, entries: &[Entry<'_>]) -> Key {
        let values = self.varying.iter().filter_map(|i| entries.get(*i)).map(|(_, value)| *value);
        Key::descriptor(&self.name, values)
    }
}

const fn varies(entry: &EntryPattern) -> bool {
    !matches!(entry.value, ValuePattern::Exact(_))
}

/// What the limits over a scope are called that no limit resource declares. `None` for accounts: no proxy says which
/// backend it will use, so no rule consumes their limits.
fn name_of(scope: Scope<'_>) -> Option<String> {
    match scope {
        Scope::Account(_) | Scope::AccountModel { .. } => None,
        Scope::Global | Scope::TenantModel { .. } => Some(String::new()),
        Scope::Model(model) => Some(format!("model {model}")),
        Scope::Tenant(tenant) => Some(format!("tenant {tenant}")),
        Scope::ApiKey { key, .. } => Some(format!("api_key {key}")),
    }
}

fn scope<'a>(pattern: &'a ScopePattern, entries: &[Entry<'a>]) -> Option<Scope<'a>> {
    // A name the pattern wants but the descriptor lacks cannot be: matching compared the lengths.
    let name = |of: &'a Option<NamePattern>| match of {
        None => Some(""),
        Some(NamePattern::Literal(name)) => Some(name.as_str()),
        Some(NamePattern::Entry(i)) => {
            entries.get(*i).map(|(_, value)| *value).filter(|value| !value.is_empty())
        }
    };
    Some(match (name(&pattern.tenant)?, name(&pattern.model)?, name(&pattern.api_key)?) {
        ("", "", _) => Scope::Global,
        ("", model, _) => Scope::Model(model),
        (tenant, "", "") => Scope::Tenant(tenant),
        (tenant, "", key) => Scope::ApiKey { tenant, key },
        (tenant, model, _) => Scope::TenantModel { tenant, model },
    })
}

impl Branch {
    fn child(&mut self, value: &ValuePattern) -> &mut Node {
        match value {
            ValuePattern::Exact(value) => self.exact.entry(value.clone()).or_default(),
            ValuePattern::Any => self.any.get_or_insert_default(),
            ValuePattern::Prefix(prefix) => {
                let at = match self.prefixes.iter().position(|(other, _)| other == prefix) {
                    Some(at) => at,
                    None => {
                        let at = self.prefixes.partition_point(|(other, _)| other.len() >= prefix.len());
                        self.prefixes.insert(at, (prefix.clone(), Node::default()));
                        at
                    }
                };
                &mut self.prefixes[at].1
            }
        }
    }
}

impl Node {
    /// Depth first in order of specificity. No deeper than a rule is long, and no wider than there are rules.
    fn find(&self, entries: &[Entry<'_>]) -> Option<&Arc<Rule>> {
        let Some(((key, value), rest)) = entries.split_first() else { return self.rule.as_ref() };
        let branch = self.keys.get(*key)?;
        let exact = branch.exact.get(*value).into_iter();
        let prefixes = branch.prefixes.iter().filter(|(prefix, _)| value.starts_with(prefix.as_str()));
        let mut nodes = exact.chain(prefixes.map(|(_, node)| node)).chain(branch.any.as_deref());
        nodes.find_map(|node| node.find(rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> Rules {
        let wire = weir_proto::manifest::parse(text, "rules.yaml").unwrap_or_else(|e| panic!("{e}"));
        let resources: Vec<Resource> =
            wire.iter().map(|w| Resource::try_from(w).expect("parse judged it")).collect();
        let (rules, unused) = Rules::compile(&resources);
        assert_eq!(unused, []);
        rules
    }

    fn rule(name: &str, entries: &str) -> String {
        format!(
            "---\nkind: descriptor_rule\nname: {name}\nspec: {{domain: d, entries: {entries}, unlimited: true}}\n"
        )
    }

    #[test]
    fn the_most_specific_rule_wins_entry_by_entry() {
        let text = [
            rule("any", "[{key: a}]"),
            rule("exact", "[{key: a, value: x}]"),
            rule("prefix", "[{key: a, value: x*}]"),
            rule("longer", "[{key: a, value: xyz*}]"),
            rule("two", "[{key: a, value: x}, {key: b}]"),
            rule("two-any", "[{key: a}, {key: b, value: only}]"),
        ];
        let rules = rules(&text.concat());
        let find = |entries: &[Entry<'_>]| rules.find("d", entries).map(|rule| rule.name.clone());
        assert_eq!(find(&[("a", "x")]).as_deref(), Some("exact"));
        assert_eq!(find(&[("a", "xy")]).as_deref(), Some("prefix"));
        assert_eq!(find(&[("a", "xyzz")]).as_deref(), Some("longer"));
        assert_eq!(find(&[("a", "q")]).as_deref(), Some("any"));
        assert_eq!(find(&[("a", "x"), ("b", "only")]).as_deref(), Some("two"), "the first entry decides");
        assert_eq!(find(&[("a", "q"), ("b", "only")]).as_deref(), Some("two-any"));
        assert_eq!(find(&[("a", "q"), ("b", "other")]), None);
        assert_eq!(find(&[("b", "x")]), None);
        assert_eq!(find(&[("a", "x"), ("b", "y"), ("c", "z")]), None, "a rule matches whole descriptors");
        assert!(rules.find("other", &[("a", "x")]).is_none());
    }

    #[test]
    fn consumed_limits_are_those_of_known_names_only() {
        let rules = rules(
            "kind: tenant\nname: acme\nspec: {limits: {requests_per_minute: 10}}\n---\nkind: limit\nname: all\nspec: \
             {rates: {requests_per_minute: 100}}\n---\nkind: limit\nname: pair\nspec: {selector: {tenant: acme, model: \
             m}, rates: {requests_per_minute: 5}}\n---\nkind: descriptor_rule\nname: r\nspec: {domain: d, entries: \
             [{key: tenant}], consumes: [{}, {tenant: '{tenant}'}, {tenant: '{tenant}', model: m}]}\n",
        );
        let names = |tenant: &str| {
            let entries = [("tenant", tenant)];
            let rule = rules.find("d", &entries).expect("matches");
            rules.consumed(rule, &entries).map(|named| named.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names("acme"), ["limit all", "tenant acme", "limit pair"]);
        assert_eq!(names("stranger"), ["limit all"]);
        assert_eq!(names(""), ["limit all"], "an absent name is not everything");
    }

    #[test]
    fn each_combination_of_values_has_its_bucket_and_exact_values_are_the_rules_own() {
        let entries = |a: &'static str, b: &'static str| [("a", a), ("b", b)];
        let rule = rules(&rule("r", "[{key: a, value: x}, {key: b}]"));
        let rule = rule.find("d", &entries("x", "1")).expect("matches").clone();
        assert_eq!(rule.record(&entries("x", "1")), rule.record(&entries("x", "1")));
        assert_ne!(rule.record(&entries("x", "1")), rule.record(&entries("x", "2")));
        assert_eq!(Key::descriptor("r", ["10.0.0.1"]).as_str(), "weir:{d:r:10.0.0.1}:s");
        assert_ne!(Key::descriptor("r", ["a", "b"]), Key::descriptor("r", ["ab", ""]));
    }
}
