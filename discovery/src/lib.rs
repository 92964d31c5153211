//! The client side of the configuration stream: what gateways and limit services share.
//!
//! A [`Subscriber`] keeps what its owner [`Apply`]s fresh from the control plane and never waits for it: it begins with
//! the copy on [`Disk`], and while the control plane is away the [`ConfigState`] stays in force.

mod config_state;
mod link;
mod observe;
mod save;
mod subscribe;

pub use config_state::{ConfigState, DeltaError, Disk, Refused};
pub use link::{Identity, Link, error_chain, reconnect_backoff};
pub use subscribe::{Apply, Subscriber};
