//! The vocabulary of a limit decision and its arithmetic: no clock, no I/O.

pub(crate) mod call;
pub(crate) mod checks;
pub(crate) mod cost;
pub mod data_set;
pub(crate) mod error;
pub(crate) mod id;
pub(crate) mod key;
pub(crate) mod kind;
pub mod leaky_bucket;
pub(crate) mod limiter;
pub(crate) mod limits;
pub mod rates;
pub mod usage;
