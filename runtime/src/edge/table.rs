//! The open connections of one listener: their maximum, and the order of eviction.

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

/// The interval of the sweep over all clocks, by which a time limit may be exceeded.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
/// If room is needed, one in this number of connections is ended, at least one. So one scan of all connections makes
/// room for many, and a flood costs little per connection.
const EVICTED_PART: usize = 100;
/// The connections of one listener.
#[derive(Debug)]
pub(super) struct Table {
    name: &'static str,
    pub(super) bounds: Bounds,
    metrics: EdgeMetrics,
    draining: AtomicBool,
    /// Connections that have not closed yet, evicted ones included.
    here: AtomicUsize,
    /// Notified when a connection has closed.
    pub(super) closed: Notify,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    open: HashMap<u64, Entry>,
    /// Connections that take room: all open ones except those that were asked to make room.
    counted: usize,
    /// The same by address. Never more addresses than connections.
    addresses: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    counted: bool,
}

impl Inner {
    /// Counts a connection, or stops counting it.
    fn count(&mut self, id: u64, counted: bool) {
        let Some(entry) = self.open.get_mut(&id).filter(|entry| entry.counted != counted) else { return };
        entry.counted = counted;
        let address = household(entry.connection.peer());
        let of_address = self.addresses.entry(address).or_default();
        if counted {
            (self.counted, *of_address) = (self.counted + 1, *of_address + 1);
            OPEN.fetch_add(1, Ordering::Relaxed);
            return;
        }
        (self.counted, *of_address) = (self.counted - 1, *of_address - 1);
        OPEN.fetch_sub(1, Ordering::Relaxed);
        if *of_address == 0 {
            self.addresses.remove(&address);
        }
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        self.open.values().map(|entry| Arc::clone(&entry.connection)).collect()
    }

    /// Connections that can be evicted.
    fn idle(&self) -> impl Iterator<Item = (u64, &Arc<Connection>)> {
        let entries = self.open.iter().filter(|(_, entry)| entry.counted && !entry.connection.is_busy());
        entries.map(|(id, entry)| (*id, &entry.connection))
    }
}

