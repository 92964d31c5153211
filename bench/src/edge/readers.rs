//! Clients that take little or nothing from a backend that sends as fast as it can.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, sleep};

use super::{Aside, EdgeArgs, SLOTS, connect_narrow, http2, metric};
use crate::load::{self, Connection, micros};
use crate::report::{Row, progress};
use crate::resources::{KEY, Resources};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};

/// The number of streams.
const STREAMS: u32 = 2000;
/// Streams per connection of HTTP/2.
const STREAMS_PER_CONNECTION: u32 = 20;
/// Bytes per second that slow readers take of each stream.
const READ_BYTES_PER_S: u32 = 2048;
/// The kernel's buffer for a client of HTTP/1, and of HTTP/2.
const RECEIVE_BYTES: [u32; 2] = [16 << 10, 32 << 10];
/// The kernel's buffer for the backend on each connection; unread bytes would otherwise take gigabytes.
const SEND_BYTES: u32 = 32 << 10;
/// The pause between opening two connections.
const OPEN_EVERY: Duration = Duration::from_millis(2);
/// A client that reads nothing is cut after 50 s (HTTP/2, for its unanswered pings) or 60 s, without noticing. It
/// reconnects before that, so that all streams exist all the time.
const LIFE: Duration = Duration::from_secs(40);
/// Measurements of a quiet gateway, before and after.
const QUIET: Duration = Duration::from_secs(6);
/// The pause between two requests of the other client.
const PAUSE: Duration = Duration::from_millis(5);
/// Tokens of its answers.
const TOKENS: u64 = 16;
/// The promised memory: in all, and for each stream.
const BASE_MIB: f64 = 64.0;
const STREAM_KIB: f64 = 128.0;
/// The interval of memory readings.
const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// The time for all streams to open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// The content of an event, and the events per write.
const EVENT_BYTES: usize = 1000;
const EVENTS_AT_ONCE: usize = 16;

/// The models: one pours, one answers at once.
const POURS: &str = "pours";
const QUICK: &str = "quick";

/// The protocol of clients.
#[derive(Debug, Clone, Copy)]
enum Protocol {
    Http1,
    /// HTTP/2 with this window for each stream.
    Http2(u32),
}

#[derive(Debug, Clone, Copy)]
struct Scenario {
    name: &'static str,
    protocol: Protocol,
    reads: bool,
}

const SCENARIOS: [Scenario; 6] = [
    Scenario { name: "HTTP/1, read nothing", protocol: Protocol::Http1, reads: false },
    Scenario { name: "HTTP/1, 2 KB/s", protocol: Protocol::Http1, reads: true },
    Scenario {
        name: "HTTP/2, read nothing, windows of 64 KiB",
        protocol: Protocol::Http2(65_535),
        reads: false,
    },
    Scenario {
        name: "HTTP/2, read nothing, largest windows",
        protocol: Protocol::Http2(http2::WINDOW_MAX),
        reads: false,
    },
    Scenario {
        name: "HTTP/2, 2 KB/s, windows of 2 KiB",
        protocol: Protocol::Http2(READ_BYTES_PER_S),
        reads: true,
    },
    Scenario {
        name: "HTTP/2, 2 KB/s, largest windows",
        protocol: Protocol::Http2(http2::WINDOW_MAX),
        reads: true,
    },
];

/// Runs all scenarios.
pub(super) async fn run(args: &EdgeArgs, notes: &mut Vec<String>) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for scenario in SCENARIOS.iter().filter(|s| s.name.contains(&args.only)) {
        progress(&format!("edge: readers: {}, {} s", scenario.name, args.readers_s));
        let directory = tempfile::tempdir()?;
        rows.push(measure(*scenario, Duration::from_secs(args.readers_s), directory.path()).await?);
    }
    notes.push(format!(
        "readers: {STREAMS} streams ({STREAMS_PER_CONNECTION} on each connection of HTTP/2); who reads nothing comes again \
         after {} s, before the gateway cuts it; the bound is {BASE_MIB} MiB and {STREAM_KIB} KiB for each stream; \
         quiet: the same gateway before and after; the other client asks for one answer after the other, every second \
         one streamed; all processes share the machine's cores",
        LIFE.as_secs()
    ));
    Ok(rows)
}

/// The memory of a gateway over time, MiB.
#[derive(Debug, Default)]
struct Memory {
    most: f64,
    end: f64,
}

