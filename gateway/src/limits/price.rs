//! What tokens of a model cost.

use weir_ratelimit::Cost;

use crate::routing::entries::ModelEntry;

/// What so many tokens of a model cost; money is rounded up to the next micro-dollar.
pub fn cost(model: &ModelEntry, prompt: u64, completion: u64) -> Cost {
    let (input, output) = (model.spec.input_price_micro_dollars, model.spec.output_price_micro_dollars);
    let spend = u128::from(prompt) * u128::from(input) + u128::from(completion) * u128::from(output);
    Cost::of_request(prompt, completion, u64::try_from(spend.div_ceil(1_000_000)).unwrap_or(u64::MAX))
}
