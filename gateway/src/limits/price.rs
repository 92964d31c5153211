//! The price of a model's tokens.

use weir_proto::resource::Model;
use weir_ratelimit::Cost;

use crate::api::usage::Tokens;
use crate::routing::entries::ModelEntry;

/// The price of these tokens of a model without cached ones, rounded up to the next micro-dollar.
pub fn cost(model: &ModelEntry, prompt: u64, completion: u64) -> Cost {
    cost_of(model, &Tokens::reserved(prompt, completion))
}

/// The cost of these tokens of a model. Tokens read from the provider's cache and written to it have prices of their
/// own; limits of tokens count all of them alike.
pub fn cost_of(model: &ModelEntry, tokens: &Tokens) -> Cost {
    Cost::of_request(tokens.prompt, tokens.completion, spend(&model.spec, tokens))
}

/// Micro-dollars, rounded up.
fn spend(model: &Model, tokens: &Tokens) -> u64 {
    let read = tokens.cache_read.min(tokens.prompt);
    let written = tokens.cache_write.min(tokens.prompt - read);
    let spend = [
        (tokens.prompt - read - written, model.input_price_micro_dollars),
        (read, model.cached_input_price_micro_dollars),
        (written, model.cache_write_price_micro_dollars),
        (tokens.completion, model.output_price_micro_dollars),
    ];
    let spend: u128 = spend.into_iter().map(|(tokens, price)| u128::from(tokens) * u128::from(price)).sum();
    u64::try_from(spend.div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use weir_proto::resource::{Resource, Spec};

    use super::*;

    fn model(prices: &str) -> Model {
        let text = format!("kind: model\nname: m\nspec: {{pool: p, {prices}}}\n");
        let wire = weir_proto::manifest::parse(&text, "m.yaml").expect("valid");
        match Resource::try_from(&wire[0]).expect("valid").spec {
            Spec::Model(model) => model,
            other => panic!("{other:?}"),
        }
    }

    fn tokens(prompt: u64, cache_read: u64, cache_write: u64, completion: u64) -> Tokens {
        Tokens { cache_read, cache_write, ..Tokens::reserved(prompt, completion) }
    }

    #[test]
    fn cached_tokens_have_their_own_price_and_the_input_price_without_one() {
        let plain = model("input_price_micro_dollars: 2000000, output_price_micro_dollars: 8000000");
        assert_eq!(spend(&plain, &tokens(100_000, 99_000, 500, 100)), 200_800);
        let cached = model(
            "input_price_micro_dollars: 2000000, output_price_micro_dollars: 8000000, \
             cached_input_price_micro_dollars: 500000, cache_write_price_micro_dollars: 2500000",
        );
        assert_eq!(spend(&cached, &tokens(100_000, 99_000, 500, 100)), 1_000 + 49_500 + 1_250 + 800);
        let free = model("input_price_micro_dollars: 2000000, cached_input_price_micro_dollars: 0");
        assert_eq!(spend(&free, &tokens(100_000, 99_000, 0, 0)), 2_000);
        assert_eq!(spend(&free, &tokens(10, 99, 99, 0)), 0, "parts are within their whole");
        assert_eq!(spend(&plain, &tokens(1, 0, 0, 0)), 2, "to the next micro-dollar");
        let dear =
            model("input_price_micro_dollars: 1099511627776, output_price_micro_dollars: 1099511627776");
        assert_eq!(spend(&dear, &tokens(u64::MAX, 0, 0, u64::MAX)), u64::MAX);
    }
}
