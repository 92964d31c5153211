//! Every metric of a limit service: name, help and labels. Labels come from configured names only.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::rules::Rule;

/// Of a finished call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// The rpc's name.
    pub method: &'static str,
    /// "ok", "limited", "invalid" or "unavailable".
    pub outcome: &'static str,
}

/// Of a descriptor that was decided.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RuleLabels {
    /// The rule; empty where none matched.
    pub rule: String,
    /// "ok", "over", or "noted": over, but for the mode.
    pub outcome: &'static str,
}

weir_runtime::metrics! {
    /// The metrics; cheap to clone.
    pub struct Metrics {
        pub calls: Family<CallLabels, Counter> = "weir_ratelimit_calls", "Calls by rpc and outcome";
        pub rules: Family<RuleLabels, Counter> = "weir_ratelimit_descriptors",
            "Descriptors decided, by rule and outcome";
        pub rules_held: Gauge = "weir_ratelimit_rules", "Rules in force";
        pub revision: Gauge = "weir_ratelimit_config_revision",
            "Store revision of the configuration in force";
        pub control_plane_connected: Gauge = "weir_ratelimit_control_plane_connected",
            "1 while the control plane is heard";
        pub duration: Histogram = "weir_ratelimit_call_duration_seconds",
            "Time from a call's arrival to its answer",
            Histogram::new([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0]);
        pub store_up: Gauge = "weir_ratelimit_store_up", "1 while the limit store answers";
    }
}

impl Metrics {
    /// Creates and registers every metric.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        metrics.register(registry);
        metrics
    }

    pub(super) fn ruled(&self, rule: Option<&Rule>, outcome: &'static str) {
        let rule = rule.map_or_else(String::new, |rule| rule.name.clone());
        self.rules.get_or_create(&RuleLabels { rule, outcome }).inc();
    }

    pub(super) fn called(&self, method: &'static str, outcome: &'static str, elapsed: Duration) {
        self.calls.get_or_create(&CallLabels { method, outcome }).inc();
        self.duration.observe(elapsed.as_secs_f64());
    }
}
