//! A control plane inside the bench, on a thread of its own: neither the load generator nor other tasks delay it.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use weir_control_plane::{Config, StoreConfig};

use crate::resources::Resources;

/// A control plane that holds its resources in memory.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    address: SocketAddr,
    token: String,
    shutdown: CancellationToken,
    join: JoinHandle<Result<(), weir_control_plane::Error>>,
    /// `None` after its end.
    runtime: Option<Runtime>,
}

impl ControlPlane {
    /// Starts one with these resources.
    pub(crate) async fn start(resources: &Resources) -> anyhow::Result<Self> {
        let local: SocketAddr = ([127, 0, 0, 1], 0).into();
        let config = Config {
            listen: local,
            http_listen: local,
            store: StoreConfig::Memory,
            bootstrap: resources.list(),
            ..Config::default()
        };
        let shutdown = CancellationToken::new();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (token, config) = (shutdown.clone(), config);
        let start =
            runtime.spawn(async move { weir_control_plane::ControlPlane::start(config, token).await });
        let running = start.await.context("the control plane panicked")??;
        let token = running.admin_token.expose().to_owned();
        Ok(Self { address: running.grpc_addr, token, shutdown, join: running.join, runtime: Some(runtime) })
    }

    /// Its address and the token that opens it.
    pub(crate) fn access(&self) -> (SocketAddr, String) {
        (self.address, self.token.clone())
    }

    /// Ends it.
    pub(crate) async fn end(mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        (&mut self.join).await.context("the control plane panicked")?.context("the control plane failed")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        // The thread is not joined here, because this may be a thread that serves others.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
