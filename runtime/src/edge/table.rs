//! The open connections of one listener: how many there may be, which go first when there are too many, and the clocks
//! that end them.
//!
//! A connection is *busy* while a request of it runs; only its client, a stalled write or the request's own clock ends it
//! then. Otherwise it is *idle*, and has a time by which it must have sent the head of a request. Strangers, who have
//! proven nothing, get less of that time and go before others when room is needed.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::descriptors;
use super::metrics::{EdgeMetrics, End};

/// How often clocks are looked at: what a limit of seconds may be late by.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
/// One connection in so many, at least one, is ended when room is needed: one look at all of them makes room for the
/// next hundred, so a flood costs little for each.
const EVICTED_PART: usize = 100;
/// While draining, a connection that has had no request yet is given so long for one.
const NEW_GRACE: Duration = Duration::from_secs(3);
/// No time at all.
const NEVER: u64 = u64::MAX;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since the process began to count.
pub(super) fn now_ms() -> u64 {
    millis(Instant::now().saturating_duration_since(*EPOCH))
}

fn ms_of(at: Instant) -> u64 {
    millis(at.saturating_duration_since(*EPOCH))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(NEVER)
}

/// What the connections of one listener may cost. Every time limit may be exceeded by a quarter of a second.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at once.
    pub connections: usize,
    /// Connections of one address at once; of one /64 with IPv6.
    pub connections_per_address: usize,
    /// From accept to the complete head of the first request, a TLS handshake included; and from the first byte of each
    /// later head to its last.
    pub head: Duration,
    /// Between two requests of a connection on which a request has proven who asks.
    pub idle: Duration,
    /// Between two requests of any other connection.
    pub stranger_idle: Duration,
    /// A peer that takes nothing of what is written for so long is cut.
    pub write_stall: Duration,
}

impl Bounds {
    /// Of a port for operations: scrapers, probes and a few people.
    pub const fn operations() -> Self {
        Self {
            connections: 1024,
            connections_per_address: 1024,
            head: Duration::from_secs(10),
            // Scrapers keep their connection from one scrape to the next, and prove nothing.
            idle: Duration::from_secs(75),
            stranger_idle: Duration::from_secs(75),
            write_stall: Duration::from_secs(30),
        }
    }

    /// Of a gRPC port: a fleet of gateways with two connections each, or as many proxies.
    pub const fn grpc() -> Self {
        Self {
            connections: 16_384,
            connections_per_address: 16_384,
            head: Duration::from_secs(10),
            idle: Duration::from_secs(600),
            stranger_idle: Duration::from_secs(10),
            // Above the 120 s after which the control plane itself gives up a gateway that does not answer.
            write_stall: Duration::from_secs(150),
        }
    }
}

/// Why a connection or request ends that did not end by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cut {
    /// Its head did not come in time.
    Head = 1,
    /// No further request came in time.
    Idle = 2,
    /// The peer takes nothing.
    Stalled = 3,
    /// Others needed its room.
    Evicted = 4,
    /// The process ends.
    Drained = 5,
}

impl Cut {
    const fn of(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::Head),
            2 => Some(Self::Idle),
            3 => Some(Self::Stalled),
            4 => Some(Self::Evicted),
            5 => Some(Self::Drained),
            _ => None,
        }
    }
}

/// The clock of one request, which runs whether or not anybody polls its body: a client that takes nothing of an HTTP/2
/// stream keeps hyper from polling.
#[derive(Debug)]
pub struct RequestClock {
    /// When the request is cut.
    cut_at: AtomicU64,
    cut: AtomicBool,
    /// Set at the end of a drain: the body may still say a last word.
    ending: AtomicBool,
    /// Who drives the request.
    driver: AtomicWaker,
    /// Who produces its answer.
    producer: AtomicWaker,
}

impl Default for RequestClock {
    fn default() -> Self {
        Self {
            cut_at: AtomicU64::new(NEVER),
            cut: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            producer: AtomicWaker::new(),
        }
    }
}

