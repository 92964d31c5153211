//! What this gateway and its control plane have to do with each other.
//!
//! [`subscription`] compiles each configuration that comes and puts it in force in [`live_config`]; [`credentials`] keeps
//! the secrets of backends beside it. [`report`] exchanges what gateways see, of it [`traffic_report`] what requests came
//! to; [`probe_channel`] is between that stream and the prober. [`questions`] takes what control planes want to know of
//! limits and usage.

pub mod credentials;
pub mod live_config;
pub mod probe_channel;
pub mod questions;
pub mod report;
pub mod subscription;
pub mod traffic_report;
