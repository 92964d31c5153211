//! The factors of every backend's effective weight, computed when metrics are read.
//!
//! A collector instead of gauges, so that requests write no gauges and a deleted backend leaves no series.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use weir_proto::v1::HealthState;

use crate::control::live_config::LiveConfig;

/// Reads the weights in force.
#[derive(Debug)]
pub(crate) struct WeightMetrics(pub(crate) Arc<LiveConfig>);

type Labels<'a> = [(&'static str, &'a str); 2];

fn gauges<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels<'a>, f64)>,
) -> fmt::Result {
    let name = format!("weir_{name}");
    let mut family = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        // A label without a name stands for none.
        let used = if labels[1].0.is_empty() { &labels[..1] } else { &labels[..] };
        ConstGauge::new(value).encode(family.encode_family(&used)?)?;
    }
    Ok(())
}

impl Collector for WeightMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let snapshot = self.0.snapshot();
        let gateways = self.0.live_gateways();
        let known = "Gateways that share the limits, this one included, as far as it knows";
        let family = encoder.encode_descriptor("weir_live_gateways", known, None, MetricType::Gauge)?;
        ConstGauge::new(i64::from(gateways)).encode(family)?;
        let backends = || snapshot.backends.values();
        let one = |backend| [("backend", backend), ("", "")];
        gauges(
            &mut encoder,
            "backend_in_flight",
            "Requests of this gateway in flight at the backend",
            backends().map(|b| (one(b.name.as_str()), f64::from(b.state.in_flight()))),
        )?;
        gauges(
            &mut encoder,
            "backend_aggregate_in_flight",
            "Requests of all gateways in flight at the backend, as last received",
            backends().map(|b| (one(b.name.as_str()), b.state.fleet_in_flight(gateways))),
        )?;
        let help = "Requests and probes sent again on a new connection because the server had just closed the kept one";
        let mut family =
            encoder.encode_descriptor("weir_backend_resends", help, None, MetricType::Counter)?;
        for backend in backends() {
            let labels = [("backend", backend.name.as_str())];
            ConstCounter::new(backend.upstream.resent()).encode(family.encode_family(&labels)?)?;
        }
        let ejected = |b: &crate::routing::backend::BackendEntry| {
            snapshot.pools.get(&b.spec.pool).is_some_and(|p| p.state.is_ejected(&b.name))
        };
        gauges(
            &mut encoder,
            "backend_ejected",
            "1 while this gateway has ejected the backend locally",
            backends().map(|b| (one(b.name.as_str()), f64::from(u8::from(ejected(b))))),
        )?;
        gauges(
            &mut encoder,
            "backend_state",
            "1 for the state of the cluster's verdict on the backend",
            backends().map(|b| ([("backend", b.name.as_str()), ("state", state(b.state.health()))], 1.0)),
        )?;
        let (mut factors, mut panics) = (Vec::new(), Vec::new());
        for model in snapshot.models_by_name.values() {
            let (weights, panic) = model.weights(gateways);
            panics.push((model, panic));
            factors.extend(weights.into_iter().map(|weight| (model, weight)));
        }
        gauges(
            &mut encoder,
            "model_panic",
            "1 in panic mode: unhealthy backends are used because too little of the pool is healthy",
            panics
                .iter()
                .map(|(m, panic)| ([("model", m.name.as_str()), ("", "")], f64::from(u8::from(*panic)))),
        )?;
        for (name, help, of) in FACTORS {
            let values = factors.iter().map(|(model, weight)| {
                let labels = [("model", model.name.as_str()), ("backend", weight.backend.as_str())];
                (labels, of(&weight.effective))
            });
            gauges(&mut encoder, name, help, values)?;
        }
        Ok(())
    }
}

type Factor = (&'static str, &'static str, fn(&crate::routing::balance::Effective) -> f64);

const FACTORS: [Factor; 5] = [
    ("backend_effective_weight", "weight x load x latency x health", |e| e.value()),
    ("backend_weight", "The configured weight", |e| e.weight),
    ("backend_load_factor", "Free share of the backend's slots in the cluster", |e| e.load),
    ("backend_latency_factor", "Speed per unit of work relative to the pool; more is faster", |e| e.latency),
    ("backend_health_factor", "1, or less while degraded or in slow start", |e| e.health),
];

fn state(state: HealthState) -> &'static str {
    match state {
        HealthState::Unspecified | HealthState::Unknown => "unknown",
        HealthState::Healthy => "healthy",
        HealthState::Degraded => "degraded",
        HealthState::Unhealthy => "unhealthy",
        HealthState::Recovering => "recovering",
    }
}
