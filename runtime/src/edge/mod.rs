//! The edge: the bounds and clocks of every listener of every process.
//!
//! * `connection`: the bounds of one connection and the clocks that end it; `clock`: the clock of one request;
//! * `table`: the open connections of a listener and the order of their eviction; `descriptors`: how many file
//!   descriptors strangers may take;
//! * `socket`: a connection's socket; `framing`: the grammar of HTTP/1; `framed`: the bytes between socket and hyper,
//!   checked; `head`: refusals of well-formed heads; `http`: HTTP/1 and HTTP/2 on a socket; `busy`: the body of an
//!   answer; `grpc`: sockets for tonic.
//!
//! Invariants:
//! - A connection that has not sent the head of a request in time is closed, whatever it does instead.
//! - If there is no room, the longest idle connection is closed, strangers first. A connection with a running request
//!   is never closed for room.
//! - The accept loop waits for connections only: handshakes and everything else belong to the connection's task.
//! - Connections take at most half of the process's file descriptors.

mod busy;
mod clock;
mod connection;
mod descriptors;
mod framed;
pub mod framing;
mod grpc;
mod head;
mod http;
mod metrics;
mod socket;
mod table;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::net::TcpListener;

use crate::ServerTls;

pub use self::busy::BusyBody;
pub use self::clock::RequestClock;
pub use self::connection::{Bounds, Busy, Connection};
pub use self::grpc::{BusyLayer, GrpcPeer, GrpcSocket, incoming};
pub use self::head::check;
pub use self::http::{Client, Handler, HttpBounds, Refusal, Refuse, Transport, serve_http, serve_http1};
pub use self::metrics::EdgeMetrics;
pub use self::socket::Socket;
pub use self::table::household;

/// The pause after an error of accept, which is mostly a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// While draining, connections that have been idle for this time are closed.
const IDLE_GRACE: Duration = Duration::from_secs(1);
/// At the end of a drain an answer has this time for its last event, and a connection to close.
const LAST_WORD: Duration = Duration::from_secs(2);

/// One listener with its bounds.
#[derive(Debug)]
pub struct Edge {
    listener: TcpListener,
    table: Arc<table::Table>,
}

/// Drains and closes the connections of a listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EdgeHandle(Arc<table::Table>);

impl EdgeHandle {
    /// The number of open connections.
    pub fn open(&self) -> usize {
        self.0.len()
    }

    /// From now on every connection ends with its running requests, and each new one after its first request. An idle
    /// HTTP/1 connection ends with its next request, or when all [close](Self::close).
    pub fn drain(&self) {
        self.0.drain();
    }

    /// Drains: lets requests run for `limit` or until `force` is done. Then the remaining ones write their last
    /// event, and every connection is closed. Returns when all are closed, and whether none had to be cut.
    pub async fn close(&self, limit: Duration, force: impl Future<Output = ()>) -> bool {
        self.drain();
        let whole = {
            let ended = async {
                // An HTTP/2 peer may have sent a request before it saw the GOAWAY. A peer that sends nothing delays
                // nobody.
                self.closed_within(IDLE_GRACE).await;
                while self.open() > 0 {
                    self.0.cut(Some(IDLE_GRACE));
                    self.closed_within(IDLE_GRACE).await;
                }
            };
            tokio::select! {
                () = ended => true,
                () = tokio::time::sleep(limit) => false,
                () = force => false,
            }
        };
        if !whole {
            self.0.end_answers();
            self.closed_within(LAST_WORD).await;
            self.0.cut(None);
            self.closed_within(LAST_WORD).await;
        }
        whole
    }

    async fn closed_within(&self, time: Duration) {
        let all = async {
            loop {
                let closed = self.0.closed.notified();
                tokio::pin!(closed);
                closed.as_mut().enable();
                if self.open() == 0 {
                    return;
                }
                closed.await;
            }
        };
        let _ = tokio::time::timeout(time, all).await;
    }
}

impl Edge {
    /// Bounds a listener. `name` is its label in metrics and logs. Must be called inside a tokio runtime.
    pub fn new(name: &'static str, listener: TcpListener, bounds: Bounds, metrics: EdgeMetrics) -> Self {
        let possible = descriptors::connections_max();
        if bounds.connections > possible {
            tracing::warn!(
                listener = name,
                configured = bounds.connections,
                possible,
                open_files = descriptors::limit(),
                "the limit of open files allows fewer connections than configured; raise it (ulimit -n, LimitNOFILE of systemd, ulimits of docker)"
            );
        }
        let table = table::Table::new(name, bounds, metrics);
        // Ends with the table.
        tokio::spawn(table::sweep(Arc::downgrade(&table)));
        Self { listener, table }
    }

    /// The handle that drains and closes its connections.
    pub fn handle(&self) -> EdgeHandle {
        EdgeHandle(Arc::clone(&self.table))
    }

    /// The next connection for which there is room; others are closed. Cancel-safe.
    pub async fn accept(&self) -> Socket {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    if let Some(open) = self.table.admit(peer.ip()) {
                        return Socket::new(stream, open);
                    }
                }
                Err(error) => {
                    // The cause is most likely a lack of file descriptors: waits for some instead of spinning.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// A connection that waits to be accepted, if there is one. Connections that are not accepted are cut when the
    /// listener closes.
    pub fn accept_now(&self) -> Option<Socket> {
        loop {
            let (stream, peer) = self.listener.accept().now_or_never()?.ok()?;
            if let Some(open) = self.table.admit(peer.ip()) {
                return Some(Socket::new(stream, open));
            }
        }
    }
}
