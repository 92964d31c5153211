//! `/livez`, `/readyz` and `/metrics`, on a port of their own so that no client reaches them.
//!
//! [`hosts`] keeps pages of other sites out; [`token`] closes what tells about tenants.

mod hosts;
mod token;

use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use hosts::{AllowedHost, AllowedHosts, Head, Refusal};
pub use token::{OpsRefusal, OpsToken, guard_ops_page, read_token};

/// Whether the process wants traffic, and if not, why. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<Mutex<Result<(), String>>>);

impl Readiness {
    /// Not ready, for this reason.
    pub fn not_ready(reason: &str) -> Self {
        Self(Arc::new(Mutex::new(Err(reason.to_owned()))))
    }

    /// Says that traffic is welcome, or why it is not.
    pub fn set(&self, state: Result<(), String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Ready, or why not.
    pub fn get(&self) -> Result<(), String> {
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
    listener: TcpListener,
    hosts: AllowedHosts,
    readiness: Readiness,
    registry: Arc<Registry>,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    serve_ops_with(listener, hosts, readiness, registry, Router::new(), shutdown).await
}

/// Serves the operations port, with pages of the process's own, until `shutdown`.
pub async fn serve_ops_with(
    listener: TcpListener,
    hosts: AllowedHosts,
    readiness: Readiness,
    registry: Arc<Registry>,
    pages: Router,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let app = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(Ops { readiness, registry })
        .merge(pages)
        // Around everything, pages that are not there included.
        .layer(from_fn_with_state(hosts, hosts::guard));
    axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn readyz(State(ops): State<Ops>) -> Response {
    match ops.readiness.get() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()).into_response(),
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
