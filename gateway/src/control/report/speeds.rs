//! Speeds of backends between this gateway and the protocol.

use std::collections::HashMap;

use weir_proto::v1::{AggregateSpeed, ModelSpeed, SpeedMeasure};

use crate::routing::balance::{Measure, Pace};
use crate::routing::snapshot::Snapshot;

/// The speeds that this gateway measured, by backend id.
pub(super) fn seen(snapshot: &Snapshot) -> HashMap<u64, Vec<ModelSpeed>> {
    let mut seen: HashMap<u64, Vec<ModelSpeed>> = HashMap::new();
    for (model, backend, measure, Pace { count, mean, variance }) in
        snapshot.pools.values().flat_map(|pool| pool.state.paces())
    {
        let measure = wire(measure).into();
        let speed = ModelSpeed { model: model.to_string(), measure, count, mean, variance };
        seen.entry(backend).or_default().push(speed);
    }
    seen
}

/// Applies the speed that other gateways measured, if backend and model exist.
pub(super) fn take(snapshot: &Snapshot, fleet: &AggregateSpeed) {
    let Some(speed) = &fleet.speed else { return };
    let (Some(backend), Some(measure)) =
        (snapshot.backends.get(fleet.backend.as_str()), of_wire(speed.measure()))
    else {
        return;
    };
    let served = backend.spec.models.keys().find(|model| model.as_str() == speed.model);
    let (Some(model), Some(pool)) = (served, snapshot.pools.get(&backend.spec.pool)) else { return };
    let pace = Pace { count: speed.count, mean: speed.mean, variance: speed.variance };
    pool.state.set_others(model, backend.id, measure, pace);
}

const fn wire(measure: Measure) -> SpeedMeasure {
    match measure {
        Measure::FirstByte => SpeedMeasure::FirstByte,
        Measure::Decode => SpeedMeasure::Decode,
        Measure::Unary => SpeedMeasure::Unary,
    }
}

const fn of_wire(measure: SpeedMeasure) -> Option<Measure> {
    match measure {
        SpeedMeasure::Unspecified => None,
        SpeedMeasure::FirstByte => Some(Measure::FirstByte),
        SpeedMeasure::Decode => Some(Measure::Decode),
        SpeedMeasure::Unary => Some(Measure::Unary),
    }
}
