//! Follows the transactions of all control planes and appends them to the log, each once and in order. After a failure it
//! continues from the last revision. If that revision is compacted, watchers read the store again.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::metadata::MetadataValue;
use weir_proto::etcd::event::EventType;
use weir_proto::etcd::watch_client::WatchClient;
use weir_proto::etcd::watch_request::RequestUnion;
use weir_proto::etcd::{Event, WatchCreateRequest, WatchRequest};

use super::client::{ANSWER_MAX_BYTES, TRY};
use super::layout::{self, Tip};
use super::{Inner, head};
use crate::store::{Batch, Write};

/// Between two connections.
const PAUSE: Duration = Duration::from_millis(100);

/// Where it is.
struct Cursor {
    revision: u64,
    /// etcd's revision of the last transaction seen.
    modified: i64,
    /// What has come of the next one.
    writes: Vec<Write>,
    writes_of: i64,
}

/// Why a watch ended.
enum Ended {
    /// The watch broke and continues on another connection.
    Broken(String),
    /// What comes next is not what comes after where it was.
    Gap,
}

/// Runs until the store stops it.
pub(super) async fn run(inner: &Inner, revision: u64, modified: i64) {
    let mut cursor = Cursor { revision, modified, writes: Vec::new(), writes_of: 0 };
    loop {
        let ended = watch(inner, &mut cursor).await;
        cursor.writes.clear();
        match ended {
            Ended::Broken(reason) => {
                tracing::debug!(reason, "etcd watch broke; it continues at another member")
            }
            Ended::Gap => match head(&inner.client, &inner.layout).await {
                Ok(Some(now)) => {
                    tracing::info!(
                        revision = now.tip.revision,
                        "store read again because of a gap in the log"
                    );
                    (cursor.revision, cursor.modified) = (now.tip.revision, now.modified);
                    inner.log.reset(cursor.revision);
                }
                Ok(None) => tracing::error!("the store in etcd is deleted; the last state stays in force"),
                Err(error) => tracing::warn!(%error, "store not readable"),
            },
        }
        sleep(PAUSE).await;
    }
}

async fn watch(inner: &Inner, cursor: &mut Cursor) -> Ended {
    let (at, channel) = match inner.client.now() {
        Ok(now) => now,
        Err(error) => return Ended::Broken(error.to_string()),
    };
    let ended = match open(inner, channel, cursor).await {
        Ok(ended) => ended,
        Err(status) if status.code() == tonic::Code::Unauthenticated => {
            let _ = inner.client.log_in().await;
            return Ended::Broken(status.message().to_owned());
        }
        Err(status) => Ended::Broken(status.message().to_owned()),
    };
    if matches!(ended, Ended::Broken(_)) {
        inner.client.move_on(at);
    }
    ended
}

async fn open(
    inner: &Inner,
    channel: tonic::transport::Channel,
    cursor: &mut Cursor,
) -> Result<Ended, Status> {
    let mut client = WatchClient::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
    // Kept open to the end: a watch ends with the stream of its requests.
    let (say, said) = tokio::sync::mpsc::channel(1);
    let (key, range_end) = inner.layout.written();
    let create = WatchCreateRequest { key, range_end, start_revision: cursor.modified + 1 };
    let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    say.send(create).await.map_err(|_| Status::cancelled("the stream ended"))?;
    let mut request = inner.client.request(ReceiverStream::new(said));
    // A member that has lost its leader would be silent for ever; like this it ends the watch.
    request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
    let late = |_| Status::deadline_exceeded(format!("no answer within {TRY:?}"));
    let mut answers = timeout(TRY, client.watch(request)).await.map_err(late)??.into_inner();
    while let Some(answer) = answers.next().await {
        let answer = answer?;
        if answer.canceled {
            let compacted = answer.compact_revision > 0;
            return Ok(if compacted { Ended::Gap } else { Ended::Broken(answer.cancel_reason) });
        }
        for event in answer.events {
            if !take(inner, cursor, event) {
                return Ok(Ended::Gap);
            }
        }
    }
    Ok(Ended::Broken("the stream ended".into()))
}

/// Applies one event. Returns false if the log has a gap.
fn take(inner: &Inner, cursor: &mut Cursor, event: Event) -> bool {
    let deleted = event.r#type() == EventType::Delete;
    let Some(entry) = event.kv else { return true };
    if entry.mod_revision != cursor.writes_of {
        // Events without a tip are not of a transaction, but of a restore or a manual change.
        cursor.writes.clear();
        cursor.writes_of = entry.mod_revision;
    }
    if entry.key != inner.layout.tip() {
        let Some(key) = inner.layout.store_key(&entry.key) else { return true };
        match (deleted, layout::unkept(&entry)) {
            (true, _) => cursor.writes.push(Write::Delete(key)),
            (false, Some((_, value))) => cursor.writes.push(Write::Put(key, value)),
            (false, None) => return false,
        }
        return true;
    }
    let writes = std::mem::take(&mut cursor.writes);
    match Tip::read(&entry.value).filter(|tip| !deleted && tip.revision == cursor.revision + 1) {
        Some(tip) => {
            (cursor.revision, cursor.modified) = (tip.revision, entry.mod_revision);
            inner.log.push(Batch { revision: tip.revision, writes });
            true
        }
        None => false,
    }
}
