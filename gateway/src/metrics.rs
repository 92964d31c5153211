//! Every metric of a gateway: name, help and labels. Labels come from configured names only.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use weir_proto::resource::Name;

use crate::api::usage::{Implausible, Source};

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

/// Of an implausible count of a backend.
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

/// Of probes that requests made needless.
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
    /// Who decided: "store", "memory" for a refusal by the deny cache, or "local" during a store outage.
    pub by: &'static str,
}

/// Of hedges: second attempts beside one under way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HedgeLabels {
    /// The model resource.
    pub model: String,
    /// Why: "silent" for longer than the backend ever needs, or held for "unhealthy" meanwhile.
    pub cause: &'static str,
    /// "started", or "won" for those that answered first.
    pub event: &'static str,
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

/// Of a gateway that the control plane reported as gone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct GoneLabels {
    /// "freed": its leases were freed; "lives": its heartbeat in the limit store continues; "unknown": the store did not
    /// answer.
    pub outcome: &'static str,
}

weir_runtime::metrics! {
    /// The metrics. Shared by one `Arc`: a copy of each family for each request would be seventy counts of references.
    pub struct Metrics {
        pub requests: Family<RequestLabels, Counter> = "requests", "Finished requests";
        pub in_flight: Gauge = "requests_in_flight", "Requests under way";
        pub duration: Family<ModelLabels, Histogram> = "request_duration_seconds",
            "From arrival to the last byte", Family::new_with_constructor(seconds);
        pub first_byte: Family<ModelLabels, Histogram> = "first_byte_seconds",
            "From arrival to the first byte of the answer", Family::new_with_constructor(seconds);
        pub tokens: Family<TokenLabels, Counter> = "tokens", "Tokens settled";
        pub implausible_usage: Family<ImplausibleLabels, Counter> = "implausible_usage",
            "Usage reported by backends that is implausible; the gateway's own count was used instead";
        pub authentication_failures: Family<AuthenticationLabels, Counter> = "authentication_failures",
            "Requests without a valid API key";
        pub attempts: Family<AttemptLabels, Counter> = "backend_attempts", "Attempts at backends";
        pub hedges: Family<HedgeLabels, Counter> = "hedges",
            "Attempts at a second backend beside one under way";
        pub hedge_tokens: Family<ModelLabels, Counter> = "hedge_lost_tokens",
            "Estimated tokens of calls that were given up because the other backend answered first; the provider may bill them";
        pub hedge_micro_dollars: Family<ModelLabels, Counter> = "hedge_lost_micro_dollars",
            "What these cost at the model's prices, micro-dollars";
        pub connections: Gauge = "connections", "Open client connections";
        pub body_bytes: Gauge = "request_body_bytes", "Request bodies held, bytes";
        pub limiter: Family<LimiterLabels, Counter> = "limiter_calls", "Admissions asked of the limiter";
        pub limiter_duration: Histogram = "limiter_duration_seconds",
            "Time of one call of the limiter", Histogram::new(LIMITER_BUCKETS);
        pub limit_store_unavailable: Gauge = "limit_store_unavailable",
            "1 during a store outage: limits are decided without the limit store";
        pub limit_store_outages: Counter = "limit_store_outages", "Outages of the limit store";
        pub limit_store_pending_records: Gauge = "limit_store_pending_records",
            "Settlements, releases and usage records that wait for the limit store";
        pub limit_store_lost_records: Counter = "limit_store_lost_records",
            "Settlements, releases and usage records that never reach the limit store";
        pub leases_reaped: Counter = "leases_reaped", "Leases of dead gateways that this gateway freed";
        pub gateways_gone: Family<GoneLabels, Counter> = "gateways_gone",
            "Gateways that the control plane reported as gone, by outcome";
        pub leases_retaken: Counter = "leases_retaken", "Stale leases that were taken again";
        pub settlement_steps: Counter = "settlement_steps",
            "Additional charges of streams that ran beyond their reservation";
        pub wait: Family<WaitLabels, Histogram> = "limit_wait_seconds",
            "Time in queues for a limit or a slot", Family::new_with_constructor(seconds);
        pub queue_position: Histogram = "limit_queue_position",
            "Requests before a request that joined a queue", Histogram::new(QUEUE_BUCKETS);
        pub waiting: Gauge = "limit_waiting", "Requests in queues for a limit or a slot";
        pub coalesced: Gauge = "limiter_coalesced_calls",
            "Admissions and settlements that shared a script call with others under the same limits";
        pub prefetched_units: Family<KindLabels, Gauge> = "limit_prefetched_units",
            "Prefetched quota that is not used yet, in units of its kind";
        pub prefetched_decisions: Gauge = "limit_prefetched_decisions",
            "Scopes of admissions that were decided from prefetched quota";
        pub settlements_lost: Counter = "settlements_lost", "Settlements that could not be made";
        pub stale_leases: Counter = "stale_leases", "Leases that expired while their request still ran";
        pub config_age: Gauge = "config_age_seconds",
            "For how long the configuration revision has been in force";
        pub revision: Gauge = "config_revision", "Configuration revision in force";
        pub control_plane_connected: Gauge = "control_plane_connected",
            "1 while a control plane is connected";
        pub config_refused: Gauge = "config_refused_resources",
            "Resources that this gateway refuses; an entire refused delta, such as a mass removal that was not allowed, counts as one";
        pub credentials_unreadable: Gauge = "credential_files_unreadable",
            "Credential files whose last read failed; a credential that was read before stays in use";
        /// From the control plane's decision until the verdict is in force, including the difference of the hosts' clocks.
        pub verdict_delay: Histogram = "verdict_delay_seconds",
            "From the control plane's decision until a changed verdict was in force here",
            Histogram::new(VERDICT_BUCKETS);
        pub probes: Family<ProbeLabels, Counter> = "gateway_probes", "Probes made by this gateway";
        pub probes_needless: Family<NeedlessProbeLabels, Counter> = "probes_needless",
            "Probes that were not made because requests of all gateways proved the backend";
        /// Output tokens of probes, as reported by backends.
        pub probe_tokens: Family<PaidProbeLabels, Counter> = "probe_tokens", "Output tokens that probes cost";
        pub probes_over_rate: Family<PaidProbeLabels, Counter> = "probes_over_rate",
            "Probes left out because the rate of paid probes was used up";
        pub probes_without_slot: Family<NeedlessProbeLabels, Counter> = "probes_without_slot",
            "Probes put off because all slots of the backend were taken and no request had succeeded";
    }
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

/// The series of one tenant's requests for one model. Each is looked up once, when there is something to count.
#[derive(Debug)]
pub struct RequestSeries {
    /// The tenant.
    pub tenant: Name,
    /// The model.
    pub model: Name,
    answered: OnceLock<Counter>,
    duration: OnceLock<Histogram>,
    first_byte: OnceLock<Histogram>,
    /// Of tokens that the provider counted: input, output.
    tokens: [OnceLock<Counter>; 2],
}

impl RequestSeries {
    /// Series of which nothing is looked up.
    pub const fn of(tenant: Name, model: Name) -> Self {
        let tokens = [const { OnceLock::new() }; 2];
        Self {
            tenant,
            model,
            answered: OnceLock::new(),
            duration: OnceLock::new(),
            first_byte: OnceLock::new(),
            tokens,
        }
    }
}

/// What a request is counted under.
#[derive(Debug, Clone, Copy)]
pub struct RequestName<'a> {
    /// The tenant's name, or "unknown".
    pub tenant: &'a str,
    /// The model's name, or "unknown".
    pub model: &'a str,
    /// The series of both, where both are known.
    pub series: Option<&'a RequestSeries>,
}

