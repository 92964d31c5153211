//! Logs never stop a process: standard error without a reader, with a dead reader, or on a full disk.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Stdio;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::Config;
use tempfile::TempDir;
use tokio::process::Child;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use weir_proto::v1::ListResourcesRequest;
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Mock, Resources, mock};
use weir_tests::eventually;
use weir_tests::limits::Limits;
use weir_tests::process::{binary, command, command_of, signal};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;
const TOKEN: &str = "0123456789abcdef";
/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest time of an answer. A request that waits for the log waits for ever.
const ANSWER: Duration = Duration::from_secs(30);
/// Concurrent requests.
const AT_ONCE: usize = 20;

/// The fate of a log line.
#[derive(Debug, Clone, Copy)]
enum Log {
    /// A pipe that is open and that nobody reads.
    Stopped,
    /// A pipe without a reader.
    Closed,
    /// A full disk.
    Full,
}

impl Log {
    /// Standard error, and the handle that keeps it in this state.
    fn open(self) -> (Stdio, Option<PipeReader>) {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        match self {
            Self::Stopped => (writer.into(), Some(reader)),
            Self::Closed => (writer.into(), None),
            Self::Full => {
                let full = File::options().write(true).open("/dev/full").expect("/dev/full");
                (full.into(), None)
            }
        }
    }
}

/// An address that nothing else uses: a process whose log cannot be read cannot report its port.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    // Outgoing connections come from 127.0.0.1 and cannot take the port meanwhile.
    let own = Ipv4Addr::new(127, 64 + high, low, 1 + (std::process::id() % 250) as u8);
    let listener = TcpListener::bind((own, 0)).expect("a port");
    listener.local_addr().expect("an address")
}

/// The service of a process.
enum Serves {
    Chat(Client),
    Admin(AdminServiceClient<tonic::transport::Channel>),
    Limits(Limits),
}

impl Serves {
    /// One request, which must be answered.
    async fn ask(&self) {
        let answered = async {
            match self {
                Self::Chat(client) => {
                    let answer = client.chat(CHAT).await;
                    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
                }
                Self::Admin(client) => {
                    let mut list =
                        tonic::Request::new(ListResourcesRequest { kind: 1, ..Default::default() });
                    let token = format!("Bearer {TOKEN}").parse().expect("a header value");
                    list.metadata_mut().insert("authorization", token);
                    client.clone().list_resources(list).await.expect("an answer");
                }
                Self::Limits(limits) => {
                    limits.ask(&[("tenant", "acme")], 1).await;
                }
            }
        };
        timeout(ANSWER, answered).await.expect("a request waits for the log");
    }

    async fn ask_many(&self) {
        let mut asked = Vec::new();
        asked.resize_with(AT_ONCE, || self.ask());
        all_at_once(asked).await;
    }
}

