//! The metrics of listeners.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::connection::Cut;

/// The labels of a listener.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabels {
    listener: &'static str,
}

/// The labels of ended connections and requests, and of refused connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    listener: &'static str,
    reason: &'static str,
}

crate::metrics! {
    /// How many connections the listeners of a node have, and why they ended some. Cheap to clone.
    pub struct EdgeMetrics {
        open: Family<ListenerLabels, Gauge> = "listener_connections", "Open connections of each listener";
        ended: Family<EndLabels, Counter> = "listener_cuts",
            "Connections that a listener refused, evicted or ended by a clock, and requests whose client took nothing";
    }
}

/// Why a connection was ended or refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Refused,
    Cut(Cut),
}

impl EdgeMetrics {
    /// Creates and registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        metrics.register(registry.sub_registry_with_prefix("weir"));
        metrics
    }

    /// Makes the series of a listener that an alert watches, so that the first refusal is an increase.
    pub(super) fn know(&self, listener: &'static str) {
        drop(self.ended.get_or_create(&EndLabels { listener, reason: "refused" }));
    }

    pub(super) fn opened(&self, listener: &'static str) {
        self.open.get_or_create(&ListenerLabels { listener }).inc();
    }

    pub(super) fn closed(&self, listener: &'static str) {
        self.open.get_or_create(&ListenerLabels { listener }).dec();
    }

    pub(super) fn ended(&self, listener: &'static str, end: End) {
        let reason = match end {
            End::Refused => "refused",
            End::Cut(Cut::Head) => "head_timeout",
            End::Cut(Cut::Idle) => "idle_timeout",
            End::Cut(Cut::Stalled) => "stalled",
            End::Cut(Cut::Evicted) => "evicted",
            End::Cut(Cut::Drained) => "drained",
        };
        self.ended.get_or_create(&EndLabels { listener, reason }).inc();
    }

    /// The connections that this listener refused.
    pub fn refused(&self, listener: &'static str) -> u64 {
        self.ended.get_or_create(&EndLabels { listener, reason: "refused" }).get()
    }
}
