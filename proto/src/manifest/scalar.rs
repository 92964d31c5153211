//! Values that are text in a file: durations, points in time, digests and enums.

use std::fmt;
use std::time;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::mirror::{Absent, Mirror};
use crate::v1;

/// The units of durations, largest first, with their nanoseconds.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// A text that is no duration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// There is nothing.
    #[error("must not be empty; write a duration such as 250ms, 30s or 1h30m")]
    Empty,
    /// A number has no unit, or one that is not known.
    #[error(
        "must be whole numbers, each with a unit of d, h, m, s, ms, us or ns, such as 250ms, 30s or 1h30m"
    )]
    Unit,
    /// Units are repeated or not in falling order.
    #[error("must have its units in falling order, each once, such as 1h30m")]
    Order,
    /// It does not fit.
    #[error("is too long")]
    TooLong,
}

/// Reads a duration: whole numbers with units, largest first, such as `250ms`, `30s`, `1h30m` or `30d`.
///
/// ```
/// use std::time::Duration;
/// use weir_proto::manifest::parse_duration;
/// assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
/// assert!(parse_duration("90").is_err());
/// ```
pub fn parse_duration(text: &str) -> Result<time::Duration, DurationError> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return Err(DurationError::Empty);
    }
    if rest == "0" {
        return Ok(time::Duration::ZERO);
    }
    let mut nanos = 0_u128;
    let mut last = None;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, tail) = tail.split_at(letters);
        let rank = UNITS.iter().position(|(name, _)| *name == unit).ok_or(DurationError::Unit)?;
        if number.is_empty() {
            return Err(DurationError::Unit);
        }
        if last.is_some_and(|last| last >= rank) {
            return Err(DurationError::Order);
        }
        let number: u64 = number.parse().map_err(|_| DurationError::TooLong)?;
        nanos += u128::from(number) * UNITS[rank].1;
        (last, rest) = (Some(rank), tail);
    }
    let secs = u64::try_from(nanos / 1_000_000_000).map_err(|_| DurationError::TooLong)?;
    // The wire's seconds are signed.
    if i64::try_from(secs).is_err() {
        return Err(DurationError::TooLong);
    }
    Ok(time::Duration::new(secs, (nanos % 1_000_000_000) as u32))
}

/// Writes a duration as [`parse_duration`] reads it: `90s` is `1m30s`, zero is `0s`. Days are written as hours.
pub fn format_duration(duration: time::Duration) -> String {
    if duration.is_zero() {
        return "0s".to_owned();
    }
    let mut nanos = duration.as_nanos();
    let mut out = String::new();
    for (unit, size) in &UNITS[1..] {
        if nanos >= *size {
            out.push_str(&format!("{}{unit}", nanos / size));
            nanos %= size;
        }
    }
    out
}

/// Reads the text of a scalar with `parse`.
fn parsed<'de, D: Deserializer<'de>, T, E: fmt::Display>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(de::Error::custom)
}

/// A duration; of the wire's values negative ones are written with a sign, which no reader takes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Duration(prost_types::Duration);

impl Mirror<prost_types::Duration> for Duration {
    fn from_wire(wire: &prost_types::Duration) -> Self {
        Self(*wire)
    }
    fn into_wire(self) -> prost_types::Duration {
        self.0
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match time::Duration::try_from(self.0) {
            Ok(d) => serializer.serialize_str(&format_duration(d)),
            Err(_) => serializer.collect_str(&format_args!("{}s{}ns", self.0.seconds, self.0.nanos)),
        }
    }
}

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let d = parsed(deserializer, parse_duration)?;
        let seconds = i64::try_from(d.as_secs()).expect("the parser takes no more");
        Ok(Self(prost_types::Duration { seconds, nanos: d.subsec_nanos().cast_signed() }))
    }
}

/// A point in time, RFC 3339.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Timestamp(prost_types::Timestamp);

