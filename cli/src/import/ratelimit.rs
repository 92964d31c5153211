//! Rule files of envoyproxy/ratelimit.
//!
//! Their nested descriptors become one rule each, with the keys and values from the root on. Where such a file would limit
//! nothing and the rules of Weir would fall back to a broader one, a rule without a limit is added: there a value that is
//! listed hides what its key has without it, here the most specific rule that matches counts.

use std::collections::HashSet;

use serde_json::Value;
use weir_proto::resource::DescriptorRule;
use weir_proto::v1::{self, resource::Spec};

use super::fields::{Fields, Variables};
use super::{Import, free_name, resource_name};

/// Most rules of one file, those that are added included.
const RULES_MAX: usize = 10_000;

/// Why a file cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("{0}: not YAML: {1}")]
    Yaml(String, Box<serde_saphyr::Error>),
    #[error("{0}: no domain and descriptors; is this a rule file of envoyproxy/ratelimit?")]
    NoRules(String),
    #[error("{0}: more than {RULES_MAX} rules")]
    TooMany(String),
}

/// Reads the text of a file of this name.
pub(crate) fn import(text: &str, file: &str) -> Result<Import, Unreadable> {
    let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
    let root: Value = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| Unreadable::Yaml(file.to_owned(), Box::new(error)))?;
    let variables = Variables::default();
    let mut fields = Fields::new("", root.as_object(), &variables);
    let (domain, list) = (fields.take("domain").and_then(scalar), fields.take("descriptors"));
    let (Some(domain), Some(list)) =
        (domain.filter(|domain| !domain.is_empty()), list.and_then(Value::as_array))
    else {
        return Err(Unreadable::NoRules(file.to_owned()));
    };
    let mut out = Import::default();
    fields.finish(&mut out);
    let nodes = read_list(list, "descriptors", 1, &mut out);
    let mut writer =
        Writer { domain, rules: Vec::new(), names: HashSet::new(), matched: HashSet::new(), out };
    writer.write(&nodes, &mut Vec::new());
    writer.hide(&nodes, &mut Vec::new());
    if writer.rules.len() > RULES_MAX {
        return Err(Unreadable::TooMany(file.to_owned()));
    }
    Ok(writer.finish())
}

/// A descriptor of the file.
#[derive(Debug)]
struct Node {
    path: String,
    key: String,
    /// Empty: any.
    value: String,
    rule: Option<Rule>,
    below: Vec<Node>,
}

/// What a descriptor is limited to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Rule {
    /// What the file calls it; empty: nothing.
    name: String,
    /// `None`: unlimited.
    limit: Option<(u64, v1::TimeUnit)>,
    shadow: bool,
}

impl Node {
    fn is_any(&self) -> bool {
        self.value.is_empty() || self.value == "*"
    }

    /// Whether every descriptor that matches another node matches this one too.
    fn covers(&self, other: &Self) -> bool {
        let prefix = self.value.strip_suffix('*').filter(|_| !self.is_any());
        let is_covered = |prefix: &str| !other.is_any() && other.value.starts_with(prefix);
        self.key == other.key && (self.is_any() || self.is_same(other) || prefix.is_some_and(is_covered))
    }

    fn is_same(&self, other: &Self) -> bool {
        self.key == other.key && (self.value == other.value || (self.is_any() && other.is_any()))
    }

    fn entry(&self) -> v1::DescriptorEntry {
        let value = if self.is_any() { String::new() } else { self.value.clone() };
        v1::DescriptorEntry { key: self.key.clone(), value }
    }
}

/// Text as YAML readers of Go take it: numbers and flags are text too.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn read_list(list: &[Value], path: &str, depth: usize, out: &mut Import) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for (i, entry) in list.iter().enumerate() {
        let Some(node) = read(entry, format!("{path}[{i}]"), depth, out) else { continue };
        if let Some(first) = nodes.iter().find(|known| known.is_same(&node)) {
            let text = format!("not carried over: {} is of the same key and value", first.path);
            out.note(node.path, text);
            continue;
        }
        let shorter = |known: &&Node| known.covers(&node) && !known.is_any() && !known.is_same(&node);
        if node.value.ends_with('*')
            && let Some(first) = nodes.iter().find(shorter)
        {
            let text = format!(
                "the longest prefix counts; in a file of envoyproxy/ratelimit the first, {}",
                first.path
            );
            out.note(&node.path, text);
        }
        nodes.push(node);
    }
    nodes
}

