//! Where a request can go: the configuration compiled for the request path, what is known of backends and pools, and the
//! choice between them.
//!
//! [`snapshot`] compiles resources into [`entries`] and the [`key_table`], [`backend`]s, [`scope`]s and [`accounts`]; [`declared`]
//! tells a limit as its operator wrote it; [`spend_period`] makes limits of money per day, week or month; [`model_use`] is what
//! requests of a key for a model have in common; [`backend_state`] and
//! [`pool_state`] outlive a change of configuration, with what [`own_probes`] say; [`balance`] is the pure choice, [`upstream`] the connections.

pub mod accounts;
pub mod backend;
pub mod backend_state;
pub mod balance;
pub mod declared;
pub mod entries;
pub mod key_table;
pub mod model_use;
pub mod own_probes;
pub mod pool_state;
pub mod probation;
pub mod roster;
pub mod scope;
pub mod snapshot;
pub mod spend_period;
pub mod upstream;

mod log_throttle;
