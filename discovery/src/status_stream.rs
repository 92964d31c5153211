//! Status streams. With several control planes a subscriber follows one of them and reports its resource versions to the
//! others, so that each of them knows which revision every subscriber has applied without asking another.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::{Applied, Hello, ResourceError};
use weir_runtime::Backoff;

use crate::config_state::ConfigState;
use crate::link::{Identity, Link, SILENCE_MAX, answered, error_chain, hello, reconnect_backoff, send};

/// Between two reports: changes in between are merged.
const REPORT_INTERVAL: Duration = Duration::from_millis(20);

/// The configuration that a subscriber has applied, as it reports it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SubscriberStatus {
    /// The applied configuration.
    pub(crate) config: ConfigState,
    /// The refused resources of the newest change.
    pub(crate) errors: Vec<ResourceError>,
    /// The revision of the newest delta that was answered.
    pub(crate) answered: u64,
}

/// Reports to one control plane while the subscriber follows another one. Ends only when `followed` is closed.
pub(crate) async fn run(
    at: usize,
    link: Link,
    identity: Arc<Identity>,
    mut status: watch::Receiver<SubscriberStatus>,
    mut followed: watch::Receiver<usize>,
) {
    let mut backoff = reconnect_backoff();
    loop {
        if followed.wait_for(|followed| *followed != at).await.is_err() {
            return;
        }
        let ended = tokio::select! {
            ended = report(&link, &identity, &mut status, &mut backoff) => ended,
            followed = followed.wait_for(|followed| *followed == at) => match followed {
                Ok(_) => continue,
                Err(_) => return,
            },
        };
        tracing::debug!(reason = ended.err(), at, "status stream ended; it is opened again after a pause");
        tokio::time::sleep(backoff.next_pause()).await;
    }
}

async fn report(
    link: &Link,
    identity: &Identity,
    status: &mut watch::Receiver<SubscriberStatus>,
    backoff: &mut Backoff,
) -> Result<(), String> {
    let channel = link.endpoint()?.connect().await.map_err(|e| error_chain(&e))?;
    let mut client = DiscoveryServiceClient::new(channel);
    let (up, messages) = mpsc::channel(2);
    let sent = status.borrow_and_update().clone();
    send(&up, Up::Hello(Hello { status_only: true, ..hello(identity, &sent.config) })).await?;
    if !sent.errors.is_empty() {
        send(&up, applied(sent)).await?;
    }
    let request = identity.request(ReceiverStream::new(messages))?;
    let mut stream =
        answered(client.stream_config(request)).await.map_err(|s| s.message().to_owned())?.into_inner();
    loop {
        tokio::select! {
            received = tokio::time::timeout(SILENCE_MAX, stream.message()) => {
                match received.map_err(|_| format!("no message for {SILENCE_MAX:?}"))? {
                    // Only heartbeats arrive on a status stream.
                    Ok(Some(_)) => backoff.reset(),
                    Ok(None) => return Ok(()),
                    Err(error) => return Err(error.message().to_owned()),
                }
            }
            changed = status.changed() => {
                changed.map_err(|_| "the subscriber ended".to_owned())?;
                tokio::time::sleep(REPORT_INTERVAL).await;
                let sent = status.borrow_and_update().clone();
                send(&up, applied(sent)).await?;
            }
        }
    }
}

fn applied(status: SubscriberStatus) -> Up {
    Up::Applied(Applied {
        store_revision: status.config.revision,
        resource_versions: if status.errors.is_empty() { Vec::new() } else { status.config.versions() },
        store_epoch: status.config.epoch,
        errors: status.errors,
        answered_revision: status.answered,
    })
}
