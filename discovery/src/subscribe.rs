//! One task owns the [`ConfigState`]. It loads the copy on disk first, then follows a control plane. When the stream ends it
//! connects again with full-jitter backoff; the configuration stays in force meanwhile.
//!
//! A change is put in force before the task waits for anything. A resource that the owner cannot use yet, such as a backend
//! whose credential is on a disk that hangs, or a copy that cannot be written, delays only the acknowledgement, by less than
//! a second. So the next change, which may revoke a key, is never blocked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::stream_config_response::Message as Down;
use weir_proto::v1::{Ack, Delta, Nack, ResourceError, ResourceRef, Retry};
use weir_runtime::{Backoff, beside};

use crate::config_state::{ConfigState, Refused, ResourceId, ids};
use crate::disk::Disk;
use crate::link::{Identity, Link, SILENCE_MAX, answered, hello, reconnect_backoff, send};
use crate::problem::Problem;
use crate::save::Saver;
use crate::status_stream::{self, SubscriberStatus};
use crate::update::{Step, Update};

/// Largest message. The control plane sends a large configuration in several deltas.
const MESSAGE_MAX_BYTES: usize = 64 << 20;

/// The owner of a configuration, which puts it in force.
pub trait Apply: Send {
    /// Puts a configuration in force as a whole. Resources that cannot be used are left out and returned, those before included.
    fn apply(&mut self, update: &Update<'_>) -> Vec<Refused>;
    /// Returns the resources that cannot be used, without putting any in force. The last version of such a resource stays. An
    /// owner that can use every valid resource returns nothing.
    fn check(&self, _update: &Update<'_>) -> Vec<Refused> {
        Vec::new()
    }
    /// Waits, well below a second, for what the last check or apply could not know yet. Returns whether there was anything;
    /// if so, check and apply may have another result.
    fn settle(&mut self) -> impl Future<Output = bool> + Send {
        std::future::ready(false)
    }
    /// Returns when check or apply may have another result although no resource changed. Cancel-safe; returns again until
    /// the resources are applied again.
    fn changed(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
    /// The refused resources by kind and name, with reasons.
    fn refusing(&mut self, _refusing: &BTreeMap<(i32, String), String>) {}
    /// Sets the number of refused resources; an entire refused delta counts as one.
    fn refused(&mut self, _count: usize) {}
    /// Sets whether a control plane is connected.
    fn connected(&mut self, connected: bool);
    /// Sets why no control plane is followed, with a remedy; `None` when one has sent something.
    fn problem(&mut self, _problem: Option<String>) {}
}

/// The task; ends with `shutdown`.
#[derive(Debug)]
pub struct Subscriber<A> {
    owner: A,
    identity: Arc<Identity>,
    /// All control planes of the store. One is followed; the others receive status streams.
    links: Vec<Link>,
    /// The index of the control plane that is followed or tried.
    followed: watch::Sender<usize>,
    /// The last problem with each control plane; `None` for one that has sent something since.
    problems: Vec<Option<Problem>>,
    status: watch::Sender<SubscriberStatus>,
    saver: Option<Saver>,
    /// The copy read at the start, until it is in force.
    loaded: Option<ConfigState>,
    config: ConfigState,
    /// Resources of it that cannot be decoded, with reasons.
    unusable: BTreeMap<ResourceId, String>,
    /// The newest revision that was acknowledged or refused.
    answered: u64,
    /// The refused resources by kind and name, with reasons.
    refusing: BTreeMap<(i32, String), String>,
    /// The control plane is to send the refused resources again.
    retry: bool,
}

impl<A: Apply> Subscriber<A> {
    /// Loads the copy on disk (blocks), which [`Self::run`] puts in force first. `links` must not be empty.
    pub fn new(owner: A, identity: Identity, links: Vec<Link>, disk: Option<Disk>) -> Self {
        // Subscribers spread over the control planes by their names, and start with the same one each time.
        let bytes = Sha256::digest(identity.id.as_bytes());
        let first = bytes.first().map_or(0, |byte| usize::from(*byte)) % links.len().max(1);
        Self {
            owner,
            identity: Arc::new(identity),
            problems: vec![None; links.len()],
            links,
            followed: watch::Sender::new(first),
            status: watch::Sender::default(),
            loaded: disk.as_ref().and_then(Disk::load),
            saver: disk.map(Saver::new),
            config: ConfigState::default(),
            unusable: BTreeMap::new(),
            answered: 0,
            refusing: BTreeMap::new(),
            retry: false,
        }
    }

    /// Puts the copy on disk in force and follows a control plane, or another one if it fails, until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        if let Some(held) = self.loaded.take() {
            let revision = held.revision;
            let step = beside(held.len(), || Step::to_all(&held));
            // No request is served yet, so a short wait delays nothing.
            beside(step.len(), || self.owner.check(&step.update(&held)));
            self.owner.settle().await;
            let refused = self.enforce(held, step);
            say(&refused);
            self.owner.refused(refused.len());
            tracing::info!(revision, refused = refused.len(), "serving the configuration copy");
        }
        let mut backoff = reconnect_backoff();
        self.publish_status(&[]);
        // The status streams end with this task.
        let mut status_streams = JoinSet::new();
        if self.links.len() > 1 {
            for (at, link) in self.links.iter().enumerate() {
                let (status, followed) = (self.status.subscribe(), self.followed.subscribe());
                status_streams.spawn(status_stream::run(
                    at,
                    link.clone(),
                    Arc::clone(&self.identity),
                    status,
                    followed,
                ));
            }
        }
        tokio::select! {
            () = self.follow_all(&mut backoff) => {}
            () = shutdown.cancelled() => {}
        }
        if let Some(saver) = &self.saver {
            saver.saved().await;
        }
    }

