//! Settings of one simulated server, with unit, bound and default of each in one place.

use std::time::Duration;

use crate::faults::{Faults, InvalidFaults};

/// Largest number of answers generated at the same time.
pub(crate) const SLOTS_MAX: usize = 100_000;
/// Largest number of requests waiting for a slot.
pub(crate) const QUEUE_MAX: usize = 1_000_000;
/// Largest number of models one server lists; each has its own metrics.
pub(crate) const MODELS_MAX: usize = 64;
/// Longest text in a header or metric label that comes from the configuration.
pub(crate) const NAME_BYTES_MAX: usize = 128;
/// Most tokens one answer may have, also by request header.
pub(crate) const OUTPUT_TOKENS_MAX: u64 = 10_000_000;
/// Largest text of one token event, also by request header.
pub(crate) const CHUNK_BYTES_MAX: usize = 1024 * 1024;
/// Fastest rate that is still simulated with a clock; beyond it, use 0 (no delay at all).
pub(crate) const TOKENS_PER_S_MAX: f64 = 1e9;
/// Longest vector of an embedding.
pub(crate) const EMBEDDING_DIMENSIONS_MAX: usize = 16_384;
/// Most connections open at once.
pub(crate) const CONNECTIONS_MAX: usize = 100_000;

/// What one simulated server is and how fast it works.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Model names served, 1 to 64, each at most 128 visible ASCII characters. Others are answered 404.
    pub models: Vec<String>,
    /// Region told in the header `x-mock-region`; at most 128 visible ASCII characters.
    pub region: String,
    /// Name told in the header `x-mock-instance`, and as `req-NAME` in `request-id`, which gateways pass on; at most 128 visible ASCII characters. Empty: `mock-<port>`.
    pub instance: String,
    /// Prompt tokens read per second, 0 to 1e9. 0: the prompt costs no time.
    pub prefill_tokens_per_s: f64,
    /// Tokens written per second and answer, 0 to 1e9. 0: tokens cost no time, many go out in one write.
    pub decode_tokens_per_s: f64,
    /// Answers generated at the same time, 1 to 100 000.
    pub slots: usize,
    /// Requests waiting for a slot, first come first served, 0 to 1 000 000. One more is answered 429.
    pub queue: usize,
    /// Spread of the time of each token, as a fraction of it, 0.0 to 1.0.
    pub jitter: f64,
    /// Seed of everything drawn: jitter, probabilities of faults, ids. Any value.
    pub seed: u64,
    /// How long the server reports that it is loading after it was bound, at most 1 hour.
    pub cold_start: Duration,
    /// Tokens of an answer when the request asks for more or does not say, 1 to 10 000 000.
    pub output_tokens: u64,
    /// Bytes of text in each token event, 0 to 1 MiB. 0: short words of natural length.
    pub chunk_bytes: usize,
    /// Numbers in an embedding when the request does not say, 1 to 16 384.
    pub embedding_dimensions: usize,
    /// Models that embed alone: other endpoints answer them 400, as vLLM does.
    pub embeds_only: bool,
    /// Connections open at once, 1 to 100 000; further ones wait in the listener's backlog.
    pub connections_max: usize,
    /// How long open answers may go on after shutdown was asked for, at most 1 hour. Then they are cut.
    pub drain: Duration,
    /// Faults switched on from the start.
    pub faults: Faults,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            models: vec!["mock-model".to_owned()],
            region: "local".to_owned(),
            instance: String::new(),
            prefill_tokens_per_s: 0.0,
            decode_tokens_per_s: 0.0,
            // vLLM's usual limit of sequences in one batch.
            slots: 256,
            queue: 1024,
            jitter: 0.0,
            seed: 0,
            cold_start: Duration::ZERO,
            output_tokens: 64,
            chunk_bytes: 0,
            embedding_dimensions: 256,
            embeds_only: false,
            connections_max: 10_000,
            drain: Duration::from_secs(5),
            faults: Faults::default(),
        }
    }
}

