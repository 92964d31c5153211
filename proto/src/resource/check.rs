//! Collecting violations with the paths of their fields.

use std::fmt;
use std::time::Duration;

use super::Name;

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field, such as `backend.timeouts.total`.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything that is wrong with a resource; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, v) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{}: {}", v.path, v.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

/// The judge's notebook: a prefix for paths (empty: none) and the violations so far.
#[derive(Debug)]
pub(super) struct Check {
    prefix: &'static str,
    found: Vec<Violation>,
}

impl Check {
    pub(super) fn new(prefix: &'static str) -> Self {
        Self { prefix, found: Vec::new() }
    }

    pub(super) fn violation(&mut self, path: &str, message: impl Into<String>) {
        let path = if self.prefix.is_empty() { path.to_owned() } else { format!("{}.{path}", self.prefix) };
        self.found.push(Violation { path, message: message.into() });
    }

    pub(super) fn finish(self) -> Result<(), Violations> {
        if self.found.is_empty() { Ok(()) } else { Err(Violations(self.found)) }
    }

    /// The name of the resource itself: its path has no prefix.
    pub(super) fn name_at(&mut self, path: String, text: &str) -> Option<Name> {
        Name::parse(text).map_err(|m| self.found.push(Violation { path, message: m.into() })).ok()
    }

    pub(super) fn name(&mut self, path: &str, text: &str) -> Option<Name> {
        Name::parse(text).map_err(|m| self.violation(path, m)).ok()
    }

    pub(super) fn names(&mut self, path: &str, texts: &[String]) -> Vec<Name> {
        texts.iter().enumerate().filter_map(|(i, t)| self.name(&format!("{path}[{i}]"), t)).collect()
    }

    pub(super) fn text(&mut self, path: &str, text: &str, max_bytes: usize) {
        if text.len() > max_bytes {
            self.violation(path, format!("must be at most {max_bytes} bytes"));
        } else if text.chars().any(char::is_control) {
            self.violation(path, "must not hold control characters");
        }
    }

    pub(super) fn range<T: PartialOrd + fmt::Display + Copy>(
        &mut self,
        path: &str,
        value: T,
        low: T,
        high: T,
    ) -> T {
        if !(low <= value && value <= high) {
            self.violation(path, format!("must be {low} to {high}, is {value}"));
        }
        value
    }

    /// An absent duration is the default; a present one is positive and at most `max`.
    pub(super) fn duration(
        &mut self,
        path: &str,
        value: Option<&prost_types::Duration>,
        default: Duration,
        max: Duration,
    ) -> Duration {
        self.duration_opt(path, value, max).unwrap_or(default)
    }

    pub(super) fn duration_opt(
        &mut self,
        path: &str,
        value: Option<&prost_types::Duration>,
        max: Duration,
    ) -> Option<Duration> {
        let value = value?;
        match Duration::try_from(*value) {
            Ok(d) if !d.is_zero() && d <= max => Some(d),
            Ok(d) => {
                self.violation(path, format!("must be above 0s and at most {max:?}, is {d:?}"));
                None
            }
            Err(_) => {
                self.violation(path, "must not be negative");
                None
            }
        }
    }
}
