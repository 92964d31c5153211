//! The catalog of all resources: commits changes to the store and follows the store.
//!
//! The state changes through the store's watch only, so changes of this and of other replicas are handled the same way. A
//! commit returns once the state contains it, so that callers read their own writes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use weir_proto::v1;
use weir_runtime::beside;

use crate::model::audit::{self, Actor, Logged};
use crate::model::{
    ALLOWED, HEAD, PREFIX, Plan, REMOVAL, Refusal, Remembered, State, request_path, token_path,
};
use crate::store::{self, Batch, Compare, Store, Transaction, Write};

pub(crate) mod log;

/// How long an answer is kept for its request id.
const REQUESTS_KEPT_MS: u64 = 24 * 60 * 60 * 1000;
/// The maximum of answers kept.
const REQUESTS_MAX: usize = 10_000;
/// Attempts of a commit when other replicas commit at the same time.
const TRIES: usize = 8;
/// The size of a change before it is planned; planning a large one must not delay the renewal of the lease.
const UNKNOWN: usize = usize::MAX;
/// How long a commit waits until the state contains it. Longer means that the follower is broken.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(10);

/// The reason of a refused or failed change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the request id was used for another request")]
    RequestIdReused,
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("too many concurrent changes; retry")]
    Contended,
    #[error("the change is made, but the state does not follow the store")]
    Behind,
    #[error("this control plane does not follow its store at the moment; retry, or ask another one")]
    Lagging,
    #[error("what was at revision {asked} is forgotten; the oldest revision known is {oldest}")]
    Forgotten { asked: u64, oldest: u64 },
    #[error("revision {asked} is ahead of this store, which is at {newest}")]
    Ahead { asked: u64, newest: u64 },
}

/// The answer to a change, with the revision that the change made.
pub(crate) trait Answer: prost::Message + Default {
    /// Sets the revision of the commit.
    fn set_revision(&mut self, revision: u64);
}

/// The context of a change.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    /// The request id; empty: the answer is not kept.
    pub(crate) request_id: String,
    /// SHA-256 over method and request.
    pub(crate) digest: [u8; 32],
    /// Check and change nothing.
    pub(crate) validate_only: bool,
    /// The caller.
    pub(crate) actor: Actor,
}

/// The result of a change.
#[derive(Debug)]
pub(crate) struct Committed<A> {
    pub(crate) answer: A,
    /// The written change; `None` when this call wrote nothing.
    pub(crate) done: Option<(Plan, u64)>,
}

/// The current state, and the only way to change it.
#[derive(Debug)]
pub(crate) struct Catalog {
    store: Arc<dyn Store>,
    state: watch::Sender<Arc<State>>,
    /// The newest records of the audit log.
    recent: log::Recent,
    /// Allows one commit at a time in this process; commits of other replicas are detected by the store.
    commit: Mutex<()>,
}

impl Catalog {
    /// Loads the state. No call is answered before.
    pub(crate) async fn load(store: Arc<dyn Store>) -> Result<Self, store::Error> {
        let state = read(&*store).await?;
        let recent = log::Recent::load(&*store, state.audit.sequence).await?;
        Ok(Self { store, state: watch::Sender::new(Arc::new(state)), recent, commit: Mutex::new(()) })
    }

    /// The current state.
    pub(crate) fn state(&self) -> Arc<State> {
        Arc::clone(&self.state.borrow())
    }

