//! What a request will probably cost, learned from what requests did cost.
//!
//! The output of a (tenant, model) is expected at its mean plus twice its mean deviation, which most answers stay
//! below; what an answer exceeds it by is charged while it streams. Prompt tokens come from bytes at the rate that
//! providers' own counts have shown for the model.
//!
//! Tables are bounded: the entries used last are kept, in two generations of which the older is dropped whole.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tokens expected of an answer while nothing is known.
const OUTPUT_UNKNOWN: u64 = 512;
/// Most pairs of tenant and model that are remembered, in each generation.
const PAIRS_MAX: usize = 10_000;
/// Most models that are remembered, in each generation.
const MODELS_MAX: usize = 2_000;
/// The weight of a new answer in the mean, and in the deviation: those of TCP's round-trip estimate.
const MEAN_GAIN: f64 = 1.0 / 8.0;
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
/// What is known of a prompt's rate before anything was counted: four bytes to a token, with the weight of a kilobyte.
const PRIOR_BYTES: f64 = 1024.0;
const PRIOR_TOKENS: f64 = 256.0;
/// How much of what was seen is kept with each further prompt.
const MEMORY: f64 = 0.98;
/// Bounds of what is believed, tokens per byte: a hostile or broken count must not move everybody's estimates.
const RATE_BOUNDS: (f64, f64) = (1.0 / 16.0, 2.0);

/// How many times what is expected one answer may count for: an outlier moves the estimate by a few answers' worth, and a
/// lasting change is followed in a few answers all the same.
const OUTPUT_OUTLIER: f64 = 4.0;
/// The part of what is remembered that one prompt may weigh, at least a kilobyte.
const PROMPT_WEIGHT: f64 = 0.1;

/// Learned estimates of one gateway.
#[derive(Debug, Default)]
pub struct Estimates {
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    outputs: Recent<(Arc<str>, Arc<str>), Output>,
    prompts: Recent<Arc<str>, Prompt>,
}

#[derive(Debug, Clone, Copy)]
struct Output {
    mean: f64,
    deviation: f64,
}

#[derive(Debug, Clone, Copy)]
struct Prompt {
    bytes: f64,
    tokens: f64,
}

impl Output {
    fn expected(&self) -> f64 {
        self.mean + 2.0 * self.deviation
    }
}

impl Estimates {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // An entry is written whole, so a poisoned lock guards nothing half done.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tokens that one answer of the model to the tenant will probably have.
    pub fn output(&self, tenant: &Arc<str>, model: &Arc<str>) -> u64 {
        let known = self.tables().outputs.get(&(tenant.clone(), model.clone()));
        known.map_or(OUTPUT_UNKNOWN, |known| known.expected().ceil().max(1.0) as u64)
    }

    /// An answer had so many tokens.
    pub fn learn_output(&self, tenant: &Arc<str>, model: &Arc<str>, tokens: u64) {
        let (mut tables, key) = (self.tables(), (tenant.clone(), model.clone()));
        let known = tables.outputs.get(&key);
        let expected = known.map_or(0.0, |known| known.expected()).max(OUTPUT_UNKNOWN as f64);
        let tokens = (tokens as f64).min(expected * OUTPUT_OUTLIER);
        let next = match known {
            None => Output { mean: tokens, deviation: tokens / 2.0 },
            Some(Output { mean, deviation }) => Output {
                mean: mean + MEAN_GAIN * (tokens - mean),
                deviation: deviation + DEVIATION_GAIN * ((tokens - mean).abs() - deviation),
            },
        };
        tables.outputs.put(key, next, PAIRS_MAX);
    }

    /// Tokens that a prompt of so many bytes has for the model; at least one.
    pub fn prompt(&self, model: &Arc<str>, bytes: u64) -> u64 {
        let seen = self.tables().prompts.get(model);
        let seen = seen.unwrap_or(Prompt { bytes: PRIOR_BYTES, tokens: PRIOR_TOKENS });
        let rate = (seen.tokens / seen.bytes).clamp(RATE_BOUNDS.0, RATE_BOUNDS.1);
        ((bytes as f64 * rate).ceil() as u64).max(1)
    }

