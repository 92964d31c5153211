//! Following changes: each watch has a place in the audit log and reads on from there at its own speed.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use weir_proto::v1::watch_response::Message;
use weir_proto::v1::{self, ResourceKind, WatchResponse};

use super::{Admin, Answers};
use crate::auth::Caller;
use crate::model::State;
use crate::services::Shared;

/// Between two bookmarks.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(10);
/// Answers that wait for a slow reader.
const OUTBOX: usize = 64;
/// Records read at once.
const READ: usize = 256;

type Outbox = mpsc::Sender<Result<WatchResponse, Status>>;

impl Admin {
    pub(super) async fn start_watch(
        &self,
        request: v1::WatchRequest,
    ) -> Result<Answers<WatchResponse>, Status> {
        let caller = self.caller()?.clone();
        let kinds: BTreeSet<ResourceKind> = request.kinds().collect();
        let state = self.0.catalog.state();
        let at = match request.from_revision {
            0 => None,
            revision => Some(self.0.catalog.sequence_at(revision).await?),
        };
        let (outbox, stream) = mpsc::channel(OUTBOX);
        let shared = self.0.clone();
        // Ends with its reader or with the stop signal.
        self.0.tasks.spawn(async move {
            let stop = shared.stop.clone();
            let served = tokio::select! {
                served = follow(&shared, &caller, &kinds, &state, at, &outbox) => served,
                () = stop.cancelled() => Err(Status::unavailable("the control plane is stopping")),
            };
            if let Err(status) = served {
                let _ = outbox.try_send(Err(status));
            }
        });
        Ok(ReceiverStream::new(stream))
    }
}

async fn follow(
    shared: &Shared,
    caller: &Caller,
    kinds: &BTreeSet<ResourceKind>,
    state: &State,
    at: Option<u64>,
    outbox: &Outbox,
) -> Result<(), Status> {
    let wanted = |kind: ResourceKind| kinds.is_empty() || kinds.contains(&kind);
    let mut states = shared.catalog.subscribe();
    let mut sequence = match at {
        Some(sequence) => sequence,
        None => {
            for (key, stored) in state.resources.iter().filter(|(key, _)| wanted(key.kind)) {
                tracing::trace!(%key, "was there before the watch");
                let event = v1::WatchEvent {
                    revision: stored.wire.revision,
                    action: v1::ChangeAction::Create.into(),
                    resource: Some(stored.wire.clone()),
                    fields: Vec::new(),
                    actor: String::new(),
                };
                say(outbox, Message::Event(event)).await?;
            }
            say(outbox, Message::Bookmark(v1::Bookmark { revision: state.revision })).await?;
            state.audit.sequence
        }
    };
    let mut bookmarks = interval(BOOKMARK_INTERVAL);
    bookmarks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    bookmarks.reset();
    loop {
        let seen = states.borrow_and_update().clone();
        loop {
            let records = shared.catalog.records_after(sequence, READ).await?;
            let Some(last) = records.last() else { break };
            sequence = last.record.sequence;
            let events = records.iter().flat_map(|logged| logged.events());
            let kind = |event: &v1::WatchEvent| {
                event.resource.as_ref().map_or(ResourceKind::Unspecified, weir_proto::resource::kind_of)
            };
            for event in events.filter(|event| wanted(kind(event))) {
                say(outbox, Message::Event(event)).await?;
            }
        }
        tokio::select! {
            changed = states.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
            }
            _ = bookmarks.tick() => {
                shared.authority.still(caller)?;
                say(outbox, Message::Bookmark(v1::Bookmark { revision: seen.revision })).await?;
            }
            () = outbox.closed() => return Ok(()),
        }
    }
}

async fn say(outbox: &Outbox, message: Message) -> Result<(), Status> {
    let sent = outbox.send(Ok(WatchResponse { message: Some(message) })).await;
    sent.map_err(|_| Status::cancelled("nobody reads the watch"))
}