impl RequestClock {
    /// Cuts the request at this time, unless it is moved before: everything the request holds is dropped.
    pub fn cut_at(&self, at: Instant) {
        // Relaxed: the sweep needs no other write to be visible with it.
        self.cut_at.store(ms_of(at), Ordering::Relaxed);
    }

    /// No time limit any more.
    pub fn stop(&self) {
        self.cut_at.store(NEVER, Ordering::Relaxed);
    }

    /// Whether the process ends and the answer must end now, with a last word. Wakes the caller when that becomes so.
    pub fn poll_ending(&self, cx: &Context<'_>) -> bool {
        self.producer.register(cx.waker());
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Whether it was cut. Wakes the caller when that becomes so.
    pub(super) fn poll_cut(&self, cx: &Context<'_>) -> bool {
        self.driver.register(cx.waker());
        self.cut.load(Ordering::Acquire)
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.driver.wake();
    }

    fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.producer.wake();
    }

    fn sweep(&self, now: u64) -> bool {
        let due = self.cut_at.load(Ordering::Relaxed) <= now;
        if due && !self.cut.load(Ordering::Relaxed) {
            self.cut();
            return true;
        }
        false
    }
}

/// What is known of one open connection.
#[derive(Debug)]
pub struct Connection {
    peer: IpAddr,
    bounds: Bounds,
    /// Requests that run.
    active: AtomicU32,
    /// When the present idle time began.
    idle_since: AtomicU64,
    /// When it must have become busy.
    busy_by: AtomicU64,
    /// Since when a write waits for the peer; [`NEVER`] when none does.
    blocked_since: AtomicU64,
    /// Bytes that its socket has taken.
    written: AtomicU64,
    /// Whether a request of it has proven who asks.
    known: AtomicBool,
    /// Whether there has been a request.
    begun: AtomicBool,
    /// Whether a head has begun, or the first one is awaited.
    in_head: AtomicBool,
    cut: AtomicU8,
    /// Whether the process ends: no further request is wanted.
    draining: AtomicBool,
    malformed: AtomicBool,
    driver: AtomicWaker,
    reader: AtomicWaker,
    writer: AtomicWaker,
    /// The clock of HTTP/1, where one request runs at a time.
    pub(super) clock: Arc<RequestClock>,
    /// The clocks of HTTP/2 streams.
    streams: Mutex<Vec<Arc<RequestClock>>>,
}

impl Connection {
    pub(super) fn new(peer: IpAddr, bounds: Bounds) -> Self {
        let now = now_ms();
        Self {
            peer,
            bounds,
            active: AtomicU32::new(0),
            idle_since: AtomicU64::new(now),
            busy_by: AtomicU64::new(now.saturating_add(millis(bounds.head))),
            blocked_since: AtomicU64::new(NEVER),
            written: AtomicU64::new(0),
            known: AtomicBool::new(false),
            begun: AtomicBool::new(false),
            in_head: AtomicBool::new(true),
            cut: AtomicU8::new(0),
            draining: AtomicBool::new(false),
            malformed: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            reader: AtomicWaker::new(),
            writer: AtomicWaker::new(),
            clock: Arc::default(),
            streams: Mutex::default(),
        }
    }

    /// The peer's address.
    pub const fn peer(&self) -> IpAddr {
        self.peer
    }

    /// A request of it has proven who asks: it may be idle for longer, and goes after strangers when room is needed.
    pub fn trust(&self) {
        // Loaded first: every request says so, and a store would take the cache line from other cores.
        if !self.known.load(Ordering::Relaxed) {
            self.known.store(true, Ordering::Relaxed);
        }
    }

    /// A request begins; it ends with the value.
    pub fn begin(self: &Arc<Self>) -> Busy {
        self.active.fetch_add(1, Ordering::AcqRel);
        if !self.begun.load(Ordering::Relaxed) {
            self.begun.store(true, Ordering::Relaxed);
        }
        self.busy_by.store(NEVER, Ordering::Relaxed);
        Busy(Arc::clone(self))
    }

