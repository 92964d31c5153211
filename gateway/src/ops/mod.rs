//! Answers about limits and usage, for control planes and on pages of the operations port, and metrics that are computed
//! when they are read.

pub mod answers;
pub mod budget_metrics;
pub mod explain;
pub mod page;
pub mod usage;
pub mod weight_metrics;
