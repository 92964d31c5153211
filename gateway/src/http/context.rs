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
use weir_proto::resource::Name;
use weir_runtime::edge::Client;

use crate::api::usage::Tokens;
use crate::control::traffic_report::TrafficCounter;
use crate::http::headers::{REQUEST_ID, ShownLimits};
use crate::metrics::{Metrics, RequestName};
use crate::routing::entries::KeyEntry;
use crate::routing::model_use::ModelUse;

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
    pub request_id: HeaderValue,
    /// Who asks, and the request's clock.
    pub client: Client,
    /// The route's path; a constant, never the client's text.
    pub route: &'static str,
    /// The API key, once known.
    pub key: Option<Arc<KeyEntry>>,
    /// The model resource, once known.
    pub model: Option<Name>,
    /// What it has in common with others, once it is to be admitted.
    pub model_use: Option<Arc<ModelUse>>,
    /// The backend that was tried last.
    pub backend: Option<Name>,
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
        let theirs = headers.get(REQUEST_ID).filter(|id| {
            let fits = (1..=REQUEST_ID_MAX_BYTES).contains(&id.len());
            fits && id.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
        });
        Box::new(Self {
            metrics: metrics.clone(),
            traffic: traffic.clone(),
            under_way,
            started: Instant::now(),
            request_id: theirs.cloned().unwrap_or_else(new_id),
            client,
            route: "unknown",
            key: None,
            model: None,
            model_use: None,
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

    /// The first byte of the answer is there.
    pub fn note_first_byte(&mut self) {
        self.first_byte.get_or_insert_with(|| self.started.elapsed());
    }

    /// How it ended: the status sent, and "ok" or the error's code.
    pub fn finished(&mut self, status: StatusCode, code: &'static str) {
        self.outcome = Some((status, code));
    }

    fn count(&self, of: RequestName<'_>, elapsed: Duration, status: u16, code: &'static str) {
        self.traffic.ended(status, code);
        if let Some(tokens) = self.tokens {
            self.traffic.tokens(tokens.prompt, tokens.completion);
            self.metrics.settled(of, [tokens.prompt, tokens.completion], tokens.source);
        }
        self.metrics.took(of, elapsed, self.first_byte);
        self.metrics.ended(of, status, code);
    }
}

/// An id of our own.
fn new_id() -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = Uuid::now_v7().hyphenated().encode_lower(&mut text);
    // Digits and dashes are a valid value.
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

/// The name of what is not known.
const UNKNOWN: &str = "unknown";

impl Drop for RequestContext {
    fn drop(&mut self) {
        // First: what follows may fail. Were it to panic all the same, fields would be dropped, and this with them.
        drop(self.under_way.take());
        let elapsed = self.started.elapsed();
        // 499: the client closed the connection first; nginx's number, which every dashboard knows.
        let (status, code) = self.outcome.map_or((499, "client_closed"), |(s, c)| (s.as_u16(), c));
        let of = RequestName {
            tenant: self.key.as_ref().map_or(UNKNOWN, |key| key.tenant.name.as_str()),
            model: self.model.as_ref().map_or(UNKNOWN, Name::as_str),
            series: self.model_use.as_ref().map(|model_use| &model_use.series),
        };
        self.count(of, elapsed, status, code);
        // Last, so that everything is counted whatever becomes of the line.
        if self.unlogged {
            tracing::debug!(target: "weir::request", request_id = self.request_id(), status, code);
        } else {
            self.log(of, status, code, elapsed);
        }
    }
}

impl RequestContext {
    fn request_id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }

    fn log(&self, of: RequestName<'_>, status: u16, code: &str, elapsed: Duration) {
        tracing::info!(
            target: "weir::request",
            request_id = self.request_id(),
            peer = %self.client.connection.peer(),
            route = self.route,
            tenant = of.tenant,
            api_key = self.key.as_ref().map(|key| key.name.as_str()),
            model = of.model,
            backend = self.backend.as_ref().map(Name::as_str),
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