    fn end(&self) {
        if self.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            let known = self.known.load(Ordering::Relaxed);
            let idle = if known { self.bounds.idle } else { self.bounds.stranger_idle };
            let now = now_ms();
            self.in_head.store(false, Ordering::Relaxed);
            self.clock.stop();
            self.idle_since.store(now, Ordering::Relaxed);
            self.busy_by.store(now.saturating_add(millis(idle)), Ordering::Relaxed);
        }
    }

    /// Whether a request runs.
    pub fn is_busy(&self) -> bool {
        self.active.load(Ordering::Acquire) > 0
    }

    /// Whether no request has run for so long, and nothing waits to be written.
    fn is_idle_for(&self, time: Duration) -> bool {
        let since = self.idle_since.load(Ordering::Relaxed);
        // A client that has just connected may be about to ask.
        let time = if self.begun.load(Ordering::Relaxed) { time } else { time.max(NEW_GRACE) };
        !self.is_busy() && !self.is_write_waiting() && now_ms().saturating_sub(since) >= millis(time)
    }

    /// The first byte of a further head was read.
    pub(super) fn head_began(&self) {
        let by = now_ms().saturating_add(millis(self.bounds.head));
        self.in_head.store(true, Ordering::Relaxed);
        self.busy_by.fetch_min(by, Ordering::Relaxed);
    }

    pub(super) fn write_waits(&self, waits: bool) {
        if waits {
            let _ =
                self.blocked_since.compare_exchange(NEVER, now_ms(), Ordering::Relaxed, Ordering::Relaxed);
        } else if self.blocked_since.load(Ordering::Relaxed) != NEVER {
            self.blocked_since.store(NEVER, Ordering::Relaxed);
        }
    }

    pub(super) fn wrote(&self, bytes: usize) {
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    pub(super) fn is_write_waiting(&self) -> bool {
        self.blocked_since.load(Ordering::Relaxed) != NEVER
    }

    /// Ends the connection.
    pub(super) fn cut(&self, why: Cut) {
        if self.cut.compare_exchange(0, why as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            for waker in [&self.driver, &self.reader, &self.writer] {
                waker.wake();
            }
        }
    }

    pub(super) fn was_cut(&self) -> Option<Cut> {
        Cut::of(self.cut.load(Ordering::Acquire))
    }

    pub(super) fn poll_cut(&self, cx: &Context<'_>) -> Option<Cut> {
        self.driver.register(cx.waker());
        self.was_cut()
    }

    /// The head of a request broke the grammar.
    pub(super) fn malformed(&self) {
        self.malformed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_malformed(&self) -> bool {
        self.malformed.load(Ordering::Relaxed)
    }

    /// Whether no further request is wanted.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Whether an HTTP/2 connection is to say that it ends; one that has had no request is still given an answer.
    pub(super) fn ends(&self) -> bool {
        self.is_draining() && self.begun.load(Ordering::Relaxed)
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.driver.wake();
    }

    /// What a peer still sends is read for so long, so that it reads the answer it was given.
    pub(super) fn lingers(&self, time: Duration) {
        self.busy_by.store(now_ms().saturating_add(millis(time)), Ordering::Relaxed);
    }

    pub(super) fn reads(&self, waker: &Waker) {
        self.reader.register(waker);
    }

    pub(super) fn writes(&self, waker: &Waker) {
        self.writer.register(waker);
    }

    /// A stream of HTTP/2 opens.
    pub(super) fn stream(self: &Arc<Self>) -> Stream {
        let clock = Arc::<RequestClock>::default();
        lock(&self.streams).push(Arc::clone(&clock));
        Stream { connection: Arc::clone(self), clock }
    }

    fn clocks(&self, mut each: impl FnMut(&RequestClock)) {
        each(&self.clock);
        lock(&self.streams).iter().for_each(|clock| each(clock));
    }

    /// Ends what has run out of time; says what it was.
    fn sweep(&self, now: u64) -> Option<Cut> {
        let stall = millis(self.bounds.write_stall);
        let why = if self.blocked_since.load(Ordering::Relaxed).saturating_add(stall) <= now {
            Some(Cut::Stalled)
        } else if !self.is_busy() && self.busy_by.load(Ordering::Relaxed) <= now {
            Some(if self.in_head.load(Ordering::Relaxed) { Cut::Head } else { Cut::Idle })
        } else {
            None
        };
        if let Some(why) = why {
            let first = self.was_cut().is_none();
            self.cut(why);
            return first.then_some(why);
        }
        let mut stalled = None;
        self.clocks(|clock| {
            if clock.sweep(now) {
                stalled = Some(Cut::Stalled);
            }
        });
        stalled
    }
}

/// A request that runs.
#[derive(Debug)]
pub struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// A stream of HTTP/2 that is open.
#[derive(Debug)]
pub(super) struct Stream {
    connection: Arc<Connection>,
    pub(super) clock: Arc<RequestClock>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut streams = lock(&self.connection.streams);
        if let Some(at) = streams.iter().position(|clock| Arc::ptr_eq(clock, &self.clock)) {
            streams.swap_remove(at);
        }
    }
}

