use proptest::prelude::*;
use weir_proto::{manifest, resource};

use super::*;

/// envoyproxy/ratelimit's own example.
const EXAMPLE: &str = "
domain: rl
descriptors:
  - key: source_cluster
    value: proxy
    descriptors:
      - {key: destination_cluster, value: mock, rate_limit: {unit: minute, requests_per_unit: 1}}
  - key: foo
    rate_limit: {unit: minute, requests_per_unit: 2}
    descriptors:
      - {key: bar, rate_limit: {unit: minute, requests_per_unit: 3}}
      - {key: bar, value: banned, rate_limit: {unit: minute, requests_per_unit: 0}}
      - {key: baz, rate_limit: {unit: second, requests_per_unit: 1}}
      - {key: bay, rate_limit: {unlimited: true}}
      - {key: baz, value: shady, rate_limit: {unit: minute, requests_per_unit: 1}, shadow_mode: true}
  - {key: qux, rate_limit: {unlimited: true}}
";

fn imported(text: &str) -> Import {
    let import = import(text, "config.yaml").unwrap_or_else(|error| panic!("{error}"));
    for wire in &import.resources {
        resource::Resource::try_from(wire).unwrap_or_else(|e| panic!("{}: {e}", wire.name));
    }
    let text = manifest::to_yaml(&import.resources);
    assert_eq!(manifest::parse(&text, "imported").as_ref(), Ok(&import.resources), "{text}");
    import
}

fn specs(import: &Import) -> Vec<(&str, &v1::DescriptorRuleSpec)> {
    let spec = |resource: &'_ v1::Resource| match &resource.spec {
        Some(Spec::DescriptorRule(_)) => (),
        other => panic!("{other:?}"),
    };
    import.resources.iter().for_each(spec);
    let pairs = import.resources.iter().filter_map(|resource| match &resource.spec {
        Some(Spec::DescriptorRule(spec)) => Some((resource.name.as_str(), spec)),
        _ => None,
    });
    pairs.collect()
}

fn note<'a>(import: &'a Import, path: &str) -> &'a str {
    let found = import.notes.iter().find(|note| note.path == path);
    &found.unwrap_or_else(|| panic!("nothing said of {path}: {:#?}", import.notes)).text
}

/// A rule in one line.
fn line(spec: &v1::DescriptorRuleSpec) -> String {
    let entries: Vec<String> = spec.entries.iter().map(|e| format!("{}={}", e.key, e.value)).collect();
    let limit = spec.limit.map_or("unlimited".to_owned(), |limit| {
        format!(
            "{}/{}",
            limit.requests_per_unit,
            limit.unit().as_str_name().trim_start_matches("TIME_UNIT_").to_lowercase()
        )
    });
    let shadow = if spec.mode() == v1::RuleMode::Shadow { " shadow" } else { "" };
    format!("{} {limit}{shadow}", entries.join(","))
}

#[test]
fn the_projects_own_example_becomes_these_rules() {
    let import = imported(EXAMPLE);
    let lines: Vec<String> = specs(&import).iter().map(|(_, spec)| line(spec)).collect();
    assert_eq!(
        lines,
        [
            "source_cluster=proxy,destination_cluster=mock 1/minute",
            "foo= 2/minute",
            "foo=,bar= 3/minute",
            "foo=,bar=banned 0/minute",
            "foo=,baz= 1/second",
            "foo=,bay= unlimited",
            "foo=,baz=shady 1/minute shadow",
            "qux= unlimited",
        ]
    );
    let names: Vec<&str> = specs(&import).iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names[..4],
        ["rl-source-cluster-proxy-destination-cluster-mock", "rl-foo", "rl-foo-bar", "rl-foo-bar-banned"]
    );
    assert!(specs(&import).iter().all(|(_, spec)| spec.domain == "rl"));
    assert_eq!(import.notes, []);
}

