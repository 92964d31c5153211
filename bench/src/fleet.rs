//! A control plane inside the bench: its work is small, and what is measured runs in processes of its own.

use std::net::SocketAddr;

use anyhow::Context as _;
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
        let running = weir_control_plane::ControlPlane::start(config, shutdown.clone()).await?;
        let token = running.admin_token.expose().to_owned();
        Ok(Self { address: running.grpc_addr, token, shutdown, join: running.join })
    }

    /// Its address and the token that opens it.
    pub(crate) fn access(&self) -> (SocketAddr, String) {
        (self.address, self.token.clone())
    }

    /// Ends it.
    pub(crate) async fn end(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        self.join.await.context("the control plane panicked")?.context("the control plane failed")
    }
}