    /// The state and its changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<State>> {
        self.state.subscribe()
    }

    /// Follows the store until `stop`. After an error the store is read again after a pause.
    pub(crate) async fn follow(&self, stop: CancellationToken) {
        loop {
            let error = tokio::select! {
                () = stop.cancelled() => return,
                error = self.follow_once() => error,
            };
            tracing::warn!(%error, "following the store failed; the store is read again");
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(Duration::from_millis(200)) => {}
            }
            if let Err(error) = self.read_again().await {
                tracing::error!(%error, "the store cannot be read");
            }
        }
    }

    async fn read_again(&self) -> Result<(), store::Error> {
        let state = read(&*self.store).await?;
        let recent = log::Recent::load(&*self.store, state.audit.sequence).await?;
        self.recent.replace(recent);
        self.state.send_replace(Arc::new(state));
        Ok(())
    }

    async fn follow_once(&self) -> store::Error {
        let mut watch = match self.store.watch(self.state().revision) {
            Ok(watch) => watch,
            Err(e) => return e,
        };
        loop {
            let batch = match watch.next().await {
                Ok(batch) => batch,
                Err(e) => return e,
            };
            match beside(batch.writes.len(), || self.take(&batch)) {
                Ok(state) => {
                    self.state.send_replace(Arc::new(state));
                }
                Err(e) => return store::Error::Failed(e.to_string()),
            }
        }
    }

    /// Applies a batch. The records are published before the state, so that every state has its records.
    fn take(&self, batch: &Batch) -> Result<State, crate::model::Unreadable> {
        let state = self.state().after(batch)?;
        for write in &batch.writes {
            if let Write::Put(key, value) = write
                && key.starts_with(audit::AUDIT_PREFIX)
            {
                self.recent.push(Logged::decode(key, value, batch.revision)?);
            }
        }
        Ok(state)
    }

    /// Plans against the current state and commits. Plans again if another replica committed first, then from what the
    /// store holds: a commit that waits for the watch of the store would keep all later ones waiting.
    pub(crate) async fn commit<A: Answer>(
        &self,
        call: &Call,
        plan: impl Fn(&State) -> Result<Plan, Refusal>,
        answer: impl Fn(&Plan, &State) -> A,
    ) -> Result<Committed<A>, Error> {
        let one = self.commit.lock().await;
        let mut newer = None;
        for _ in 0..TRIES {
            let state = newer.take().unwrap_or_else(|| self.state());
            if !call.request_id.is_empty()
                && !call.validate_only
                && let Some(kept) = recall(&state, call)?
            {
                let mut answer = A::decode(kept.answer.as_slice())
                    .map_err(|e| store::Error::Failed(format!("a remembered answer: {e}")))?;
                answer.set_revision(kept.revision);
                return Ok(Committed { answer, done: None });
            }
            let plan = beside(UNKNOWN, || plan(&state));
            // A plan that writes nothing is not checked by a transaction. From a state that lags, it could refuse, or treat as
            // done, something that another replica has changed. So the state is brought up to date first.
            let writes = plan.as_ref().is_ok_and(|plan| !plan.is_empty());
            if !writes && !call.validate_only && self.store.range(HEAD).await?.revision > state.revision {
                newer = Some(Arc::new(read(&*self.store).await?));
                continue;
            }
            let plan = plan?;
            let mut answer = answer(&plan, &state);
            if call.validate_only || plan.is_empty() {
                return Ok(Committed { answer, done: None });
            }
            let transaction = beside(plan.steps.len(), || transaction(&state, call, &plan, &answer));
            match self.store.transact(transaction).await {
                Ok(revision) => {
                    // The next one need not wait until this one is seen here.
                    drop(one);
                    self.caught_up(revision).await?;
                    answer.set_revision(revision);
                    return Ok(Committed { answer, done: Some((plan, revision)) });
                }
                Err(store::Error::Conflict(_)) => {
                    // A change of another replica is on its way here.
                    newer = Some(Arc::new(read(&*self.store).await?));
                }
                Err(e) => return Err(e.into()),
            }
        }
        Err(Error::Contended)
    }

    /// Whether the store has nothing newer than a state; otherwise waits for the newer state.
    async fn is_current(&self, state: &State) -> Result<bool, Error> {
        let newest = self.store.range(HEAD).await?.revision;
        if newest <= state.revision {
            return Ok(true);
        }
        self.caught_up(newest).await.map_err(|_| Error::Lagging)?;
        Ok(false)
    }

    /// A state at or after a revision; waits for a revision of another replica.
    async fn state_at(&self, revision: u64) -> Result<Arc<State>, Error> {
        let mut state = self.state();
        if revision > state.revision && !self.is_current(&state).await? {
            state = self.state();
        }
        if revision > state.revision {
            return Err(Error::Ahead { asked: revision, newest: state.revision });
        }
        Ok(state)
    }

    async fn caught_up(&self, revision: u64) -> Result<(), Error> {
        let mut changes = self.subscribe();
        let seen = changes.wait_for(|state| state.revision >= revision);
        match tokio::time::timeout(FOLLOW_TIMEOUT, seen).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Error::Behind),
        }
    }
}

