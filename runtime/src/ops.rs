//! `/livez`, `/readyz` and `/metrics`, on a port of their own so that no client reaches them.
//!
//! [`hosts`] refuses requests of other sites' pages; [`token`] protects pages about tenants.

mod hosts;
mod token;

use std::sync::{Arc, Mutex, PoisonError};

use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{Request, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;
use tonic::codegen::Service as _;

use crate::edge::framing::{HeadBounds, Violation};
use crate::edge::{self, Client, Edge, HttpBounds, check, serve_http1};

/// The bounds of heads, which come from scrapers and browsers.
const BOUNDS: HttpBounds =
    HttpBounds { head: HeadBounds { bytes: 32 << 10, fields: 100, target_bytes: 8 << 10 }, streams: 0 };
/// The time in which an answer must begin, whatever the request's body does.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that running requests have when the process ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

pub use hosts::{AllowedHost, AllowedHosts, Head, Refusal};
pub use token::{OpsRefusal, OpsToken, guard_ops_page, read_token};

/// Whether the process wants traffic, and the reason if not. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Mutex<Result<Option<String>, String>>>);

impl Readiness {
    /// Not ready, for this reason.
    pub fn not_ready(reason: &str) -> Self {
        Self(Arc::new(Mutex::new(Err(reason.to_owned()))))
    }

    /// Sets whether traffic is welcome, or why it is not. A process that is ready may have a problem all the same, which
    /// it tells here, such as a control plane that refuses it.
    pub fn set(&self, state: Result<Option<String>, String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Ready, maybe with a problem, or why not.
    pub fn get(&self) -> Result<Option<String>, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[derive(Debug, Clone)]
struct Ops {
    readiness: Readiness,
    registry: Arc<Registry>,
}

/// Serves the operations port until `shutdown`, under the names that `hosts` allows.
pub async fn serve_ops(
    edge: Edge,
    hosts: AllowedHosts,
    readiness: Readiness,
    registry: Arc<Registry>,
    shutdown: CancellationToken,
) {
    serve_ops_with(edge, hosts, readiness, registry, Router::new(), shutdown).await
}

/// Serves the operations port, with pages of the process's own, until `shutdown`.
pub async fn serve_ops_with(
    edge: Edge,
    hosts: AllowedHosts,
    readiness: Readiness,
    registry: Arc<Registry>,
    pages: Router,
    shutdown: CancellationToken,
) {
    let app = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Ops { readiness, registry })
        .merge(pages)
        // Around everything, missing pages included.
        .layer(from_fn_with_state(hosts, hosts::guard));
    let handle = edge.handle();
    loop {
        let socket = tokio::select! {
            socket = edge.accept() => socket,
            () = shutdown.cancelled() => break,
        };
        let (app, connection) = (app.clone(), socket.connection().clone());
        // Ends with the connection, which its clocks and the end of the process end.
        tokio::spawn(serve_http1(
            socket,
            connection,
            BOUNDS,
            refuse,
            move |client: Client, request: Request<Incoming>| Box::pin(answer(app.clone(), client, request)),
        ));
    }
    drop(edge);
    handle.close(CLOSE_TIMEOUT, std::future::pending()).await;
}

async fn answer(mut app: Router, client: Client, mut request: Request<Incoming>) -> Response {
    if let Err(violation) = check(&request, BOUNDS.head.fields) {
        let headers = [(header::CONTENT_TYPE, "application/json"), (header::CONNECTION, "close")];
        return (violation.status, headers, refuse(violation).body).into_response();
    }
    request.extensions_mut().insert(client.connection);
    match tokio::time::timeout(ANSWER_TIMEOUT, app.call(request)).await {
        Ok(Ok(response)) => response,
        Ok(Err(never)) => match never {},
        Err(_) => (StatusCode::REQUEST_TIMEOUT, "the request did not arrive in time\n").into_response(),
    }
}

fn refuse(violation: Violation) -> edge::Refusal {
    // A violation is one of our own sentences, which contain no character with a meaning in JSON.
    edge::Refusal { body: format!("{{\"error\":\"{violation}\"}}"), request_id: None }
}

async fn readyz(State(ops): State<Ops>) -> Response {
    match ops.readiness.get() {
        Ok(None) => (StatusCode::OK, "ready\n").into_response(),
        Ok(Some(problem)) => (StatusCode::OK, format!("ready; {problem}\n")).into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response(),
    }
}

async fn metrics(State(ops): State<Ops>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &ops.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
