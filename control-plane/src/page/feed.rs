//! The feed of the live page: one frame per second, made once for all open pages; no frame is made without an open page.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use weir_proto::v1::ResourceKind;

use super::frame::{Frame, event};
use crate::auth::{Caller, role_name};
use crate::gateways::timeseries::SAMPLE;
use crate::services::Shared;

/// The maximum of open pages.
const WATCHERS_MAX: usize = 64;
/// The stream of a page that reads nothing for this time is closed.
const STALLED: Duration = Duration::from_secs(30);
/// The interval at which the token of an open page is checked again.
const TOKEN_CHECK: Duration = Duration::from_secs(10);

/// The feed of the live page. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Feed {
    frames: watch::Sender<Option<Arc<Frame>>>,
    /// Notified when a frame is to be made now.
    wanted: Notify,
    permits: Arc<Semaphore>,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            frames: watch::Sender::new(None),
            wanted: Notify::new(),
            permits: Arc::new(Semaphore::new(WATCHERS_MAX)),
        }
    }
}

impl Feed {
    /// Samples the time series and makes frames for open pages, until `stop`.
    pub(crate) async fn run(self: Arc<Self>, shared: Shared, stop: CancellationToken) {
        let mut samples = interval(SAMPLE);
        samples.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = samples.tick() => {
                    let state = shared.catalog.state();
                    let backends = state.of_kind(ResourceKind::Backend).map(|stored| stored.wire.name.as_str());
                    let loads = shared.aggregate.loads().borrow().clone();
                    shared.aggregate.timeseries().sample(&loads, backends);
                }
                () = self.wanted.notified() => {}
            }
            if self.frames.receiver_count() == 0 {
                // Without this, the next page would start with an old frame.
                self.frames.send_replace(None);
                continue;
            }
            let before = self.frames.borrow().clone();
            let frame = Frame::of(&shared, before.as_deref()).await;
            self.frames.send_replace(Some(Arc::new(frame)));
        }
    }

    /// Requests a frame now, after a change.
    pub(super) fn refresh(&self) {
        self.wanted.notify_one();
    }

    /// The stream of one page.
    pub(super) fn watch(
        self: &Arc<Self>,
        shared: &Shared,
        caller: Caller,
        operates: bool,
    ) -> Result<ReceiverStream<Result<Bytes, Infallible>>, Status> {
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{WATCHERS_MAX} pages are open already; close one"))
        })?;
        let (outbox, events) = mpsc::channel(1);
        let (frames, shared, feed) = (self.frames.subscribe(), shared.clone(), self.clone());
        // The stream ends when the page is closed, its token is revoked, or the process stops.
        shared.tasks.clone().spawn(async move {
            let _permit = permit;
            let stop = shared.stop.clone();
            tokio::select! {
                () = feed.send(frames, &shared, &caller, operates, &outbox) => {}
                () = stop.cancelled() => {}
                () = outbox.closed() => {}
            }
        });
        Ok(ReceiverStream::new(events))
    }

    async fn send(
        &self,
        mut frames: watch::Receiver<Option<Arc<Frame>>>,
        shared: &Shared,
        caller: &Caller,
        operates: bool,
        outbox: &mpsc::Sender<Result<Bytes, Infallible>>,
    ) {
        let hello = json!({ "name": &*caller.name, "role": role_name(caller.role), "operates": operates });
        let mut pieces = vec![event("hello", &hello)];
        let (mut told, mut checked) = (None::<Arc<Frame>>, Instant::now());
        self.refresh();
        loop {
            let newest = frames.borrow_and_update().clone();
            if let Some(frame) = newest {
                pieces.extend(frame.after(told.as_deref()));
                told = Some(frame);
            }
            for piece in pieces.drain(..) {
                if !matches!(timeout(STALLED, outbox.send(Ok(piece))).await, Ok(Ok(()))) {
                    return;
                }
            }
            if checked.elapsed() >= TOKEN_CHECK {
                checked = Instant::now();
                if let Err(status) = shared.authority.still(caller) {
                    let why = event("refused", &json!({ "error": status.message() }));
                    // A page that does not read misses the error and sees the end of the stream.
                    let _ = timeout(STALLED, outbox.send(Ok(why))).await;
                    return;
                }
            }
            if frames.changed().await.is_err() {
                return;
            }
        }
    }
}
