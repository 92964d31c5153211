//! Every metric of a gateway: name, help and labels. Labels come from configured names only.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::api::usage::Implausible;

/// Of a finished request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// The model resource; "unknown" when none was found.
    pub model: String,
    /// The tenant; "unknown" when none was found.
    pub tenant: String,
    /// The HTTP status.
    pub status: u16,
    /// "ok", or the machine code of the error.
    pub code: &'static str,
}

/// Of one model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabels {
    /// The model resource.
    pub model: String,
}

/// Of tokens counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TokenLabels {
    /// The model resource.
    pub model: String,
    /// "input" or "output".
    pub direction: &'static str,
    /// "provider", "counted" or "reserved".
    pub source: &'static str,
}

/// Of one attempt at a backend.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AttemptLabels {
    /// The backend.
    pub backend: String,
    /// "ok" or what went wrong.
    pub outcome: &'static str,
}

/// Of one probe of a backend.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProbeLabels {
    /// The backend.
    pub backend: String,
    /// "liveness", "readiness" or "deep".
    pub tier: &'static str,
    /// "pass" or what was seen instead.
    pub outcome: &'static str,
}

/// Of a count of a backend that cannot be true.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ImplausibleLabels {
    /// The backend.
    pub backend: String,
    /// "input", "output", or "other" for a part or a sum of them.
    pub direction: &'static str,
}

/// Of a request without a valid key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AuthenticationLabels {
    /// "missing", "unknown" or "expired".
    pub reason: &'static str,
}

/// Of probes that were not made.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NeedlessProbeLabels {
    /// The backend.
    pub backend: String,
    /// "readiness" or "deep".
    pub tier: &'static str,
}

/// Of probes that cost tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PaidProbeLabels {
    /// The backend.
    pub backend: String,
}

/// Of a limiter call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct LimiterLabels {
    /// "granted", "limited", "no_slot" or "error".
    pub outcome: &'static str,
    /// Who decided: "store", "memory" for a refusal that was known, or "local" while the store was away.
    pub by: &'static str,
}

/// Of what a limit counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    /// "requests", "tokens", "input_tokens", "output_tokens" or "spend".
    pub kind: &'static str,
}

/// Of a request that waited for a limit or a slot.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WaitLabels {
    /// "granted", or why it was refused in the end: "too_long", "queue_full", "expired".
    pub outcome: &'static str,
    /// "high", "normal" or "low".
    pub priority: &'static str,
}

/// Of a gateway that the control plane said was gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct GoneLabels {
    /// "freed": its leases are; "lives": it says in the limit store that it does; "unknown": the store did not answer.
    pub outcome: &'static str,
}

/// The metrics; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Finished requests.
    pub requests: Family<RequestLabels, Counter>,
    /// Requests under way.
    pub in_flight: Gauge,
    /// From the request's arrival to its last byte.
    pub duration: Family<ModelLabels, Histogram>,
    /// From the request's arrival to the first byte of its answer.
    pub first_byte: Family<ModelLabels, Histogram>,
    /// Tokens settled.
    pub tokens: Family<TokenLabels, Counter>,
    /// Reports of usage that cannot be true, and were left aside.
    pub implausible_usage: Family<ImplausibleLabels, Counter>,
    /// Requests without a valid key.
    pub authentication_failures: Family<AuthenticationLabels, Counter>,
    /// Attempts at backends.
    pub attempts: Family<AttemptLabels, Counter>,
    /// Limiter calls.
    pub limiter: Family<LimiterLabels, Counter>,
    /// How long a limiter call took.
    pub limiter_duration: Histogram,
    /// How long requests waited in queues.
    pub wait: Family<WaitLabels, Histogram>,
    /// How many stood before a request that joined a queue.
    pub queue_ahead: Histogram,
    /// Requests in queues.
    pub waiting: Gauge,
    /// Admissions and settlements that travelled to the store with another one.
    pub merged: Gauge,
    /// Units taken ahead and not yet used.
    pub ahead: Family<KindLabels, Gauge>,
    /// Scopes of admissions decided from quota taken ahead.
    pub from_quota: Gauge,
    /// Settlements that could not be made.
    pub settlements_lost: Counter,
    /// Steps charged while a stream ran on beyond its reservation.
    pub settlement_steps: Counter,
    /// Leases that ran out under a live request.
    pub leases_lost: Counter,
    /// 1 while the limit store does not decide.
    pub limit_store_away: Gauge,
    /// Times it went away.
    pub limit_store_outages: Counter,
    /// What it has not been told of what was decided without it.
    pub limit_store_untold: Gauge,
    /// What it will never be told.
    pub limit_store_lost: Counter,
    /// Gateways that the control plane said were gone.
    pub gateways_gone: Family<GoneLabels, Counter>,
    /// Leases freed of gateways that were gone.
    pub leases_reaped: Counter,
    /// Leases that were taken again under a live request.
    pub leases_retaken: Counter,
    /// Open client connections.
    pub connections: Gauge,
    /// Client connections refused for lack of room.
    pub connections_refused: Counter,
    /// Bytes of request bodies held.
    pub body_bytes: Gauge,
    /// The configuration revision in force.
    pub revision: Gauge,
    /// Seconds for which it has been in force.
    pub config_age: Gauge,
    /// 1 while the control plane is heard.
    pub control_plane_connected: Gauge,
    /// Resources that this gateway refuses.
    pub config_refused: Gauge,
    /// Credential files that could not be read last.
    pub credentials_unreadable: Gauge,
    /// From the control plane's decision until a verdict was in force here; between hosts also what their clocks differ.
    pub verdict_delay: Histogram,
    /// Probes made by this gateway.
    pub probes: Family<ProbeLabels, Counter>,
    /// Probes whose tokens were saved, since requests said as much.
    pub probes_needless: Family<NeedlessProbeLabels, Counter>,
    /// Output tokens that probes cost, as far as backends say.
    pub probe_tokens: Family<PaidProbeLabels, Counter>,
    /// Probes left out since the budget was spent.
    pub probes_over_budget: Family<PaidProbeLabels, Counter>,
    /// Probes put off since all slots of the backend were taken.
    pub probes_without_slot: Family<NeedlessProbeLabels, Counter>,
}