    /// Follows one control plane after the other. Never ends.
    async fn follow_all(&mut self, backoff: &mut Backoff) {
        loop {
            let at = *self.followed.borrow();
            let ended = self.follow(at, backoff).await;
            self.owner.connected(false);
            self.followed.send_modify(|at| *at = (*at + 1) % self.links.len().max(1));
            // A stream that ends without a reason has reached its age.
            if let Err(problem) = ended {
                self.failed(at, problem);
            }
            self.meanwhile(tokio::time::sleep(backoff.next_pause())).await;
        }
    }

    /// Tells a problem with a control plane: in the log once, as long as it stays the same.
    fn failed(&mut self, at: usize, problem: Problem) {
        let text = |at: usize, problem: &Problem| problem.text(&self.identity, self.links[at].url());
        let (url, reason, revision) = (self.links[at].url(), text(at, &problem), self.config.revision);
        if self.problems[at].as_ref() == Some(&problem) {
            tracing::debug!(url, reason, revision, "control plane still not followed");
        } else {
            tracing::warn!(
                url,
                reason,
                revision,
                "control plane not followed; the configuration stays in force"
            );
        }
        self.problems[at] = Some(problem);
        let several = self.links.len() > 1;
        let known = self.problems.iter().enumerate().filter_map(|(at, known)| {
            let told = text(at, known.as_ref()?);
            let name = if several {
                format!("control plane {}", self.links[at].url())
            } else {
                "control plane".to_owned()
            };
            Some(format!("{name} {told}"))
        });
        let all = known.collect::<Vec<_>>().join("; ");
        self.owner.problem(Some(all));
    }

    /// Notes that a control plane has accepted this process and sent something.
    fn heard(&mut self, at: usize) {
        if self.problems[at].take().is_some() {
            tracing::info!(url = self.links[at].url(), "control plane followed");
        }
        self.owner.problem(None);
    }

    /// Waits for a future, and applies the resources again whenever the owner requests it.
    async fn meanwhile<T>(&mut self, something: impl Future<Output = T>) -> T {
        let mut something = std::pin::pin!(something);
        loop {
            tokio::select! {
                done = &mut something => return done,
                () = self.owner.changed() => self.renew(),
            }
        }
    }

    async fn follow(&mut self, at: usize, backoff: &mut Backoff) -> Result<(), Problem> {
        // The address was checked at the start, so only its certificates can be wrong.
        let connecting = self.links[at].endpoint().map_err(Problem::Tls)?;
        let channel: Channel = self
            .meanwhile(async move { connecting.connect().await })
            .await
            .map_err(|e| Problem::of_transport(&e))?;
        let mut client = DiscoveryServiceClient::new(channel).max_decoding_message_size(MESSAGE_MAX_BYTES);
        // Room for hello, one answer and one retry, because one delta is in flight at a time.
        let (up, messages) = mpsc::channel(3);
        // After hello the control plane sends all refused resources anyway.
        self.retry = false;
        send(&up, Up::Hello(hello(&self.identity, &self.config))).await.map_err(Problem::Ended)?;
        let request = self.identity.request(ReceiverStream::new(messages)).map_err(Problem::UnusableToken)?;
        let opened = self.meanwhile(answered(client.stream_config(request))).await;
        let mut stream = opened.map_err(|status| Problem::of_status(&status))?.into_inner();
        self.owner.connected(true);
        let mut silent_at = Instant::now() + SILENCE_MAX;
        loop {
            if std::mem::take(&mut self.retry) {
                send(&up, Up::Retry(Retry {})).await.map_err(Problem::Ended)?;
            }
            let message = tokio::select! {
                message = tokio::time::timeout_at(silent_at, stream.message()) => message,
                () = self.owner.changed() => {
                    self.renew();
                    continue;
                }
            };
            let message = message.map_err(|_| Problem::Ended(format!("no message for {SILENCE_MAX:?}")))?;
            let Some(message) = message.map_err(|status| Problem::of_status(&status))? else { return Ok(()) };
            silent_at = Instant::now() + SILENCE_MAX;
            self.heard(at);
            backoff.reset();
            if let Some(Down::Delta(delta)) = message.message {
                let answer = self.apply(delta).await;
                send(&up, answer).await.map_err(Problem::Ended)?;
            }
        }
    }