async fn read(store: &dyn Store) -> Result<State, store::Error> {
    let range = store.range(PREFIX).await?;
    beside(range.entries.len(), || State::load(&range)).map_err(|e| store::Error::Failed(e.to_string()))
}

fn now_ms() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default()
}

fn now() -> prost_types::Timestamp {
    let now = jiff::Timestamp::now();
    prost_types::Timestamp { seconds: now.as_second(), nanos: now.subsec_nanosecond() }
}

/// The kept answer for a request id, if it is of the same request and not too old.
fn recall(state: &State, call: &Call) -> Result<Option<Arc<Remembered>>, Error> {
    match state.requests.get(call.request_id.as_str()) {
        Some(kept) if now_ms().saturating_sub(kept.time_ms) >= REQUESTS_KEPT_MS => Ok(None),
        Some(kept) if kept.digest != call.digest => Err(Error::RequestIdReused),
        kept => Ok(kept.cloned()),
    }
}

fn transaction(state: &State, call: &Call, plan: &Plan, answer: &impl Answer) -> Transaction {
    let compares = vec![Compare { key: HEAD.into(), revision: state.head }];
    let (path, record, end) = audit::seal(state, plan, &call.actor, &call.request_id, now());
    let mut writes = vec![Write::Put(HEAD.into(), end.encode_to_vec().into()), Write::Put(path, record)];
    if let Some(oldest) = end.sequence.checked_sub(audit::AUDIT_MAX).filter(|oldest| *oldest > 0) {
        writes.push(Write::Delete(audit::path(oldest)));
    }
    for token in &plan.tokens {
        let path = token_path(&token.name);
        writes.push(match &token.after {
            Some(token) => Write::Put(path, token.encode_to_vec().into()),
            None => Write::Delete(path),
        });
    }
    for step in &plan.steps {
        match step.action {
            v1::ChangeAction::Create | v1::ChangeAction::Update => {
                writes.push(Write::Put(step.key.path(), step.resource.value()));
            }
            v1::ChangeAction::Delete => writes.push(Write::Delete(step.key.path())),
            v1::ChangeAction::Unchanged | v1::ChangeAction::Unspecified => {}
        }
    }
    if plan.removes_backends {
        writes.push(Write::Put(REMOVAL.into(), Bytes::new()));
    }
    if plan.allow_mass_removal {
        writes.push(Write::Put(ALLOWED.into(), Bytes::new()));
    }
    if !call.request_id.is_empty() {
        writes.extend(forgotten(state).into_iter().map(|id| Write::Delete(request_path(&id))));
        let kept = Remembered {
            time_ms: now_ms(),
            digest: call.digest.to_vec(),
            answer: answer.encode_to_vec(),
            revision: 0,
        };
        writes.push(Write::Put(request_path(&call.request_id), kept.encode_to_vec().into()));
    }
    Transaction { compares, writes }
}