    /// The provider counted so many tokens in a prompt of so many bytes.
    pub fn learn_prompt(&self, model: &Arc<str>, bytes: u64, tokens: u64) {
        if bytes == 0 {
            return;
        }
        let mut tables = self.tables();
        let seen = tables.prompts.get(model);
        let seen = seen.unwrap_or(Prompt { bytes: PRIOR_BYTES, tokens: PRIOR_TOKENS });
        let (bytes, tokens) = (bytes as f64, tokens as f64);
        let tokens = tokens.clamp(bytes * RATE_BOUNDS.0, bytes * RATE_BOUNDS.1);
        let weight = (seen.bytes * PROMPT_WEIGHT).max(PRIOR_BYTES).min(bytes) / bytes;
        let (bytes, tokens) = (bytes * weight, tokens * weight);
        let next = Prompt { bytes: seen.bytes * MEMORY + bytes, tokens: seen.tokens * MEMORY + tokens };
        tables.prompts.put(model.clone(), next, MODELS_MAX);
    }
}

/// A map of what was written last, twice its bound at most.
#[derive(Debug)]
struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Self { young: HashMap::new(), old: HashMap::new() }
    }
}

impl<K: Hash + Eq, V: Copy> Recent<K, V> {
    fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.young.get(key).or_else(|| self.old.get(key)).copied()
    }

    fn put(&mut self, key: K, value: V, bound: usize) {
        if self.young.len() >= bound && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Arc<str> {
        text.into()
    }

    #[test]
    fn an_estimate_covers_most_answers_and_follows_a_change() {
        let (estimates, tenant, model) = (Estimates::default(), name("acme"), name("m"));
        assert_eq!(estimates.output(&tenant, &model), OUTPUT_UNKNOWN);
        for tokens in [80, 120].into_iter().cycle().take(100) {
            estimates.learn_output(&tenant, &model, tokens);
        }
        let learned = estimates.output(&tenant, &model);
        assert!((120..200).contains(&learned), "{learned}");
        (0..60).for_each(|_| estimates.learn_output(&tenant, &model, 1000));
        assert!(estimates.output(&tenant, &model) >= 990);
        assert_eq!(estimates.output(&name("other"), &model), OUTPUT_UNKNOWN, "tenants differ");
        estimates.learn_output(&name("zero"), &model, 0);
        assert_eq!(estimates.output(&name("zero"), &model), 1, "zero is a value");
    }

    #[test]
    fn the_bytes_of_a_token_are_the_models_own_and_bounded() {
        let (estimates, model) = (Estimates::default(), name("m"));
        assert_eq!(estimates.prompt(&model, 400), 100);
        (0..500).for_each(|_| estimates.learn_prompt(&model, 300, 100));
        assert!((130..=140).contains(&estimates.prompt(&model, 400)), "{}", estimates.prompt(&model, 400));
        (0..1000).for_each(|_| estimates.learn_prompt(&model, 10, u64::MAX));
        assert!(estimates.prompt(&model, 100) <= 200, "a broken count is believed up to a bound");
        assert_eq!(estimates.prompt(&model, 0), 1);
    }

    #[test]
    fn one_outlier_is_forgotten_within_a_few_answers() {
        let (estimates, tenant, model) = (Estimates::default(), name("acme"), name("m"));
        let expected = || estimates.output(&tenant, &model);
        for usual in [1, 20, 100, 2_000] {
            (0..200).for_each(|_| estimates.learn_output(&tenant, &model, usual));
            let before = expected();
            for outlier in [2_000_000, 9_000_000_000, u64::MAX] {
                estimates.learn_output(&tenant, &model, outlier);
                assert!(expected() <= 12 * before.max(OUTPUT_UNKNOWN), "{usual} {outlier}: {}", expected());
                (0..20).for_each(|_| estimates.learn_output(&tenant, &model, usual));
                assert!(expected() <= 2 * before.max(OUTPUT_UNKNOWN), "{usual} {outlier}: {}", expected());
            }
        }
        (0..200).for_each(|_| estimates.learn_prompt(&model, 400, 100));
        estimates.learn_prompt(&model, 16 << 20, u64::MAX);
        (0..20).for_each(|_| estimates.learn_prompt(&model, 400, 100));
        assert!(estimates.prompt(&model, 400) <= 200, "{}", estimates.prompt(&model, 400));
    }

    #[test]
    fn tables_are_bounded_and_keep_what_is_in_use() {
        let mut recent = Recent::default();
        for i in 0..10_000u32 {
            recent.put(i, i, 100);
            recent.put(7, 7, 100);
        }
        assert!(recent.young.len() + recent.old.len() <= 200);
        assert_eq!((recent.get(&7), recent.get(&9_999), recent.get(&1)), (Some(7), Some(9_999), None));
    }
}
