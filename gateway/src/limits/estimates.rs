//! Estimates of the cost of a request, learned from the cost of earlier requests.
//!
//! The output of a (tenant, model) is estimated at its mean plus twice its mean deviation, which most answers stay
//! below. Output beyond the estimate is charged while it streams. Prompt tokens are estimated from bytes, at the rate
//! that providers' counts have shown for the model. For how long a (tenant, model)'s requests hold their leases is kept
//! as a mean, from which a refusal says when a place is likely free.
//!
//! Tables are bounded: they keep the entries that learned last.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_runtime::RecentMap;

/// The estimate of an answer's tokens before anything is known.
const OUTPUT_UNKNOWN: u64 = 512;
/// Pairs of tenant and model that are remembered.
const PAIRS_MAX: usize = 20_000;
/// Models that are remembered.
const MODELS_MAX: usize = 4_000;
/// The weight of a new answer in the mean and in the deviation, as in TCP's estimate of the round-trip time.
const MEAN_GAIN: f64 = 1.0 / 8.0;
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
/// The prior of a prompt's rate: four bytes per token, with the weight of a kilobyte.
const PRIOR_BYTES: f64 = 1024.0;
const PRIOR_TOKENS: f64 = 256.0;
/// The part of the learned rate that each further prompt leaves.
const MEMORY: f64 = 0.98;
/// Bounds of a believed rate, tokens per byte: a hostile or broken count must not change everybody's estimates.
const RATE_BOUNDS: (f64, f64) = (1.0 / 16.0, 2.0);

/// One answer counts for at most this multiple of the estimate. An outlier moves the estimate by the weight of a few
/// answers, and a lasting change is followed within a few answers.
const OUTPUT_OUTLIER: f64 = 4.0;
/// The weight that one prompt can have, as a part of the learned weight; at least a kilobyte.
const PROMPT_WEIGHT: f64 = 0.1;

/// The learned estimates of one gateway.
#[derive(Debug, Default)]
pub struct Estimates {
    tables: Mutex<Tables>,
}

#[derive(Debug)]
struct Tables {
    outputs: RecentMap<(Arc<str>, Arc<str>), Output>,
    prompts: RecentMap<Arc<str>, Prompt>,
    /// For how long leases are held, seconds.
    holds: RecentMap<(Arc<str>, Arc<str>), f64>,
}

impl Default for Tables {
    fn default() -> Self {
        // Estimates do not age: a model that is asked once a day is estimated as well as a busy one.
        let outputs = RecentMap::new(PAIRS_MAX, Duration::MAX);
        let holds = RecentMap::new(PAIRS_MAX, Duration::MAX);
        Self { outputs, prompts: RecentMap::new(MODELS_MAX, Duration::MAX), holds }
    }
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
        // An entry is written as a whole, so a poisoned lock guards complete entries.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The estimate of the tokens of one answer of the model to the tenant.
    pub fn output(&self, tenant: &Arc<str>, model: &Arc<str>) -> u64 {
        let known = self.tables().outputs.get(&(tenant.clone(), model.clone()), Instant::now()).copied();
        known.map_or(OUTPUT_UNKNOWN, |known| known.expected().ceil().max(1.0) as u64)
    }

    /// Learns the tokens of an answer.
    pub fn learn_output(&self, tenant: &Arc<str>, model: &Arc<str>, tokens: u64) {
        let (mut tables, key, now) = (self.tables(), (tenant.clone(), model.clone()), Instant::now());
        let known = tables.outputs.get(&key, now).copied();
        let expected = known.map_or(0.0, |known| known.expected()).max(OUTPUT_UNKNOWN as f64);
        let tokens = (tokens as f64).min(expected * OUTPUT_OUTLIER);
        let next = match known {
            None => Output { mean: tokens, deviation: tokens / 2.0 },
            Some(Output { mean, deviation }) => Output {
                mean: mean + MEAN_GAIN * (tokens - mean),
                deviation: deviation + DEVIATION_GAIN * ((tokens - mean).abs() - deviation),
            },
        };
        tables.outputs.insert(key, next, now);
    }

    /// When the next of `places` is likely free that requests like this one hold: with all of them taken, one ends each
    /// time a request's length is over as often as there are places. `None` before any has ended.
    pub fn next_free(&self, tenant: &Arc<str>, model: &Arc<str>, places: u64) -> Option<Duration> {
        let mean = *self.tables().holds.get(&(tenant.clone(), model.clone()), Instant::now())?;
        Duration::try_from_secs_f64(mean / places.max(1) as f64).ok()
    }

