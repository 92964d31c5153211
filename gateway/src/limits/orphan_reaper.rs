//! The orphan reaper: frees the leases of dead gateways.
//!
//! The control plane notices that a gateway is gone and tells a few others. Each of them frees the leases with the owner id
//! of the dead gateway, in every lease set of its configuration. The control plane may be wrong, because a gateway without a
//! control plane continues to serve. So every gateway sends a heartbeat to the limit store, and leases of a gateway with a
//! current heartbeat are not freed. A lease that is freed by mistake is taken again at its next renewal.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_ratelimit::membership::{self, MEMBERSHIP_LIFE};
use weir_ratelimit::{Key, Limiter, ORPHAN_SETS_MAX, OwnerId};

use super::ledger::{LEASE_TTL, Ledger};
use crate::control::live_config::LiveConfig;
use crate::metrics::{GoneLabels, Metrics};
use crate::routing::scope::ScopeEntry;
use crate::routing::snapshot::Snapshot;

/// The interval of heartbeats. A gateway counts as dead after three missing heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(900);
/// The interval between two checks of a gateway that was reported as gone.
const RETRY_PAUSE: Duration = Duration::from_millis(250);
/// A gateway whose heartbeat continues for this time is alive. Well above the lifetime of a heartbeat.
const ALIVE_AFTER: Duration = Duration::from_secs(2 * MEMBERSHIP_LIFE.as_secs());
/// Gateways that wait to be checked; the leases of further ones expire.
const QUEUE: usize = 256;

/// Sends heartbeats and frees the leases of dead gateways; [`Self::run`] must be called.
#[derive(Debug)]
pub struct OrphanReaper {
    live: Arc<LiveConfig>,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    own: OwnerId,
    gone: mpsc::Receiver<String>,
}

impl OrphanReaper {
    /// A reaper of the gateway with the owner id `own`, and the channel for the incarnations of dead gateways. If the channel
    /// is full, their leases expire.
    pub fn new(
        live: Arc<LiveConfig>,
        ledger: Arc<Ledger>,
        metrics: Arc<Metrics>,
        own: OwnerId,
    ) -> (mpsc::Sender<String>, Self) {
        let (sender, gone) = mpsc::channel(QUEUE);
        (sender, Self { live, ledger, metrics, own, gone })
    }

    /// Runs until `shutdown`, then removes this gateway's heartbeat.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        let mut known = HashSet::new();
        let mut heartbeats = tokio::time::interval(HEARTBEAT);
        heartbeats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Without the outage layer: heartbeats need the store itself.
        let store = self.ledger.limiter.store();
        loop {
            tokio::select! {
                _ = heartbeats.tick() => {
                    if let Err(error) = membership::heartbeat(store, self.own).await {
                        tracing::debug!(%error, "heartbeat not sent to the limit store");
                    }
                }
                Some(incarnation) = self.gone.recv(), if tasks.len() < QUEUE => {
                    let holder = OwnerId::of(&incarnation);
                    if holder != self.own && known.insert(holder) {
                        let (live, ledger) = (self.live.clone(), self.ledger.clone());
                        tasks.spawn(async move { (holder, incarnation, free_when_gone(&live, &ledger, holder).await) });
                    }
                }
                Some(Ok((holder, incarnation, outcome))) = tasks.join_next(), if !tasks.is_empty() => {
                    known.remove(&holder);
                    self.note(&incarnation, &outcome);
                }
                () = shutdown.cancelled() => break,
            }
        }
        tasks.shutdown().await;
        if let Err(error) = membership::leave(store, self.own).await {
            tracing::debug!(%error, "heartbeat not removed from the limit store; it expires");
        }
    }

    fn note(&self, incarnation: &str, outcome: &Outcome) {
        let label = match outcome {
            Outcome::Freed(leases) => {
                self.metrics.leases_reaped.inc_by(*leases);
                tracing::info!(incarnation, leases, "leases of a dead gateway freed");
                "freed"
            }
            Outcome::Lives => {
                tracing::info!(incarnation, "gateway without a control plane is alive; its leases stay");
                "lives"
            }
            Outcome::Unknown(reason) => {
                tracing::warn!(incarnation, reason, "leases of a dead gateway not freed; they expire");
                "unknown"
            }
        };
        self.metrics.gateways_gone.get_or_create(&GoneLabels { outcome: label }).inc();
    }
}

