//! Resolves the host names of backends with the system's resolver, and adds a bound on look-ups and a cache.
//!
//! - At most one look-up per host is in flight, however many connections wait for its answer, and at most [`LOOKUPS_MAX`]
//!   in the process. Each look-up has its own thread: in tokio's blocking pool, a resolver that hangs would delay disk
//!   writes, and the shutdown waits for that pool.
//! - An answer is fresh for [`FRESH`]. Until [`REFRESH_BEHIND`] it is used while a new look-up runs in the background.
//!   After that, or after a connection to one of its addresses failed, a connection waits for the new answer, at most
//!   [`REFRESH_WAIT`].
//! - If a look-up fails, returns no address or hangs, the last answer is used until it is [`STALE_MAX`] old.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use hyper_util::client::legacy::connect::dns::Name;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tower_service::Service;

/// The time for which an answer is used without a new look-up. The system's resolver does not return a time to live.
const FRESH: Duration = Duration::from_secs(5);
/// The age up to which an answer is used while a new look-up runs in the background.
const REFRESH_BEHIND: Duration = Duration::from_secs(30);
/// The longest time that a connection waits for a new answer while an old one exists.
const REFRESH_WAIT: Duration = Duration::from_millis(250);
/// The age up to which an answer is used when look-ups fail. Gateways also serve for an hour without a control plane.
const STALE_MAX: Duration = Duration::from_secs(3600);
/// The shortest time between the starts of two look-ups of a host.
const LOOKUP_EVERY: Duration = Duration::from_secs(1);
/// The time after which no connection waits for a look-up any more.
const LOOKUP_SLOW: Duration = Duration::from_secs(10);
/// The time after which a look-up that hangs counts as failed, so that another one may start. The system's resolver fails
/// sooner by default: after 5 s, twice for each of at most three servers.
const LOOKUP_MAX: Duration = Duration::from_secs(60);
/// Look-ups in progress over all hosts; each has a thread.
const LOOKUPS_MAX: usize = 64;
/// Addresses of one answer that are tried. The connect timeout is divided by their number.
const ADDRESSES_MAX: usize = 16;

/// The future of a look-up.
pub type Found = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;

/// Looks up a host name.
pub type Lookup = Arc<dyn Fn(&str) -> Found + Send + Sync>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LookupLabels {
    /// "ok", or "failed": an error, no address, or no answer in time.
    outcome: &'static str,
}

/// The hosts of all backends of a gateway. Cheap to clone.
#[derive(Clone)]
pub struct Resolver {
    inner: Arc<Inner>,
}

struct Inner {
    lookup: Lookup,
    /// The hosts that backends use.
    hosts: Mutex<HashMap<Box<str>, Weak<Host>>>,
    counted: Family<LookupLabels, Counter>,
}

impl Default for Resolver {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").finish_non_exhaustive()
    }
}

impl Resolver {
    /// A resolver that uses the system's resolver.
    pub fn system() -> Self {
        let permits = Arc::new(Semaphore::new(LOOKUPS_MAX));
        Self::new(Arc::new(move |host| Box::pin(ask_system(permits.clone(), host.to_owned()))))
    }

    /// A resolver that uses `lookup`.
    pub fn new(lookup: Lookup) -> Self {
        Self { inner: Arc::new(Inner { lookup, hosts: Mutex::default(), counted: Family::default() }) }
    }

    /// Registers the counter of look-ups.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let help = "Look-ups of backends' host names";
        registry.register("weir_backend_lookups", help, self.inner.counted.clone());
    }

    /// The host of a backend. Backends with the same host share it; it is dropped with the last of them.
    pub(super) fn host(&self, name: &str) -> HostResolver {
        let mut hosts = self.inner.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let host = match hosts.get(name).and_then(Weak::upgrade) {
            Some(host) => host,
            None => {
                hosts.retain(|_, host| host.strong_count() > 0);
                let host = Arc::new(Host {
                    name: name.into(),
                    lookup: self.inner.lookup.clone(),
                    counted: self.inner.counted.clone(),
                    state: Mutex::default(),
                    changed: watch::Sender::new(()),
                });
                hosts.insert(name.into(), Arc::downgrade(&host));
                host
            }
        };
        HostResolver { host, wait: LOOKUP_SLOW }
    }
}