    /// Learns for how long a request held its leases.
    pub fn learn_hold(&self, tenant: &Arc<str>, model: &Arc<str>, held: Duration) {
        let (mut tables, key, now) = (self.tables(), (tenant.clone(), model.clone()), Instant::now());
        let held = held.as_secs_f64();
        let mean = tables.holds.get(&key, now).map_or(held, |mean| mean + MEAN_GAIN * (held - mean));
        tables.holds.insert(key, mean, now);
    }

    /// The estimate of the tokens of a prompt for the model; at least one.
    pub fn prompt(&self, model: &Arc<str>, bytes: u64) -> u64 {
        let seen = self.tables().prompts.get(model, Instant::now()).copied();
        let seen = seen.unwrap_or(Prompt { bytes: PRIOR_BYTES, tokens: PRIOR_TOKENS });
        let rate = (seen.tokens / seen.bytes).clamp(RATE_BOUNDS.0, RATE_BOUNDS.1);
        ((bytes as f64 * rate).ceil() as u64).max(1)
    }

    /// The estimate of the tokens of a prompt by the prior alone, which no other request can change; at least one.
    pub fn prior_prompt(bytes: u64) -> u64 {
        ((bytes as f64 * (PRIOR_TOKENS / PRIOR_BYTES)).ceil() as u64).max(1)
    }

    /// Learns the tokens that a provider counted in a prompt of this size.
    pub fn learn_prompt(&self, model: &Arc<str>, bytes: u64, tokens: u64) {
        if bytes == 0 {
            return;
        }
        let (mut tables, now) = (self.tables(), Instant::now());
        let seen = tables.prompts.get(model, now).copied();
        let seen = seen.unwrap_or(Prompt { bytes: PRIOR_BYTES, tokens: PRIOR_TOKENS });
        let (bytes, tokens) = (bytes as f64, tokens as f64);
        let tokens = tokens.clamp(bytes * RATE_BOUNDS.0, bytes * RATE_BOUNDS.1);
        let weight = (seen.bytes * PROMPT_WEIGHT).max(PRIOR_BYTES).min(bytes) / bytes;
        let (bytes, tokens) = (bytes * weight, tokens * weight);
        let next = Prompt { bytes: seen.bytes * MEMORY + bytes, tokens: seen.tokens * MEMORY + tokens };
        tables.prompts.insert(model.clone(), next, now);
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
    fn a_place_is_free_after_a_part_of_a_requests_length() {
        let (estimates, tenant, model) = (Estimates::default(), name("acme"), name("m"));
        assert_eq!(estimates.next_free(&tenant, &model, 5), None);
        (0..50).for_each(|_| estimates.learn_hold(&tenant, &model, Duration::from_millis(600)));
        assert_eq!(estimates.next_free(&tenant, &model, 5), Some(Duration::from_millis(120)));
        (0..100).for_each(|_| estimates.learn_hold(&tenant, &model, Duration::from_secs(10)));
        let longer = estimates.next_free(&tenant, &model, 1).expect("known").as_secs_f64();
        assert!((9.9..=10.0).contains(&longer), "{longer}");
        assert_eq!(estimates.next_free(&name("other"), &model, 5), None, "tenants differ");
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
    fn the_prior_is_moved_by_nobody() {
        let (estimates, model) = (Estimates::default(), name("m"));
        (0..200).for_each(|_| estimates.learn_prompt(&model, 300, 1_100));
        assert!(estimates.prompt(&model, 40_000) > 70_000);
        assert_eq!((Estimates::prior_prompt(40_000), Estimates::prior_prompt(0)), (10_000, 1));
    }

    #[test]
    fn tables_are_bounded_and_keep_what_is_in_use() {
        let (estimates, model) = (Estimates::default(), name("m"));
        for n in 0..PAIRS_MAX + 10 {
            estimates.learn_output(&name("busy"), &model, 7);
            estimates.learn_output(&name(&n.to_string()), &model, 7);
        }
        assert_eq!(estimates.tables().outputs.len(), PAIRS_MAX);
        let output = |tenant: &str| estimates.output(&name(tenant), &model);
        assert!(output("busy") < OUTPUT_UNKNOWN && output(&(PAIRS_MAX + 9).to_string()) < OUTPUT_UNKNOWN);
        assert_eq!(output("0"), OUTPUT_UNKNOWN, "the oldest is forgotten");
    }
}
