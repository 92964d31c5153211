//! A gateway on real sockets in front of a scripted backend, and clients that do what no library would.

pub(crate) mod backend;
pub(crate) mod http1;
pub(crate) mod http2;

use std::net::SocketAddr;
use std::time::Duration;

use prost_types::Duration as Wire;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::Instant;
use weir_gateway::config::Config;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{Gateway, KEY, Resources, digest, gateway_with};
use weir_tests::process::Process;

use self::backend::Backend;

/// The longest wait for an effect that is promised at once; long, because the machine may be busy.
pub(crate) const SOON: Duration = Duration::from_secs(20);
/// Slots of the model `short`.
pub(crate) const SHORT_SLOTS: u32 = 4;
/// The total timeout of the model `short`.
pub(crate) const SHORT_TOTAL: Duration = Duration::from_secs(3);

/// A gateway and its backend.
#[derive(Debug)]
pub(crate) struct Lab {
    /// Where clients are served.
    pub(crate) clients: SocketAddr,
    /// Where operations are served.
    pub(crate) ops: SocketAddr,
    /// The backend.
    pub(crate) backend: Backend,
    /// The gateway's process, if it has one of its own.
    pub(crate) process: Option<Process>,
    _here: Option<Gateway>,
    _data: TempDir,
}

/// The model `m` has plenty of slots and time, `short` has four slots and three seconds. The tenant `acme` has
/// [`KEY`].
pub(crate) fn resources(backend: SocketAddr) -> Resources {
    let seconds = |seconds| Some(Wire { seconds, nanos: 0 });
    let mut resources = Resources::default();
    for (model, total, slots, wait) in
        [("m", 300, 10_000, 5), ("short", SHORT_TOTAL.as_secs().cast_signed(), SHORT_SLOTS, 1)]
    {
        let timeouts = v1::Timeouts { idle: seconds(total), total: seconds(total), ..Default::default() };
        let health = v1::HealthProfile { paid_probes_per_hour: Some(0), ..Default::default() };
        let pool = v1::PoolSpec {
            timeouts: Some(timeouts),
            health: Some(health),
            queue: Some(v1::Queue { max_wait: seconds(wait), ..Default::default() }),
            hedging: Some(v1::Hedging { disabled: true, ..Default::default() }),
            ..Default::default()
        };
        let server = v1::BackendSpec {
            pool: format!("{model}-pool"),
            url: format!("http://{backend}"),
            models: [(model.to_owned(), String::new())].into(),
            max_concurrency: Some(slots),
            ..Default::default()
        };
        resources
            .put(&format!("{model}-pool"), Spec::Pool(pool))
            .put(&format!("{model}-backend"), Spec::Backend(server))
            .put(model, Spec::Model(v1::ModelSpec { pool: format!("{model}-pool"), ..Default::default() }));
    }
    let known = v1::KeyDigest { sha256: digest(KEY), prefix: "weir_test".into(), expire_time: None };
    let key = v1::ApiKeySpec { tenant: "acme".into(), digests: vec![known], ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec::default())).put("acme-key", Spec::ApiKey(key));
    resources
}

impl Lab {
    /// A gateway in this process.
    pub(crate) async fn here() -> Self {
        Self::here_with(|_| {}).await
    }

    /// The same with settings of the test's own.
    pub(crate) async fn here_with(change: impl FnOnce(&mut Config)) -> Self {
        let backend = Backend::start().await;
        let gateway = gateway_with(&resources(backend.address), change).await;
        let (clients, ops) = (gateway.running.address, gateway.running.ops_address);
        let data = tempfile::tempdir().expect("a directory");
        Self { clients, ops, backend, process: None, _here: Some(gateway), _data: data }
    }

    /// A gateway as a process, whose memory and descriptors can be read.
    pub(crate) async fn process(args: &[&str]) -> Self {
        let backend = Backend::start().await;
        let data = tempfile::tempdir().expect("a directory");
        resources(backend.address).save(data.path());
        let own = [
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            "--control-plane=http://127.0.0.1:9",
            "--pre-stop=0s",
            "--data-dir",
            data.path().to_str().expect("UTF-8"),
        ];
        let process = Process::start("weir-gateway", &[&own[..], args].concat(), "serving").await;
        let address = |field| process.text(field).parse().expect("an address");
        let (clients, ops) = (address("clients"), address("ops"));
        Self { clients, ops, backend, process: Some(process), _here: None, _data: data }
    }

    /// A good client.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.clients, KEY)
    }

    /// A client of the operations port.
    pub(crate) fn operations(&self) -> Client {
        Client::new(self.ops, "")
    }

    /// The gateway's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().and_then(|process| process.child.id()).expect("it runs as a process")
    }

    /// Resident memory of the gateway's process.
    pub(crate) fn resident_kib(&self) -> u64 {
        resident_kib(self.pid())
    }

    /// The peak of resident memory of the gateway's process.
    pub(crate) fn peak_kib(&self) -> u64 {
        status_kib(self.pid(), "VmHWM:")
    }

    /// The value of a metric without labels, or with exactly these: `name{a="b"}`.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let page = self.operations().ask(http::Method::GET, "/metrics", "").await;
        let line = page.text().lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {}", page.text())).parse().expect("a number")
    }

    /// Sends a good client's request on a new connection, and asserts that it was served.
    pub(crate) async fn assert_served_within(&self, within: Duration, meanwhile: &str) {
        let began = Instant::now();
        let asked =
            tokio::time::timeout(SOON, http1::exchange(self.clients, http1::chat("m", "ok", true))).await;
        let took = began.elapsed();
        let heard =
            asked.unwrap_or_else(|_| panic!("a good client was not answered within {SOON:?}: {meanwhile}"));
        assert_eq!(heard.statuses(), [200], "a good client, {meanwhile}: {heard:?}");
        assert!(took <= within, "a good client was answered after {took:?}, {meanwhile}");
    }
}

/// Resident memory of a process.
pub(crate) fn resident_kib(pid: u32) -> u64 {
    status_kib(pid, "VmRSS:")
}

fn status_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix(field)).expect("the kernel says so");
    value.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// A connection with a small receive buffer, so that unread bytes stay with the peer.
pub(crate) async fn connect_narrow(address: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    socket.connect(address).await.expect("listens")
}

/// Connects, even if the listener's queue is full.
pub(crate) async fn connect(address: SocketAddr) -> TcpStream {
    let connecting = tokio::time::timeout(SOON, TcpStream::connect(address));
    let socket = connecting.await.expect("it listens").expect("a connection");
    socket.set_nodelay(true).expect("no delay");
    socket
}
