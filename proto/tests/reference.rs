//! What the comments of resources say about bounds and absence, held against the judge of resources: a number that changes
//! in one of both places and not in the other fails here, and so does one that is only in the code.

use std::time::Duration;

use serde_json::{Value as Json, json};
use weir_proto::manifest::{self, format_duration, parse_duration};
use weir_proto::reference::{self, Field, Message, Value};
use weir_proto::resource::Resource;

/// A field somewhere below a spec.
#[derive(Debug)]
struct Place {
    kind: &'static str,
    /// The fields from the spec down to this one.
    way: Vec<Field>,
}

/// The absence of these means what the pool says, which the comment of the message says too.
fn inherits(place: &Place) -> bool {
    place.kind == "model" && place.way[0].name == "timeouts"
}

/// One of several fields of which a rule needs one; the comment of the message says so.
fn is_alternative(place: &Place) -> bool {
    place.kind == "descriptor_rule" && place.way.len() == 1 && place.way[0].name == "limit"
}

fn places() -> Vec<Place> {
    fn below(kind: &'static str, message: &Message, way: &[Field], found: &mut Vec<Place>) {
        for field in &message.fields {
            let way = [way, std::slice::from_ref(field)].concat();
            if let Value::Message(inner) = &field.value {
                below(kind, inner, &way, found);
            }
            found.push(Place { kind, way });
        }
    }
    let mut found = Vec::new();
    for kind in reference::kinds().expect("readable") {
        below(kind.name, &kind.spec, &[], &mut found);
    }
    assert!(found.len() > 100, "the fields were not found: {}", found.len());
    found
}

/// The least that a kind needs.
fn least(kind: &str) -> Json {
    match kind {
        "backend" => json!({"pool": "p", "url": "http://h", "models": {"m": ""}}),
        // The price is what the absence of other prices means, and no value that is tried.
        "model" => json!({"pool": "p", "input_price_micro_dollars": 7_777_777}),
        "api_key" => json!({"tenant": "t"}),
        "limit" => json!({"rates": {}}),
        "descriptor_rule" => json!({"domain": "d", "entries": [{"key": "k"}], "limit": {"unit": "minute"}}),
        _ => json!({}),
    }
}

/// The least that a part of a kind needs.
fn least_of(message: &Message) -> Json {
    match message.name.as_str() {
        "KeyDigest" => json!({"sha256": "00".repeat(32)}),
        "DescriptorEntry" => json!({"key": "k"}),
        "DescriptorLimit" => json!({"unit": "minute"}),
        _ => json!({}),
    }
}

impl Place {
    fn field(&self) -> &Field {
        self.way.last().expect("a field")
    }

    fn path(&self) -> String {
        let names: Vec<&str> = self.way.iter().map(|field| field.name.as_str()).collect();
        format!("{}.{}", self.kind, names.join("."))
    }

    /// The judgement about a resource that has only what it needs, with this value of the field, or without the field.
    fn judged(&self, value: Option<Json>) -> Result<Resource, String> {
        let mut spec = least(self.kind);
        let mut at = &mut spec;
        let (last, way) = self.way.split_last().expect("a field");
        for field in way {
            let Value::Message(inner) = &field.value else { panic!("{field:?} has fields") };
            let inner = least_of(inner);
            let inner = if field.list { json!([inner]) } else { inner };
            let fields = at.as_object_mut().expect("fields");
            at = fields.entry(field.name.clone()).or_insert(inner);
            if field.list {
                at = &mut at[0];
            }
        }
        if last.name.ends_with("_per_minute") {
            // Its product with the rate has a bound too.
            at["burst_multiplier"] = json!(1);
        }
        match value {
            Some(value) => at[&last.name] = value,
            None => drop(at.as_object_mut().expect("fields").remove(&last.name)),
        }
        let text = json!({"kind": self.kind, "name": "x", "spec": spec}).to_string();
        let wire = manifest::parse(&text, "x").map_err(|error| error.to_string())?;
        Resource::try_from(&wire[0]).map_err(|error| error.to_string())
    }

