//! What stands between a caller and the store: see [`crate::stack`] for their order.

pub mod deny_cache;
pub mod fallback;
pub mod quota_prefetch;
pub mod waiting;
