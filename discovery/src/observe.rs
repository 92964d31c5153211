//! Where there are several control planes a subscriber follows one and reports to the others what it holds, so that each
//! of them knows what all subscribers hold without asking another.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::{Applied, Hello, ResourceError};
use weir_runtime::Backoff;

use crate::link::{Identity, Link, SILENCE_MAX, error_chain, reconnect_backoff, send};

/// Between two reports: changes in between are merged.
const REPORT_INTERVAL: Duration = Duration::from_millis(20);

/// What a subscriber holds, as it reports it.
#[derive(Debug, Clone, Default)]
pub(crate) struct SubscriberStatus {
    /// As in Hello.
    pub(crate) hello: Hello,
    /// What of it was refused.
    pub(crate) errors: Vec<ResourceError>,
    /// The revision that was answered last.
    pub(crate) answered: u64,
}

/// Reports to one control plane what is held, for as long as another one is followed. Never ends by itself.
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
        tracing::debug!(reason = ended.err(), at, "a control plane that is not followed is away");
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
    send(&up, Up::Hello(Hello { observer: true, ..sent.hello.clone() })).await?;
    if !sent.errors.is_empty() {
        send(&up, applied(sent)).await?;
    }
    let request = identity.request(ReceiverStream::new(messages))?;
    let mut stream = client.stream_config(request).await.map_err(|s| s.message().to_owned())?.into_inner();
    loop {
        tokio::select! {
            received = tokio::time::timeout(SILENCE_MAX, stream.message()) => {
                match received.map_err(|_| format!("nothing heard for {SILENCE_MAX:?}"))? {
                    // Nothing but heartbeats comes here.
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
        store_epoch: status.hello.store_epoch,
        store_revision: status.hello.store_revision,
        held: if status.errors.is_empty() { Vec::new() } else { status.hello.held },
        errors: status.errors,
        answered_revision: status.answered,
    })
}
