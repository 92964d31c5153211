//! What all requests of a gateway share.

use std::sync::Arc;

use super::authentication::Failures;
use super::cors::Cors;
use super::request_body::BodyMemory;
use crate::control::live_config::LiveConfig;
use crate::control::probe_channel::ProbeChannel;
use crate::control::traffic_report::TrafficCounter;
use crate::limits::ledger::Ledger;
use crate::metrics::Metrics;

/// Everything a request needs.
#[derive(Debug)]
pub struct Gateway {
    /// The configuration in force.
    pub live: Arc<LiveConfig>,
    /// Limits and their settlement.
    pub ledger: Arc<Ledger>,
    /// Requests without a valid key, by address.
    pub failures: Failures,
    /// Memory for request bodies.
    pub bodies: Arc<BodyMemory>,
    /// Largest answer that is not streamed, bytes.
    pub answer_max: usize,
    /// Largest request body, bytes.
    pub body_bytes_max: usize,
    /// Which web pages may ask.
    pub cors: Cors,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What is reported of requests to the control plane.
    pub traffic: Arc<TrafficCounter>,
    /// Where requests ask for probes of backends that are silent.
    pub probes: Arc<ProbeChannel>,
}
