//! The fields of one map of another gateway's file, read by name and type. Whatever nobody has read, and whatever was of
//! another type than it should be, is noted: nothing of a file is dropped in silence.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::{Import, Note};

/// What stands before the name of a variable that LiteLLM reads when it starts.
const FROM_ENVIRONMENT: &str = "os.environ/";

/// The variables that a file itself sets, by name.
#[derive(Debug, Default)]
pub(super) struct Variables(BTreeMap<String, String>);

impl Variables {
    /// Of a section such as `environment_variables`.
    pub(super) fn of(section: Option<&Value>) -> Self {
        let fields = section.and_then(Value::as_object).into_iter().flatten();
        Self(fields.filter_map(|(name, value)| Some((name.clone(), plain_text(value)?))).collect())
    }

    /// The value of a variable, where the file says it.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// A scalar as text.
fn plain_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// The variable that a value is taken from.
pub(super) fn variable(value: &Value) -> Option<&str> {
    value.as_str()?.strip_prefix(FROM_ENVIRONMENT)
}

/// The fields of one map. [`Fields::finish`] says what became of those that were not read.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    path: String,
    values: BTreeMap<&'a str, &'a Value>,
    read: BTreeSet<&'a str>,
    variables: &'a Variables,
    notes: Vec<Note>,
}

impl<'a> Fields<'a> {
    /// Of the map at this path. What is null is as absent, as for LiteLLM.
    pub(super) fn new(
        path: impl Into<String>,
        map: Option<&'a Map<String, Value>>,
        variables: &'a Variables,
    ) -> Self {
        let values = map.into_iter().flatten().filter(|(_, value)| !value.is_null());
        let values = values.map(|(name, value)| (name.as_str(), value)).collect();
        Self { path: path.into(), values, read: BTreeSet::new(), variables, notes: Vec::new() }
    }

    /// With the fields of another map where this one has none.
    pub(super) fn or(mut self, defaults: Option<&'a Map<String, Value>>) -> Self {
        for (name, value) in defaults.into_iter().flatten().filter(|(_, value)| !value.is_null()) {
            self.values.entry(name.as_str()).or_insert(value);
        }
        self
    }

    /// The path of a field.
    pub(super) fn path(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// Says something of a field.
    pub(super) fn note(&mut self, field: &str, text: impl Into<String>) {
        let path = self.path(field);
        self.notes.push(Note { path, text: text.into() });
    }

    /// A value of any type, read from now on.
    pub(super) fn take(&mut self, field: &str) -> Option<&'a Value> {
        let (name, value) = self.values.get_key_value(field)?;
        self.read.insert(name);
        Some(value)
    }

    /// A text, or the value of a variable that the file sets. A variable that it does not set is noted, as is another type.
    pub(super) fn text(&mut self, field: &str) -> Option<String> {
        let value = self.take(field)?;
        match (variable(value), value.as_str()) {
            (Some(name), _) => self.resolved(field, name),
            (None, Some(text)) => Some(text.to_owned()),
            (None, None) => {
                self.note(field, "not carried over: must be text");
                None
            }
        }
    }