async fn measure(scenario: Scenario, length: Duration, directory: &Path) -> anyhow::Result<Row> {
    let aside = Aside::start()?;
    let listener = TcpSocket::new_v4()?;
    listener.set_send_buffer_size(SEND_BYTES)?;
    listener.bind(([127, 0, 0, 1], 0).into())?;
    let listener = listener.listen(STREAMS)?.into_std()?;
    let poured = Arc::<AtomicU64>::default();
    let pours = listener.local_addr()?;
    aside.spawn(backend(listener, poured.clone()));
    let quick = Mock::start(
        "quick",
        &MockArgs { model: QUICK.into(), slots: SLOTS, ..MockArgs::default() },
        directory,
    )
    .await?;
    let mut resources = Resources::basic();
    resources.model_at(POURS, pours).model_at(QUICK, quick.address);
    let args = GatewayArgs { id: "gateway".into(), ..GatewayArgs::default() };
    let gateway = Gateway::start(&args, &resources, directory).await?;
    let mut quiet = Other::default();
    // The first run warms up and is not compared.
    Other::default().ask(gateway.address, Duration::from_secs(1)).await;
    quiet.ask(gateway.address, QUIET).await;
    let idle_mib = gateway.process.usage().rss_mib;

    let clients = Aside::start()?;
    clients.spawn(open(scenario, gateway.address));
    wait_for_streams(gateway.ops).await?;
    let mut other = Other::default();
    let mut memory = Memory::default();
    let (began, filled) = (Instant::now(), poured.load(Ordering::Relaxed));
    tokio::select! {
        () = other.ask(gateway.address, length) => {}
        () = sample(&gateway, &mut memory) => {}
    }
    let poured_mib = (poured.load(Ordering::Relaxed) - filled) as f64 / 1048576.0;
    let poured_per_s = poured_mib / began.elapsed().as_secs_f64();
    memory.most = memory.most.max(gateway.process.usage().peak_rss_mib);
    let streams = metric(gateway.ops, "weir_requests_in_flight").await?;
    drop(clients);
    // Cut streams end at once. Those that the gateway still writes to are noticed at the next write.
    let free = async {
        while metric(gateway.ops, "weir_requests_in_flight").await.unwrap_or(0.0) > 0.0 {
            sleep(SAMPLE_EVERY).await;
        }
    };
    let _ = tokio::time::timeout(OPEN_TIMEOUT, free).await;
    quiet.ask(gateway.address, QUIET).await;
    let bound = BASE_MIB + f64::from(STREAMS) * STREAM_KIB / 1024.0;
    let p99 = |of: &Other| of.waits.value_at_percentile(99.0) as f64 / 1000.0;
    Ok(Row::default()
        .text("clients", scenario.name)
        .figure("streams_at_end", streams, 0)
        .figure("idle_rss_mib", idle_mib, 1)
        .figure("most_rss_mib", memory.most, 1)
        .figure("end_rss_mib", memory.end, 1)
        .figure("bound_mib", bound, 0)
        .figure("poured_mib_per_s", poured_per_s, 1)
        .figure("quiet_p99_ms", p99(&quiet), 2)
        .figure("p99_ms", p99(&other), 2)
        .figure("ratio", p99(&other) / p99(&quiet), 2)
        .count("failed", other.failed + quiet.failed))
}

async fn wait_for_streams(ops: SocketAddr) -> anyhow::Result<()> {
    let there = async {
        while metric(ops, "weir_requests_in_flight").await? < f64::from(STREAMS) {
            sleep(SAMPLE_EVERY).await;
        }
        anyhow::Ok(())
    };
    match tokio::time::timeout(OPEN_TIMEOUT, there).await {
        Ok(there) => there,
        Err(_) => {
            let open = metric(ops, "weir_requests_in_flight").await?;
            anyhow::bail!("only {open} of {STREAMS} streams are open after {OPEN_TIMEOUT:?}")
        }
    }
}

async fn sample(gateway: &Gateway, memory: &mut Memory) {
    loop {
        memory.end = gateway.process.usage().rss_mib;
        memory.most = memory.most.max(memory.end);
        sleep(SAMPLE_EVERY).await;
    }
}

/// Another client, which asks the same gateway for short answers.
#[derive(Debug)]
struct Other {
    waits: Histogram<u64>,
    failed: u64,
}

impl Default for Other {
    fn default() -> Self {
        Self { waits: load::latencies(), failed: 0 }
    }
}

impl Other {
    async fn ask(&mut self, address: SocketAddr, length: Duration) {
        let requests = [false, true].map(|stream| load::chat(KEY, QUICK, TOKENS, stream));
        let mut connection: Option<Connection> = None;
        let until = Instant::now() + length;
        for request in requests.iter().cycle() {
            let sent = Instant::now();
            if sent >= until {
                return;
            }
            match load::call(&mut connection, address, request).await {
                Ok(answer) if answer.is_ok() => self.waits.saturating_record(micros(sent.elapsed())),
                _ => self.failed += 1,
            }
            sleep(PAUSE).await;
        }
    }
}