/// All requests at once, in this task.
async fn all_at_once<F: Future<Output = ()>>(futures: Vec<F>) {
    let mut futures: Vec<_> = futures.into_iter().map(|future| Some(Box::pin(future))).collect();
    std::future::poll_fn(|context| {
        for slot in &mut futures {
            if slot.as_mut().is_some_and(|future| future.as_mut().poll(context).is_ready()) {
                *slot = None;
            }
        }
        match futures.iter().all(Option::is_none) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}

/// A process and the parts that it depends on.
struct Process {
    child: Child,
    serves: Serves,
    ops: SocketAddr,
    backends: CancellationToken,
    _log: Option<PipeReader>,
    _data: TempDir,
}

impl Process {
    async fn page(&self, path: &str) -> (StatusCode, String) {
        let asked = async {
            let answer = Client::new(self.ops, "").ask(Method::GET, path, "").await;
            (answer.status, answer.text().to_owned())
        };
        timeout(ANSWER, asked).await.expect("the operations port waits for the log")
    }

    async fn figure(&self, name: &str) -> Option<f64> {
        let (_, page) = self.page("/metrics").await;
        page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    async fn started(&self) {
        let ready = async {
            while tokio::net::TcpStream::connect(self.ops).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, ready).await.expect("it starts");
        eventually("ready", || async { self.page("/readyz").await.0 == StatusCode::OK }).await;
    }
}

fn gateway_args(data: &TempDir, clients: SocketAddr, ops: SocketAddr) -> Vec<String> {
    let data = data.path().to_str().expect("UTF-8");
    vec![
        format!("--listen={clients}"),
        format!("--ops-listen={ops}"),
        // The discard port: nothing listens there, and the copy on disk is served.
        "--control-plane=http://127.0.0.1:9".into(),
        format!("--data-dir={data}"),
        "--pre-stop=0s".into(),
    ]
}

/// A directory with the configuration of a gateway in front of one backend.
async fn gateway_data(backends: &CancellationToken) -> TempDir {
    let data = tempfile::tempdir().expect("a directory");
    let config = Config { models: vec!["gpt-4.1".into()], ..Config::default() };
    let backend: Mock = mock(config, backends).await;
    Resources::in_front_of(&[backend]).save(data.path());
    data
}

async fn gateway(log: Log) -> Process {
    let backends = CancellationToken::new();
    let data = gateway_data(&backends).await;
    let (clients, ops) = (free_address(), free_address());
    let (stderr, reader) = log.open();
    let mut command = command("weir-gateway");
    command.args(gateway_args(&data, clients, ops)).arg("--log=trace").stderr(stderr);
    let child = command.spawn().expect("starts");
    let serves = Serves::Chat(Client::new(clients, KEY));
    Process { child, serves, ops, backends, _log: reader, _data: data }
}

async fn control_plane(log: Log) -> Process {
    let data = tempfile::tempdir().expect("a directory");
    let (grpc, ops) = (free_address(), free_address());
    let (stderr, reader) = log.open();
    let mut command = command("weir-control-plane");
    command.args([format!("--listen={grpc}"), format!("--http-listen={ops}")]);
    command.args(["--store-in-memory", "--log=trace"]).env("WEIR_ADMIN_TOKEN", TOKEN).stderr(stderr);
    let child = command.spawn().expect("starts");
    let endpoint = tonic::transport::Channel::from_shared(format!("http://{grpc}")).expect("an address");
    let serves = Serves::Admin(AdminServiceClient::new(endpoint.connect_lazy()));
    Process { child, serves, ops, backends: CancellationToken::new(), _log: reader, _data: data }
}

async fn limit_service(log: Log) -> Process {
    let data = tempfile::tempdir().expect("a directory");
    let (grpc, ops) = (free_address(), free_address());
    let (stderr, reader) = log.open();
    let mut command = command("weir-ratelimit");
    command.args([format!("--listen={grpc}"), format!("--ops-listen={ops}")]);
    command.args(["--pre-stop=0s", "--log=trace"]).stderr(stderr);
    let child = command.spawn().expect("starts");
    let serves = Serves::Limits(Limits::new(&grpc.to_string()));
    Process { child, serves, ops, backends: CancellationToken::new(), _log: reader, _data: data }
}

async fn up(log: Log) -> Process {
    let (stderr, reader) = log.open();
    let mut command = command("weir");
    command.args(["up", "--listen=127.0.0.1:0", "--output=json", "--log=trace"]);
    let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("starts");
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().expect("piped")));
    let line = timeout(PATIENCE, lines.next_line()).await.expect("it starts").expect("readable");
    let line: serde_json::Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
    let address = |url: &serde_json::Value| {
        let url = url.as_str().and_then(|url| url.strip_prefix("http://")).expect("a URL");
        url.parse::<SocketAddr>().expect("an address")
    };
    let key = line["api_key"].as_str().expect("a key");
    Process {
        child,
        serves: Serves::Chat(Client::new(address(&line["gateways"][0]), key)),
        ops: address(&line["ops"][0]),
        backends: CancellationToken::new(),
        _log: reader,
        _data: tempfile::tempdir().expect("a directory"),
    }
}

/// The promise: the process starts, answers everything, is ready, counts lost lines, leaks nothing, and ends when
/// told.
async fn serves_all_the_same(mut process: Process) {
    process.started().await;
    let lost = "weir_log_lines_lost_total";
    let started = Instant::now();
    // A pipe and the queue take some thousand lines until the first is lost.
    while process.figure(lost).await.expect("it has the figure") == 0.0 {
        assert!(started.elapsed() < PATIENCE, "nothing was lost: is the log broken at all?");
        for _ in 0..5 {
            process.serves.ask_many().await;
        }
    }
    for _ in 0..10 {
        process.serves.ask_many().await;
        assert_eq!(process.page("/readyz").await.0, StatusCode::OK);
    }
    assert_eq!(process.figure("weir_panics_total").await, Some(0.0));
    if let Serves::Chat(client) = &mut process.serves {
        // A new process has no connections yet; those of the old one end with it.
        *client = Client::new(([127, 0, 0, 1], 9).into(), "");
        for gauge in ["weir_requests_in_flight", "weir_connections"] {
            eventually(&format!("{gauge} is 0 again"), || async { process.figure(gauge).await == Some(0.0) })
                .await;
        }
    }
    signal(&process.child, "-TERM").await;
    let ended = timeout(PATIENCE, process.child.wait()).await.expect("the end waits for the log");
    assert_eq!(ended.expect("it ends").code(), Some(0));
    process.backends.cancel();
}

macro_rules! rows {
    ($($name:ident: $process:ident, $log:ident;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            serves_all_the_same($process(Log::$log).await).await;
        }
    )*};
}

