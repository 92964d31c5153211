//! One open connection: what it may cost, whether a request of it runs, and the clocks that end it.
//!
//! A connection is *busy* while a request of it runs; only its client, a stalled write or the request's own clock ends it
//! then. Otherwise it is *idle*, and has a time by which it must have sent the head of a request. Strangers, who have
//! proven nothing, get less of that time.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::task::AtomicWaker;

use super::clock::{NEVER, RequestClock, millis, now_ms};

/// While draining, a connection that has had no request yet is given so long for one.
const NEW_GRACE: Duration = Duration::from_secs(3);
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
    /// Whether its driver closes it when asked to, instead of being cut.
    closes_itself: AtomicBool,
    /// Whether its driver is asked to close it, unless a request has come.
    asked_to_close: AtomicBool,
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
            closes_itself: AtomicBool::new(false),
            asked_to_close: AtomicBool::new(false),
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
    pub(super) fn is_idle_for(&self, time: Duration) -> bool {
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

    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.driver.wake();
    }

    /// HTTP/1: nothing tells a client that its idle connection is about to close, so its driver first reads what has arrived.
    pub(super) fn closes_itself(&self) {
        self.closes_itself.store(true, Ordering::Release);
    }

    /// Ends a connection that is idle because the process ends.
    pub(super) fn close_idle(&self) {
        if self.closes_itself.load(Ordering::Acquire) {
            self.asked_to_close.store(true, Ordering::Release);
            self.driver.wake();
        } else {
            self.cut(Cut::Drained);
        }
    }

    /// Whether [`close_idle`](Self::close_idle) has asked since the last call.
    pub(super) fn was_asked_to_close(&self) -> bool {
        self.asked_to_close.load(Ordering::Relaxed) && self.asked_to_close.swap(false, Ordering::AcqRel)
    }

    /// Whether no request runs, no head has begun after an earlier request, and nothing waits to be written.
    pub(super) fn is_at_rest(&self) -> bool {
        let in_later_head = self.begun.load(Ordering::Relaxed) && self.in_head.load(Ordering::Relaxed);
        !self.is_busy() && !in_later_head && !self.is_write_waiting()
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

    #[cfg(test)]
    pub(super) fn open_streams(&self) -> usize {
        lock(&self.streams).len()
    }

    pub(super) fn clocks(&self, mut each: impl FnMut(&RequestClock)) {
        each(&self.clock);
        lock(&self.streams).iter().for_each(|clock| each(clock));
    }

    /// The order of eviction: strangers before others, the longest idle first.
    pub(super) fn eviction_order(&self) -> (bool, u64) {
        (self.known.load(Ordering::Relaxed), self.idle_since.load(Ordering::Relaxed))
    }

    /// Ends what has run out of time; says what it was.
    pub(super) fn sweep(&self, now: u64) -> Option<Cut> {
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
