//! The client side of the configuration stream: what gateways and limit services share.
//!
//! A [`Subscriber`] receives configuration from the control plane and passes it to its owner, which implements [`Apply`]. It
//! never waits for the control plane: it starts with the copy on [`Disk`], and without a control plane the [`ConfigState`]
//! stays in force.

mod config_state;
mod disk;
mod link;
mod problem;
mod save;
mod status_stream;
mod subscribe;
mod update;

pub use config_state::{ConfigState, DeltaError, Encoded, Refused, ResourceId};
pub use disk::Disk;
pub use link::{Identity, Link, SILENCE_MAX, answered, error_chain, reconnect_backoff};
pub use problem::not_configured;
pub use subscribe::{Apply, Subscriber};
#[doc(hidden)]
pub use update::with_update_between;
pub use update::{Change, Update};