#[test]
fn every_unit_in_any_case_and_values_of_any_type() {
    let units = ["second", "MINUTE", "Hour", "day", "week", "month", "year"];
    let rules: String = units
        .iter()
        .enumerate()
        .map(|(n, unit)| {
            format!("  - {{key: n, value: {n}, rate_limit: {{unit: {unit}, requests_per_unit: {n}}}}}\n")
        })
        .collect();
    let import = imported(&format!(
        "domain: 7\ndescriptors:\n{rules}  - {{key: on, value: yes, rate_limit: {{unit: day, requests_per_unit: \"5\"}}, shadow_mode: yes}}\n"
    ));
    let lines: Vec<String> = specs(&import).iter().map(|(_, spec)| line(spec)).collect();
    assert_eq!(lines[1], "n=1 1/minute");
    assert_eq!((lines[4].as_str(), lines[7].as_str()), ("n=4 4/week", "on=yes 5/day shadow"));
    assert!(specs(&import).iter().all(|(_, spec)| spec.domain == "7"));
}

#[test]
fn whatever_is_not_carried_over_is_said() {
    let import = imported(
        "
domain: d
flavour: sweet
descriptors:
  - {key: a, rate_limit: {unit: fortnight, requests_per_unit: 1}}
  - {key: b, rate_limit: {unit: hour, requests_per_unit: -1}}
  - {key: c, rate_limit: {unit: hour}}
  - {key: d, detailed_metric: true, share_threshold: true, rate_limit: {unit: hour, requests_per_unit: 1, name: limit one, replaces: [{name: x}]}}
  - {key: e, shadow_mode: true}
  - {key: e, rate_limit: {unlimited: true}}
  - {value: v, rate_limit: {unlimited: true}}
  - just text
  - {key: f, value: [1], rate_limit: {unlimited: true}}
  - {key: g, value: 1.50, rate_limit: {unlimited: true}}
  - {key: h, rate_limit: {unlimited: true}, descriptors: none}
  - {key: i, rate_limit: plenty}
  - {key: j, value: bar*b, rate_limit: {unlimited: true, unit: hour}}
",
    );
    for (path, says) in [
        ("flavour", "not carried over"),
        ("descriptors[0].rate_limit.unit", "second, minute"),
        ("descriptors[1].rate_limit.requests_per_unit", "whole number"),
        ("descriptors[2].rate_limit.requests_per_unit", "lets nothing pass"),
        ("descriptors[3].detailed_metric", "metrics"),
        ("descriptors[3].share_threshold", "not carried over"),
        ("descriptors[3].rate_limit.replaces", "hold beside it"),
        ("descriptors[4].shadow_mode", "no rate_limit"),
        ("descriptors[5]", "descriptors[4] is of the same"),
        ("descriptors[6]", "no key"),
        ("descriptors[7]", "no key"),
        ("descriptors[8]", "no text"),
        ("descriptors[9].value", "quote it"),
        ("descriptors[10].descriptors", "must be a list"),
        ("descriptors[11].rate_limit", "must be a map"),
        ("descriptors[12].rate_limit.unit", "not carried over"),
    ] {
        assert!(note(&import, path).contains(says), "{path}: {}", note(&import, path));
    }
    let lines: Vec<String> = specs(&import).iter().map(|(_, spec)| line(spec)).collect();
    assert_eq!(lines, ["c= 0/hour", "d= 1/hour", "g=1.5 unlimited", "h= unlimited", "j=bar*b unlimited"]);
    assert_eq!(specs(&import)[1].0, "limit-one");
}

