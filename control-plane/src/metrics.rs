//! Every metric of the control plane. Labels come from configured names and fixed sets only.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
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

weir_runtime::metrics! {
    pub(crate) struct Metrics {
        pub(crate) revision: Gauge = "weir_store_revision", "The newest store revision";
        pub(crate) gateways: Gauge = "weir_connected_gateways", "Gateways with a configuration stream";
        pub(crate) is_leader: Gauge = "weir_control_plane_is_leader",
            "1 while this control plane is the leader, whose verdicts and assignments gateways follow";
        pub(crate) applied_lag: Gauge = "weir_applied_lag_revisions",
            "Revisions that the connected gateway furthest behind has yet to acknowledge";
        deltas: Counter = "weir_deltas_sent", "Deltas sent to gateways";
        resources: Counter = "weir_delta_resources_sent", "Resources sent to gateways, each with its body";
        bytes: Counter = "weir_delta_body_bytes", "Bytes of the bodies sent";
        pub(crate) full_nacks: Counter = "weir_delta_full_nacks",
            "Deltas that gateways refused entirely, such as a mass removal that was not allowed";
        pub(crate) foreign_epochs: Counter = "weir_foreign_epoch_connects",
            "Connects of gateways whose configuration is of another store epoch";
        pub(crate) acks: Counter = "weir_delta_acks", "Deltas that gateways applied";
        pub(crate) nacks: Counter = "weir_delta_nacks", "Deltas that gateways refused entirely or in part";
        admin_calls: Family<AdminCall, Counter> = "weir_admin_calls", "Calls of the admin service";
        probes: Family<Probe, Counter> = "weir_probes", "Probe results of all observers";
        health_events: Family<HealthEvent, Counter> = "weir_health_events", "Health events, by kind";
        backend_states: Family<BackendState, Gauge> = "weir_backend_state", "1 for the state a backend is in";
        backend_factors: Family<Backend, Gauge<f64, AtomicU64>> = "weir_backend_health_factor",
            "The part of a backend's weight that its health and its pool leave, 0 to 1, without slow start";
        alarms: Family<AlarmLabels, Gauge> = "weir_health_alarm", "1 for each alarm that is on";
    }
}

impl Metrics {
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

    /// Replaces the series of verdicts and alarms.
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

    /// Removes the series of a deleted backend.
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
