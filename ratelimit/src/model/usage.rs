//! Who used how much: an account per tenant, model and day.
//!
//! A settlement brings what its request used; the script that applies the settlement adds it, in the same step and under
//! the same id, so that it is counted once however often it is sent. A tenant's day is one record in the tenant's slot,
//! with one line per model; it is kept for [`USAGE_LIFE`] after its first line. Nothing here limits anything.

use std::sync::Arc;
use std::time::Duration;

use crate::model::cost::Cost;
use crate::model::key::Key;
use crate::model::kind::Kind;

/// How long the record of a day is kept: a year, and time to close its books.
pub const USAGE_LIFE: Duration = Duration::from_secs(400 * 24 * 3600);
/// Most models with a line of their own in a tenant's day; what comes after them is added up under [`OTHER_MODELS`].
pub const USAGE_MODELS_MAX: usize = 4096;
/// The line for models beyond [`USAGE_MODELS_MAX`]. No model can have this name.
pub const OTHER_MODELS: &str = "~";
/// Most records in one call of [`crate::model::limiter::Limiter::usage`].
pub const USAGE_RECORDS_MAX: usize = 8;

/// Largest change that is noted at once, and largest sum: what a double holds exactly.
const MOST: i64 = 9_000_000_000_000_000;

/// What was used, or by how much that is to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Requests.
    pub requests: i64,
    /// Prompt tokens.
    pub input_tokens: i64,
    /// Completion tokens.
    pub output_tokens: i64,
    /// Money, micro-dollars.
    pub spend_micro_dollars: i64,
}

impl Tally {
    /// What a request cost.
    pub fn of(cost: &Cost) -> Self {
        let amount = |kind| i64::try_from(cost.get(kind)).unwrap_or(MOST).min(MOST);
        Self {
            requests: amount(Kind::Requests),
            input_tokens: amount(Kind::InputTokens),
            output_tokens: amount(Kind::OutputTokens),
            spend_micro_dollars: amount(Kind::Spend),
        }
    }

    /// Both together, within what can be noted.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self::from_array(std::array::from_fn(|n| {
            self.to_array()[n].saturating_add(other.to_array()[n]).clamp(-MOST, MOST)
        }))
    }

    /// What this is more than the other.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.plus(Self::from_array(other.to_array().map(|amount| amount.saturating_neg())))
    }

    /// Whether it changes nothing.
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }

    /// In the order of the stores.
    pub(crate) fn to_array(self) -> [i64; 4] {
        [self.requests, self.input_tokens, self.output_tokens, self.spend_micro_dollars]
    }

    pub(crate) fn from_array([requests, input_tokens, output_tokens, spend_micro_dollars]: [i64; 4]) -> Self {
        Self { requests, input_tokens, output_tokens, spend_micro_dollars }
    }
}

/// What a settlement adds to the account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage {
    /// The tenant's day: [`Key::usage`].
    pub record: Key,
    /// The name of the model's resource.
    pub model: Arc<str>,
    /// What to add; negative where more was noted before than was used in the end.
    pub tally: Tally,
}

/// The lines of one record, by model.
pub type UsageLines = Vec<(String, Tally)>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tallies_add_up_and_stay_exact() {
        let cost = Tally::of(&Cost::of_request(3, 4, 5));
        assert_eq!(cost.to_array(), [1, 3, 4, 5]);
        assert!(cost.minus(cost).is_zero());
        assert_eq!(cost.minus(cost.plus(cost)).output_tokens, -4);
        assert_eq!(Tally::of(&Cost::of_request(u64::MAX, 0, 0)).plus(cost).input_tokens, MOST);
    }
}