impl Metrics {
    /// Counts a request that ended.
    pub fn ended(&self, of: RequestName<'_>, status: u16, code: &'static str) {
        let find = || {
            let labels = RequestLabels { model: of.model.into(), tenant: of.tenant.into(), status, code };
            self.requests.get_or_create(&labels).clone()
        };
        match of.series {
            Some(series) if (status, code) == (200, "ok") => series.answered.get_or_init(find).inc(),
            _ => find().inc(),
        };
    }

    /// Counts how long a request took, and its first byte if there was one.
    pub fn took(&self, of: RequestName<'_>, all: Duration, first_byte: Option<Duration>) {
        let labels = || ModelLabels { model: of.model.into() };
        let observe =
            |family: &Family<ModelLabels, Histogram>, known: Option<&OnceLock<Histogram>>, took: Duration| {
                let find = || family.get_or_create(&labels()).clone();
                match known {
                    Some(known) => known.get_or_init(find).observe(took.as_secs_f64()),
                    None => find().observe(took.as_secs_f64()),
                }
            };
        observe(&self.duration, of.series.map(|series| &series.duration), all);
        if let Some(first) = first_byte {
            observe(&self.first_byte, of.series.map(|series| &series.first_byte), first);
        }
    }

    /// Counts the tokens of a request: input, output.
    pub fn settled(&self, of: RequestName<'_>, tokens: [u64; 2], source: Source) {
        for (i, (direction, count)) in ["input", "output"].into_iter().zip(tokens).enumerate() {
            let find = || {
                let labels = TokenLabels { model: of.model.into(), direction, source: source.label() };
                self.tokens.get_or_create(&labels).clone()
            };
            match of.series {
                Some(series) if source == Source::Provider => add(series.tokens[i].get_or_init(find), count),
                _ => add(&find(), count),
            }
        }
    }

    /// Creates the series that alerts ask about for these backends, at zero.
    pub fn know_backends<'a>(&self, backends: impl Iterator<Item = &'a str>) {
        for backend in backends {
            for direction in Implausible::DIRECTIONS {
                let labels = ImplausibleLabels { backend: backend.to_owned(), direction };
                drop(self.implausible_usage.get_or_create(&labels));
            }
        }
    }

    /// Creates and registers every metric.
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let metrics = Self::default();
        metrics.register(registry.sub_registry_with_prefix("weir"));
        Arc::new(metrics)
    }
}