rows! {
    a_gateway_whose_log_nobody_reads_serves: gateway, Stopped;
    a_gateway_whose_log_reader_is_gone_serves: gateway, Closed;
    a_gateway_whose_log_disk_is_full_serves: gateway, Full;
    a_control_plane_whose_log_nobody_reads_serves: control_plane, Stopped;
    a_control_plane_whose_log_reader_is_gone_serves: control_plane, Closed;
    a_control_plane_whose_log_disk_is_full_serves: control_plane, Full;
    a_limit_service_whose_log_nobody_reads_serves: limit_service, Stopped;
    a_limit_service_whose_log_reader_is_gone_serves: limit_service, Closed;
    a_limit_service_whose_log_disk_is_full_serves: limit_service, Full;
    up_whose_log_nobody_reads_serves: up, Stopped;
    up_whose_log_reader_is_gone_serves: up, Closed;
    up_whose_log_disk_is_full_serves: up, Full;
}

/// The number in the report of lost lines, if there is one.
fn told(line: &str) -> Option<u64> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    (line["message"] == "log lines were lost").then(|| line["lost"].as_u64().expect("a number"))
}

/// The reader of a named pipe goes, for instance because a collector restarts, and another one comes.
#[tokio::test(flavor = "multi_thread")]
async fn lines_flow_again_when_a_new_reader_comes_and_say_how_many_were_lost() {
    let backends = CancellationToken::new();
    let data = gateway_data(&backends).await;
    let (clients, ops) = (free_address(), free_address());
    let pipe = data.path().join("log");
    let made = command_of("mkfifo").arg(&pipe).status().await.expect("mkfifo runs");
    assert!(made.success());
    // Opened for reading and writing, so that opening does not wait for the other end.
    let first = File::options().read(true).write(true).open(&pipe).expect("a reader");
    let log = File::options().write(true).open(&pipe).expect("the gateway's end");
    let mut command = command("weir-gateway");
    command.args(gateway_args(&data, clients, ops)).stderr(log);
    let child = command.spawn().expect("starts");
    drop(command);
    let client = Client::new(clients, KEY);
    let process = Process { child, serves: Serves::Chat(client), ops, backends, _log: None, _data: data };
    process.started().await;
    drop(first);
    for _ in 0..5 {
        process.serves.ask_many().await;
    }
    let lost = "weir_log_lines_lost_total";
    eventually("all lines are lost", || async { process.figure(lost).await >= Some(100.0) }).await;
    let again = tokio::task::spawn_blocking(move || {
        let mut lines = BufReader::new(File::open(&pipe).expect("another reader")).lines();
        let told = lines.find_map(|line| told(&line.expect("a line"))).expect("the log ended");
        // It stays open, so that nothing more is lost.
        (told, lines)
    });
    // The log reports losses without a request.
    let (told, _lines) = timeout(PATIENCE, again).await.expect("it tells").expect("no panic");
    assert_eq!(process.figure(lost).await, Some(told as f64));
    process.backends.cancel();
}

