//! The load generator: closed loop (a number of clients with one request at a time) and open loop (requests arrive at
//! a fixed rate, whatever the server does; latency counts from when a request was due).

mod closed;
mod connection;
mod open;
mod pacer;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use hdrhistogram::Histogram;

pub(crate) use closed::closed;
pub(crate) use connection::{Answer, Connection};
pub(crate) use open::{open, open_until};
pub(crate) use pacer::Pacer;

/// The timeout of a request, after which it counts as failed.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest latency that is distinguished, microseconds.
const LATENCY_MAX_US: u64 = 120_000_000;

/// The maximum of distinguished failures.
const FAILURE_KINDS_MAX: usize = 16;
/// All other failures.
const OTHER_KINDS: &str = "others";

/// Latencies in microseconds, to three digits.
pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_US, 3).expect("constants within the library's bounds")
}

/// The results of a load.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Latencies of the requests with the expected answer, microseconds.
    pub(crate) latency_us: Histogram<u64>,
    /// The number of requests with the expected answer.
    pub(crate) ok: u64,
    /// The number of other requests.
    pub(crate) failed: u64,
    /// The first failure.
    pub(crate) first_failure: Option<String>,
    /// The number of failures of each kind.
    pub(crate) failures: BTreeMap<String, u64>,
    /// How long it took.
    pub(crate) elapsed: Duration,
}

impl Outcome {
    pub(crate) fn new() -> Self {
        let latency_us = latencies();
        Self {
            latency_us,
            ok: 0,
            failed: 0,
            first_failure: None,
            failures: BTreeMap::new(),
            elapsed: Duration::ZERO,
        }
    }

    /// Counts one request.
    pub(crate) fn count(&mut self, latency: Duration, result: &Result<Answer, String>) {
        match result {
            Ok(answer) if answer.is_ok() => {
                self.ok += 1;
                self.latency_us.saturating_record(micros(latency));
            }
            Ok(answer) => {
                let code = error_code(&answer.excerpt);
                let kind = format!("{} {}", answer.status, code.unwrap_or_default());
                self.fail(kind.trim_end().to_owned(), format!("{} {}", answer.status, answer.excerpt));
            }
            Err(error) => self.fail(error.clone(), error.clone()),
        }
    }

    fn fail(&mut self, kind: String, why: String) {
        self.failed += 1;
        self.first_failure.get_or_insert(why);
        self.add_kind(kind, 1);
    }

    fn add_kind(&mut self, kind: String, count: u64) {
        let known = self.failures.len() < FAILURE_KINDS_MAX || self.failures.contains_key(&kind);
        *self.failures.entry(if known { kind } else { OTHER_KINDS.to_owned() }).or_default() += count;
    }

    /// The kinds of failures, the most frequent one first; empty if there were none.
    pub(crate) fn failures_line(&self) -> String {
        let mut kinds: Vec<_> = self.failures.iter().collect();
        kinds.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let kinds: Vec<String> = kinds.into_iter().map(|(kind, count)| format!("{count} x {kind}")).collect();
        kinds.join(", ")
    }

    /// Adds the results of another part of the same load.
    pub(crate) fn add(&mut self, other: Self) {
        self.ok += other.ok;
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
        for (kind, count) in other.failures {
            self.add_kind(kind, count);
        }
        self.elapsed = self.elapsed.max(other.elapsed);
        // Both histograms have the same bounds, so nothing is lost.
        let _ = self.latency_us.add(other.latency_us);
    }

    /// Requests answered per second.
    pub(crate) fn per_second(&self) -> f64 {
        self.ok as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// A percentile of the latency, microseconds.
    pub(crate) fn percentile_us(&self, percent: f64) -> f64 {
        self.latency_us.value_at_percentile(percent) as f64
    }
}

/// The code of an error in OpenAI's form.
fn error_code(body: &str) -> Option<String> {
    let body: serde_json::Value = serde_json::from_str(body).ok()?;
    body["error"]["code"].as_str().map(str::to_owned)
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// One request of a client that may reconnect: an answer, or the error.
pub(crate) async fn call(
    connection: &mut Option<Connection>,
    address: SocketAddr,
    request: &[u8],
) -> Result<Answer, String> {
    let whole = async {
        let open = match connection.take() {
            Some(open) => open,
            None => Connection::open(address).await?,
        };
        let open = connection.insert(open);
        open.call(request).await
    };
    let result = match tokio::time::timeout(REQUEST_TIMEOUT, whole).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {REQUEST_TIMEOUT:?}")),
    };
    if result.is_err() || connection.as_ref().is_some_and(Connection::closes) {
        *connection = None;
    }
    result
}

/// A chat request as bytes. `tokens` is how long the answer will be.
pub(crate) fn chat(key: &str, model: &str, tokens: u64, stream: bool) -> Bytes {
    chat_about("How does a weir work, and why is it built across a river?", key, model, tokens, stream)
}

/// The same with a prompt, in which nothing needs to be escaped.
pub(crate) fn chat_about(prompt: &str, key: &str, model: &str, tokens: u64, stream: bool) -> Bytes {
    let body = format!(
        r#"{{"model":"{model}","max_tokens":{tokens},"stream":{stream},"messages":[{{"role":"user","content":"{prompt}"}}]}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into()
}

/// A request without a body.
pub(crate) fn get(path: &str, token: &str) -> Bytes {
    format!("GET {path} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {token}\r\n\r\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_what_they_say_and_no_more_kinds_than_a_few() {
        let mut outcome = Outcome::new();
        let excerpt = r#"{"error":{"message":"...","code":"backends_busy"}}"#;
        let busy = Answer { status: 503, excerpt: excerpt.into(), ..Answer::default() };
        for _ in 0..3 {
            outcome.count(Duration::ZERO, &Ok(busy.clone()));
        }
        outcome.count(Duration::ZERO, &Err("connection reset".into()));
        let mut sum = Outcome::new();
        sum.add(outcome);
        assert_eq!(sum.failures_line(), "3 x 503 backends_busy, 1 x connection reset");
        for i in 0..100 {
            sum.count(Duration::ZERO, &Err(format!("port {i}")));
        }
        assert_eq!((sum.failures.len(), sum.failures[OTHER_KINDS]), (FAILURE_KINDS_MAX + 1, 86));
    }
}