/// The request ids to remove: old ones, and the oldest ones above the maximum, leaving room for one more. They are rows of
/// the store, deleted by the transaction that adds one.
fn forgotten(state: &State) -> BTreeSet<Arc<str>> {
    let now = now_ms();
    let expired = |kept: &Remembered| now.saturating_sub(kept.time_ms) >= REQUESTS_KEPT_MS;
    let mut out: BTreeSet<Arc<str>> =
        state.requests.iter().filter(|(_, kept)| expired(kept)).map(|(id, _)| Arc::clone(id)).collect();
    let surplus = (state.requests.len() - out.len() + 1).saturating_sub(REQUESTS_MAX);
    if surplus > 0 {
        let mut by_age: Vec<_> =
            state.requests.iter().filter(|(_, k)| !expired(k)).map(|(id, k)| (k.revision, id)).collect();
        by_age.sort_unstable();
        out.extend(by_age.into_iter().take(surplus).map(|(_, id)| Arc::clone(id)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tenant;
    use crate::model::{Edit, Options, plan};

    impl Answer for () {
        fn set_revision(&mut self, _revision: u64) {}
    }

    /// A catalog of this store that follows it, until the token is dropped.
    async fn catalog(store: &Arc<dyn Store>) -> (Arc<Catalog>, tokio_util::sync::DropGuard) {
        let (catalog, stop) =
            (Arc::new(Catalog::load(store.clone()).await.unwrap()), CancellationToken::new());
        let (following, end) = (catalog.clone(), stop.clone());
        tokio::spawn(async move { following.follow(end).await });
        (catalog, stop.drop_guard())
    }

    async fn write(catalog: &Catalog, name: &str) {
        put(catalog, tenant(name)).await.unwrap();
    }

    /// The revision made, if any.
    async fn put(catalog: &Catalog, wire: v1::Resource) -> Result<Option<u64>, Error> {
        let actor = Actor { name: "a".into(), role: v1::Role::Admin, method: "Apply" };
        let call = Call { request_id: String::new(), digest: [0; 32], validate_only: false, actor };
        let edit = || vec![Edit::Put(Box::new(wire.clone()))];
        let plan = |state: &State| plan(state, edit(), Options::default());
        let committed = catalog.commit(&call, plan, |_, _| ()).await?;
        Ok(committed.done.map(|(_, revision)| revision))
    }

    /// What changes nothing here may change something in the store, and what is refused here may be allowed there.
    #[tokio::test(start_paused = true)]
    async fn nothing_is_taken_for_done_or_refused_from_a_state_that_lags() {
        let store: Arc<dyn Store> = Arc::new(crate::store::MemoryStore::default());
        let (writer, _end) = catalog(&store).await;
        write(&writer, "t").await;
        // It does not follow the store yet.
        let lagging = Catalog::load(store.clone()).await.unwrap();
        let mut changed = tenant("t");
        changed.apply_set = "other".into();
        put(&writer, changed).await.unwrap();
        assert!(matches!(lagging.at(2).await, Err(Error::Lagging)), "another one has made that revision");
        // Both are stored, and neither waits until the other one is seen here.
        let began = tokio::time::Instant::now();
        let both = tokio::join!(put(&lagging, tenant("t")), put(&lagging, tenant("u")));
        assert!(matches!(both, (Err(Error::Behind), Err(Error::Behind))), "{both:?}");
        assert_eq!(began.elapsed(), FOLLOW_TIMEOUT);
        assert!(put(&lagging, tenant("t")).await.unwrap().is_none(), "as it is in the store");
        let stop = CancellationToken::new();
        tokio::join!(lagging.follow(stop.clone()), async {
            assert_eq!(put(&lagging, tenant("v")).await.unwrap(), Some(5));
            assert_eq!(put(&lagging, tenant("v")).await.unwrap(), None);
            assert!(matches!(lagging.at(9).await, Err(Error::Ahead { asked: 9, newest: 5 })));
            stop.cancel();
        });
    }

    /// The log is read after the state: what others write meanwhile comes again, as a batch.
    #[tokio::test]
    async fn what_is_written_while_the_log_is_read_is_in_it_once() {
        let store: Arc<dyn Store> = Arc::new(crate::store::MemoryStore::default());
        let (writer, _end) = catalog(&store).await;
        write(&writer, "before").await;
        let newest = read(&*store).await.unwrap().audit.sequence;
        write(&writer, "meanwhile").await;
        let recent = log::Recent::load(&*store, newest).await.unwrap();
        let batch = store.watch(newest).unwrap().next().await.unwrap();
        let own = Catalog { recent, ..Catalog::load(store.clone()).await.unwrap() };
        own.state.send_replace(Arc::new(State::default()));
        own.take(&batch).unwrap();
        own.state.send_replace(writer.state());
        let log = own.records_after(0, 10).await.unwrap();
        let sequences: Vec<u64> = log.iter().map(|logged| logged.record.sequence).collect();
        assert_eq!(sequences, [1, 2]);
    }

    #[test]
    fn request_ids_are_bounded_in_age_and_number() {
        let kept =
            |time_ms, revision| Arc::new(Remembered { time_ms, digest: vec![], answer: vec![], revision });
        let mut state = State::default();
        state.requests.insert("old".into(), kept(now_ms() - REQUESTS_KEPT_MS, 1));
        for i in 0..REQUESTS_MAX as u64 {
            state.requests.insert(format!("r{i}").into(), kept(now_ms(), 10 + i));
        }
        let forgotten: Vec<_> = forgotten(&state).into_iter().collect();
        assert_eq!(forgotten, [Arc::from("old"), Arc::from("r0")]);
    }
}
