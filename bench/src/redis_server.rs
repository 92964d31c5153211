//! A `redis-server` of a bench's own, on a free port, with nothing on disk.

use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::process::{Process, Usage, free_port, installed};

/// It listens this long after its start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that ends with the bench.
#[derive(Debug)]
pub(crate) struct Redis {
    /// The process.
    pub(crate) process: Process,
    /// Its port.
    pub(crate) port: u16,
}

impl Redis {
    /// Starts one and waits until it takes connections.
    pub(crate) async fn start(directory: &Path) -> anyhow::Result<Self> {
        Self::start_on(free_port()?, directory).await
    }

    /// The same on a given port.
    pub(crate) async fn start_on(port: u16, directory: &Path) -> anyhow::Result<Self> {
        if !installed("redis-server") {
            bail!("redis-server is not installed: run `make tools`, or apt-get install redis-server");
        }
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
        command.args(["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]);
        let redis = Self { process: Process::start(&format!("redis-{port}"), command, directory)?, port };
        let listens = async {
            while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(START_TIMEOUT, listens).await.is_err() {
            bail!("redis-server does not listen on port {port}: {}", redis.process.log_tail());
        }
        Ok(redis)
    }

    /// Its address.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Asks it something whose answer is short.
    pub(crate) async fn command(&self, words: &[&str]) -> anyhow::Result<String> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        let answer: redis::Value = command.query_async(&mut connection).await?;
        Ok(match answer {
            redis::Value::Int(number) => number.to_string(),
            other => redis::from_redis_value(other)?,
        })
    }

    /// What it has used.
    pub(crate) fn usage(&self) -> Usage {
        self.process.usage()
    }
}
