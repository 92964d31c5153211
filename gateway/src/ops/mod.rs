//! Pages of the operations port for limits and usage, and metrics that are computed when they are read.

pub mod explain;
pub mod page;
pub mod usage;
pub mod weight_metrics;
