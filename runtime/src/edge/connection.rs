//! One open connection: its bounds, its running requests, and the clocks that end it.
//!
//! A connection is *busy* while one of its requests runs. Then only its client, a stalled write or the request's own
//! clock ends it. Otherwise it is *idle* and must have sent the head of a request by a certain time. Strangers, whose
//! requests have shown no valid key, get less time.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use futures_util::task::AtomicWaker;

use super::clock::{NEVER, RequestClock, millis, now_ms};

/// While draining, a connection without any request yet has this time for one.
const NEW_GRACE: Duration = Duration::from_secs(3);
/// An idle connection that is asked to close while its socket holds bytes has this time to become busy.
const UNREAD_GRACE: Duration = Duration::from_secs(1);
/// The bounds of the connections of one listener. Times may be exceeded by a quarter of a second.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// The maximum of connections.
    pub connections: usize,
    /// The maximum of connections of one address; with IPv6, of one /64.
    pub connections_per_address: usize,
    /// The time from accept to the complete head of the first request, a TLS handshake included; and from the first
    /// to the last byte of each later head.
    pub head: Duration,
    /// The longest time between two requests of a connection whose caller is identified.
    pub idle: Duration,
    /// The longest time between two requests of any other connection.
    pub stranger_idle: Duration,
    /// The longest time for which a peer may take nothing of what is written.
    pub write_stall: Duration,
}

impl Bounds {
    /// The bounds of an operations port: scrapers, probes and a few people.
    pub const fn operations() -> Self {
        Self {
            connections: 1024,
            connections_per_address: 1024,
            head: Duration::from_secs(10),
            // Scrapers keep their connection between two scrapes and are never identified.
            idle: Duration::from_secs(75),
            stranger_idle: Duration::from_secs(75),
            write_stall: Duration::from_secs(30),
        }
    }

    /// The bounds of a gRPC port: a fleet of gateways with two connections each, or as many proxies.
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

/// Why a connection or a request was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Cut {
    /// Its head did not arrive in time.
    Head = 1,
    /// No further request arrived in time.
    Idle = 2,
    /// The peer takes nothing.
    Stalled = 3,
    /// It made room for others.
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

/// The state of one open connection.
#[derive(Debug)]
pub struct Connection {
    peer: IpAddr,
    bounds: Bounds,
    /// The number of running requests.
    active: AtomicU32,
    /// The start of the current idle time.
    idle_since: AtomicU64,
    /// The time by which it must be busy.
    busy_by: AtomicU64,
    /// The time since which a write waits for the peer; [`NEVER`] if none waits.
    blocked_since: AtomicU64,
    /// Bytes that its socket has taken.
    written: AtomicU64,
    /// Whether the caller of one of its requests was identified.
    known: AtomicBool,
    /// Whether there was a request.
    begun: AtomicBool,
    /// Whether a head has begun, or the first one is expected.
    in_head: AtomicBool,
    cut: AtomicU8,
    /// Whether the process ends, so that no further request is wanted.
    draining: AtomicBool,
    /// Whether its driver closes it when asked to, and not its socket.
    closes_itself: AtomicBool,
    /// Why it is asked to close, unless a request comes first: a [`Cut`], or zero if it is not asked.
    asked_to_close: AtomicU8,
    /// Whether it was left open in this idle time because its socket held bytes.
    spared: AtomicBool,
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
            asked_to_close: AtomicU8::new(0),
            spared: AtomicBool::new(false),
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

    /// Records that the caller of a request is identified. The connection may be idle for longer, and is evicted
    /// after strangers.
    pub fn trust(&self) {
        // Loaded first, because every request records this and a store would take the cache line from other cores.
        if !self.known.load(Ordering::Relaxed) {
            self.known.store(true, Ordering::Relaxed);
        }
    }

