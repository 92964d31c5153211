//! What all requests of a gateway share.

use std::sync::Arc;

use super::authentication::Failures;
use super::request_body::BodyMemory;
use crate::control::live_config::LiveConfig;
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
    /// What is counted.
    pub metrics: Metrics,
    /// What is reported of requests to the control plane.
    pub traffic: Arc<TrafficCounter>,
}