/// Looks a host up with the system's resolver in a thread of its own.
async fn ask_system(permits: Arc<Semaphore>, host: String) -> io::Result<Vec<IpAddr>> {
    let permit = permits.try_acquire_owned().map_err(|_| {
        let text =
            format!("{LOOKUPS_MAX} look-ups wait for the system's resolver already; check /etc/resolv.conf");
        io::Error::other(text)
    })?;
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new().name("lookup".into()).spawn(move || {
        let found = (host.as_str(), 0).to_socket_addrs();
        // The receiver is dropped when the gateway stops.
        let _ = tell.send(found.map(|all| all.map(|address| address.ip()).collect()));
        drop(permit);
    })?;
    told.await.unwrap_or_else(|_| Err(io::Error::other("the look-up's thread ended without an answer")))
}

struct Host {
    name: Box<str>,
    lookup: Lookup,
    counted: Family<LookupLabels, Counter>,
    /// Locked for a few operations, never across an await.
    state: Mutex<State>,
    /// Sent when a look-up has ended.
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    answer: Option<Answer>,
    /// When the last look-up started, and whether it is still in flight.
    started: Option<Instant>,
    looking: bool,
    /// The end of the last look-up, if it failed.
    failed: Option<(Instant, String)>,
    /// A connection to one of the addresses failed, so the answer may be outdated.
    outdated: bool,
}

struct Answer {
    addresses: Arc<[IpAddr]>,
    at: Instant,
}

/// The next step of a connection that needs addresses.
enum Step {
    Use(Arc<[IpAddr]>),
    WaitUntil(Instant),
    Fail(String),
}

impl Host {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of the host. Waits at most `wait` when none is known. Cancel-safe.
    async fn addresses(self: &Arc<Self>, wait: Duration) -> io::Result<Arc<[IpAddr]>> {
        let asked = Instant::now();
        let mut changed = self.changed.subscribe();
        loop {
            let until = match self.step(asked, wait) {
                Step::Use(addresses) => return Ok(addresses),
                Step::Fail(why) => {
                    return Err(io::Error::other(format!("look-up of host {} failed: {why}", self.name)));
                }
                Step::WaitUntil(until) => until,
            };
            // The next step tells a timeout from a change.
            let _ = timeout_at(until, changed.changed()).await;
        }
    }

    fn step(self: &Arc<Self>, asked: Instant, wait: Duration) -> Step {
        let now = Instant::now();
        let mut state = self.state();
        let known = state.answer.as_ref().map(|answer| (answer.addresses.clone(), now - answer.at));
        let known = known.filter(|(_, age)| *age < STALE_MAX);
        if let Some((addresses, age)) = &known
            && *age < FRESH
            && !state.outdated
        {
            return Step::Use(addresses.clone());
        }
        let failed_since = state.failed.as_ref().is_some_and(|(at, _)| *at >= asked);
        let is_due = state.started.is_none_or(|started| now - started >= LOOKUP_EVERY);
        if !state.looking && is_due && !failed_since {
            (state.started, state.looking) = (Some(now), true);
            tokio::spawn(self.clone().look_up());
        }
        if let Some((addresses, age)) = &known
            && *age < REFRESH_BEHIND
            && !state.outdated
        {
            return Step::Use(addresses.clone());
        }
        if let Some(started) = state.started.filter(|_| state.looking) {
            let until = match known {
                Some(_) => asked.min(started) + REFRESH_WAIT,
                None => (asked + wait).min(started + LOOKUP_SLOW),
            };
            if now < until {
                return Step::WaitUntil(until);
            }
        }
        match (known, &state.failed) {
            (Some((addresses, _)), _) => Step::Use(addresses),
            (None, _) if state.looking => Step::Fail("no answer from the system's resolver yet".into()),
            (None, Some((_, why))) => Step::Fail(why.clone()),
            (None, None) => Step::Fail("the last answer is too old".into()),
        }
    }