#[test]
fn a_file_of_something_else_is_refused_by_name() {
    for text in ["model_list: []", "domain: d", "descriptors: []", "domain: ''\ndescriptors: []", "7", ""] {
        let refused = import(text, "f.yaml");
        assert!(matches!(&refused, Err(Unreadable::NoRules(f)) if f == "f.yaml"), "{text}: {refused:?}");
    }
    assert!(matches!(import("a: [", "f.yaml"), Err(Unreadable::Yaml(..))));
    let many: String =
        (0..=RULES_MAX).map(|n| format!("- {{key: k{n}, rate_limit: {{unlimited: true}}}}\n")).collect();
    let refused = import(&format!("domain: d\ndescriptors:\n{many}"), "f.yaml");
    assert!(matches!(refused, Err(Unreadable::TooMany(_))), "{refused:?}");
    assert!(imported("domain: d\ndescriptors: []").resources.is_empty());
}

#[test]
fn deep_and_long_descriptors_are_told_apart_from_those_that_fit() {
    let mut text = "{key: k, rate_limit: {unlimited: true}}".to_owned();
    for _ in 0..20 {
        text = format!("{{key: k, rate_limit: {{unlimited: true}}, descriptors: [{text}]}}");
    }
    let import = imported(&format!("domain: d\ndescriptors: [{text}]"));
    assert_eq!(import.resources.len(), DescriptorRule::MAX_ENTRIES);
    assert!(import.notes.iter().any(|note| note.text.contains("at most 16 entries")), "{:?}", import.notes);
    let long = "x".repeat(200);
    let import = import_of_long(&long);
    assert!(import.notes.iter().any(|note| note.text.contains("corrected by hand")), "{:?}", import.notes);
}

fn import_of_long(long: &str) -> Import {
    let text =
        format!("domain: d\ndescriptors: [{{key: a, value: {long}, rate_limit: {{unlimited: true}}}}]");
    import(&text, "f.yaml").expect("readable")
}

#[test]
fn what_a_listed_value_does_not_limit_falls_back_to_nothing() {
    let import = imported(
        "
domain: d
descriptors:
  - key: a
    rate_limit: {unit: minute, requests_per_unit: 1}
    descriptors:
      - {key: b, rate_limit: {unit: minute, requests_per_unit: 2}}
      - {key: c, value: 1, rate_limit: {unit: minute, requests_per_unit: 3}}
  - key: a
    value: x
    descriptors:
      - {key: c, rate_limit: {unit: minute, requests_per_unit: 4}}
",
    );
    let lines: Vec<String> = specs(&import).iter().map(|(_, spec)| line(spec)).collect();
    assert_eq!(
        lines,
        [
            "a= 1/minute",
            "a=,b= 2/minute",
            "a=,c=1 3/minute",
            "a=x,c= 4/minute",
            "a=x unlimited",
            "a=x,b= unlimited",
        ]
    );
    assert!(note(&import, "descriptors[1]").contains("falls back"));
}

/// A rule that hides is of a narrower value than the prefix that has the limit.
#[test]
fn what_is_hidden_below_a_value_leaves_the_limits_of_its_prefix() {
    let import = imported(
        "
domain: d
descriptors:
  - key: a
    value: x
    descriptors:
      - key: b
        value: y*
        descriptors:
          - {key: c, value: z, rate_limit: {unit: minute, requests_per_unit: 1}}
  - key: a
    descriptors:
      - key: b
        value: y
        descriptors:
          - {key: c, rate_limit: {unit: minute, requests_per_unit: 2}}
",
    );
    let lines: Vec<String> = specs(&import).iter().map(|(_, spec)| line(spec)).collect();
    assert_eq!(
        lines,
        ["a=x,b=y*,c=z 1/minute", "a=,b=y,c= 2/minute", "a=x,b=y,c= unlimited", "a=x,b=y,c=z 1/minute",]
    );
}

/// What envoyproxy/ratelimit does with a descriptor: at each level the value, else the first prefix, else the key alone;
/// never back.
fn theirs(nodes: &[Node], entries: &[(&str, &str)]) -> Option<Rule> {
    let ((key, value), rest) = entries.split_first()?;
    let of_key = || nodes.iter().filter(|node| node.key == *key);
    let exact = of_key().find(|node| !node.value.is_empty() && node.value == *value);
    let prefix =
        || of_key().find(|n| n.value.strip_suffix('*').is_some_and(|start| value.starts_with(start)));
    let node = exact.or_else(prefix).or_else(|| of_key().find(|node| node.value.is_empty()))?;
    if rest.is_empty() { node.rule.clone() } else { theirs(&node.below, rest) }
}

