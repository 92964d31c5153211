//! The layers between a caller and the store. [`crate::stack`] puts them in order.

pub mod deny_cache;
pub mod fallback;
pub mod quota_prefetch;
pub mod waiting;