    async fn look_up(self: Arc<Self>) {
        // Without catching a panic, the host would count as being looked up for ever.
        let lookup = AssertUnwindSafe(async { (self.lookup)(&self.name).await }).catch_unwind();
        let found = timeout(LOOKUP_MAX, lookup).await;
        let now = Instant::now();
        let found = match found {
            Ok(Ok(Ok(addresses))) if addresses.is_empty() => Err("the answer has no address".to_owned()),
            Ok(Ok(Ok(addresses))) => Ok(addresses),
            Ok(Ok(Err(error))) => Err(error.to_string()),
            Ok(Err(_)) => Err("the look-up panicked; please report this as a bug of Weir".to_owned()),
            Err(_) => Err(format!("no answer within {} s", LOOKUP_MAX.as_secs())),
        };
        let outcome = if found.is_ok() { "ok" } else { "failed" };
        self.counted.get_or_create(&LookupLabels { outcome }).inc();
        let mut state = self.state();
        state.looking = false;
        match found {
            Ok(mut addresses) => {
                addresses.truncate(ADDRESSES_MAX);
                state.answer = Some(Answer { addresses: addresses.into(), at: now });
                state.outdated = false;
                if state.failed.take().is_some() {
                    tracing::info!(host = %self.name, "backend host resolved again");
                }
            }
            Err(error) => {
                // Logged once per outage.
                if state.failed.is_none() {
                    let age_s = state.answer.as_ref().map(|answer| (now - answer.at).as_secs());
                    tracing::warn!(
                        host = %self.name, error, age_s,
                        "backend host not resolved; its last addresses are used, if any"
                    );
                }
                state.failed = Some((now, error));
            }
        }
        drop(state);
        self.changed.send_replace(());
    }
}

/// Resolves the host of one backend and ignores the requested name, so that a backend's connections go to its host only.
#[derive(Clone)]
pub(super) struct HostResolver {
    host: Arc<Host>,
    wait: Duration,
}

impl fmt::Debug for HostResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostResolver").field("host", &self.host.name).finish_non_exhaustive()
    }
}

impl HostResolver {
    /// The same resolver with a timeout for the first answer, at most [`LOOKUP_SLOW`].
    pub(super) fn waiting(self, wait: Duration) -> Self {
        Self { wait: wait.min(LOOKUP_SLOW), ..self }
    }

    /// Records that a connection to these addresses failed, because the host may have other addresses now.
    pub(super) fn distrust(&self) {
        self.host.state().outdated = true;
    }
}

