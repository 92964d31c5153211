//! What this control plane knows of its gateways: who is connected, what each holds, and what they report.
//!
//! - [`registry`]: the streams of the configuration and what each gateway has acknowledged.
//! - [`membership`]: how many gateways there are; [`departures`]: which ones have gone.
//! - [`aggregate`]: the reports of all gateways, summed; [`speeds`]: how fast backends serve, summed for each gateway.
//! - [`timeseries`]: the last five minutes of the reports, for people.

pub(crate) mod aggregate;
mod departures;
pub(crate) mod loads;
pub(crate) mod membership;
pub(crate) mod registry;
mod speeds;
pub(crate) mod timeseries;