    /// A value as a comment says it; `None` if it is words.
    fn value(&self, text: &str) -> Option<Json> {
        match &self.field().value {
            Value::Enumeration(words) => {
                words.values.iter().any(|(word, _)| word == text).then(|| json!(text))
            }
            Value::Duration => parse_duration(text).ok().map(|_| json!(text)),
            Value::WholeNumber => text.parse::<u64>().ok().map(|number| json!(number)),
            Value::Number => text.parse::<f64>().ok().map(|number| json!(number)),
            Value::Boolean => text.parse::<bool>().ok().map(|value| json!(value)),
            Value::Text => text.starts_with('/').then(|| json!(text)),
            Value::Time | Value::Hex | Value::Map | Value::Message(_) => None,
        }
    }

    /// A valid value that differs from one that a comment says.
    fn other_than(&self, text: &str) -> Option<Json> {
        match &self.field().value {
            Value::Enumeration(words) => {
                words.values.iter().find(|(word, _)| word != text).map(|(word, _)| json!(word))
            }
            Value::Duration => parse_duration(text).ok().map(|time| json!(format_duration(time + MOMENT))),
            Value::WholeNumber => text.parse::<u64>().ok().map(|number| json!(number + 1)),
            Value::Number => text.parse::<f64>().ok().map(|number| json!(number + 1.0)),
            Value::Text => text.starts_with('/').then(|| json!(format!("{text}2"))),
            Value::Boolean | Value::Time | Value::Hex | Value::Map | Value::Message(_) => None,
        }
    }

    /// A value of so many units: the number itself, bytes of a text, or items of a list or map.
    fn of_size(&self, size: u64) -> Json {
        let field = self.field();
        let names = || (0..size).map(|i| format!("n{i}"));
        match &field.value {
            Value::Text if field.list => names().collect(),
            Value::Message(message) if field.list => (0..size).map(|_| least_of(message)).collect(),
            Value::Map => json!(names().map(|name| (name, json!(""))).collect::<serde_json::Map<_, _>>()),
            Value::Text => {
                let size = usize::try_from(size).expect("small");
                let path = if field.name.ends_with("path") { "/" } else { "" };
                json!(format!("{path}{}", "a".repeat(size - path.len().min(size))))
            }
            _ => json!(size),
        }
    }
}

/// The least difference that is tried between two durations.
const MOMENT: Duration = Duration::from_millis(1);

/// The lowest and the highest value of `1 to 16`, `at most 24h` and the like.
fn ends(bounds: &str) -> (Option<&str>, Option<&str>) {
    let words: Vec<&str> = bounds.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    match words.as_slice() {
        [low, "to", high] | [low, "to", high, "bytes"] => (Some(low), Some(high)),
        ["at", "least", low, "at", "most", high] => (Some(low), Some(high)),
        ["at", "most", high] | ["at", "most", high, "bytes"] => (None, Some(high)),
        ["at", "least", low] => (Some(low), None),
        _ => panic!("not a bound: {bounds}"),
    }
}

#[test]
fn a_field_that_is_called_required_is_and_no_other() {
    for place in places().iter().filter(|place| !is_alternative(place)) {
        let without = place.judged(None);
        assert_eq!(without.is_err(), place.field().facts.required, "{}: {without:?}", place.path());
    }
}

#[test]
fn every_field_says_what_its_absence_means() {
    for place in places() {
        let field = place.field();
        let group = matches!(field.value, Value::Message(_)) && !field.list;
        let told = field.facts.required || field.facts.default.is_some();
        assert!(told || group, "{}: say Required, Default, Absent or Empty: {}", place.path(), field.comment);
    }
}

#[test]
fn a_default_is_what_the_absence_of_a_field_means() {
    let mut checked = 0;
    for place in places().iter().filter(|place| !inherits(place)) {
        let Some(default) = &place.field().facts.default else { continue };
        let Some(value) = place.value(default) else { continue };
        let absent = place.judged(None);
        if is_alternative(place) || absent.is_err() {
            continue;
        }
        checked += 1;
        assert_eq!(place.judged(Some(value)), absent, "{}: default {default}", place.path());
        if let Some(other) = place.other_than(default) {
            let judged = place.judged(Some(other.clone()));
            assert!(judged.is_ok() && judged != absent, "{}: {other} is as absent: {judged:?}", place.path());
        }
    }
    assert!(checked > 50, "{checked} defaults");
}

