//! The open connections of one listener: how many there may be, and which go first when there are too many.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::Notify;

use super::clock::{RequestClock, now_ms};
use super::connection::{Bounds, Connection, Cut, lock};
use super::descriptors;
use super::metrics::{EdgeMetrics, End};

/// How often the clocks are checked: what a limit of seconds may be late by.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
/// One connection in so many, at least one, is ended when room is needed: one look at all of them makes room for the
/// next hundred, so a flood costs little for each.
const EVICTED_PART: usize = 100;
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
        let of_address = |c: &Connection| household(c.peer()) == address;
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
            idle.select_nth_unstable_by_key(count - 1, |(_, c)| c.eviction_order());
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
        let address = household(connection.peer());
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

    /// Where the first connection to go stands in the order of eviction.
    fn oldest(&self) -> Option<(bool, u64)> {
        let inner = lock(&self.inner);
        inner.open.values().filter(|c| !c.is_busy()).map(|c| c.eviction_order()).min()
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
        for connection in &open {
            match idle {
                None => connection.cut(Cut::Drained),
                Some(time) if connection.is_idle_for(time) => connection.close_idle(),
                Some(_) => {}
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.here.load(Ordering::Acquire)
    }
}

/// The process has no room: whichever of its listeners has the longest idle connection ends some.
fn evict_anywhere() -> bool {
    let tables: Vec<_> = lock(&TABLES).iter().filter_map(Weak::upgrade).collect();
    let oldest =
        tables.iter().filter_map(|t| t.oldest().map(|order| (order, t))).min_by_key(|(order, _)| *order);
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
