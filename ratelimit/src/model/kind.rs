//! What a bucket counts, and how much of it it holds.

use std::time::Duration;

/// What a bucket counts. The discriminant is the position inside a record and on the wire to the scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(usize)]
pub enum Kind {
    /// One per request.
    Requests = 0,
    /// Prompt and completion tokens together.
    Tokens = 1,
    /// Prompt tokens.
    InputTokens = 2,
    /// Completion tokens.
    OutputTokens = 3,
    /// Money, in micro-dollars.
    Spend = 4,
}

impl Kind {
    /// How many kinds there are: the width of a record.
    pub const COUNT: usize = 5;
    /// Every kind, in record order.
    pub const ALL: [Kind; Kind::COUNT] =
        [Kind::Requests, Kind::Tokens, Kind::InputTokens, Kind::OutputTokens, Kind::Spend];

    /// The name used in error bodies, metrics labels and headers.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Requests => "requests",
            Kind::Tokens => "tokens",
            Kind::InputTokens => "input_tokens",
            Kind::OutputTokens => "output_tokens",
            Kind::Spend => "spend",
        }
    }
}

/// Capacity and drain rate of one bucket. Neither is stored: both come with every call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// The most that may be used at once, whole units. At most [`Bucket::MAX_UNITS`]; of money 9e15 micro-dollars.
    pub capacity: u64,
    /// Whole units drained per `period`. Zero never drains; such a bucket state is forgotten `period` after it was written.
    pub rate: u64,
    /// The period of `rate`; a minute for requests and tokens per minute. At least one millisecond.
    pub period: Duration,
}

impl Bucket {
    /// Largest capacity or rate: 2^53 micro-units, so that doubles in Lua stay exact.
    pub const MAX_UNITS: u64 = 9_000_000_000;

    /// A bucket of `rate` per minute that holds `burst` minutes' worth.
    pub fn per_minute(rate: u64, burst: f64) -> Self {
        Self::per(rate, Duration::from_secs(60), burst)
    }

    /// A bucket of `rate` per period that holds `burst` periods' worth.
    pub fn per(rate: u64, period: Duration, burst: f64) -> Self {
        let capacity = ((rate as f64) * burst.max(0.0)).floor().clamp(0.0, Self::MAX_UNITS as f64) as u64;
        Self { capacity: capacity.max(u64::from(rate > 0)), rate: rate.min(Self::MAX_UNITS), period }
    }
}