/// A log file has reached its maximum size, as on a full disk or over a quota, and then gets room again.
#[tokio::test(flavor = "multi_thread")]
async fn lines_flow_again_when_there_is_room_again_and_say_how_many_were_lost() {
    let backends = CancellationToken::new();
    let data = gateway_data(&backends).await;
    let (clients, ops) = (free_address(), free_address());
    let path = data.path().join("log");
    let file = File::options().create(true).append(true).open(&path).expect("a log file");
    let mut command = command_of("sh");
    // At most 8 blocks of 512 bytes, or of 1024 with some shells.
    command.args(["-c", "ulimit -S -f 8; exec \"$0\" \"$@\""]).arg(binary("weir-gateway"));
    command.args(gateway_args(&data, clients, ops)).stderr(file);
    let child = command.spawn().expect("starts");
    let client = Client::new(clients, KEY);
    let process = Process { child, serves: Serves::Chat(client), ops, backends, _log: None, _data: data };
    process.started().await;
    let lost = "weir_log_lines_lost_total";
    let full = Instant::now();
    while process.figure(lost).await.expect("it has the figure") == 0.0 {
        assert!(full.elapsed() < PATIENCE, "the file has no limit");
        process.serves.ask_many().await;
    }
    process.serves.ask_many().await;
    assert_eq!(process.page("/readyz").await.0, StatusCode::OK);
    // Lines are lost until there is room, so the file is full to its last byte.
    File::options().write(true).open(&path).and_then(|file| file.set_len(0)).expect("room");
    eventually("the log tells", || async {
        let text = std::fs::read_to_string(&path).expect("readable");
        text.lines().any(|line| told(line).is_some())
    })
    .await;
    process.serves.ask().await;
    eventually("requests are logged again", || async {
        let text = std::fs::read_to_string(&path).expect("readable");
        text.lines().skip_while(|line| told(line).is_none()).any(|line| line.contains("weir::request"))
    })
    .await;
    process.backends.cancel();
}

/// `weir up` continues and reports it if nobody reads its output.
#[tokio::test(flavor = "multi_thread")]
async fn up_runs_on_when_it_cannot_print() {
    let (_, gone) = std::io::pipe().expect("a pipe");
    let full = File::options().write(true).open("/dev/full").expect("/dev/full");
    for stdout in [Stdio::from(gone), Stdio::from(full)] {
        let (log, stderr) = std::io::pipe().expect("a pipe");
        let mut command = command("weir");
        command.args(["up", "--listen=127.0.0.1:0", "--log=info"]).stdout(stdout).stderr(stderr);
        let mut child = command.spawn().expect("starts");
        drop(command);
        let (mut clients, mut complained) = (None, false);
        let mut lines = BufReader::new(log).lines();
        while clients.is_none() || !complained {
            let line = lines.next().expect("it ended").expect("readable");
            let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            match line["message"].as_str() {
                Some("serving") => clients = line["clients"].as_str().map(str::to_owned),
                Some(text) => complained |= text.starts_with("addresses not printed"),
                None => {}
            }
        }
        let address = clients.and_then(|clients| clients.parse().ok()).expect("an address");
        let answer = Client::new(address, "").ask(Method::GET, "/v1/models", "").await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "it answers; the key was not printed");
        signal(&child, "-TERM").await;
        let ended = timeout(PATIENCE, child.wait()).await.expect("it ends");
        assert_eq!(ended.expect("it ends").code(), Some(0));
    }
}

/// The exit code of a process that cannot start does not depend on a reader of its output.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_setting_has_its_exit_code_whatever_becomes_of_the_log() {
    for log in [Log::Stopped, Log::Closed, Log::Full] {
        for (name, args, code) in [
            ("weir-gateway", &["--control-plane=nonsense://"][..], 64),
            ("weir-gateway", &["--log=a=b=c"], 2),
            ("weir-control-plane", &["--bootstrap=/nowhere/weir.yaml"], 64),
            ("weir-ratelimit", &["--log=a=b=c"], 64),
            ("weir", &["up", "--listen=127.0.0.1:0", "--config=/nowhere/weir.yaml"], 64),
            ("weir", &["list", "tenants", "--server=http://127.0.0.1:9"], 69),
        ] {
            let (stderr, _reader) = log.open();
            let mut command = command(name);
            command.args(args).stderr(stderr).stdout(Stdio::null());
            if name == "weir-gateway" {
                command.args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"]);
            }
            let ended = timeout(PATIENCE, command.status()).await.expect("it ends").expect("it runs");
            assert_eq!(ended.code(), Some(code), "{name} {args:?} with its log {log:?}");
        }
    }
}