fn read(entry: &Value, path: String, depth: usize, out: &mut Import) -> Option<Node> {
    let variables = Variables::default();
    let mut fields = Fields::new(path.clone(), entry.as_object(), &variables);
    let Some(key) = fields.take("key").and_then(scalar).filter(|key| !key.is_empty()) else {
        out.note(path, "not carried over: no key");
        return None;
    };
    if depth > DescriptorRule::MAX_ENTRIES {
        out.note(
            path,
            format!("not carried over: a rule has at most {} entries", DescriptorRule::MAX_ENTRIES),
        );
        return None;
    }
    let value = match fields.take("value") {
        None => String::new(),
        Some(value) => match scalar(value) {
            Some(text) => {
                if value.is_f64() {
                    fields.note(
                        "value",
                        format!("read as the number {text}; quote it if it is written otherwise"),
                    );
                }
                text
            }
            None => {
                out.note(path, "not carried over: the value is no text");
                return None;
            }
        },
    };
    let shadow = flag(&mut fields, "shadow_mode");
    if flag(&mut fields, "detailed_metric") {
        fields.note("detailed_metric", "not carried over: metrics have the name of the rule, never a value");
    }
    let limit = fields.take("rate_limit");
    if shadow && limit.is_none() {
        fields.note("shadow_mode", "not carried over: there is no rate_limit beside it");
    }
    let below = fields.take("descriptors");
    if below.is_some_and(|below| !below.is_array()) {
        fields.note("descriptors", "not carried over: must be a list");
    }
    fields.finish(out);
    let rule = limit.and_then(|limit| read_limit(limit, &format!("{path}.rate_limit"), shadow, out));
    let below = below.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let below = read_list(below, &format!("{path}.descriptors"), depth + 1, out);
    Some(Node { path, key, value, rule, below })
}

fn flag(fields: &mut Fields<'_>, field: &str) -> bool {
    match fields.take(field) {
        None => false,
        Some(value) => match scalar(value).unwrap_or_default().to_ascii_lowercase().as_str() {
            // Flags as YAML 1.1 writes them, which that project reads.
            "true" | "yes" | "on" | "y" => true,
            "false" | "no" | "off" | "n" => false,
            _ => {
                fields.note(field, "not carried over: must be true or false");
                false
            }
        },
    }
}

fn read_limit(limit: &Value, path: &str, shadow: bool, out: &mut Import) -> Option<Rule> {
    let variables = Variables::default();
    let mut fields = Fields::new(path, limit.as_object(), &variables);
    if !limit.is_object() {
        out.note(path, "not carried over: must be a map");
        return None;
    }
    let name = fields.take("name").and_then(scalar).unwrap_or_default();
    if fields.take("replaces").is_some() {
        let text = "not carried over: the limits that it replaces hold beside it; give them an unlimited rule where it applies";
        fields.note("replaces", text);
    }
    let unlimited = flag(&mut fields, "unlimited");
    let limit = match unlimited {
        true => None,
        false => {
            let Some(unit) = unit(&mut fields) else {
                fields.finish(out);
                return None;
            };
            let rate = match fields.take("requests_per_unit") {
                // As there, where an absent number is zero.
                None => {
                    fields.note("requests_per_unit", "there is none, which lets nothing pass");
                    Some(0)
                }
                Some(_) => fields.whole("requests_per_unit", 0, u32::MAX.into()),
            };
            let Some(rate) = rate else {
                fields.finish(out);
                return None;
            };
            Some((rate, unit))
        }
    };
    fields.finish(out);
    Some(Rule { name, limit, shadow: shadow && limit.is_some() })
}

fn unit(fields: &mut Fields<'_>) -> Option<v1::TimeUnit> {
    let text = fields.take("unit").and_then(scalar).unwrap_or_default();
    let unit = match text.to_ascii_lowercase().as_str() {
        "second" => v1::TimeUnit::Second,
        "minute" => v1::TimeUnit::Minute,
        "hour" => v1::TimeUnit::Hour,
        "day" => v1::TimeUnit::Day,
        "week" => v1::TimeUnit::Week,
        "month" => v1::TimeUnit::Month,
        "year" => v1::TimeUnit::Year,
        _ => {
            let text =
                "the limit is not carried over: must be second, minute, hour, day, week, month or year";
            fields.note("unit", text);
            return None;
        }
    };
    Some(unit)
}

struct Writer {
    domain: String,
    rules: Vec<(String, v1::DescriptorRuleSpec)>,
    /// What is taken: names, and keys with their values.
    names: HashSet<String>,
    matched: HashSet<Vec<(String, String)>>,
    out: Import,
}

