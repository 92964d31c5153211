//! Which processes live, so that the leases of those that died can be freed.
//!
//! Every reservation id carries the id of the process that made it ([`OwnerId`]), so a lease tells who took it. When a
//! process has died, others free its leases ([`Limiter::free_orphans`]) instead of waiting until they run out. A process
//! that is only cut off from those who watch it must not lose its leases. So each process writes a heartbeat into the
//! store itself: it holds a lease of a few seconds in the membership set, and no lease of a member is freed.

use std::time::Duration;

use crate::model::call::Candidate;
use crate::model::error::Error;
use crate::model::id::OwnerId;
use crate::model::key::Key;
use crate::model::limiter::Limiter;

/// How long a process counts as a member after its last heartbeat. Several times the pause between two heartbeats.
pub const MEMBERSHIP_LIFE: Duration = Duration::from_secs(3);

/// Makes `owner` a member for [`MEMBERSHIP_LIFE`].
///
/// # Errors
/// Those of the store; then it is a member for as long as its last heartbeat made it one.
pub async fn heartbeat(limiter: &impl Limiter, owner: OwnerId) -> Result<(), Error> {
    let set = [Candidate { leases: Key::membership(), max_concurrency: u32::MAX, bound: None }];
    limiter.move_slot(owner.membership_entry(), None, &set, MEMBERSHIP_LIFE).await.map(drop)
}

/// Ends the membership of `owner`.
///
/// # Errors
/// Those of the store.
pub async fn leave(limiter: &impl Limiter, owner: OwnerId) -> Result<(), Error> {
    limiter.release(owner.membership_entry(), &[Key::membership()]).await
}