/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Table {
    name: &'static str,
    pub(super) bounds: Bounds,
    metrics: EdgeMetrics,
    draining: AtomicBool,
    /// Connections that have not closed yet, those that were evicted included.
    here: AtomicUsize,
    /// A connection has closed.
    pub(super) closed: Notify,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, Arc<Connection>>,
    /// Never more addresses than connections.
    addresses: HashMap<IpAddr, usize>,
}

/// All listeners of the process, and how many connections they have together.
static TABLES: Mutex<Vec<Weak<Table>>> = Mutex::new(Vec::new());
static OPEN: AtomicUsize = AtomicUsize::new(0);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    pub(super) fn new(name: &'static str, bounds: Bounds, metrics: EdgeMetrics) -> Arc<Self> {
        let table = Arc::new(Self {
            name,
            bounds,
            metrics,
            draining: AtomicBool::new(false),
            here: AtomicUsize::new(0),
            closed: Notify::new(),
            inner: Mutex::default(),
        });
        let mut tables = lock(&TABLES);
        tables.retain(|table| table.strong_count() > 0);
        tables.push(Arc::downgrade(&table));
        drop(tables);
        table
    }

    /// Room for one more connection. Where there is none, those that have been idle for longest are ended, strangers
    /// first; `None` when all of them are busy.
    pub(super) fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Open> {
        let address = household(peer);
        let of_address = |c: &Connection| household(c.peer) == address;
        let (open, own) = {
            let inner = lock(&self.inner);
            (inner.open.len(), inner.addresses.get(&address).copied().unwrap_or_default())
        };
        let fits = (own < self.bounds.connections_per_address || self.evict(of_address) > 0)
            && (open < self.bounds.connections || self.evict(|_| true) > 0)
            && (OPEN.load(Ordering::Relaxed) < descriptors::connections_max() || evict_anywhere());
        if !fits {
            self.metrics.ended(self.name, End::Refused);
            return None;
        }
        let connection = Arc::new(Connection::new(peer, self.bounds));
        let id = {
            let mut inner = lock(&self.inner);
            let id = inner.next;
            inner.next += 1;
            inner.open.insert(id, Arc::clone(&connection));
            *inner.addresses.entry(address).or_default() += 1;
            OPEN.fetch_add(1, Ordering::Relaxed);
            id
        };
        self.here.fetch_add(1, Ordering::AcqRel);
        self.metrics.opened(self.name);
        if self.draining.load(Ordering::Acquire) {
            connection.drain();
        }
        Some(Open { table: Arc::clone(self), id, connection })
    }

    /// Ends the connections that have been idle for longest among those that `fits` names; how many.
    fn evict(&self, fits: impl Fn(&Connection) -> bool) -> usize {
        let mut idle: Vec<_> = {
            let inner = lock(&self.inner);
            let idle = inner.open.iter().filter(|(_, c)| !c.is_busy() && fits(c));
            idle.map(|(id, c)| (*id, Arc::clone(c))).collect()
        };
        let count = (idle.len() / EVICTED_PART).max(1).min(idle.len());
        if count == 0 {
            return 0;
        }
        if count < idle.len() {
            idle.select_nth_unstable_by_key(count - 1, |(_, c)| age(c));
        }
        for (id, connection) in &idle[..count] {
            // Its room is free from now on, a moment before its task has ended.
            self.leave(*id, connection);
            connection.cut(Cut::Evicted);
            self.metrics.ended(self.name, End::Cut(Cut::Evicted));
        }
        count
    }

    fn leave(&self, id: u64, connection: &Connection) {
        let address = household(connection.peer);
        let mut inner = lock(&self.inner);
        if inner.open.remove(&id).is_none() {
            return;
        }
        OPEN.fetch_sub(1, Ordering::Relaxed);
        if let Some(count) = inner.addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                inner.addresses.remove(&address);
            }
        }
    }

    /// The longest idle connection's place in the order of eviction.
    fn oldest(&self) -> Option<(bool, u64)> {
        let inner = lock(&self.inner);
        inner.open.values().filter(|c| !c.is_busy()).map(age).min()
    }

    fn sweep(&self) {
        let now = now_ms();
        let open: Vec<_> = lock(&self.inner).open.values().cloned().collect();
        for connection in open {
            if let Some(why) = connection.sweep(now) {
                self.metrics.ended(self.name, End::Cut(why));
            }
        }
    }

    /// From now on every connection ends with the requests it has. HTTP/1 cannot say so between two requests, and closed
    /// while it is idle it would lose the request that is on its way: its next answer says it.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        let open: Vec<_> = lock(&self.inner).open.values().cloned().collect();
        open.iter().for_each(|connection| connection.drain());
    }

    /// Ends the answers that run, each with a last word.
    pub(super) fn end_answers(&self) {
        let open: Vec<_> = lock(&self.inner).open.values().cloned().collect();
        open.iter().for_each(|connection| connection.clocks(RequestClock::end));
    }

    /// Ends all connections, or those that have been idle for `idle`: the last answer of one that has just become so may
    /// not have left yet.
    pub(super) fn cut(&self, idle: Option<Duration>) {
        let open: Vec<_> = lock(&self.inner).open.values().cloned().collect();
        for connection in open.iter().filter(|c| idle.is_none_or(|time| c.is_idle_for(time))) {
            connection.cut(Cut::Drained);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.here.load(Ordering::Acquire)
    }
}

