//! The facts of one request, collected on its way and written once at its end: one log line, one set of metrics.
//!
//! Dropping the context is its end, whatever the way out; a context that was not marked as finished belongs to
//! a client that went away.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, StatusCode};
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use uuid::Uuid;
use weir_runtime::edge::Client;

use crate::api::usage::Tokens;
use crate::control::traffic_report::TrafficCounter;
use crate::http::headers::ShownLimits;
use crate::metrics::{self, Metrics, ModelLabels, RequestLabels, TokenLabels};

/// What is known of a request.
#[derive(Debug)]
pub struct RequestContext {
    metrics: Arc<Metrics>,
    traffic: Arc<TrafficCounter>,
    /// None from the end of the request on.
    under_way: Option<UnderWay>,
    /// When it arrived.
    pub started: Instant,
    /// Ours, or the client's own when it is well formed.
    pub request_id: String,
    /// Who asks, and the request's clock.
    pub client: Client,
    /// The route's path; a constant, never the client's text.
    pub route: &'static str,
    /// The tenant's name, once known.
    pub tenant: Option<String>,
    /// The API key's name, once known.
    pub api_key: Option<String>,
    /// The model resource, once known.
    pub model: Option<String>,
    /// The backend that was tried last.
    pub backend: Option<String>,
    /// Attempts at backends.
    pub attempts: u32,
    /// The status and the text of the last attempt that failed, whatever became of the request.
    pub failed: Option<(Option<u16>, String)>,
    /// Time spent asking the limiter.
    pub limiter: Duration,
    /// Time spent waiting in queues for a limit or a slot.
    pub waited: Duration,
    /// The limits as the last decision left them, for the headers of a refusal.
    pub limits: ShownLimits,
    /// Whether the client asked for a stream.
    pub stream: bool,
    /// From arrival to the first byte of the answer.
    pub first_byte: Option<Duration>,
    /// The status sent, and "ok" or the error's code.
    pub outcome: Option<(StatusCode, &'static str)>,
    /// What it used, and who counted.
    pub tokens: Option<Tokens>,
    /// It is counted, and gets no line of its own: its address fails too often.
    pub unlogged: bool,
    /// The answer closes its connection.
    pub close: bool,
}

/// Counts a request as under way for as long as it lives.
#[derive(Debug)]
struct UnderWay {
    in_flight: Gauge,
    traffic: Arc<TrafficCounter>,
}

impl UnderWay {
    fn begin(metrics: &Arc<Metrics>, traffic: &Arc<TrafficCounter>) -> Self {
        metrics.in_flight.inc();
        traffic.began();
        Self { in_flight: metrics.in_flight.clone(), traffic: traffic.clone() }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.in_flight.dec();
        self.traffic.left();
    }
}

/// Longest request id that is taken over from a client, bytes.
const REQUEST_ID_MAX_BYTES: usize = 128;

impl RequestContext {
    /// A request arrived.
    pub fn begin(
        metrics: &Arc<Metrics>,
        traffic: &Arc<TrafficCounter>,
        headers: &http::HeaderMap,
        client: Client,
    ) -> Box<Self> {
        let under_way = Some(UnderWay::begin(metrics, traffic));
        let theirs = headers.get("x-request-id").and_then(|v| v.to_str().ok()).filter(|id| {
            let fits = (1..=REQUEST_ID_MAX_BYTES).contains(&id.len());
            fits && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        });
        Box::new(Self {
            metrics: metrics.clone(),
            traffic: traffic.clone(),
            under_way,
            started: Instant::now(),
            request_id: theirs.map_or_else(|| Uuid::now_v7().to_string(), str::to_owned),
            client,
            route: "unknown",
            tenant: None,
            api_key: None,
            model: None,
            backend: None,
            attempts: 0,
            failed: None,
            limiter: Duration::ZERO,
            waited: Duration::ZERO,
            limits: ShownLimits::new(),
            stream: false,
            first_byte: None,
            outcome: None,
            tokens: None,
            unlogged: false,
            close: false,
        })
    }

    /// The id as the header `x-request-id`.
    pub fn request_id_header(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(self.request_id.as_str()).ok()
    }