/// Opens all clients of a scenario, and reconnects those that were cut.
async fn open(scenario: Scenario, address: SocketAddr) {
    let (connections, streams) = match scenario.protocol {
        Protocol::Http1 => (STREAMS, 1),
        Protocol::Http2(_) => (STREAMS / STREAMS_PER_CONNECTION, STREAMS_PER_CONNECTION),
    };
    for n in 0..connections {
        // Clients do not all reconnect at once.
        let life = LIFE + OPEN_EVERY * n * 4;
        tokio::spawn(async move {
            loop {
                // However a client ends, another one follows.
                let _ = client(scenario, address, streams, life).await;
                sleep(OPEN_EVERY).await;
            }
        });
        sleep(OPEN_EVERY * streams).await;
    }
}

async fn client(
    scenario: Scenario,
    address: SocketAddr,
    streams: u32,
    life: Duration,
) -> std::io::Result<()> {
    let until = Instant::now() + life;
    let mut socket = match scenario.protocol {
        Protocol::Http1 => {
            let mut socket = connect_narrow(address, RECEIVE_BYTES[0]).await?;
            // Longer than any scenario.
            socket.write_all(&load::chat(KEY, POURS, 1_000_000, true)).await?;
            socket
        }
        Protocol::Http2(window) => {
            let mut socket = connect_narrow(address, RECEIVE_BYTES[1]).await?;
            let body = format!(
                r#"{{"model":"{POURS}","stream":true,"messages":[{{"role":"user","content":"pour"}}]}}"#
            );
            http2::begin(&mut socket, window, streams, KEY, &body).await?;
            socket
        }
    };
    if !scenario.reads {
        tokio::time::sleep_until(until).await;
        return Ok(());
    }
    read_slowly(&mut socket, scenario.protocol, streams).await
}

/// Reads its share each second until the server ends the connection.
async fn read_slowly(socket: &mut TcpStream, protocol: Protocol, streams: u32) -> std::io::Result<()> {
    let mut buffer = vec![0; READ_BYTES_PER_S as usize];
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let (mut pings, mut pongs) = (http2::Pings::default(), Vec::new());
    let mut more = Vec::new();
    if matches!(protocol, Protocol::Http2(window) if window < http2::WINDOW_MAX) {
        for stream in http2::streams(streams) {
            http2::window_update(&mut more, stream, READ_BYTES_PER_S);
        }
    }
    loop {
        tick.tick().await;
        socket.write_all(&more).await?;
        let second = Instant::now() + Duration::from_millis(900);
        let mut left = (READ_BYTES_PER_S * streams) as usize;
        while left > 0 {
            let room = left.min(buffer.len());
            match tokio::time::timeout_at(second, socket.read(&mut buffer[..room])).await {
                Ok(Ok(0)) => return Ok(()),
                Ok(read) => {
                    let read = read?;
                    left -= read;
                    if matches!(protocol, Protocol::Http2(_)) {
                        pings.read(&buffer[..read], &mut pongs);
                    }
                }
                Err(_) => break,
            }
        }
        socket.write_all(&std::mem::take(&mut pongs)).await?;
    }
}

/// A backend that sends as fast as its bytes are taken.
async fn backend(listener: std::net::TcpListener, poured: Arc<AtomicU64>) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let event = format!(
        "data: {{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"{POURS}\",\
         \"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{}\"}},\"finish_reason\":null}}]}}\n\n",
        "a".repeat(EVENT_BYTES)
    );
    let burst = event.repeat(EVENTS_AT_ONCE);
    let burst = Bytes::from(format!("{:x}\r\n{burst}\r\n", burst.len()));
    loop {
        let Ok((socket, _)) = listener.accept().await else { return };
        let (burst, poured) = (burst.clone(), poured.clone());
        // Ends when the gateway closes.
        tokio::spawn(async move { drop(pour(socket, &burst, &poured).await) });
    }
}

async fn pour(mut socket: TcpStream, burst: &[u8], poured: &AtomicU64) -> std::io::Result<()> {
    let mut have = Vec::new();
    loop {
        let body = loop {
            if let Some(end) = have.windows(4).position(|w| w == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&have[..end]).to_ascii_lowercase();
                let length =
                    head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
                let whole = end + 4 + length.unwrap_or(0_usize);
                if have.len() >= whole {
                    have.drain(..whole);
                    break !head.starts_with("get ");
                }
            }
            if socket.read_buf(&mut have).await? == 0 {
                return Ok(());
            }
        };
        if body {
            break;
        }
        let list = format!(r#"{{"object":"list","data":[{{"id":"{POURS}"}}]}}"#);
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{list}",
            list.len()
        );
        socket.write_all(head.as_bytes()).await?;
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await?;
    loop {
        socket.write_all(burst).await?;
        poured.fetch_add(burst.len() as u64, Ordering::Relaxed);
    }
}
