//! What a request costs.

use crate::model::kind::Kind;
use crate::model::leaky_bucket;

/// What a request costs, in whole units per [`Kind`] (spend in micro-dollars).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    units: [u64; Kind::COUNT],
    /// Millionths of a unit on top: what is left of requests that have partly drained.
    parts: [u32; Kind::COUNT],
}

impl Cost {
    /// So many units of each kind.
    pub const fn new(units: [u64; Kind::COUNT]) -> Self {
        Self { units, parts: [0; Kind::COUNT] }
    }

    /// The cost of one request with so many prompt and completion tokens and so much money.
    pub const fn of_request(input_tokens: u64, output_tokens: u64, spend_micro_dollars: u64) -> Self {
        Self::new([
            1,
            input_tokens.saturating_add(output_tokens),
            input_tokens,
            output_tokens,
            spend_micro_dollars,
        ])
    }

    /// The whole units of one kind.
    pub const fn get(&self, kind: Kind) -> u64 {
        self.units[kind as usize]
    }

    /// The amount of one kind in the arithmetic, micro-units.
    pub(crate) fn amount(&self, kind: Kind) -> f64 {
        leaky_bucket::amount(kind, self.get(kind)) + f64::from(self.parts[kind as usize])
    }

    /// Sets one kind to whole micro-units.
    pub(crate) fn set_amount(&mut self, kind: Kind, amount: f64) {
        let unit = leaky_bucket::unit(kind);
        self.units[kind as usize] = (amount / unit).floor() as u64;
        self.parts[kind as usize] = (amount % unit) as u32;
    }
}
