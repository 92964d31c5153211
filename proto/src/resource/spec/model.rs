//! Models.

use std::time::Duration;

use super::{Rates, TimeoutOverrides, secs};
use crate::resource::Name;
use crate::resource::check::Check;
use crate::v1;

/// A name clients may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The pool that serves it.
    pub pool: Name,
    /// The name in requests and answers.
    pub client_name: String,
    /// Models to try when none of this one's backends is usable.
    pub fallbacks: Vec<Name>,
    /// Micro-dollars per million prompt tokens.
    pub input_price_micro_dollars: u64,
    /// Micro-dollars per million completion tokens.
    pub output_price_micro_dollars: u64,
    /// Micro-dollars per million prompt tokens from the provider's cache: the input price.
    pub cached_input_price_micro_dollars: u64,
    /// Micro-dollars per million prompt tokens that are written to the provider's cache: the input price.
    pub cache_write_price_micro_dollars: u64,
    /// Overrides of the pool's clocks.
    pub timeouts: TimeoutOverrides,
    /// The timeout of a probe; `None` is the pool's.
    pub health_timeout: Option<Duration>,
    /// Limits for everybody together.
    pub limits: Option<Rates>,
}

impl Model {
    /// Longest client-facing name, bytes.
    pub const CLIENT_NAME_MAX_BYTES: usize = 256;
    /// Highest price, micro-dollars per million tokens: about a dollar per token.
    pub const PRICE_MAX: u64 = 1 << 40;

    pub(in crate::resource) fn judge(
        w: &v1::ModelSpec,
        resource_name: &str,
        check: &mut Check,
    ) -> Option<Self> {
        let pool = check.name("pool", &w.pool);
        check.text("client_name", &w.client_name, Self::CLIENT_NAME_MAX_BYTES);
        if w.fallbacks.len() > 8 {
            check.violation("fallbacks", "must be at most 8");
        }
        let fallbacks = check.names("fallbacks", &w.fallbacks);
        if fallbacks.iter().any(|f| f.as_str() == resource_name) {
            check.violation("fallbacks", "must not name the model itself");
        }
        let mut price = |field: &str, micro_dollars| check.range(field, micro_dollars, 0, Self::PRICE_MAX);
        let input_price = price("input_price_micro_dollars", w.input_price_micro_dollars);
        let mut cache_price =
            |field: &str, own: Option<u64>| own.map_or(input_price, |own| price(field, own));
        let cached_input_price =
            cache_price("cached_input_price_micro_dollars", w.cached_input_price_micro_dollars);
        let cache_write_price =
            cache_price("cache_write_price_micro_dollars", w.cache_write_price_micro_dollars);
        let model = Self {
            pool: pool?,
            client_name: if w.client_name.is_empty() {
                resource_name.to_owned()
            } else {
                w.client_name.clone()
            },
            fallbacks,
            input_price_micro_dollars: input_price,
            output_price_micro_dollars: price("output_price_micro_dollars", w.output_price_micro_dollars),
            cached_input_price_micro_dollars: cached_input_price,
            cache_write_price_micro_dollars: cache_write_price,
            timeouts: TimeoutOverrides::judge(w.timeouts.as_ref(), check),
            health_timeout: check.duration_opt("health_timeout", w.health_timeout.as_ref(), secs(600)),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
        };
        Some(model)
    }
}
