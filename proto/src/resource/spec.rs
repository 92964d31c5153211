//! The specs, each with its defaults and bounds beside its fields. One file per kind.

mod address;
mod backend;
mod limit;
mod model;
mod pool;
mod tenant;

use std::time::Duration;

pub use backend::*;
pub use limit::*;
pub use model::*;
pub use pool::*;
pub use tenant::*;

/// The longest duration any field takes: a day.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Most models one backend serves, and most names in any list.
const MAX_LIST: usize = 1000;

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn or(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}
