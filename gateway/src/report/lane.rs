//! The report lane to one control plane.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use weir_discovery::{Identity, Link, error_chain, reconnect_backoff};
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::{StreamReportsRequest, StreamReportsResponse};
use weir_runtime::Backoff;

use super::outgoing::{Outgoing, Seen};
use crate::live::Live;

/// What happened on a lane.
#[derive(Debug)]
pub(super) enum News {
    /// It is there.
    Open,
    /// The control plane said something.
    Said(Box<StreamReportsResponse>),
    /// It is gone.
    Closed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Lane {
    /// Its place among the lanes.
    pub(super) at: usize,
    pub(super) live: Arc<Live>,
    pub(super) identity: Arc<Identity>,
    pub(super) link: Link,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) news: mpsc::Sender<(usize, News)>,
}

impl Lane {
    /// Never ends by itself, but when nobody listens to its news any more.
    pub(super) async fn run(self) {
        let mut backoff = reconnect_backoff();
        loop {
            let ended = self.follow(&mut backoff).await;
            self.outgoing.close();
            tracing::debug!(reason = ended.err(), url = self.link.url(), "report lane away");
            if self.news.send((self.at, News::Closed)).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.next_pause()).await;
        }
    }

    async fn follow(&self, backoff: &mut Backoff) -> Result<(), String> {
        let channel = self.link.endpoint()?.connect().await.map_err(|e| error_chain(&e))?;
        let mut client = ReportServiceClient::new(channel);
        // Room for one: what cannot go yet is merged with what comes next.
        let (up, reports) = mpsc::channel(1);
        // Zero is what was never reported.
        let mut sequence = 1;
        let standing = Seen { backends: super::backends(&self.live, false), ..Seen::default() };
        up.try_send(self.report(standing, sequence))
            .map_err(|_| "no room for the first report".to_owned())?;
        let request = self.identity.request(ReceiverStream::new(reports))?;
        let mut stream =
            client.stream_reports(request).await.map_err(|s| s.message().to_owned())?.into_inner();
        self.outgoing.open();
        self.tell(News::Open).await?;
        loop {
            tokio::select! {
                message = stream.message() => match message.map_err(|s| s.message().to_owned())? {
                    Some(message) => {
                        backoff.reset();
                        self.tell(News::Said(Box::new(message))).await?;
                    }
                    None => return Ok(()),
                },
                permit = self.room(&up) => {
                    let permit = permit?;
                    if let Some(seen) = self.outgoing.take() {
                        sequence += 1;
                        permit.send(self.report(seen, sequence));
                    }
                }
            }
        }
    }

    /// Returns when there is something to say and room to say it. Cancel-safe.
    async fn room<'a>(
        &self,
        up: &'a mpsc::Sender<StreamReportsRequest>,
    ) -> Result<mpsc::Permit<'a, StreamReportsRequest>, String> {
        self.outgoing.filled().await;
        up.reserve().await.map_err(|_| "the stream ended".to_owned())
    }

    async fn tell(&self, news: News) -> Result<(), String> {
        self.news.send((self.at, news)).await.map_err(|_| "the gateway is stopping".to_owned())
    }

    fn report(&self, seen: Seen, sequence: u64) -> StreamReportsRequest {
        StreamReportsRequest {
            gateway_id: self.identity.id.clone(),
            incarnation: self.identity.incarnation.clone(),
            sequence,
            backends: seen.backends,
            region: self.identity.region.clone(),
            probes: true,
            results: seen.results,
            traffic: seen.traffic,
            limits: seen.limits,
        }
    }
}