impl Mirror<prost_types::Timestamp> for Timestamp {
    fn from_wire(wire: &prost_types::Timestamp) -> Self {
        Self(*wire)
    }
    fn into_wire(self) -> prost_types::Timestamp {
        self.0
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match jiff::Timestamp::new(self.0.seconds, self.0.nanos) {
            Ok(t) => serializer.collect_str(&t),
            // Outside the years that have a text; no reader takes this.
            Err(_) => serializer.collect_str(&format_args!("unix:{}", self.0.seconds)),
        }
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let t: jiff::Timestamp = parsed(deserializer, |text| {
            text.parse().map_err(|_| "must be a point in time such as 2027-01-31T12:00:00Z")
        })?;
        let floor = t.as_nanosecond().div_euclid(1_000_000_000);
        let nanos = t.as_nanosecond().rem_euclid(1_000_000_000);
        let seconds = i64::try_from(floor).map_err(de::Error::custom)?;
        Ok(Self(prost_types::Timestamp { seconds, nanos: nanos as i32 }))
    }
}

/// A digest, in lower-case hex.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sha256(Vec<u8>);

impl Mirror<Vec<u8>> for Sha256 {
    fn from_wire(wire: &Vec<u8>) -> Self {
        Self(wire.clone())
    }
    fn into_wire(self) -> Vec<u8> {
        self.0
    }
}

impl Absent for Sha256 {
    fn is_absent(&self) -> bool {
        self.0.is_empty()
    }
}

impl Serialize for Sha256 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&HEXLOWER.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Sha256 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parsed(deserializer, |text| hex(text).ok_or("must be 64 hexadecimal digits")).map(Self)
    }
}

/// The 32 bytes of 64 hex digits in either case.
fn hex(text: &str) -> Option<Vec<u8>> {
    HEXLOWER_PERMISSIVE.decode(text.as_bytes()).ok().filter(|bytes| bytes.len() == 32)
}

/// Declares an enum's form in a file: the name without its prefix, in lower case.
macro_rules! names {
    ($($name:ident $prefix:literal $expected:literal)*) => { $(
        #[derive(Debug, Clone, Default, PartialEq)]
        pub(super) struct $name(i32);

        impl Mirror<i32> for $name {
            fn from_wire(wire: &i32) -> Self {
                Self(*wire)
            }
            fn into_wire(self) -> i32 {
                self.0
            }
        }

        impl Absent for $name {
            fn is_absent(&self) -> bool {
                self.0 == 0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match v1::$name::try_from(self.0) {
                    Ok(known) => {
                        let name = known.as_str_name().trim_start_matches($prefix).to_ascii_lowercase();
                        serializer.serialize_str(&name)
                    }
                    // Of a newer version; no reader of this one takes it.
                    Err(_) => serializer.collect_str(&format_args!("unknown_{}", self.0)),
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                parsed(deserializer, |text| {
                    let lower = text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
                    v1::$name::from_str_name(&format!("{}{}", $prefix, text.to_ascii_uppercase()))
                        .filter(|known| lower && *known != v1::$name::Unspecified)
                        .ok_or(concat!("must be one of ", $expected))
                })
                .map(|known| Self(known as i32))
            }
        }
    )* };
}

names! {
    BalancingPolicy "BALANCING_POLICY_" "weighted_round_robin, round_robin, random, least_request, prefix_affinity, priority"
    AdminState "ADMIN_STATE_" "active, draining, disabled"
    Dialect "DIALECT_" "openai, azure, anthropic, gemini, vertex, vllm, sglang, llama_cpp, tgi, ollama, xai, deepseek, mistral, groq, openrouter, new_api"
    HitKind "HIT_KIND_" "requests, tokens, input_tokens, output_tokens"
    RuleMode "RULE_MODE_" "enforce, meter, report, shadow"
    TimeUnit "TIME_UNIT_" "second, minute, hour, day, week, month, year"
    WithoutStore "WITHOUT_STORE_" "local_share, open, closed"
    Priority "PRIORITY_" "high, normal, low"
    BudgetPeriod "BUDGET_PERIOD_" "day, week, month"
}
