//! Status-only streams: a subscriber that follows another control plane receives heartbeats and reports the configuration
//! that it has applied.

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tonic::{Status, Streaming};
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::{self, StreamConfigRequest};

use super::{HEARTBEAT, Outbox, age_limit, heartbeat, taken};
use crate::auth::Caller;
use crate::gateways::registry::Claim;
use crate::publish::{ConfigState, Snapshot, versions};
use crate::services::Shared;

/// Serves one status-only stream until it ends.
pub(super) async fn serve(
    shared: Shared,
    caller: Caller,
    hello: v1::Hello,
    mut inbound: Streaming<StreamConfigRequest>,
    outbox: Outbox,
) -> Result<(), Status> {
    let mut snapshots = shared.snapshots.clone();
    let mut snapshot = snapshots.borrow_and_update().clone();
    let mut held = ConfigState::of(&hello);
    let applied = if held.epoch == snapshot.epoch { held.revision } else { 0 };
    let claim = Claim::of(&caller);
    let connection = shared.registry.connect(&hello, &held, applied, claim).map_err(taken)?;
    let limit_service = hello.role() == v1::SubscriberRole::LimitService;
    let _present = (!limit_service).then(|| shared.membership.enter(&hello.gateway_id));
    tracing::debug!(gateway = hello.gateway_id, "status-only stream opened");
    let mut heartbeats = interval(HEARTBEAT);
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeats.reset();
    let ends = Instant::now() + age_limit()?;
    // Whether the subscriber applied its revision without refusals.
    let mut complete = true;
    loop {
        // The subscriber may have reported a revision before this control plane had read it.
        if complete && share(&mut held, &snapshot) {
            connection.holds(&held);
        }
        tokio::select! {
            () = connection.replaced.cancelled() => {
                return Err(Status::aborted("another stream of this gateway took over"));
            }
            said = inbound.message() => match said?.map(|said| said.message) {
                None => return Ok(()),
                Some(Some(Up::Applied(applied))) => {
                    held.epoch = applied.store_epoch.as_str().into();
                    held.revision = applied.store_revision;
                    complete = applied.errors.is_empty();
                    if complete {
                        share(&mut held, &snapshot);
                        let revision = if held.epoch == snapshot.epoch { held.revision } else { 0 };
                        connection.acknowledged(revision, &held);
                    } else {
                        let hello = v1::Hello { resource_versions: applied.resource_versions, ..v1::Hello::default() };
                        held.versions = ConfigState::of(&hello).versions;
                        connection.refused(&applied.errors, applied.answered_revision, &held);
                    }
                }
                Some(_) => return Err(Status::invalid_argument("a status-only stream carries one hello, then applied messages only")),
            },
            changed = snapshots.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                snapshot = snapshots.borrow_and_update().clone();
            }
            _ = heartbeats.tick() => {
                shared.authority.still(&caller)?;
                heartbeat(&outbox, held.revision);
            }
            () = sleep_until(ends) => return Ok(()),
        }
    }
}

/// Takes the versions of the snapshot for a subscriber that applied the snapshot's revision completely. Returns whether
/// that changed the known versions.
fn share(held: &mut ConfigState, snapshot: &Snapshot) -> bool {
    if !held.is(snapshot) {
        return false;
    }
    let all = versions(snapshot, held.role);
    let news = !all.is_same(&held.versions);
    held.versions = all.clone();
    news
}