#[test]
fn a_default_of_the_code_is_told() {
    let numbers = (0..=300).chain([500, 1000, 1024, 4096, 10_000, 100_000]);
    let numbers: Vec<Json> = numbers.map(|n: u64| json!(n)).collect();
    let milliseconds = [1, 10, 20, 50, 100, 200, 250, 500].into_iter();
    let seconds = (1..=120).chain((3..=60).map(|m| 60 * m)).chain((1..=24).map(|h| 3600 * h));
    let times = milliseconds.map(Duration::from_millis).chain(seconds.map(Duration::from_secs));
    let times: Vec<Json> = times.map(|time| json!(format_duration(time))).collect();
    for place in places() {
        let field = place.field();
        let told = field.facts.default.as_ref().is_some_and(|default| place.value(default).is_some());
        if told || field.facts.required || field.list {
            continue;
        }
        let tried = match &field.value {
            Value::WholeNumber | Value::Number => numbers.clone(),
            Value::Duration => times.clone(),
            Value::Enumeration(words) => words.values.iter().map(|(word, _)| json!(word)).collect(),
            _ => continue,
        };
        let absent = place.judged(None);
        for value in tried {
            assert_ne!(place.judged(Some(value.clone())), absent, "{}: the default is {value}", place.path());
        }
    }
}

#[test]
fn what_is_within_its_bounds_is_taken_and_what_is_outside_is_refused() {
    let mut checked = 0;
    for place in places() {
        let field = place.field();
        let Some(bounds) = &field.facts.bounds else { continue };
        checked += 1;
        let (low, high) = ends(bounds);
        let time = |text: &str| parse_duration(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let number = |text: &str| text.parse::<u64>().unwrap_or_else(|error| panic!("{text}: {error}"));
        let is_time = matches!(field.value, Value::Duration);
        let sized = |text: &str, more: i64| match is_time {
            true if more < 0 => json!(format_duration(time(text) - MOMENT)),
            true if more > 0 => json!(format_duration(time(text) + MOMENT)),
            true => json!(text),
            false => place.of_size(number(text).strict_add_signed(more)),
        };
        let check = |value: Json, taken: bool| {
            let judged = place.judged(Some(value.clone()));
            let shown = value.to_string().chars().take(80).collect::<String>();
            assert_eq!(judged.is_ok(), taken, "{}: {bounds}, {shown}: {judged:?}", place.path());
        };
        if let Some(low) = low {
            check(sized(low, 0), true);
            match (&field.value, low) {
                // The page says of zero that the field is left out; where it is not, it is refused.
                (Value::WholeNumber, "0") => {}
                (Value::WholeNumber, "1") => {
                    let zero = place.judged(Some(json!(0)));
                    assert!(zero.is_err() || zero == place.judged(None), "{}: zero", place.path());
                }
                _ => check(sized(low, -1), false),
            }
        }
        if let Some(high) = high {
            check(sized(high, 0), true);
            check(sized(high, 1), false);
        }
    }
    assert!(checked > 50, "{checked} bounds");
}

#[test]
fn a_bound_of_the_code_is_told() {
    for place in places() {
        let field = place.field();
        if field.facts.bounds.is_some() {
            continue;
        }
        let extreme = match &field.value {
            Value::WholeNumber => json!(u32::MAX),
            Value::Number => json!(1e18),
            Value::Duration => json!("10000d"),
            Value::Text if field.list => place.of_size(5000),
            Value::Text => place.of_size(10_000),
            Value::Message(_) if field.list => place.of_size(5000),
            Value::Map => place.of_size(5000),
            _ => continue,
        };
        if let Err(refused) = place.judged(Some(extreme)) {
            // The form of names is said once, for all of them. Other forms, such as that of a URL, are in the comments.
            let of_form = ["63 bytes", "http", "env:NAME", "is for callers", "cannot be"];
            assert!(of_form.iter().any(|form| refused.contains(form)), "{}: {refused}", place.path());
        }
    }
}