    /// The first byte of the answer is there.
    pub fn note_first_byte(&mut self) {
        self.first_byte.get_or_insert_with(|| self.started.elapsed());
    }

    /// How it ended: the status sent, and "ok" or the error's code.
    pub fn finished(&mut self, status: StatusCode, code: &'static str) {
        self.outcome = Some((status, code));
    }

    fn count(&self, elapsed: Duration, status: u16, code: &'static str, model: &str, tenant: &str) {
        let m = &self.metrics;
        self.traffic.ended(status, code);
        if let Some(tokens) = self.tokens {
            self.traffic.tokens(tokens.prompt, tokens.completion);
            for (direction, count) in [("input", tokens.prompt), ("output", tokens.completion)] {
                let labels =
                    TokenLabels { model: model.to_owned(), direction, source: tokens.source.label() };
                metrics::add(&m.tokens.get_or_create(&labels), count);
            }
        }
        let by_model = ModelLabels { model: model.to_owned() };
        m.duration.get_or_create(&by_model).observe(elapsed.as_secs_f64());
        if let Some(first) = self.first_byte {
            m.first_byte.get_or_create(&by_model).observe(first.as_secs_f64());
        }
        let (model, tenant) = (model.to_owned(), tenant.to_owned());
        m.requests.get_or_create(&RequestLabels { model, tenant, status, code }).inc();
    }
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        // First: what follows may fail. Were it to panic all the same, fields would be dropped, and this with them.
        drop(self.under_way.take());
        let elapsed = self.started.elapsed();
        // 499: the client closed the connection first; nginx's number, which every dashboard knows.
        let (status, code) = self.outcome.map_or((499, "client_closed"), |(s, c)| (s.as_u16(), c));
        let model = self.model.take().unwrap_or_else(|| "unknown".into());
        let tenant = self.tenant.take().unwrap_or_else(|| "unknown".into());
        self.count(elapsed, status, code, &model, &tenant);
        // Last, so that everything is counted whatever becomes of the line.
        if self.unlogged {
            tracing::debug!(target: "weir::request", request_id = self.request_id, status, code);
        } else {
            self.log(status, code, elapsed, &model, &tenant);
        }
    }
}

impl RequestContext {
    fn log(&self, status: u16, code: &str, elapsed: Duration, model: &str, tenant: &str) {
        tracing::info!(
            target: "weir::request",
            request_id = self.request_id,
            peer = %self.client.connection.peer(),
            route = self.route,
            tenant,
            api_key = self.api_key,
            model,
            backend = self.backend,
            attempts = self.attempts,
            upstream_status = self.failed.as_ref().and_then(|failed| failed.0),
            upstream_error = self.failed.as_ref().map(|failed| failed.1.as_str()),
            stream = self.stream,
            status,
            code,
            duration_ms = elapsed.as_secs_f64() * 1e3,
            first_byte_ms = self.first_byte.map(|d| d.as_secs_f64() * 1e3),
            limiter_ms = self.limiter.as_secs_f64() * 1e3,
            wait_ms = self.waited.as_secs_f64() * 1e3,
            input_tokens = self.tokens.map(|t| t.prompt),
            cached_tokens = self.tokens.map(|t| t.cache_read),
            output_tokens = self.tokens.map(|t| t.completion),
            usage_source = self.tokens.map(|t| t.source.label()),
        );
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn a_request_that_panics_is_not_under_way_any_more() {
        let (metrics, traffic) = (Metrics::new(&mut Registry::default()), Arc::default());
        let client = Client::detached("127.0.0.1".parse().expect("an address"));
        let begun = || RequestContext::begin(&metrics, &traffic, &http::HeaderMap::new(), client.clone());
        let mut finished = begun();
        finished.finished(StatusCode::OK, "ok");
        let left = begun();
        assert_eq!(metrics.in_flight.get(), 2);
        drop((finished, left));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _context = begun();
            panic!("a bug");
        }));
        assert!(panicked.is_err());
        assert_eq!(metrics.in_flight.get(), 0);
        let traffic = traffic.take_traffic();
        assert_eq!((traffic.in_flight, traffic.succeeded, traffic.cancelled), (0, 1, 2));
    }
}