/// Strangers come before others, and who has been idle for longer before who has not.
fn age(connection: &Arc<Connection>) -> (bool, u64) {
    (connection.known.load(Ordering::Relaxed), connection.idle_since.load(Ordering::Relaxed))
}

/// The process has no room: whichever of its listeners has the longest idle connection ends some.
fn evict_anywhere() -> bool {
    let tables: Vec<_> = lock(&TABLES).iter().filter_map(Weak::upgrade).collect();
    let oldest = tables.iter().filter_map(|t| t.oldest().map(|age| (age, t))).min_by_key(|(age, _)| *age);
    oldest.is_some_and(|(_, table)| table.evict(|_| true) > 0)
}

/// Looks at the clocks of a listener's connections for as long as it is there.
pub(super) async fn sweep(table: Weak<Table>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(table) = table.upgrade() else { return };
        table.sweep();
    }
}

/// A connection's place in its listener's table; given back on drop.
#[derive(Debug)]
pub(super) struct Open {
    table: Arc<Table>,
    id: u64,
    connection: Arc<Connection>,
}

impl Open {
    /// The connection.
    pub(super) const fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.table.leave(self.id, &self.connection);
        self.table.here.fetch_sub(1, Ordering::AcqRel);
        self.table.metrics.closed(self.table.name);
        self.table.closed.notify_waiters();
    }
}

/// Whom an address belongs to. IPv6 is handed out in networks of 64 bits: whoever has one has all addresses in it.
pub fn household(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests;