    /// Starts a request, which ends when the returned value is dropped.
    pub fn begin(self: &Arc<Self>) -> Busy {
        self.active.fetch_add(1, Ordering::AcqRel);
        if !self.begun.load(Ordering::Relaxed) {
            self.begun.store(true, Ordering::Relaxed);
        }
        self.busy_by.store(NEVER, Ordering::Relaxed);
        if self.spared.load(Ordering::Relaxed) {
            self.spared.store(false, Ordering::Relaxed);
        }
        // The request may be answered before the time at which the driver would close.
        if self.is_asked_to_close() {
            self.asked_to_close.store(0, Ordering::Release);
        }
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

    /// Whether no request has run for this time and no write waits.
    pub(super) fn is_idle_for(&self, time: Duration) -> bool {
        let since = self.idle_since.load(Ordering::Relaxed);
        // A client that has just connected may be about to send a request.
        let time = if self.begun.load(Ordering::Relaxed) { time } else { time.max(NEW_GRACE) };
        !self.is_busy() && !self.is_write_waiting() && now_ms().saturating_sub(since) >= millis(time)
    }

    /// Records the first byte of a head. A further head has its whole time, even if it begins when the idle time is
    /// nearly over.
    pub(super) fn head_began(&self) {
        let by = now_ms().saturating_add(millis(self.bounds.head));
        if self.in_head.swap(true, Ordering::Relaxed) {
            self.busy_by.fetch_min(by, Ordering::Relaxed);
        } else {
            self.busy_by.store(by, Ordering::Relaxed);
        }
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

    /// Records that the head of a request broke the grammar.
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

    /// Whether an HTTP/2 connection must announce its end. One without any request yet gets an answer first.
    pub(super) fn ends(&self) -> bool {
        self.is_draining() && self.begun.load(Ordering::Relaxed)
    }

    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.driver.wake();
    }

    /// From now on the driver closes the connection when it is idle, after it has read what has arrived.
    pub(super) fn closes_itself(&self) {
        self.closes_itself.store(true, Ordering::Release);
    }

    /// Whether its socket must close it.
    pub(super) fn is_closed_by_socket(&self) -> bool {
        !self.closes_itself.load(Ordering::Acquire)
    }

    /// Ends an idle connection, unless its socket holds an unread request: its client could not know of the end, and
    /// the request would be lost. The task that reads the socket checks it last.
    pub(super) fn ask_to_close(&self, why: Cut) {
        if self.is_write_waiting() {
            // The reader may wait for the writer.
            return self.cut(why);
        }
        self.asked_to_close.store(why as u8, Ordering::Release);
        for waker in [&self.driver, &self.reader] {
            waker.wake();
        }
    }

    /// Whether it is asked to close and no request has begun since.
    pub(super) fn is_asked_to_close(&self) -> bool {
        self.asked_to_close.load(Ordering::Acquire) != 0
    }

    /// Returns why it is asked to close, and takes the request to close back.
    pub(super) fn take_asked_to_close(&self) -> Option<Cut> {
        if !self.is_asked_to_close() {
            return None;
        }
        Cut::of(self.asked_to_close.swap(0, Ordering::AcqRel))
    }

    /// Why it ends, cut or asked to close.
    #[cfg(test)]
    pub(super) fn ends_for(&self) -> Option<Cut> {
        self.was_cut().or(Cut::of(self.asked_to_close.load(Ordering::Acquire)))
    }

    /// Whether it is open and not asked to close.
    pub(super) fn stays(&self) -> bool {
        !self.is_asked_to_close() && self.was_cut().is_none()
    }

    /// Whether it is left open for a moment because its socket holds unread bytes. Once in each idle time, since the
    /// bytes need not be a request.
    pub(super) fn is_spared(&self) -> bool {
        if self.spared.swap(true, Ordering::Relaxed) {
            return false;
        }
        self.busy_by.store(now_ms().saturating_add(millis(UNREAD_GRACE)), Ordering::Relaxed);
        true
    }

    /// Whether an HTTP/2 client must still be told that its idle connection ends. While others need the room, only an
    /// identified client is told.
    pub(super) fn is_to_be_told(&self, why: Cut) -> bool {
        let known = self.known.load(Ordering::Relaxed);
        self.begun.load(Ordering::Relaxed) && !self.is_draining() && (known || why != Cut::Evicted)
    }

    /// Whether no request runs, no head has begun, and no write waits. If others need the room, the beginning of a
    /// head does not count.
    pub(super) fn is_at_rest(&self, why: Cut) -> bool {
        let in_later_head = self.begun.load(Ordering::Relaxed) && self.in_head.load(Ordering::Relaxed);
        !self.is_busy() && (!in_later_head || why == Cut::Evicted) && !self.is_write_waiting()
    }

    /// After its driver has ended, reads what the peer still sends for this time, so that the peer reads the answer.
    pub(super) fn lingers(&self, time: Duration) {
        self.closes_itself.store(false, Ordering::Release);
        self.busy_by.store(now_ms().saturating_add(millis(time)), Ordering::Relaxed);
    }

    pub(super) fn reads(&self, waker: &Waker) {
        self.reader.register(waker);
    }

    pub(super) fn writes(&self, waker: &Waker) {
        self.writer.register(waker);
    }

    /// Adds the clock of an HTTP/2 stream.
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

    /// Ends what has run out of time. Returns whether that was a single request of the connection.
    pub(super) fn sweep(&self, now: u64) -> bool {
        let stall = millis(self.bounds.write_stall);
        if self.blocked_since.load(Ordering::Relaxed).saturating_add(stall) <= now {
            self.cut(Cut::Stalled);
            return false;
        }
        if !self.is_busy() && self.busy_by.load(Ordering::Relaxed) <= now {
            match self.in_head.load(Ordering::Relaxed) {
                true => self.cut(Cut::Head),
                false => self.ask_to_close(Cut::Idle),
            }
            return false;
        }
        let mut stalled = false;
        self.clocks(|clock| stalled |= clock.sweep(now));
        stalled
    }
}

/// A running request.
#[derive(Debug)]
pub struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// An open stream of HTTP/2.
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