/// What Weir does with it: the most specific rule that matches, entry by entry.
fn ours<'a>(
    rules: &[(&str, &'a v1::DescriptorRuleSpec)],
    entries: &[(&str, &str)],
) -> Option<&'a v1::DescriptorRuleSpec> {
    let rank = |pattern: &v1::DescriptorEntry, (key, value): (&str, &str)| {
        let start = pattern.value.strip_suffix('*');
        match (pattern.key == key, start) {
            (true, _) if pattern.value.is_empty() => Some((0, 0)),
            (true, Some(start)) if value.starts_with(start) => Some((1, start.len())),
            (true, None) if pattern.value == value => Some((2, 0)),
            _ => None,
        }
    };
    let matching = rules.iter().filter(|(_, spec)| spec.entries.len() == entries.len());
    let ranked = matching.filter_map(|(_, spec)| {
        let ranks = spec.entries.iter().zip(entries).map(|(pattern, entry)| rank(pattern, *entry));
        Some((ranks.collect::<Option<Vec<_>>>()?, *spec))
    });
    ranked.max_by_key(|(ranks, _)| ranks.clone()).map(|(_, spec)| spec)
}

/// A list of descriptors, as YAML.
fn descriptors() -> impl Strategy<Value = String> {
    let limit = prop_oneof![
        3 => (0_u32..9).prop_map(|n| format!("rate_limit: {{unit: minute, requests_per_unit: {n}}}")),
        1 => Just("rate_limit: {unlimited: true}".to_owned()),
        2 => Just("detailed_metric: false".to_owned()),
    ];
    let value = prop_oneof![Just(""), Just("x"), Just("xy"), Just("x*"), Just("z")];
    let node = (prop_oneof![Just("a"), Just("b")], value, limit);
    let leaf =
        node.clone().prop_map(|(key, value, limit)| format!("{{key: {key}, value: '{value}', {limit}}}"));
    let level = leaf.prop_recursive(3, 24, 4, move |inner| {
        (node.clone(), proptest::collection::vec(inner, 0..4)).prop_map(|((key, value, limit), below)| {
            format!("{{key: {key}, value: '{value}', {limit}, descriptors: [{}]}}", below.join(", "))
        })
    });
    proptest::collection::vec(level, 0..5).prop_map(|list| format!("[{}]", list.join(", ")))
}

proptest! {
    #[test]
    fn the_rules_decide_as_the_file_does(list in descriptors()) {
        let import = imported(&format!("domain: d\ndescriptors: {list}"));
        let rules = specs(&import);
        let parsed: Value = serde_saphyr::from_str(&list).expect("YAML");
        let nodes = read_list(parsed.as_array().expect("a list"), "", 1, &mut Import::default());
        let values = ["x", "xy", "xyz", "z", "q"];
        let entry = |n: usize| (["a", "b"][n % 2], values[n / 2 % values.len()]);
        for one in 0..10 {
            for two in 0..11 {
                for three in 0..11 {
                    let more = [two, three].into_iter().take_while(|n| *n < 10).map(entry);
                    let entries: Vec<(&str, &str)> = std::iter::once(entry(one)).chain(more).collect();
                    let wanted = theirs(&nodes, &entries).and_then(|rule| rule.limit);
                    let decided = ours(&rules, &entries).and_then(|spec| spec.limit);
                    let decided = decided.map(|limit| (limit.requests_per_unit, limit.unit()));
                    prop_assert_eq!(decided, wanted, "{:?} under {}", entries, list);
                }
            }
        }
    }
}
