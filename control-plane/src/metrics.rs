//! Every metric of the control plane. Labels come from configured names and fixed sets only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use weir_proto::v1;

use crate::health::event::{Alarm, EventKind};
use crate::health::{Outcome, State, Tier};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdminCall {
    method: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Probe {
    backend: String,
    tier: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BackendState {
    backend: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Backend {
    backend: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AlarmLabels {
    alarm: &'static str,
    subject: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HealthEvent {
    kind: &'static str,
}

#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) revision: Gauge,
    pub(crate) gateways: Gauge,
    /// Whether this control plane leads.
    pub(crate) leads: Gauge,
    /// How many revisions the connected gateway that is furthest behind has yet to acknowledge.
    pub(crate) applied_lag: Gauge,
    deltas: Counter,
    resources: Counter,
    bytes: Counter,
    /// Deltas refused whole: a gateway guards what it holds.
    pub(crate) refused_whole: Counter,
    /// Gateways that came with the configuration of another store.
    pub(crate) foreign_epochs: Counter,
    pub(crate) acks: Counter,
    pub(crate) nacks: Counter,
    admin_calls: Family<AdminCall, Counter>,
    probes: Family<Probe, Counter>,
    health_events: Family<HealthEvent, Counter>,
    backend_states: Family<BackendState, Gauge>,
    backend_factors: Family<Backend, Gauge<f64, AtomicU64>>,
    alarms: Family<AlarmLabels, Gauge>,
}

impl Metrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register("weir_store_revision", "The newest store revision", self.revision.clone());
        registry.register(
            "weir_connected_gateways",
            "Gateways with a configuration stream",
            self.gateways.clone(),
        );
        registry.register(
            "weir_control_plane_leads",
            "1 while this control plane leads: its verdicts and assignments are followed",
            self.leads.clone(),
        );
        registry.register(
            "weir_applied_lag_revisions",
            "Revisions that the connected gateway furthest behind has yet to acknowledge",
            self.applied_lag.clone(),
        );
        registry.register("weir_deltas_sent", "Deltas sent to gateways", self.deltas.clone());
        registry.register(
            "weir_delta_resources_sent",
            "Resources sent to gateways, each with its body",
            self.resources.clone(),
        );
        registry.register("weir_delta_body_bytes", "Bytes of the bodies sent", self.bytes.clone());
        registry.register(
            "weir_deltas_refused_whole",
            "Deltas that gateways refused as a whole, such as a mass removal nobody allowed",
            self.refused_whole.clone(),
        );
        registry.register(
            "weir_foreign_epoch_connects",
            "Connects of gateways that hold the configuration of another store",
            self.foreign_epochs.clone(),
        );
        registry.register("weir_delta_acks", "Deltas that gateways applied", self.acks.clone());
        registry.register(
            "weir_delta_nacks",
            "Deltas that gateways refused in part or whole",
            self.nacks.clone(),
        );
        registry.register("weir_admin_calls", "Calls of the admin service", self.admin_calls.clone());
        registry.register(
            "weir_probes",
            "Probes of backends taken into account, by all observers",
            self.probes.clone(),
        );
        registry.register("weir_health_events", "Events of health, by kind", self.health_events.clone());
        registry.register(
            "weir_backend_state",
            "1 for the state a backend is in",
            self.backend_states.clone(),
        );
        registry.register(
            "weir_backend_health_factor",
            "What its state and its pool leave of a backend's weight, 0 to 1, slow start aside",
            self.backend_factors.clone(),
        );
        registry.register("weir_health_alarm", "1 for each alarm that is on", self.alarms.clone());
    }

    pub(crate) fn sent(&self, resources: usize, bytes: usize) {
        self.deltas.inc();
        self.resources.inc_by(resources as u64);
        self.bytes.inc_by(bytes as u64);
    }

    pub(crate) fn admin_call(&self, method: &'static str, code: tonic::Code) {
        let code = code_name(code);
        self.admin_calls.get_or_create(&AdminCall { method, code }).inc();
    }

    pub(crate) fn probed(&self, backend: &str, tier: Tier, outcome: Outcome) {
        let labels = Probe { backend: backend.to_owned(), tier: tier.name(), result: outcome.name() };
        self.probes.get_or_create(&labels).inc();
    }

    pub(crate) fn health_event(&self, kind: EventKind) {
        self.health_events.get_or_create(&HealthEvent { kind: kind.as_str() }).inc();
    }

    /// Shows the verdicts and alarms there are, and no others.
    pub(crate) fn health(&self, healths: &BTreeMap<String, v1::BackendHealth>, alarms: &BTreeSet<Alarm>) {
        self.backend_states.clear();
        self.backend_factors.clear();
        self.alarms.clear();
        for (backend, health) in healths {
            let state = State::of_wire(health.state()).name();
            self.backend_states.get_or_create(&BackendState { backend: backend.clone(), state }).set(1);
            let labels = Backend { backend: backend.clone() };
            self.backend_factors.get_or_create(&labels).set(health.factor.unwrap_or(1.0));
        }
        for alarm in alarms {
            let labels = AlarmLabels { alarm: alarm.kind.as_str(), subject: alarm.subject.clone() };
            self.alarms.get_or_create(&labels).set(1);
        }
    }

    /// A backend that is gone leaves no series behind.
    pub(crate) fn forget_backend(&self, backend: &str) {
        for tier in Tier::ALL {
            for result in Outcome::NAMES {
                self.probes.remove(&Probe { backend: backend.to_owned(), tier: tier.name(), result });
            }
        }
    }
}

const fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
