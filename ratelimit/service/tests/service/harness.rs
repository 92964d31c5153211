//! Limit services of a test's own, spoken to as others do: by gRPC over TCP.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use weir_proto::v1::limit_service_client::LimitServiceClient;
use weir_ratelimit_service::{Config, Running, start};

/// A service that ends with the test.
pub(crate) struct Service {
    pub(crate) channel: Channel,
    pub(crate) running: Option<Running>,
    pub(crate) shutdown: CancellationToken,
}

/// Settings for a test: any port, no pause at the end.
pub(crate) fn config(redis: Option<&Redis>) -> Config {
    Config {
        listen: ([127, 0, 0, 1], 0).into(),
        ops_listen: ([127, 0, 0, 1], 0).into(),
        redis: redis.map(Redis::url),
        pre_stop: Duration::ZERO,
        ..Config::default()
    }
}

impl Service {
    /// Starts one; returns before its store has answered.
    pub(crate) async fn start(config: Config) -> Self {
        let shutdown = CancellationToken::new();
        let running = start(config, None, shutdown.clone(), CancellationToken::new())
            .await
            .expect("the service starts");
        let endpoint = Channel::from_shared(format!("http://{}", running.address)).expect("an address");
        Self { channel: endpoint.connect_lazy(), running: Some(running), shutdown }
    }

    /// Starts one and waits until it is ready.
    pub(crate) async fn ready(config: Config) -> Self {
        let service = Self::start(config).await;
        eventually("ready", || async { service.page("/readyz").await.starts_with("HTTP/1.1 200") }).await;
        service
    }

    pub(crate) fn native(&self) -> LimitServiceClient<Channel> {
        LimitServiceClient::new(self.channel.clone())
    }

    /// A page of the operations port, head and body.
    pub(crate) async fn page(&self, path: &str) -> String {
        let address = self.running.as_ref().expect("running").ops_address;
        let mut stream = TcpStream::connect(address).await.expect("the operations port");
        let request = format!("GET {path} HTTP/1.1\r\nhost: ops\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        answer
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Asks until the answer is yes.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let asked = tokio::time::timeout(Duration::from_secs(30), async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(asked.await.is_ok(), "never: {what}");
}

/// A Redis of the test's own, gone with it.
pub(crate) struct Redis {
    child: Child,
    port: u16,
}

impl Redis {
    pub(crate) async fn start() -> Self {
        // The port may be taken between choosing and binding: then the server exits, and another is chosen.
        for _ in 0..20 {
            let mut redis = Self::at(free_port());
            while redis.child.try_wait().expect("child").is_none() {
                if TcpStream::connect(("127.0.0.1", redis.port)).await.is_ok() {
                    return redis;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        panic!("redis-server did not start");
    }

    /// One that may not listen yet.
    pub(crate) fn at(port: u16) -> Self {
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("these tests need a Redis server: apt-get install redis-server");
        Self { child, port }
    }

    /// Stops it with -STOP, lets it go on with -CONT.
    pub(crate) fn signal(&self, signal: &str) {
        let sent =
            Command::new("kill").args([signal, &self.child.id().to_string()]).status().expect("kill runs");
        assert!(sent.success());
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}