impl Writer {
    /// A rule for each limit, in the order of the file. `above` is what a descriptor begins with to come here.
    fn write(&mut self, nodes: &[Node], above: &mut Vec<v1::DescriptorEntry>) {
        for node in nodes {
            above.push(node.entry());
            if let Some(rule) = &node.rule {
                self.rule(above, rule);
            }
            self.write(&node.below, above);
            above.pop();
        }
    }

    /// The rules without a limit that keep descriptors from falling back to a broader rule.
    fn hide(&mut self, nodes: &[Node], above: &mut Vec<v1::DescriptorEntry>) {
        for node in nodes {
            above.push(node.entry());
            let before = self.rules.len();
            for broader in nodes.iter().filter(|other| other.covers(node) && !other.is_same(node)) {
                self.hide_below(node, broader, above);
            }
            if self.rules.len() > before {
                let text = "has rules without a limit added: what it does not limit falls back to no broader descriptor";
                self.out.note(&node.path, text);
            }
            self.hide(&node.below, above);
            above.pop();
            if self.rules.len() > RULES_MAX {
                return;
            }
        }
    }

    /// Where `broader` has a limit and `node`, which hides it, has none.
    fn hide_below(&mut self, node: &Node, broader: &Node, above: &mut Vec<v1::DescriptorEntry>) {
        if broader.rule.as_ref().is_some_and(|rule| rule.limit.is_some()) && node.rule.is_none() {
            self.rule(above, &Rule::default());
        }
        for theirs in &broader.below {
            above.push(theirs.entry());
            // What a descriptor meets first there: the same value, else the narrowest that covers it.
            let covering = node.below.iter().filter(|own| own.covers(theirs));
            match covering.max_by_key(|own| (own.is_same(theirs), own.value.len())) {
                Some(own) => {
                    let before = self.rules.len();
                    self.hide_below(own, theirs, above);
                    if self.rules.len() > before && !own.is_same(theirs) {
                        self.repeat(own, above);
                    }
                }
                None => self.hide_all(theirs, above),
            }
            above.pop();
        }
    }

    /// What a node says, for a narrower value than its own: rules that hide there are more specific than its own ones.
    fn repeat(&mut self, node: &Node, above: &mut Vec<v1::DescriptorEntry>) {
        if self.rules.len() > RULES_MAX {
            return;
        }
        if let Some(rule) = &node.rule {
            self.rule(above, rule);
        }
        self.write(&node.below, above);
        self.hide(&node.below, above);
    }

    /// Every limit from here on.
    fn hide_all(&mut self, node: &Node, above: &mut Vec<v1::DescriptorEntry>) {
        if node.rule.as_ref().is_some_and(|rule| rule.limit.is_some()) {
            self.rule(above, &Rule::default());
        }
        for below in &node.below {
            above.push(below.entry());
            self.hide_all(below, above);
            above.pop();
        }
    }

    fn rule(&mut self, entries: &[v1::DescriptorEntry], rule: &Rule) {
        let matched = entries.iter().map(|entry| (entry.key.clone(), entry.value.clone())).collect();
        if self.rules.len() > RULES_MAX || !self.matched.insert(matched) {
            return;
        }
        let base = match rule.name.as_str() {
            "" => {
                let parts = entries.iter().flat_map(|entry| [entry.key.as_str(), entry.value.as_str()]);
                let parts: Vec<&str> = std::iter::once(self.domain.as_str()).chain(parts).collect();
                resource_name(&parts.join(" "))
            }
            name => resource_name(name),
        };
        let name = free_name(&base, |name| self.names.contains(name));
        self.names.insert(name.clone());
        let limit = rule.limit.map(|(requests_per_unit, unit)| v1::DescriptorLimit {
            requests_per_unit,
            unit: unit.into(),
            burst_multiplier: None,
        });
        let mode = if rule.shadow { v1::RuleMode::Shadow } else { v1::RuleMode::Unspecified };
        let spec = v1::DescriptorRuleSpec {
            domain: self.domain.clone(),
            entries: entries.to_vec(),
            unlimited: limit.is_none(),
            limit,
            mode: mode.into(),
            ..Default::default()
        };
        self.rules.push((name, spec));
    }

    fn finish(self) -> Import {
        let Self { rules, mut out, .. } = self;
        let resource = |(name, spec)| v1::Resource {
            name,
            spec: Some(Spec::DescriptorRule(spec)),
            ..Default::default()
        };
        out.resources = rules.into_iter().map(resource).collect();
        out.judge();
        out
    }
}

#[cfg(test)]
mod tests;
