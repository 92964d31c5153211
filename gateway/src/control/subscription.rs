//! Keeps the snapshot fresh: what a gateway does with the configuration it subscribes to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use weir_discovery::{Apply, Refused, Update};
use weir_proto::resource::{CredentialRef, Resource, Spec};
use weir_proto::v1::ResourceKind;

use crate::control::credentials::Credentials;
use crate::control::live_config::LiveConfig;
use crate::routing::snapshot::Snapshot;

/// Credentials that change within this of each other come into force together.
const GATHER: Duration = Duration::from_millis(50);

/// Compiles each configuration and publishes it.
#[derive(Debug)]
pub struct Publisher {
    live: Arc<LiveConfig>,
    credentials: Arc<Credentials>,
    changes: watch::Receiver<u64>,
    /// The changes of credentials that what is in force has taken over.
    taken: u64,
    /// The files of the backends in force.
    used: BTreeSet<PathBuf>,
    /// The files of the backends that were offered last and may have been refused, by their names.
    offered: Mutex<BTreeMap<String, PathBuf>>,
}

/// The backends whose credentials are in files, with the files.
fn files(resources: &[Resource]) -> impl Iterator<Item = (String, PathBuf)> {
    resources.iter().filter_map(|resource| match &resource.spec {
        Spec::Backend(backend) => match &backend.credential {
            Some(CredentialRef::File(path)) => Some((resource.name.to_string(), path.into())),
            _ => None,
        },
        _ => None,
    })
}

impl Publisher {
    /// Publishes to `live`, with these credentials.
    pub fn new(live: Arc<LiveConfig>, credentials: Arc<Credentials>) -> Self {
        let (changes, offered) = (credentials.changes(), Mutex::default());
        Self { live, credentials, changes, taken: 0, used: BTreeSet::new(), offered }
    }

    fn compile(&self, update: &Update<'_>) -> (Snapshot, Vec<Refused>) {
        let authorize = |backend: &_| self.credentials.of(backend);
        self.live.snapshot().updated(update, &authorize)
    }

    fn offered(&self) -> MutexGuard<'_, BTreeMap<String, PathBuf>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Apply for Publisher {
    fn apply(&mut self, update: &Update<'_>) -> Vec<Refused> {
        // Before the credentials are asked for: what changes after that is taken over by the next call.
        self.taken = *self.changes.borrow_and_update();
        let (snapshot, refused) = self.compile(update);
        snapshot.take_effect(&self.live.snapshot());
        self.used = files(snapshot.serving()).map(|(_, path)| path).collect();
        self.live.publish(snapshot);
        refused
    }

    fn check(&self, update: &Update<'_>) -> Vec<Refused> {
        self.credentials.read_again();
        let (snapshot, refused) = self.compile(update);
        self.offered().extend(files(snapshot.serving()));
        refused
    }

    async fn settle(&mut self) -> bool {
        self.credentials.settle().await
    }

    async fn changed(&mut self) {
        let taken = self.taken;
        // The sender is in the credentials, which this has.
        let _ = self.changes.wait_for(|count| *count != taken).await;
        tokio::time::sleep(GATHER).await;
    }

    fn refusing(&mut self, refusing: &BTreeMap<(i32, String), String>) {
        let mut offered = self.offered.lock().unwrap_or_else(PoisonError::into_inner);
        offered.retain(|name, _| refusing.contains_key(&(ResourceKind::Backend as i32, name.clone())));
        self.credentials.retain(&self.used.iter().chain(offered.values()).cloned().collect());
    }

    fn refused(&mut self, count: usize) {
        self.live.set_config_refused(count);
    }

    fn connected(&mut self, connected: bool) {
        self.live.set_connected(connected);
    }

    fn problem(&mut self, problem: Option<String>) {
        self.live.set_problem(problem);
    }
}