/// A setting is outside its bound.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InvalidConfig {
    /// A number is outside its range.
    #[error("{field} must be {expected}")]
    OutOfRange {
        /// Name of the field in [`Config`].
        field: &'static str,
        /// The allowed range with its unit.
        expected: &'static str,
    },
    /// An initial fault is invalid.
    #[error("faults: {0}")]
    Faults(#[from] InvalidFaults),
}

impl Config {
    /// Longest cold start and drain.
    const DURATION_MAX: Duration = Duration::from_secs(3600);

    /// Checks every bound stated at the fields.
    ///
    /// # Errors
    /// The first field outside its bound.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let rate = |rate: f64| (0.0..=TOKENS_PER_S_MAX).contains(&rate);
        let text = "at most 128 visible ASCII characters without quotes or backslashes";
        let models = (1..=MODELS_MAX).contains(&self.models.len())
            && self.models.iter().all(|name| !name.is_empty() && is_plain(name));
        let checks = [
            (models, "models", "1 to 64 names, each 1 to 128 visible ASCII characters"),
            (is_plain(&self.region), "region", text),
            (is_plain(&self.instance), "instance", text),
            (rate(self.prefill_tokens_per_s), "prefill_tokens_per_s", "0 to 1e9 tokens per second"),
            (rate(self.decode_tokens_per_s), "decode_tokens_per_s", "0 to 1e9 tokens per second"),
            ((1..=SLOTS_MAX).contains(&self.slots), "slots", "1 to 100000 requests"),
            (self.queue <= QUEUE_MAX, "queue", "0 to 1000000 requests"),
            ((0.0..=1.0).contains(&self.jitter), "jitter", "a fraction from 0.0 to 1.0"),
            (self.cold_start <= Self::DURATION_MAX, "cold_start", "at most one hour"),
            ((1..=OUTPUT_TOKENS_MAX).contains(&self.output_tokens), "output_tokens", "1 to 10000000 tokens"),
            (self.chunk_bytes <= CHUNK_BYTES_MAX, "chunk_bytes", "0 to 1048576 bytes"),
            (
                (1..=EMBEDDING_DIMENSIONS_MAX).contains(&self.embedding_dimensions),
                "embedding_dimensions",
                "1 to 16384 numbers",
            ),
            (
                (1..=CONNECTIONS_MAX).contains(&self.connections_max),
                "connections_max",
                "1 to 100000 connections",
            ),
            (self.drain <= Self::DURATION_MAX, "drain", "at most one hour"),
        ];
        for (holds, field, expected) in checks {
            if !holds {
                return Err(InvalidConfig::OutOfRange { field, expected });
            }
        }
        Ok(self.faults.validate()?)
    }
}

/// Safe to print into a header, a metric label and JSON without escaping.
fn is_plain(text: &str) -> bool {
    text.len() <= NAME_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(Config::default().validate(), Ok(()));
    }

    #[test]
    fn each_bound_is_checked() {
        let wrong = [
            Config { models: vec![], ..Config::default() },
            Config { models: vec!["a\"b".into()], ..Config::default() },
            Config { region: "a\r\nb".into(), ..Config::default() },
            Config { prefill_tokens_per_s: -1.0, ..Config::default() },
            Config { decode_tokens_per_s: f64::NAN, ..Config::default() },
            Config { slots: 0, ..Config::default() },
            Config { queue: QUEUE_MAX + 1, ..Config::default() },
            Config { jitter: 1.5, ..Config::default() },
            Config { output_tokens: 0, ..Config::default() },
            Config { chunk_bytes: CHUNK_BYTES_MAX + 1, ..Config::default() },
            Config { embedding_dimensions: 0, ..Config::default() },
            Config { connections_max: 0, ..Config::default() },
            Config { drain: Duration::from_secs(3601), ..Config::default() },
            Config { faults: Faults { slow_factor: Some(0.0), ..Faults::default() }, ..Config::default() },
        ];
        for config in wrong {
            assert!(config.validate().is_err(), "{config:?}");
        }
    }
}