impl Service<Name> for HostResolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        let Self { host, wait } = self.clone();
        Box::pin(async move {
            let addresses = host.addresses(wait).await?;
            let addresses: Vec<_> = addresses.iter().map(|address| SocketAddr::new(*address, 0)).collect();
            Ok(addresses.into_iter())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// What the resolver says next, and how often it was asked.
    #[derive(Clone)]
    struct Script {
        says: Arc<Mutex<Says>>,
        asked: Arc<AtomicUsize>,
        at_once: Arc<AtomicUsize>,
        most_at_once: Arc<AtomicUsize>,
    }

    #[derive(Clone)]
    enum Says {
        These(Vec<IpAddr>),
        No,
        Nothing,
        Panic,
    }

    fn address(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    impl Script {
        fn new(says: Says) -> (Self, Resolver) {
            let script = Self {
                says: Arc::new(Mutex::new(says)),
                asked: Arc::default(),
                at_once: Arc::default(),
                most_at_once: Arc::default(),
            };
            let own = script.clone();
            let resolver = Resolver::new(Arc::new(move |_| {
                let own = own.clone();
                Box::pin(async move {
                    own.asked.fetch_add(1, Ordering::SeqCst);
                    let now = own.at_once.fetch_add(1, Ordering::SeqCst) + 1;
                    own.most_at_once.fetch_max(now, Ordering::SeqCst);
                    let says = own.says.lock().expect("whole").clone();
                    let found = match says {
                        Says::These(addresses) => Ok(addresses),
                        Says::No => Err(io::Error::other("no such name")),
                        Says::Nothing => std::future::pending().await,
                        Says::Panic => panic!("a bug"),
                    };
                    own.at_once.fetch_sub(1, Ordering::SeqCst);
                    found
                })
            }));
            (script, resolver)
        }

        fn say(&self, says: Says) {
            *self.says.lock().expect("whole") = says;
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::SeqCst)
        }
    }

    async fn found(host: &HostResolver) -> io::Result<Vec<IpAddr>> {
        let found = host.host.addresses(Duration::from_secs(5)).await;
        found.map(|addresses| addresses.to_vec())
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_connections_share_one_lookup_and_its_answer_is_kept() {
        let (script, resolver) = Script::new(Says::These(vec![address(1)]));
        let host = resolver.host("h.example");
        let all = (0..1000).map(|_| found(&host));
        for found in futures_util::future::join_all(all).await {
            assert_eq!(found.expect("found"), [address(1)]);
        }
        assert_eq!(script.asked(), 1);
        script.say(Says::These(vec![address(2)]));
        tokio::time::advance(FRESH).await;
        assert_eq!(found(&host).await.expect("found"), [address(1)], "at once, and asked again behind");
        tokio::task::yield_now().await;
        assert_eq!(found(&host).await.expect("found"), [address(2)]);
        assert_eq!((script.asked(), script.most_at_once.load(Ordering::SeqCst)), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_good_addresses_outlive_failures_empty_answers_and_silence_for_a_bounded_time() {
        for wrong in [Says::No, Says::These(Vec::new()), Says::Nothing] {
            let (script, resolver) = Script::new(Says::These(vec![address(1)]));
            let host = resolver.host("h.example");
            found(&host).await.expect("found");
            script.say(wrong);
            let began = Instant::now();
            while began.elapsed() < STALE_MAX - Duration::from_secs(10) {
                tokio::time::advance(Duration::from_secs(7)).await;
                let asked = Instant::now();
                assert_eq!(found(&host).await.expect("kept"), [address(1)], "after {:?}", began.elapsed());
                assert!(asked.elapsed() <= REFRESH_WAIT);
            }
            tokio::time::advance(Duration::from_secs(20)).await;
            let error = found(&host).await.expect_err("too old").to_string();
            assert!(error.contains("h.example"), "{error}");
            script.say(Says::These(vec![address(2)]));
            // One that hung is given up, and another may start.
            tokio::time::sleep(LOOKUP_MAX + LOOKUP_EVERY).await;
            assert_eq!(found(&host).await.expect("found again"), [address(2)]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lookup_that_hangs_is_one_and_is_waited_for_by_the_first_only() {
        let (script, resolver) = Script::new(Says::Nothing);
        let host = resolver.host("h.example");
        let asked = Instant::now();
        found(&host).await.expect_err("nothing is known");
        assert_eq!(asked.elapsed(), Duration::from_secs(5));
        tokio::time::advance(LOOKUP_SLOW).await;
        for _ in 0..1000 {
            let asked = Instant::now();
            found(&host).await.expect_err("nothing is known");
            assert!(asked.elapsed().is_zero());
        }
        assert_eq!(script.asked(), 1);
        let other = resolver.host("other.example");
        script.say(Says::These(vec![address(3)]));
        assert_eq!(found(&other).await.expect("found"), [address(3)], "another host is not held up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_connection_asks_again_but_not_more_than_once_a_second() {
        let (script, resolver) = Script::new(Says::These(vec![address(1)]));
        let host = resolver.host("h.example");
        found(&host).await.expect("found");
        script.say(Says::These(vec![address(2)]));
        host.distrust();
        assert_eq!(found(&host).await.expect("found"), [address(1)], "asked for a moment ago");
        tokio::time::advance(LOOKUP_EVERY).await;
        assert_eq!(found(&host).await.expect("found"), [address(2)], "waited for");
        for _ in 0..1000 {
            host.distrust();
            found(&host).await.expect("found");
        }
        assert_eq!(script.asked(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn hosts_are_remembered_while_a_backend_uses_them_and_answers_are_cut() {
        let (script, resolver) = Script::new(Says::These((0..255).map(address).collect()));
        let first = resolver.host("h.example");
        assert_eq!(found(&first).await.expect("found").len(), ADDRESSES_MAX);
        let second = resolver.host("h.example");
        drop(first);
        found(&second).await.expect("known");
        assert_eq!(script.asked(), 1);
        drop(second);
        let _other = resolver.host("other.example");
        assert_eq!(resolver.inner.hosts.lock().expect("whole").len(), 1);
    }

    #[tokio::test]
    async fn the_system_is_asked_by_a_bounded_number_of_threads() {
        let found = ask_system(Arc::new(Semaphore::new(1)), "localhost".into()).await.expect("known");
        assert!(found.iter().all(IpAddr::is_loopback), "{found:?}");
        let error = ask_system(Arc::new(Semaphore::new(0)), "localhost".into()).await.expect_err("full");
        assert!(error.to_string().contains("resolv.conf"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_up_that_panics_is_one_that_failed() {
        let (script, resolver) = Script::new(Says::Panic);
        let host = resolver.host("backend.example");
        let error = host.host.addresses(LOOKUP_SLOW).await.expect_err("it panicked");
        assert!(error.to_string().contains("panicked"), "{error}");
        script.say(Says::These(vec![address(1)]));
        tokio::time::sleep(LOOKUP_EVERY).await;
        assert_eq!(*host.host.addresses(LOOKUP_SLOW).await.expect("asked again"), [address(1)]);
    }
}
