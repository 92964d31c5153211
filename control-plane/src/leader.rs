//! Which of several control planes leads: the one that has the lease. All of them take in what gateways see and judge it;
//! the one that leads has its verdicts and assignments followed.
//!
//! Nothing is written to the store by virtue of leading, so the number of the lease fences what is sent: gateways
//! follow the highest they have received. A leader that cannot renew stops before its lease ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::store::{Error, Store};

const LEASE: &str = "leader";
/// How long a leader that died is waited for. Several times the pauses of a busy machine.
const TTL: Duration = Duration::from_secs(8);
/// A leader stops so long before its lease ends: the time that a message may be on its way.
const MARGIN: Duration = Duration::from_secs(1);
/// Between two renewals, or two looks at whether it is free. One small read each.
const INTERVAL: Duration = Duration::from_secs(1);

/// The number of the lease while this control plane leads.
pub(crate) type Leads = watch::Receiver<Option<u64>>;

/// One control plane's part in the election.
#[derive(Debug)]
pub(crate) struct Candidate {
    store: Arc<dyn Store>,
    name: String,
    leads: watch::Sender<Option<u64>>,
    metrics: Arc<Metrics>,
    /// Until when it may lead.
    until: Instant,
}

impl Candidate {
    /// Under this name, which is nobody else's.
    pub(crate) fn new(store: Arc<dyn Store>, name: String, metrics: Arc<Metrics>) -> Self {
        Self { store, name, leads: watch::Sender::new(None), metrics, until: Instant::now() }
    }

    /// The number, and every change of it.
    pub(crate) fn leads(&self) -> Leads {
        self.leads.subscribe()
    }

    /// Asks once. Where there is no other control plane it leads from then on.
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
                // A renewal that came too late is none.
                self.set((Instant::now() < self.until).then_some(lease.fencing), "it has the lease");
            }
            Ok(Err(Error::Held(by))) => self.set(None, &format!("{by} has the lease")),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the lease of the leader could not be asked for");
                if Instant::now() >= self.until {
                    self.set(None, "the lease could not be renewed");
                }
            }
            Err(_) => self.set(None, "the lease could not be renewed in time"),
        }
    }

    fn set(&self, fencing: Option<u64>, reason: &str) {
        let changed = self.leads.send_if_modified(|leads| std::mem::replace(leads, fencing) != fencing);
        if changed {
            match fencing {
                Some(fencing) => tracing::info!(name = self.name, fencing, "this control plane leads"),
                None => tracing::warn!(name = self.name, reason, "this control plane does not lead any more"),
            }
            self.metrics.leads.set(i64::from(fencing.is_some()));
        }
    }

    /// Asks again and again until told to stop; then gives the lease back.
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
        self.set(None, "it stops");
        if let Err(error) = self.store.release(LEASE, &self.name).await {
            tracing::warn!(%error, "the lease is not given back: the next leader waits for its end");
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
