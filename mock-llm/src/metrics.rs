//! Counters and their Prometheus text, under the names vLLM uses.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use crate::config::Config;

/// Tokens of key-value cache per slot; only the used fraction is shown.
const KV_TOKENS_PER_SLOT: u64 = 4096;
/// vLLM's buckets, seconds.
const TTFT_BUCKETS: [f64; 18] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0];
const E2E_BUCKETS: [f64; 16] =
    [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0];

/// A histogram of durations; the last count is of values above all bounds.
#[derive(Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<AtomicU64>,
    sum_micros: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_micros: AtomicU64::new(0) }
    }

    fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        if let Some(count) = self.counts.get(bucket) {
            count.fetch_add(1, Relaxed);
        }
        self.sum_micros.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    fn write(&self, text: &mut String, name: &str, model: &str) {
        let mut total = 0;
        let bounds = self.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Relaxed);
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\",model_name=\"{model}\"}} {total}");
        }
        let sum = self.sum_micros.load(Relaxed) as f64 / 1e6;
        let _ = writeln!(text, "{name}_sum{{model_name=\"{model}\"}} {sum}");
        let _ = writeln!(text, "{name}_count{{model_name=\"{model}\"}} {total}");
    }
}

/// The counters of one model.
#[derive(Debug)]
pub(crate) struct ModelMetrics {
    name: String,
    pub(crate) running: AtomicU64,
    pub(crate) waiting: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) generation_tokens: AtomicU64,
    ttft: Histogram,
    e2e: Histogram,
}

impl ModelMetrics {
    pub(crate) fn observe_first_token(&self, since_arrival: Duration) {
        self.ttft.observe(since_arrival);
    }

    pub(crate) fn observe_done(&self, since_arrival: Duration) {
        self.e2e.observe(since_arrival);
    }
}

/// All counters of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// In the order of [`Config::models`].
    pub(crate) models: Vec<ModelMetrics>,
    pub(crate) requests: AtomicU64,
    pub(crate) with_request_id: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) cancelled: AtomicU64,
    pub(crate) completed: AtomicU64,
    pub(crate) cut: AtomicU64,
    pub(crate) in_flight: AtomicUsize,
    pub(crate) max_in_flight: AtomicUsize,
    pub(crate) waiting: AtomicUsize,
    pub(crate) connections: AtomicU64,
    pub(crate) kv_tokens: AtomicU64,
    kv_capacity: u64,
}

impl Metrics {
    pub(crate) fn new(config: &Config) -> Self {
        let model = |name: &String| ModelMetrics {
            name: name.clone(),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            ttft: Histogram::new(&TTFT_BUCKETS),
            e2e: Histogram::new(&E2E_BUCKETS),
        };
        Self {
            models: config.models.iter().map(model).collect(),
            requests: AtomicU64::new(0),
            with_request_id: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            cancelled: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            max_in_flight: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            connections: AtomicU64::new(0),
            kv_tokens: AtomicU64::new(0),
            kv_capacity: KV_TOKENS_PER_SLOT * config.slots as u64,
        }
    }

    pub(crate) fn prompt_tokens(&self) -> u64 {
        self.models.iter().map(|model| model.prompt_tokens.load(Relaxed)).sum()
    }

    pub(crate) fn generation_tokens(&self) -> u64 {
        self.models.iter().map(|model| model.generation_tokens.load(Relaxed)).sum()
    }

    /// Prometheus text format, version 0.0.4.
    pub(crate) fn render(&self) -> String {
        let mut text = String::with_capacity(4096);
        let usage = (self.kv_tokens.load(Relaxed) as f64 / self.kv_capacity as f64).min(1.0);
        let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&ModelMetrics) -> f64| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for model in &self.models {
                let _ = writeln!(text, "{name}{{model_name=\"{}\"}} {}", model.name, value(model));
            }
        };
        let count = |counter: &AtomicU64| counter.load(Relaxed) as f64;
        family("vllm:num_requests_running", "gauge", "Requests being generated.", &|m| count(&m.running));
        family("vllm:num_requests_waiting", "gauge", "Requests waiting for a slot.", &|m| count(&m.waiting));
        family("vllm:kv_cache_usage_perc", "gauge", "Share of the cache in use, 1 is full.", &|_| usage);
        family("vllm:gpu_cache_usage_perc", "gauge", "Older name of kv_cache_usage_perc.", &|_| usage);
        family("vllm:prompt_tokens_total", "counter", "Prompt tokens read.", &|m| count(&m.prompt_tokens));
        family("vllm:generation_tokens_total", "counter", "Tokens sent.", &|m| count(&m.generation_tokens));
        let mut histogram = |name: &str, help: &str, of: fn(&ModelMetrics) -> &Histogram| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
            for model in &self.models {
                of(model).write(&mut text, name, &model.name);
            }
        };
        histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", |model| &model.ttft);
        histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", |model| &model.e2e);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_end_at_infinity() {
        let histogram = Histogram::new(&TTFT_BUCKETS);
        for millis in [1, 15, 90_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = String::new();
        histogram.write(&mut text, "t", "m");
        assert!(text.contains("t_bucket{le=\"0.001\",model_name=\"m\"} 1\n"), "{text}");
        assert!(text.contains("t_bucket{le=\"0.02\",model_name=\"m\"} 2\n"), "{text}");
        assert!(text.contains("t_bucket{le=\"40\",model_name=\"m\"} 2\n"), "{text}");
        assert!(text.contains("t_bucket{le=\"+Inf\",model_name=\"m\"} 3\n"), "{text}");
        assert!(text.contains("t_sum{model_name=\"m\"} 90.016\n"), "{text}");
    }
}
