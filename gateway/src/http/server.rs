//! Listening to clients. What strangers may take of a connection is the business of [`weir_runtime::edge`]; here are the
//! figures, and what becomes of a request.

use std::sync::Arc;

use http::Request;
use hyper::body::Incoming;
use prometheus_client::metrics::gauge::Gauge;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use weir_runtime::ServerTls;
use weir_runtime::edge::framing::Violation;
use weir_runtime::edge::{self, Client, Edge, EdgeMetrics, HttpBounds, Refusal, Socket};

use crate::error::GatewayError;
use crate::http::bounds::Bounds;
use crate::http::gateway::Gateway;
use crate::http::pipeline;

/// The name of this listener in metrics and logs.
const LISTENER: &str = "clients";

/// The listener for clients.
#[derive(Debug)]
pub struct Server {
    /// With it nothing but TLS is spoken.
    pub tls: Option<ServerTls>,
    /// What requests need.
    pub gateway: Arc<Gateway>,
    /// What a connection may cost.
    pub bounds: Bounds,
    /// What is counted of connections.
    pub listeners: EdgeMetrics,
}

impl Server {
    /// Serves until `shutdown`, then drains: keep accepting for `pre_stop`, then refuse, let streams run for `drain` or
    /// until `force`.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken, force: CancellationToken) {
        let Self { tls, gateway, bounds, listeners } = self;
        let edge = Edge::new(LISTENER, listener, bounds.edge, listeners);
        let handle = edge.handle();
        let connections = Arc::new(Connections { tls, gateway: gateway.clone(), http: bounds.http });
        let stop_accepting = async {
            shutdown.cancelled().await;
            // Clients leave with their next answer instead of being cut between two requests.
            handle.drain();
            tokio::select! {
                () = tokio::time::sleep(bounds.pre_stop) => {}
                () = force.cancelled() => {}
            }
        };
        tokio::pin!(stop_accepting);
        loop {
            tokio::select! {
                socket = edge.accept() => connections.start(socket),
                () = &mut stop_accepting => break,
            }
        }
        edge.retire(|socket| connections.start(socket)).await;
        tracing::info!(streams = gateway.metrics.in_flight.get(), "draining");
        match handle.close(bounds.drain, force.cancelled()).await {
            true => tracing::info!("drained"),
            false => {
                tracing::warn!("the drain was cut short; streams that still ran ended with an error event");
            }
        }
    }
}

/// Counts a connection for as long as it is there.
struct OpenConnection(Gauge);

impl OpenConnection {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// What all connections have in common.
struct Connections {
    tls: Option<ServerTls>,
    gateway: Arc<Gateway>,
    http: HttpBounds,
}

impl Connections {
    fn start(self: &Arc<Self>, socket: Socket) {
        let open = OpenConnection::new(&self.gateway.metrics.connections);
        let connections = self.clone();
        // Ends with the connection, which its clocks and the end of the drain end.
        tokio::spawn(async move {
            connections.serve(socket).await;
            drop(open);
        });
    }

    async fn serve(&self, socket: Socket) {
        let connection = socket.connection().clone();
        let gateway = self.gateway.clone();
        let service = move |client: Client, request: Request<Incoming>| {
            Box::pin(pipeline::handle(gateway.clone(), request, client))
        };
        match &self.tls {
            None => edge::serve_http(socket, connection, self.http, refuse, service).await,
            Some(tls) => match tls.acceptor().accept(socket).await {
                Ok(stream) => edge::serve_http(stream, connection, self.http, refuse, service).await,
                Err(error) => tracing::debug!(peer = %connection.peer(), %error, "a TLS handshake failed"),
            },
        }
    }
}

/// Words the refusal of a head that never became a request.
fn refuse(violation: Violation) -> Refusal {
    Refusal {
        body: GatewayError::BadHead(violation).to_body(),
        request_id: Some(uuid::Uuid::now_v7().to_string()),
    }
}
