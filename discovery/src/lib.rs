//! The client side of the configuration lane: what gateways and limit services share.
//!
//! A [`Subscriber`] keeps what its owner [`Apply`]s fresh from the control plane and never waits for it: it begins with
//! the copy on [`Disk`], and while the control plane is away what is [`Held`] stays in force.

mod held;
mod observe;
mod save;
mod subscribe;

pub use held::{DeltaError, Disk, Held, Refused};
pub use subscribe::{Apply, Backoff, Identity, Link, Subscriber, error_chain};
