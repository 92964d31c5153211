//! The state of the gateways: connected gateways, their applied configuration, and their reports.
//!
//! - [`registry`]: the streams of the configuration and what each gateway has acknowledged.
//! - [`membership`]: how many gateways there are; [`departures`]: which ones have gone.
//! - [`aggregate`]: the reports of all gateways, summed; [`speeds`]: how fast backends serve, summed for each gateway.
//! - [`questions`]: what only gateways can answer, and which of them can be asked.
//! - [`timeseries`]: the last five minutes of the reports, for people.

pub(crate) mod aggregate;
mod departures;
pub(crate) mod loads;
pub(crate) mod membership;
pub(crate) mod questions;
pub(crate) mod registry;
mod speeds;
pub(crate) mod timeseries;
