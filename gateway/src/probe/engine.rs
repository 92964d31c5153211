//! What an engine says of itself on its Prometheus page: vLLM, SGLang, TGI and llama.cpp by their names.

/// Names of the share of the KV cache in use, 0 to 1.
const CACHE: [&str; 4] = [
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
];
/// Names of the number of requests that wait.
const QUEUE: [&str; 4] =
    ["vllm:num_requests_waiting", "sglang:num_queue_reqs", "tgi_queue_size", "llamacpp:requests_deferred"];

/// What was found; `None` where the page does not say it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Engine {
    pub(super) cache_used: Option<f64>,
    pub(super) queue: Option<u64>,
}

impl Engine {
    /// Reads a page. Of several series of a name the fullest cache and the sum of the queues count.
    pub(super) fn read(page: &str) -> Self {
        let mut engine = Self::default();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = sample(line) else { continue };
            if CACHE.contains(&name) {
                engine.cache_used = Some(engine.cache_used.unwrap_or_default().max(value.clamp(0.0, 1.0)));
            } else if QUEUE.contains(&name) {
                // Saturates: no queue is longer than what fits.
                engine.queue = Some(engine.queue.unwrap_or_default().saturating_add(value.max(0.0) as u64));
            }
        }
        engine
    }
}

/// The name and the value of a line of the text format.
fn sample(line: &str) -> Option<(&str, f64)> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(end);
    // Label values may hold any character but an unescaped quote, so the last brace ends them.
    let rest = if rest.starts_with('{') { &rest[rest.rfind('}')? + 1..] } else { rest };
    let value = rest.split_ascii_whitespace().next()?.parse::<f64>().ok()?;
    value.is_finite().then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_of_four_engines_are_read() {
        let read = |page: &str| {
            let engine = Engine::read(page);
            (engine.cache_used, engine.queue)
        };
        let vllm = "# TYPE vllm:kv_cache_usage_perc gauge\n\
                    vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"a} b\"} 0.25\n\
                    vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 0.75\n\
                    vllm:num_requests_waiting{model_name=\"m\"} 3.0\n\
                    vllm:num_requests_waiting{model_name=\"n\"} 4 1700000000000\n";
        assert_eq!(read(vllm), (Some(0.75), Some(7)));
        assert_eq!(
            read("sglang:token_usage{m=\"x\"} 0.5\nsglang:num_queue_reqs{m=\"x\"} 2\n"),
            (Some(0.5), Some(2))
        );
        assert_eq!(read("tgi_queue_size 9\ntgi_batch_current_size 3\n"), (None, Some(9)));
        assert_eq!(
            read("llamacpp:kv_cache_usage_ratio 0.1\nllamacpp:requests_deferred 0\n"),
            (Some(0.1), Some(0))
        );
        assert_eq!(
            read("vllm:kv_cache_usage_perc NaN\nnonsense\n{} 1\nvllm:num_requests_waiting{\n"),
            (None, None)
        );
        assert_eq!(read(""), (None, None));
    }
}