/// All listeners of the process, and the sum of their connections.
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

    /// Makes room for one more connection, if necessary by ending the longest idle ones, strangers first. `None` if
    /// all are busy.
    pub(super) fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Open> {
        let address = household(peer);
        let of_address = |c: &Connection| household(c.peer()) == address;
        let own = |inner: &Inner| inner.addresses.get(&address).copied().unwrap_or_default();
        let fits = self.has_room(own, self.bounds.connections_per_address, of_address)
            && self.has_room(|inner| inner.counted, self.bounds.connections, |_| true)
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
            inner.open.insert(id, Entry { connection: Arc::clone(&connection), counted: false });
            inner.count(id, true);
            id
        };
        self.here.fetch_add(1, Ordering::AcqRel);
        self.metrics.opened(self.name);
        if self.draining.load(Ordering::Acquire) {
            connection.drain();
        }
        Some(Open { table: Arc::clone(self), id, connection })
    }

    /// Whether there is room for one more connection; makes room if there is none. The bound may be exceeded for a
    /// moment, if a connection to be evicted has a request in its socket.
    fn has_room(
        &self,
        taken: impl Fn(&Inner) -> usize,
        bound: usize,
        fits: impl Fn(&Connection) -> bool,
    ) -> bool {
        let taken = taken(&lock(&self.inner));
        let surplus = (taken + 1).saturating_sub(bound);
        surplus == 0 || self.evict(surplus, fits) >= surplus
    }

    /// Ends at least this number of connections, the longest idle of those that `fits` accepts, or none if there are
    /// fewer. Returns the number. A connection with an unread request in its socket stays, and takes room again.
    fn evict(&self, at_least: usize, fits: impl Fn(&Connection) -> bool) -> usize {
        let mut idle: Vec<_> = {
            let inner = lock(&self.inner);
            inner.idle().filter(|(_, c)| fits(c)).map(|(id, c)| (id, Arc::clone(c))).collect()
        };
        if idle.len() < at_least {
            return 0;
        }
        let count = (idle.len() / EVICTED_PART).max(at_least);
        if count < idle.len() {
            idle.select_nth_unstable_by_key(count - 1, |(_, c)| c.eviction_order());
        }
        for (id, connection) in &idle[..count] {
            // Its room is free from now on, a moment before its task ends.
            lock(&self.inner).count(*id, false);
            connection.ask_to_close(Cut::Evicted);
        }
        count
    }

    /// The place of the first connection to go in the order of eviction.
    fn oldest(&self) -> Option<(bool, u64)> {
        let inner = lock(&self.inner);
        inner.idle().map(|(_, c)| c.eviction_order()).min()
    }

    fn sweep(&self) {
        let now = now_ms();
        for connection in self.connections() {
            if connection.sweep(now) {
                self.metrics.ended(self.name, End::Cut(Cut::Stalled));
            }
        }
        let mut inner = lock(&self.inner);
        let stays = |entry: &Entry| !entry.counted && entry.connection.stays();
        let stay: Vec<_> = inner.open.iter().filter(|(_, entry)| stays(entry)).map(|(id, _)| *id).collect();
        stay.into_iter().for_each(|id| inner.count(id, true));
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        lock(&self.inner).connections()
    }

    /// From now on every connection ends with its running requests. HTTP/1 cannot announce an end between two
    /// requests, and closing an idle connection would lose a request in flight, so its next answer announces it.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        self.connections().iter().for_each(|connection| connection.drain());
    }

    /// Ends the running answers, each with its last event.
    pub(super) fn end_answers(&self) {
        self.connections().iter().for_each(|connection| connection.clocks(RequestClock::end));
    }

    /// Ends all connections, or those that have been idle for `idle`: the last answer of one that has just become
    /// idle may not be sent yet.
    pub(super) fn cut(&self, idle: Option<Duration>) {
        for connection in self.connections() {
            match idle {
                None => connection.cut(Cut::Drained),
                Some(time) if connection.is_idle_for(time) => connection.ask_to_close(Cut::Drained),
                Some(_) => {}
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.here.load(Ordering::Acquire)
    }
}

/// The process has no room: the listener with the longest idle connection evicts, until there is room for one more.
fn evict_anywhere() -> bool {
    let tables: Vec<_> = lock(&TABLES).iter().filter_map(Weak::upgrade).collect();
    let surplus = || (OPEN.load(Ordering::Relaxed) + 1).saturating_sub(descriptors::connections_max());
    while surplus() > 0 {
        let oldest = tables.iter().filter_map(|t| t.oldest().map(|order| (order, t)));
        let Some((_, table)) = oldest.min_by_key(|(order, _)| *order) else { return false };
        if table.evict(1, |_| true) == 0 {
            return false;
        }
    }
    true
}

/// Checks the clocks of a listener's connections while the listener exists.
pub(super) async fn sweep(table: Weak<Table>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(table) = table.upgrade() else { return };
        table.sweep();
    }
}

/// A connection's entry in its listener's table; dropping it removes the entry.
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
        {
            let mut inner = lock(&self.table.inner);
            inner.count(self.id, false);
            inner.open.remove(&self.id);
        }
        if let Some(why) = self.connection.was_cut() {
            self.table.metrics.ended(self.table.name, End::Cut(why));
        }
        self.table.here.fetch_sub(1, Ordering::AcqRel);
        self.table.metrics.closed(self.table.name);
        self.table.closed.notify_waiters();
    }
}

/// The network that an address is counted under. IPv6 is handed out in networks of 64 bits, whose owner has all
/// addresses in them.
pub fn household(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(v4) => IpAddr::V4(v4),
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests;
