//! A `redis-server` of a bench's own, on a free port.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use redis::FromRedisValue;
use tokio::process::Command;

use crate::process::{Process, Usage, free_port, installed};

/// It must answer within this time.
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
    /// Starts a server without data and waits until it answers.
    pub(crate) async fn start(directory: &Path) -> anyhow::Result<Self> {
        Self::start_on(free_port()?, directory).await
    }

    /// The same on a given port.
    pub(crate) async fn start_on(port: u16, directory: &Path) -> anyhow::Result<Self> {
        Self::start_with(port, directory, &[]).await
    }

    /// The same with additional settings.
    pub(crate) async fn start_with(port: u16, directory: &Path, settings: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new("redis-server");
        command.args(["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]);
        command.args(settings);
        Self::run(port, command, directory).await
    }

    /// A Sentinel, by its configuration file.
    pub(crate) async fn start_sentinel(file: &Path, directory: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new("redis-server");
        command.arg(file).arg("--sentinel");
        Self::run(free_port()?, command, directory).await
    }

    async fn run(port: u16, mut command: Command, directory: &Path) -> anyhow::Result<Self> {
        if !installed("redis-server") {
            bail!("redis-server is not installed: run `make tools`, or apt-get install redis-server");
        }
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
        let redis = Self { process: Process::start(&format!("redis-{port}"), command, directory)?, port };
        let answers = async {
            while redis.ask::<String>(&["PING"]).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if tokio::time::timeout(START_TIMEOUT, answers).await.is_err() {
            bail!("redis-server does not answer on port {port}: {}", redis.process.log_tail());
        }
        Ok(redis)
    }

    /// Its host and port.
    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its address.
    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.host())
    }

    /// Sends a command on a connection of its own and returns the reply.
    pub(crate) async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> anyhow::Result<T> {
        let client = redis::Client::open(self.url())?;
        let mut connection = client.get_multiplexed_async_connection().await?;
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(word);
        }
        command.query_async(&mut connection).await.with_context(|| format!("{} {words:?}", self.host()))
    }

    /// Tells it to do something.
    pub(crate) async fn tell(&self, words: &[&str]) -> anyhow::Result<()> {
        self.ask::<redis::Value>(words).await.map(drop)
    }

    /// The resources that it used.
    pub(crate) fn usage(&self) -> Usage {
        self.process.usage()
    }
}