#[derive(Debug)]
enum Outcome {
    Freed(u64),
    Lives,
    Unknown(String),
}

/// Asks until the store knows the answer: the last heartbeat must expire first.
async fn free_when_gone(live: &LiveConfig, ledger: &Ledger, holder: OwnerId) -> Outcome {
    let began = tokio::time::Instant::now();
    loop {
        let tried = reap(live, ledger, holder).await;
        match tried {
            Ok(Some(leases)) => return Outcome::Freed(leases),
            Ok(None) if began.elapsed() >= ALIVE_AFTER => return Outcome::Lives,
            Err(error) if began.elapsed() >= LEASE_TTL => return Outcome::Unknown(error.to_string()),
            Ok(None) | Err(_) => tokio::time::sleep(RETRY_PAUSE).await,
        }
    }
}

async fn reap(
    live: &LiveConfig,
    ledger: &Ledger,
    holder: OwnerId,
) -> Result<Option<u64>, weir_ratelimit::Error> {
    let sets = lease_sets(&live.snapshot());
    let mut freed = 0;
    for sets in sets.chunks(ORPHAN_SETS_MAX) {
        match ledger.limiter.free_orphans(holder, sets).await? {
            Some(leases) => freed += leases,
            None => return Ok(None),
        }
    }
    Ok(Some(freed))
}

/// Every lease set of this configuration; sets of the same hash slot are adjacent.
fn lease_sets(snapshot: &Snapshot) -> Vec<Key> {
    let keys = snapshot.keys.values().flat_map(|key| &key.scopes);
    let tenants = snapshot.tenants.values().flat_map(|tenant| {
        tenant.scopes.iter().chain(tenant.model_scopes.iter().flat_map(|(_, scopes)| scopes))
    });
    let models = snapshot.models_by_name.values().flat_map(|model| {
        let accounts = model.accounts.iter().flat_map(|account| &account.scopes);
        model.scopes.iter().chain(accounts)
    });
    let scopes = keys.chain(tenants).chain(models).chain(&snapshot.global);
    let limited = scopes.filter(|entry: &&ScopeEntry| entry.limits.concurrency.is_some());
    let sets: BTreeSet<Key> = limited
        .map(|entry| entry.limits.leases.clone())
        .chain(snapshot.backends.values().map(|backend| backend.slots.clone()))
        .collect();
    sets.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use weir_proto::resource::Resource;
    use weir_proto::v1::{self, resource::Spec};

    use super::*;

    #[test]
    fn leases_of_accounts_are_freed_with_the_rest() {
        let put = |name: &str, spec| {
            let wire = v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
            Resource::try_from(&wire).expect("valid")
        };
        let backend = v1::BackendSpec {
            pool: "chat".into(),
            url: "http://127.0.0.1:9".into(),
            models: [("m".to_owned(), String::new())].into(),
            account: "x".into(),
            ..Default::default()
        };
        let selector = v1::LimitSelector { account: "x".into(), ..Default::default() };
        let rates = v1::Rates { concurrency: Some(2), ..Default::default() };
        let resources = [
            put("chat", Spec::Pool(v1::PoolSpec::default())),
            put("b", Spec::Backend(backend)),
            put("m", Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() })),
            put("l", Spec::Limit(v1::LimitSpec { selector: Some(selector), rates: Some(rates) })),
        ];
        let (snapshot, _) = Snapshot::compile("e", 1, &resources, &Snapshot::default(), &|_| Ok(None));
        let sets: Vec<String> = lease_sets(&snapshot).iter().map(|key| key.as_str().to_owned()).collect();
        assert_eq!(sets, ["weir:{a:x}:c:l:l", "weir:{b:b}:c"]);
    }
}
