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

#[cfg(target_os = "linux")]
use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpStream};

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
/// When a listener ends, handshakes under way have this time: a round trip to the other side of the earth.
const HANDSHAKES_END: Duration = Duration::from_millis(300);
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
        metrics.know(name);
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

    /// Lets go of the listener without cutting anybody: a client whose connection is established is accepted, whoever
    /// comes later is refused by the system and knows that its request was not read.
    ///
    /// The kernel completes handshakes by itself and resets what nobody accepted when a listener closes, so first no
    /// further handshake may begin (on Linux), those under way get time, and the queue is emptied.
    pub async fn retire(self, mut start: impl FnMut(Socket)) {
        begin_no_handshake(&self.listener);
        let _ = tokio::time::timeout(HANDSHAKES_END, async {
            loop {
                start(self.accept().await);
            }
        })
        .await;
        // The runtime knows of a connection only after it asked the kernel, so the kernel is asked.
        let Ok(listener) = self.listener.into_std() else { return };
        for _ in 0..self.table.bounds.connections {
            let Ok((stream, peer)) = listener.accept() else { break };
            let stream = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
            if let (Ok(stream), Some(open)) = (stream, self.table.admit(peer.ip())) {
                start(Socket::new(stream, open));
            }
        }
    }
}

/// Drops the first packet of every further handshake. Its client asks again after a second and is refused then.
#[cfg(target_os = "linux")]
fn begin_no_handshake(listener: &TcpListener) {
    /// Packets are seen from their TCP header on, and the 14th byte of it holds the flags (RFC 9293, 3.1).
    const FLAGS_AT: u32 = 13;
    const SYN_OR_ACK: u32 = 0x12;
    const SYN: u32 = 0x02;
    const WHOLE: u32 = u32::MAX;
    // The classic filter of the kernel: load a byte, and, jump if equal, return how much of the packet is kept.
    let only_known = [
        SockFilter::new(0x30, 0, 0, FLAGS_AT),
        SockFilter::new(0x54, 0, 0, SYN_OR_ACK),
        SockFilter::new(0x15, 0, 1, SYN),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, WHOLE),
    ];
    if let Err(error) = SockRef::from(listener).attach_filter(&only_known) {
        tracing::debug!(%error, "a client that connects at the last moment may be cut");
    }
}

#[cfg(not(target_os = "linux"))]
fn begin_no_handshake(_: &TcpListener) {}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::SocketAddr;

    use futures_util::FutureExt as _;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    async fn edge() -> (Edge, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let metrics = EdgeMetrics::new(&mut prometheus_client::registry::Registry::default());
        (Edge::new("test", listener, Bounds::operations(), metrics), address)
    }

    /// Answers one byte.
    fn answer(mut socket: Socket) {
        tokio::spawn(async move { socket.write_all(b"!").await });
    }

    #[tokio::test]
    async fn a_connection_of_which_the_runtime_was_not_told_is_accepted_at_the_end() {
        let (edge, address) = edge().await;
        assert!(edge.accept().now_or_never().is_none());
        // The runtime asks the kernel for nothing in between.
        let _client = std::net::TcpStream::connect(address).expect("established by the kernel");
        let mut accepted = 0;
        edge.retire(|_| accepted += 1).await;
        assert_eq!(accepted, 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_is_connected_when_a_listener_ends_is_answered() {
        let (edge, address) = edge().await;
        let clients: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(move || {
                    let mut answered = 0;
                    while let Ok(mut client) = std::net::TcpStream::connect(address) {
                        client.write_all(b"?").expect("connected");
                        client.read_exact(&mut [0]).expect("answered");
                        answered += 1;
                    }
                    answered
                })
            })
            .collect();
        for _ in 0..1000 {
            answer(edge.accept().await);
        }
        edge.retire(answer).await;
        let clients =
            tokio::task::spawn_blocking(|| clients.into_iter().map(|c| c.join().expect("answered")));
        assert!(clients.await.expect("joined").sum::<usize>() >= 1000);
    }
}
