//! The report stream to one control plane.

use std::pin::pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::ReceiverStream;
use weir_discovery::{Identity, Link, SILENCE_MAX, answered, error_chain, reconnect_backoff};
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::{StreamReportsRequest, StreamReportsResponse};
use weir_runtime::Backoff;

use super::backends;
use super::outgoing::{Observed, Outgoing};
use crate::control::live_config::LiveConfig;
use crate::control::questions::Questions;

/// An event of a stream.
#[derive(Debug)]
pub(super) enum Event {
    /// The stream is open.
    Connected,
    /// A message arrived.
    Received(Box<StreamReportsResponse>),
    /// The stream ended; another attempt follows.
    Disconnected,
}

/// Keeps one stream open, and opens it again when it ends.
#[derive(Debug)]
pub(super) struct ReportStream {
    /// Its index among the streams.
    pub(super) at: usize,
    pub(super) live: Arc<LiveConfig>,
    pub(super) identity: Arc<Identity>,
    pub(super) link: Link,
    pub(super) outgoing: Arc<Outgoing>,
    pub(super) events: mpsc::Sender<(usize, Event)>,
    pub(super) questions: Questions,
}

impl ReportStream {
    /// Runs until the receiver of its events is dropped.
    pub(super) async fn run(self) {
        let mut backoff = reconnect_backoff();
        loop {
            let ended = self.follow(&mut backoff).await;
            self.outgoing.close();
            tracing::debug!(reason = ended.err(), url = self.link.url(), "report stream ended");
            if self.events.send((self.at, Event::Disconnected)).await.is_err() {
                return;
            }
            tokio::time::sleep(backoff.next_pause()).await;
        }
    }

    async fn follow(&self, backoff: &mut Backoff) -> Result<(), String> {
        let channel = self.link.endpoint()?.connect().await.map_err(|e| error_chain(&e))?;
        let mut client = ReportServiceClient::new(channel.clone());
        // Room for one message; further observations are merged until it is sent.
        let (up, reports) = mpsc::channel(1);
        // Sequence numbers start at one, because zero means never reported.
        let mut sequence = 1;
        let first = Observed { backends: backends::without_counts(&self.live), ..Observed::default() };
        up.try_send(self.report(first, sequence)).map_err(|_| "no room for the first report".to_owned())?;
        let request = self.identity.request(ReceiverStream::new(reports))?;
        let opened = answered(client.stream_reports(request)).await;
        let mut stream = opened.map_err(|s| s.message().to_owned())?.into_inner();
        self.outgoing.open();
        self.notify(Event::Connected).await?;
        let mut silent_at = Instant::now() + SILENCE_MAX;
        let mut questions = pin!(self.questions.serve(channel, &self.identity));
        loop {
            tokio::select! {
                () = sleep_until(silent_at) => return Err(format!("no message for {SILENCE_MAX:?}")),
                // Never ends: it has no end of its own to report.
                () = &mut questions => {}
                message = stream.message() => match message.map_err(|s| s.message().to_owned())? {
                    Some(message) => {
                        silent_at = Instant::now() + SILENCE_MAX;
                        backoff.reset();
                        self.notify(Event::Received(Box::new(message))).await?;
                    }
                    None => return Ok(()),
                },
                permit = self.room(&up) => {
                    let permit = permit?;
                    if let Some(observed) = self.outgoing.take() {
                        sequence += 1;
                        permit.send(self.report(observed, sequence));
                    }
                }
            }
        }
    }

    /// Returns when there are unsent observations and room to send them. Cancel-safe.
    async fn room<'a>(
        &self,
        up: &'a mpsc::Sender<StreamReportsRequest>,
    ) -> Result<mpsc::Permit<'a, StreamReportsRequest>, String> {
        self.outgoing.filled().await;
        up.reserve().await.map_err(|_| "the stream ended".to_owned())
    }

    async fn notify(&self, event: Event) -> Result<(), String> {
        self.events.send((self.at, event)).await.map_err(|_| "the gateway is stopping".to_owned())
    }

    fn report(&self, observed: Observed, sequence: u64) -> StreamReportsRequest {
        StreamReportsRequest {
            gateway_id: self.identity.id.clone(),
            incarnation: self.identity.incarnation.clone(),
            sequence,
            backends: observed.backends,
            region: self.identity.region.clone(),
            can_probe: true,
            probe_results: observed.results,
            traffic: observed.traffic,
            limits: observed.limits,
        }
    }
}
