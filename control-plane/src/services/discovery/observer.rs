//! A subscriber that follows another control plane: it is sent only heartbeats, and reports what it holds.

use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tonic::{Status, Streaming};
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::{self, StreamConfigRequest};

use super::{HEARTBEAT, Outbox, age_limit, heartbeat, taken};
use crate::auth::Caller;
use crate::gateways::registry::Claim;
use crate::publish::{ConfigState, Snapshot, versions};
use crate::services::Shared;

/// Serves it to its end.
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
    tracing::debug!(gateway = hello.gateway_id, "observed: it follows another control plane");
    let mut heartbeats = interval(HEARTBEAT);
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeats.reset();
    let ends = Instant::now() + age_limit()?;
    // Whether it holds all of its revision.
    let mut whole = true;
    loop {
        // It may have said that it holds a revision before this control plane had that one.
        if whole && share(&mut held, &snapshot) {
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
                    whole = applied.errors.is_empty();
                    if whole {
                        share(&mut held, &snapshot);
                        let revision = if held.epoch == snapshot.epoch { held.revision } else { 0 };
                        connection.acknowledged(revision, &held);
                    } else {
                        let hello = v1::Hello { held: applied.held, ..v1::Hello::default() };
                        held.versions = ConfigState::of(&hello).versions;
                        connection.refused(&applied.errors, applied.answered_revision, &held);
                    }
                }
                Some(_) => return Err(Status::invalid_argument("an observer says hello once, then applied")),
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

/// Who applied all of a revision holds what is in it. Says whether that was not known.
fn share(held: &mut ConfigState, snapshot: &Snapshot) -> bool {
    if !held.is(snapshot) {
        return false;
    }
    let all = versions(snapshot, held.role);
    let news = !std::sync::Arc::ptr_eq(all, &held.versions);
    held.versions = all.clone();
    news
}
