//! The cost of strangers, slow clients and a broken log, and the service that others get meanwhile.
//!
//! * [`readers`]: clients that take little or nothing of what a backend sends as fast as it can;
//! * [`silent`]: thousands of connections without a request, on each port of each process;
//! * [`logs`]: a full disk, a stopped reader and no reader behind standard error.
//!
//! Strangers and the pouring backend have a runtime of their own ([`Aside`]), so that they delay the measured parts
//! only by the CPU time they take.

mod http2;
mod logs;
mod readers;
mod services;
mod silent;

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::net::{TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};

use crate::report::Report;
use crate::roles::fetch;

/// Concurrent answers of a simulated server, above any need.
const SLOTS: usize = 10_000;

/// The arguments of `edge`. Without `--readers`, `--silent` or `--logs` all three run.
#[derive(Debug, Args)]
pub(crate) struct EdgeArgs {
    /// Clients that read nothing or 2 KB/s
    #[arg(long)]
    readers: bool,
    /// Silent, trickling and half-open connections on each port
    #[arg(long)]
    silent: bool,
    /// A log that cannot be written
    #[arg(long)]
    logs: bool,
    /// Seconds of each scenario of --readers
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(5..=600), value_name = "SECONDS")]
    readers_s: u64,
    /// Seconds for which the strangers of --silent come again
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(2..=120), value_name = "SECONDS")]
    silent_s: u64,
    /// Seconds of each log of --logs
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(2..=120), value_name = "SECONDS")]
    logs_s: u64,
    /// Every kind of stranger from one address and from many; in turns otherwise
    #[arg(long)]
    whole: bool,
    /// Only ports and scenarios whose name has this in it
    #[arg(long, default_value = "", value_name = "TEXT")]
    only: String,
}

/// Runs the bench.
pub(crate) async fn run(args: &EdgeArgs) -> anyhow::Result<Report> {
    let machine = crate::machine::describe();
    let all = !(args.readers || args.silent || args.logs);
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    if all || args.readers {
        rows.extend(readers::run(args, &mut notes).await?);
    }
    if all || args.silent {
        rows.extend(silent::run(args, &mut notes).await?);
    }
    if all || args.logs {
        rows.extend(logs::run(args, &mut notes).await?);
    }
    Ok(Report { bench: "edge", machine, rows, notes })
}

/// A runtime on a thread of its own. Dropping this ends its tasks.
#[derive(Debug)]
struct Aside(Option<Runtime>);

impl Aside {
    fn start() -> anyhow::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Ok(Self(Some(runtime.context("a runtime")?)))
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(runtime) = &self.0 {
            runtime.spawn(task);
        }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            // A runtime must not be waited for inside another one.
            runtime.shutdown_background();
        }
    }
}

/// Connects from this address with a small receive buffer: unread bytes stay with the server.
async fn connect_narrow(address: SocketAddr, receive_bytes: u32) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(receive_bytes)?;
    socket.connect(address).await
}

/// A figure of a process, by the start of its line.
async fn metric(ops: SocketAddr, name: &str) -> anyhow::Result<f64> {
    let page = fetch(ops, "/metrics").await?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.with_context(|| format!("no figure {name} at {ops}"))
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
