//! Pages of the operations port that tell of limits and usage, and the metrics that are computed when they are asked for.

pub mod explain;
pub mod page;
pub mod usage;
pub mod weight_metrics;
