//! Backups of the store.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use weir_proto::v1::BackupResponse;

use super::{Admin, Answers};
use crate::store::backup;

/// Bytes sent at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that wait for a slow reader.
const OUTBOX: usize = 2;

impl Admin {
    pub(super) async fn start_backup(&self) -> Result<Answers<BackupResponse>, Status> {
        let caller = self.caller()?;
        tracing::info!(target: "weir::audit", actor = &*caller.name, method = "Backup", "backup sent");
        let everything = self.0.catalog.everything().await?;
        let file = backup::encode(&everything);
        let (outbox, stream) = mpsc::channel(OUTBOX);
        let stop = self.0.stop.clone();
        // Ends with its reader or with the stop signal.
        self.0.tasks.spawn(async move {
            let mut rest = file;
            while !rest.is_empty() {
                let chunk = rest.split_to(CHUNK_BYTES.min(rest.len()));
                let sent = tokio::select! {
                    sent = outbox.send(Ok(BackupResponse { chunk: chunk.to_vec() })) => sent.is_ok(),
                    () = stop.cancelled() => false,
                };
                if !sent {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(stream))
    }
}