    /// A number, also as text or by a variable that the file sets. `allowed` says what it must be, and what to say if it is
    /// not.
    pub(super) fn number(&mut self, field: &str, allowed: impl Fn(f64) -> bool, what: &str) -> Option<f64> {
        let value = self.take(field)?;
        let text = match variable(value) {
            Some(name) => self.resolved(field, name)?,
            None => plain_text(value).unwrap_or_default(),
        };
        let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite() && allowed(*number));
        if number.is_none() {
            self.note(field, format!("not carried over: must be {what}"));
        }
        number
    }

    /// A whole number within bounds; `100.0` is one.
    pub(super) fn whole(&mut self, field: &str, min: u64, max: u64) -> Option<u64> {
        let is_whole = |number: f64| number.fract() == 0.0 && number >= min as f64 && number <= max as f64;
        let number = self.number(field, is_whole, &format!("a whole number from {min} to {max}"))?;
        // In bounds, which a double holds exactly.
        Some(number as u64)
    }

    fn resolved(&mut self, field: &str, name: &str) -> Option<String> {
        let value = self.variables.get(name).map(str::to_owned);
        if value.is_none() {
            let text = format!("not carried over: put the value of {name} into the file and import again");
            self.note(field, text);
        }
        value
    }

    /// What was noted, of fields of something that is not carried over at all.
    pub(super) fn refuse(self, out: &mut Import) {
        out.notes.extend(self.notes);
    }

    /// What was noted, and that the rest was not carried over.
    pub(super) fn finish(self, out: &mut Import) {
        let rest: Vec<String> = self
            .values
            .keys()
            .filter(|name| !self.read.contains(*name))
            .map(|name| self.path(name))
            .collect();
        out.notes.extend(self.notes);
        for path in rest {
            out.note(path, "not carried over");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notes(fields: Fields<'_>) -> Vec<(String, String)> {
        let mut out = Import::default();
        fields.finish(&mut out);
        out.notes.into_iter().map(|note| (note.path, note.text)).collect()
    }

    fn map(text: &str) -> Map<String, Value> {
        serde_json::from_str(text).expect("an object")
    }

    const ANY: fn(f64) -> bool = |_| true;

    #[test]
    fn numbers_are_read_in_each_form_that_litellm_reads() {
        let variables = Variables(BTreeMap::from([("N".to_owned(), "7.5".to_owned())]));
        let map = map(
            r#"{"a": 300, "b": "300", "c": " 1e-6 ", "d": "os.environ/N", "e": 100.0, "f": "2", "n": null}"#,
        );
        let mut fields = Fields::new("at", Some(&map), &variables);
        assert_eq!(fields.number("a", ANY, ""), Some(300.0));
        assert_eq!(fields.number("b", ANY, ""), Some(300.0));
        assert_eq!(fields.number("c", ANY, ""), Some(0.000_001));
        assert_eq!(fields.number("d", ANY, ""), Some(7.5));
        assert_eq!((fields.whole("e", 1, 100), fields.whole("f", 1, 2)), (Some(100), Some(2)));
        assert_eq!((fields.number("n", ANY, ""), fields.text("absent")), (None, None));
        assert_eq!(notes(fields), []);
    }

    #[test]
    fn what_is_of_another_type_or_not_known_or_not_read_is_said() {
        let variables = Variables::default();
        let map = map(
            r#"{"a": "30s", "b": [1], "c": "os.environ/N", "d": 1.5, "e": true, "f": "nan", "g": 5, "h": {}, "i": -1}"#,
        );
        let mut fields = Fields::new("at", Some(&map), &variables);
        for field in ["a", "b", "c", "e", "f"] {
            assert_eq!(fields.number(field, ANY, "a number"), None, "{field}");
        }
        assert_eq!((fields.whole("d", 0, 9), fields.whole("i", 0, 9), fields.text("g")), (None, None, None));
        let notes = notes(fields);
        let said: Vec<&str> = notes.iter().map(|(path, _)| path.as_str()).collect();
        assert_eq!(said, ["at.a", "at.b", "at.c", "at.e", "at.f", "at.d", "at.i", "at.g", "at.h"]);
        assert!(notes[2].1.contains("the value of N") && notes[5].1.contains("from 0 to 9"), "{notes:?}");
        assert_eq!(notes[8].1, "not carried over");
    }

    #[test]
    fn defaults_fill_what_is_absent() {
        let (own, defaults) = (map(r#"{"a": 1, "b": null}"#), map(r#"{"a": 2, "b": 3, "c": 4}"#));
        let variables = Variables::default();
        let mut fields = Fields::new("at", Some(&own), &variables).or(Some(&defaults));
        let read = ["a", "b", "c"].map(|field| fields.whole(field, 0, 9));
        assert_eq!(read, [Some(1), Some(3), Some(4)]);
    }
}
