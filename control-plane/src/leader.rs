//! Which of several control planes is the leader: the one that holds the lease. All of them receive reports and compute
//! verdicts; gateways follow the verdicts and assignments of the leader only.
//!
//! The leader writes nothing to the store because it is the leader, so the fencing token needs to protect messages only:
//! gateways follow the highest token that they have received. A leader that cannot renew its lease stops before it expires.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::store::{Error, Store};

const LEASE: &str = "leader";
/// The lifetime of the lease, after which a dead leader is replaced. Several times the pauses of a busy machine.
const TTL: Duration = Duration::from_secs(8);
/// A leader stops this long before its lease expires, for messages that are still on their way.
const MARGIN: Duration = Duration::from_secs(1);
/// The interval between two renewals, or two requests of the lease. Each is one small read.
const INTERVAL: Duration = Duration::from_secs(1);
/// The reason of a leader that ends with its process.
const STOPPING: &str = "stopping";

/// The fencing token while this control plane is the leader.
pub(crate) type Leads = watch::Receiver<Option<u64>>;

/// A candidate for the leader lease.
#[derive(Debug)]
pub(crate) struct Candidate {
    store: Arc<dyn Store>,
    name: String,
    leads: watch::Sender<Option<u64>>,
    metrics: Arc<Metrics>,
    /// Until when this control plane may be the leader.
    until: Instant,
}

impl Candidate {
    /// A candidate under a name that no other control plane of the store has.
    pub(crate) fn new(store: Arc<dyn Store>, name: String, metrics: Arc<Metrics>) -> Self {
        Self { store, name, leads: watch::Sender::new(None), metrics, until: Instant::now() }
    }

    /// The fencing token and its changes.
    pub(crate) fn leads(&self) -> Leads {
        self.leads.subscribe()
    }

    /// Requests or renews the lease once. A control plane without others is the leader after this call.
    pub(crate) async fn ask(&mut self) {
        let asked = Instant::now();
        let leading = *self.leads.borrow();
        let answer = {
            let lease = self.store.lease(LEASE, &self.name, TTL);
            let limit = if leading.is_some() { self.until.saturating_duration_since(asked) } else { TTL };
            timeout(limit, lease).await
        };
        match answer {
            Ok(Ok(lease)) => {
                self.until = asked + TTL - MARGIN;
                // A renewal whose answer came after the lease expired does not count.
                self.set((Instant::now() < self.until).then_some(lease.fencing_token), "acquired the lease");
            }
            Ok(Err(Error::Held(by))) => self.set(None, &format!("{by} has the lease")),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the leader lease could not be requested");
                if Instant::now() >= self.until {
                    self.set(None, "the lease could not be renewed");
                }
            }
            Err(_) => self.set(None, "the lease could not be renewed in time"),
        }
    }

    fn set(&self, fencing_token: Option<u64>, reason: &str) {
        let changed =
            self.leads.send_if_modified(|leads| std::mem::replace(leads, fencing_token) != fencing_token);
        if changed {
            match fencing_token {
                Some(fencing_token) => tracing::info!(name = self.name, fencing_token, "became the leader"),
                // Nothing is wrong with a process that stops.
                None if reason == STOPPING => {
                    tracing::info!(name = self.name, reason, "stopped being the leader");
                }
                None => tracing::warn!(name = self.name, reason, "stopped being the leader"),
            }
            self.metrics.is_leader.set(i64::from(fencing_token.is_some()));
        }
    }

    /// Renews the lease until `stop`, then releases it.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let next = Instant::now() + INTERVAL;
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(next) => {}
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.ask() => {}
            }
        }
        self.set(None, STOPPING);
        if let Err(error) = self.store.release(LEASE, &self.name).await {
            tracing::warn!(%error, "the leader lease was not released; the next leader waits until it expires");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn candidate(store: &Arc<MemoryStore>, name: &str) -> Candidate {
        Candidate::new(store.clone(), name.into(), Arc::default())
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_until_it_stops_or_cannot_renew_and_the_next_has_a_higher_number() {
        let store = Arc::new(MemoryStore::default());
        let (mut a, mut b) = (candidate(&store, "a"), candidate(&store, "b"));
        a.ask().await;
        b.ask().await;
        let first = a.leads().borrow().expect("a was first");
        assert_eq!(*b.leads().borrow(), None);
        for _ in 0..20 {
            tokio::time::advance(INTERVAL).await;
            a.ask().await;
            b.ask().await;
        }
        assert_eq!((*a.leads().borrow(), *b.leads().borrow()), (Some(first), None));
        // Paused for longer than its lease: by the time it is back another one leads, with a higher number.
        tokio::time::advance(TTL).await;
        b.ask().await;
        let second = b.leads().borrow().expect("b follows");
        assert!(second > first);
        a.ask().await;
        assert_eq!(*a.leads().borrow(), None);
        let stop = CancellationToken::new();
        stop.cancel();
        b.run(stop).await;
        a.ask().await;
        assert!(a.leads().borrow().expect("given back, so at once") > second);
    }
}