    /// Publishes the status for the control planes that are not followed.
    fn publish_status(&self, errors: &[ResourceError]) {
        if self.links.len() > 1 {
            let (config, answered) = (self.config.clone(), self.answered);
            self.status.send_replace(SubscriberStatus { config, errors: errors.to_vec(), answered });
        }
    }

    async fn apply(&mut self, delta: Delta) -> Up {
        let nonce = delta.nonce;
        self.answered = delta.target_revision.max(delta.store_revision);
        let changed = delta.upserts.len() + delta.removals.len();
        let next = match beside(changed, || self.config.after(&delta)) {
            Ok(next) => next,
            Err(error) => {
                tracing::error!(%error, "entire delta refused");
                self.owner.refused(1);
                let errors = vec![ResourceError { resource: None, message: error.to_string() }];
                self.publish_status(&errors);
                return Up::Nack(Nack { nonce, errors });
            }
        };
        let refused = self.take(next, &delta).await;
        if let Some(saver) = &mut self.saver {
            saver.save(&self.config);
            saver.saved().await;
        }
        say(&refused);
        tracing::info!(
            revision = self.config.revision,
            changed = delta.upserts.len(),
            removed = delta.removals.len(),
            refused = refused.len(),
            "configuration applied"
        );
        // Refused resources are sent again with the next change; deletions are sent without them.
        if !delta.upserts.is_empty() || delta.store_revision == delta.target_revision {
            self.refusing.clear();
        }
        self.refusing.extend(refused.iter().map(|r| ((r.kind as i32, r.name.clone()), r.message.clone())));
        self.owner.refused(self.refusing.len());
        self.owner.refusing(&self.refusing);
        let error = |kind: i32, name: &str, message: &str| ResourceError {
            resource: Some(ResourceRef { kind, name: name.to_owned() }),
            message: message.to_owned(),
        };
        let all = self.refusing.iter().map(|((kind, name), message)| error(*kind, name, message));
        self.publish_status(&all.collect::<Vec<_>>());
        let errors: Vec<_> = refused.iter().map(|r| error(r.kind as i32, &r.name, &r.message)).collect();
        if errors.is_empty() { Up::Ack(Ack { nonce }) } else { Up::Nack(Nack { nonce, errors }) }
    }

    /// Puts the resources of a delta in force; first the ones that the owner can use at once.
    async fn take(&mut self, next: ConfigState, delta: &Delta) -> Vec<Refused> {
        let before = self.config.clone();
        let ids = ids(delta);
        if before.epoch.is_empty() {
            // No request is served yet, so a revoked key is not in force either.
            let step = self.step(&next, &ids);
            beside(step.len(), || self.owner.check(&step.update(&next)));
            self.owner.settle().await;
        }
        let refused = self.enforce_or_keep(next.clone(), &before, delta, &ids);
        // The owner may have requested the refused resources a moment ago.
        if self.owner.settle().await { self.enforce_or_keep(next, &before, delta, &ids) } else { refused }
    }

    /// The step from what is in force to a configuration that differs in some of these resources.
    fn step(&self, next: &ConfigState, ids: &BTreeSet<ResourceId>) -> Step {
        beside(ids.len(), || Step::between(&self.config, &self.unusable, next, ids))
    }

    /// Keeps the last version of changed resources that cannot be used.
    fn enforce_or_keep(
        &mut self,
        mut next: ConfigState,
        before: &ConfigState,
        delta: &Delta,
        ids: &BTreeSet<ResourceId>,
    ) -> Vec<Refused> {
        let mut step = self.step(&next, ids);
        let mut refused = step.refused();
        refused.extend(beside(step.len(), || self.owner.check(&step.update(&next))));
        if next.keep(before, delta, &refused) {
            step = self.step(&next, ids);
        } else {
            refused.clear();
        }
        let known: BTreeSet<_> = refused.iter().map(|r| (r.kind, r.name.clone())).collect();
        let more = self.enforce(next, step);
        refused.extend(more.into_iter().filter(|more| !known.contains(&(more.kind, more.name.clone()))));
        refused
    }

    /// Puts a configuration in force and returns the refused resources.
    fn enforce(&mut self, next: ConfigState, step: Step) -> Vec<Refused> {
        let mut refused = step.refused();
        refused.extend(beside(step.len(), || self.owner.apply(&step.update(&next))));
        self.config = next;
        self.unusable = step.unusable;
        refused
    }

    /// Applies the resources again after a change of the owner, and requests the refused resources again.
    fn renew(&mut self) {
        let held = self.config.clone();
        let step = self.step(&held, &BTreeSet::new());
        let refused = self.enforce(held, step);
        say(&refused);
        tracing::info!(
            revision = self.config.revision,
            refused = refused.len(),
            "configuration applied again"
        );
        self.owner.refused(self.refusing.len().max(refused.len()));
        self.retry = !self.refusing.is_empty();
    }
}

fn say(refused: &[Refused]) {
    for r in refused {
        tracing::warn!(
            kind = weir_proto::resource::kind_name(r.kind),
            name = r.name,
            reason = r.message,
            "resource refused"
        );
    }
}