const REQUEST_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
const LIMITER_BUCKETS: [f64; 10] =
    [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05];

const VERDICT_BUCKETS: [f64; 10] = [0.001, 0.002, 0.003, 0.005, 0.007_5, 0.01, 0.025, 0.05, 0.25, 1.0];
const QUEUE_BUCKETS: [f64; 8] = [0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

fn seconds() -> Histogram {
    Histogram::new(REQUEST_BUCKETS)
}

/// Adds to a counter, which stays at its largest value rather than beginning again: a counter that falls is taken for a
/// restart.
pub fn add(counter: &Counter, count: u64) {
    counter.inc_by(count.min(u64::MAX - counter.get()));
}

impl Metrics {
    /// Creates the series that alerts ask about for these backends, at zero.
    pub fn know_backends<'a>(&self, backends: impl Iterator<Item = &'a str>) {
        for backend in backends {
            for direction in Implausible::DIRECTIONS {
                let labels = ImplausibleLabels { backend: backend.to_owned(), direction };
                drop(self.implausible_usage.get_or_create(&labels));
            }
        }
    }

    /// Registers every metric.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::unregistered();
        let registry = registry.sub_registry_with_prefix("weir");
        metrics.register_requests(registry);
        metrics.register_limits(registry);
        metrics.register_configuration(registry);
        metrics.register_probes(registry);
        metrics
    }

    fn unregistered() -> Self {
        Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            duration: Family::new_with_constructor(seconds),
            first_byte: Family::new_with_constructor(seconds),
            tokens: Family::default(),
            implausible_usage: Family::default(),
            authentication_failures: Family::default(),
            attempts: Family::default(),
            limiter: Family::default(),
            limiter_duration: Histogram::new(LIMITER_BUCKETS),
            wait: Family::new_with_constructor(seconds),
            queue_ahead: Histogram::new(QUEUE_BUCKETS),
            waiting: Gauge::default(),
            merged: Gauge::default(),
            ahead: Family::default(),
            from_quota: Gauge::default(),
            settlements_lost: Counter::default(),
            settlement_steps: Counter::default(),
            leases_lost: Counter::default(),
            limit_store_away: Gauge::default(),
            limit_store_outages: Counter::default(),
            limit_store_untold: Gauge::default(),
            limit_store_lost: Counter::default(),
            gateways_gone: Family::default(),
            leases_reaped: Counter::default(),
            leases_retaken: Counter::default(),
            connections: Gauge::default(),
            connections_refused: Counter::default(),
            body_bytes: Gauge::default(),
            revision: Gauge::default(),
            config_age: Gauge::default(),
            control_plane_connected: Gauge::default(),
            config_refused: Gauge::default(),
            credentials_unreadable: Gauge::default(),
            verdict_delay: Histogram::new(VERDICT_BUCKETS),
            probes: Family::default(),
            probes_needless: Family::default(),
            probe_tokens: Family::default(),
            probes_over_budget: Family::default(),
            probes_without_slot: Family::default(),
        }
    }

    fn register_requests(&self, r: &mut Registry) {
        r.register("requests", "Finished requests", self.requests.clone());
        r.register("requests_in_flight", "Requests under way", self.in_flight.clone());
        r.register("request_duration_seconds", "From arrival to the last byte", self.duration.clone());
        r.register(
            "first_byte_seconds",
            "From arrival to the first byte of the answer",
            self.first_byte.clone(),
        );
        r.register("tokens", "Tokens settled", self.tokens.clone());
        r.register(
            "implausible_usage",
            "Reports of usage by backends that cannot be true; the gateway's own count was used",
            self.implausible_usage.clone(),
        );
        r.register(
            "authentication_failures",
            "Requests without a valid API key",
            self.authentication_failures.clone(),
        );
        r.register("backend_attempts", "Attempts at backends", self.attempts.clone());
        r.register("connections", "Open client connections", self.connections.clone());
        r.register(
            "connections_refused",
            "Client connections refused for lack of room",
            self.connections_refused.clone(),
        );
        r.register("request_body_bytes", "Request bodies held, bytes", self.body_bytes.clone());
    }

    fn register_limits(&self, r: &mut Registry) {
        r.register("limiter_calls", "Admissions asked of the limiter", self.limiter.clone());
        r.register("limiter_duration_seconds", "How long an reservation took", self.limiter_duration.clone());
        r.register(
            "limit_store_away",
            "1 while the limit store does not decide",
            self.limit_store_away.clone(),
        );
        r.register(
            "limit_store_outages",
            "Times the limit store went away",
            self.limit_store_outages.clone(),
        );
        r.register(
            "limit_store_untold",
            "Settlements, releases and lines of usage that wait for the limit store",
            self.limit_store_untold.clone(),
        );
        r.register(
            "limit_store_lost",
            "Settlements, releases and lines of usage that the limit store will never be told",
            self.limit_store_lost.clone(),
        );
        r.register("leases_reaped", "Leases freed of gateways that were gone", self.leases_reaped.clone());
        r.register(
            "gateways_gone",
            "Gateways the control plane said were gone, by what came of it",
            self.gateways_gone.clone(),
        );
        r.register("leases_retaken", "Leases taken again under a live request", self.leases_retaken.clone());
        r.register(
            "settlement_steps",
            "Charges of streams beyond their reservation",
            self.settlement_steps.clone(),
        );
        r.register("limit_wait_seconds", "Time in queues for a limit or a slot", self.wait.clone());
        r.register(
            "limit_queue_ahead",
            "How many stood before a request that joined a queue",
            self.queue_ahead.clone(),
        );
        r.register("limit_waiting", "Requests in queues for a limit or a slot", self.waiting.clone());
        r.register(
            "limiter_merged_calls",
            "Admissions and settlements so far that travelled to the store with another one under the same limits",
            self.merged.clone(),
        );
        r.register(
            "limit_prefetched_units",
            "Units taken ahead of limits and not yet used",
            self.ahead.clone(),
        );
        r.register(
            "limit_prefetched_decisions",
            "Scopes of admissions so far that were decided from quota taken ahead",
            self.from_quota.clone(),
        );
        r.register("settlements_lost", "Settlements that could not be made", self.settlements_lost.clone());
        r.register("leases_lost", "Leases that ran out under a live request", self.leases_lost.clone());
    }

    fn register_configuration(&self, r: &mut Registry) {
        r.register(
            "config_age_seconds",
            "For how long the configuration revision has been in force",
            self.config_age.clone(),
        );
        r.register("config_revision", "Configuration revision in force", self.revision.clone());
        r.register(
            "control_plane_connected",
            "1 while the control plane is heard",
            self.control_plane_connected.clone(),
        );
        r.register(
            "config_refused_resources",
            "Resources this gateway refuses; a delta refused whole, such as a mass removal nobody allowed, counts as one",
            self.config_refused.clone(),
        );
        r.register(
            "credential_files_unreadable",
            "Files of backends' credentials that could not be read last; where one was read before, that one is in use",
            self.credentials_unreadable.clone(),
        );
        r.register(
            "verdict_delay_seconds",
            "From the control plane's decision until a changed verdict was in force here",
            self.verdict_delay.clone(),
        );
    }

    fn register_probes(&self, r: &mut Registry) {
        r.register("gateway_probes", "Probes made by this gateway", self.probes.clone());
        r.register(
            "probes_needless",
            "Probes whose tokens were saved, since requests of the fleet said as much",
            self.probes_needless.clone(),
        );
        r.register("probe_tokens", "Output tokens that probes cost", self.probe_tokens.clone());
        r.register(
            "probes_over_budget",
            "Probes left out since their hour's budget was spent",
            self.probes_over_budget.clone(),
        );
        r.register(
            "probes_without_slot",
            "Probes put off since all slots of the backend were taken and its requests did not prove it",
            self.probes_without_slot.clone(),
        );
    }
}
