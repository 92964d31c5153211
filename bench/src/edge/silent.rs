//! Thousands of connections without a request, on each port of each process in turn.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, sleep, timeout};

use super::services::Service;
use super::{Aside, EdgeArgs, SLOTS, http2, metric, ms};
use crate::load::{self, micros};
use crate::process::Process;
use crate::report::{Row, progress};
use crate::resources::{KEY, Resources};
use crate::roles::{ControlPlaneProcess, Gateway, GatewayArgs, LimitService, Logging, Mock, MockArgs};

/// The number of connections that strangers try to keep open.
const STRANGERS: usize = 10_000;
/// Connections that are opened at a time, and the pause: at most 5000 per second.
const CONNECTS_AT_ONCE: usize = 50;
const CONNECT_EVERY: Duration = Duration::from_millis(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The interval of bytes of a trickling connection.
const TRICKLE_EVERY: Duration = Duration::from_secs(1);
/// The interval of good clients.
const ASK_EVERY: Duration = Duration::from_millis(100);
/// Everything must be as before this long after the strangers.
const BACK: Duration = Duration::from_secs(15);
/// The number of addresses of strangers that come from many, from 127.64.0.0 on.
const ADDRESSES: u32 = 10_000;

/// A record of a TLS handshake that announces 512 bytes and has six.
const HALF_HELLO: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
const HALF_HEAD: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ";

/// The behaviour of a stranger.
#[derive(Debug, Clone, Copy)]
struct Kind {
    name: &'static str,
    says: &'static [u8],
    trickles: bool,
}

/// On ports with TLS and without.
fn kinds(tls: bool) -> [Kind; 3] {
    let begins = if tls { HALF_HELLO } else { HALF_HEAD };
    let half = if tls { HALF_HELLO } else { &http2::PREFACE[..15] };
    [
        Kind { name: "silent", says: b"", trickles: false },
        Kind { name: "a byte each second", says: begins, trickles: true },
        Kind { name: "half open", says: half, trickles: false },
    ]
}

/// A port under attack.
struct Port<'a> {
    name: &'static str,
    /// Its label in the metrics of its process.
    listener: &'static str,
    address: SocketAddr,
    ops: SocketAddr,
    process: &'a Process,
    good: Service,
}

/// The processes whose ports are attacked.
struct Scene {
    gateway: Gateway,
    secured: Gateway,
    control_plane: ControlPlaneProcess,
    limits: LimitService,
    /// A TLS client that trusts the certificate of `secured`.
    tls: Arc<rustls::ClientConfig>,
    _quick: Mock,
    _directory: tempfile::TempDir,
}

impl Scene {
    async fn start() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let quick = Mock::start(
            "quick",
            &MockArgs { model: "quick".into(), slots: SLOTS, ..MockArgs::default() },
            directory.path(),
        )
        .await?;
        let mut resources = Resources::basic();
        resources.model_at("quick", quick.address);
        let (flags, tls) = certificate(directory.path())?;
        let plain = GatewayArgs { id: "gateway".into(), ..GatewayArgs::default() };
        let secured = GatewayArgs { id: "tls-gateway".into(), flags, ..GatewayArgs::default() };
        let gateway = Gateway::start(&plain, &resources, directory.path()).await?;
        let secured = Gateway::start(&secured, &resources, directory.path()).await?;
        let control_plane = ControlPlaneProcess::start(None, directory.path()).await?;
        let limits = LimitService::start(directory.path(), &Logging::default()).await?;
        Ok(Self { gateway, secured, control_plane, limits, tls, _quick: quick, _directory: directory })
    }

    fn ports(&self) -> [Port<'_>; 7] {
        let Self { gateway, secured, control_plane: plane, limits, tls, .. } = self;
        let chat = load::chat(KEY, "quick", 2, false);
        let page = |address, path| Service::Http(address, load::get(path, ""));
        let last =
            String::from_utf8_lossy(&chat).replacen("host: bench", "host: bench\r\nconnection: close", 1);
        [
            Port {
                name: "gateway, clients",
                listener: "clients",
                address: gateway.address,
                ops: gateway.ops,
                process: &gateway.process,
                good: Service::Http(gateway.address, chat),
            },
            Port {
                name: "gateway, clients over TLS",
                listener: "clients",
                address: secured.address,
                ops: secured.ops,
                process: &secured.process,
                good: Service::Tls(secured.address, last.into_bytes().into(), Arc::clone(tls)),
            },
            Port {
                name: "gateway, operations",
                listener: "ops",
                address: gateway.ops,
                ops: gateway.ops,
                process: &gateway.process,
                good: page(gateway.ops, "/readyz"),
            },
            Port {
                name: "control plane, gRPC",
                listener: "grpc",
                address: plane.grpc,
                ops: plane.http,
                process: &plane.process,
                good: Service::List(plane.grpc, plane.token.clone()),
            },
            Port {
                name: "control plane, page",
                listener: "http",
                address: plane.http,
                ops: plane.http,
                process: &plane.process,
                good: page(plane.http, "/readyz"),
            },
            Port {
                name: "limit service, gRPC",
                listener: "grpc",
                address: limits.grpc,
                ops: limits.ops,
                process: &limits.process,
                good: Service::Limit(limits.grpc),
            },
            Port {
                name: "limit service, operations",
                listener: "ops",
                address: limits.ops,
                ops: limits.ops,
                process: &limits.process,
                good: page(limits.ops, "/readyz"),
            },
        ]
    }
}

/// Runs every kind on every port.
pub(super) async fn run(args: &EdgeArgs, notes: &mut Vec<String>) -> anyhow::Result<Vec<Row>> {
    let scene = Scene::start().await?;
    let ports = scene.ports();
    let length = Duration::from_secs(args.silent_s);
    let mut rows = Vec::new();
    for (p, port) in ports.iter().enumerate().filter(|(_, port)| port.name.contains(&args.only)) {
        for (k, kind) in kinds(port.name.contains("TLS")).into_iter().enumerate() {
            for many in [false, true] {
                if args.whole || many == ((p + k) % 2 == 1) {
                    let from = if many { "many addresses" } else { "one address" };
                    progress(&format!("edge: silent: {}: {}, {from}", port.name, kind.name));
                    rows.push(attack(port, kind, many, length, notes).await?);
                }
            }
        }
    }
    notes.push(format!(
        "silent: strangers keep {STRANGERS} connections open where they are let, and connect anew when one is closed, at most \
         {} a second, for {} s; most: that were open at once; a good client connects and asks each {ASK_EVERY:?}, and its \
         time counts from there; back: until the listener has as many connections as before (at most {BACK:?}); memory: \
         the most beside before, and what is left {BACK:?} after the strangers at most",
        CONNECTS_AT_ONCE as u128 * (1000 / CONNECT_EVERY.as_millis()),
        args.silent_s
    ));
    Ok(rows)
}

/// Flags of a gateway that has a certificate, and a client that trusts it.
fn certificate(directory: &Path) -> anyhow::Result<(Vec<String>, Arc<rustls::ClientConfig>)> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    let (certificate, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let flags = [("--tls-cert", &certificate), ("--tls-key", &key)];
    let flags =
        flags.iter().flat_map(|(flag, path)| [(*flag).to_owned(), path.display().to_string()]).collect();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client =
        rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok((flags, Arc::new(client.with_root_certificates(roots).with_no_client_auth())))
}

/// The results of the strangers.
#[derive(Debug, Default)]
struct Counts {
    open: AtomicU64,
    most: AtomicU64,
    opened: AtomicU64,
}

/// The results of the good clients.
struct Good {
    waits: Histogram<u64>,
    asked: u64,
    failed: u64,
    first_failure: Option<String>,
}

async fn attack(
    port: &Port<'_>,
    kind: Kind,
    many: bool,
    length: Duration,
    notes: &mut Vec<String>,
) -> anyhow::Result<Row> {
    let figure = format!("weir_listener_connections{{listener=\"{}\"}}", port.listener);
    // The connection that reads the metric counts, if it is one of this port.
    // A listener without any connection so far has no metric.
    let before = metric(port.ops, &figure).await.unwrap_or(0.0);
    let rss = || port.process.usage().rss_mib;
    let rss_before = rss();
    let aside = Aside::start()?;
    let counts = Arc::<Counts>::default();
    aside.spawn(strangers(port.address, kind, many, counts.clone()));
    let mut rss_most = rss_before;
    let good = tokio::select! {
        good = ask(&port.good, length) => good,
        () = async {
            loop {
                rss_most = rss_most.max(rss());
                sleep(ASK_EVERY).await;
            }
        } => unreachable!("it goes on"),
    };
    drop(aside);
    let gone = Instant::now();
    let mut back = None;
    while back.is_none() && gone.elapsed() < BACK {
        match timeout(BACK, metric(port.ops, &figure)).await {
            Ok(Ok(now)) if now <= before => back = Some(gone.elapsed()),
            _ => sleep(ASK_EVERY).await,
        }
    }
    let from = if many { "many" } else { "one" };
    let mut failed = good.failed;
    let mut why = good.first_failure;
    if let Err(error) = port.good.ask().await {
        failed += 1;
        why = why.or(Some(format!("afterwards: {error}")));
    }
    if let Some(why) = why {
        notes.push(format!("{}, {}, {from}: first failure: {why}", port.name, kind.name));
    }
    let max = |percent| good.waits.value_at_percentile(percent) as f64 / 1000.0;
    Ok(Row::default()
        .text("port", port.name)
        .text("strangers", kind.name)
        .text("from", from)
        .count("most", counts.most.load(Ordering::Relaxed))
        .count("opened", counts.opened.load(Ordering::Relaxed))
        .count("asked", good.asked)
        .count("failed", failed)
        .figure("slowest_ms", max(100.0), 1)
        .figure("back_s", back.map(|back| ms(back) / 1000.0), 2)
        .figure("most_mib", rss_most - rss_before, 1)
        .figure("left_mib", rss() - rss_before, 1))
}

/// Good clients at a fixed interval, whether or not earlier ones were answered.
async fn ask(service: &Service, length: Duration) -> Good {
    let mut good = Good { waits: load::latencies(), asked: 0, failed: 0, first_failure: None };
    let until = Instant::now() + length;
    let mut tick = tokio::time::interval(ASK_EVERY);
    let mut asking = JoinSet::new();
    loop {
        let due = tick.tick().await;
        if due >= until {
            break;
        }
        good.asked += 1;
        let service = service.clone();
        asking.spawn(async move {
            let sent = Instant::now();
            (service.ask().await, sent.elapsed())
        });
    }
    while let Some(asked) = asking.join_next().await {
        match asked {
            Ok((Ok(()), took)) => good.waits.saturating_record(micros(took)),
            Ok((Err(error), _)) => {
                good.failed += 1;
                good.first_failure.get_or_insert(error);
            }
            Err(_) => good.failed += 1,
        }
    }
    good
}

/// Opens connections, keeps them open, and replaces those that are closed.
async fn strangers(address: SocketAddr, kind: Kind, many: bool, counts: Arc<Counts>) {
    let room = Arc::new(Semaphore::new(STRANGERS));
    let mut tick = tokio::time::interval(CONNECT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut n = 0_u32;
    loop {
        tick.tick().await;
        for _ in 0..CONNECTS_AT_ONCE {
            let Ok(permit) = room.clone().try_acquire_owned() else { break };
            n = n.wrapping_add(1);
            let from =
                many.then(|| Ipv4Addr::from_bits(Ipv4Addr::new(127, 64, 0, 1).to_bits() + n % ADDRESSES));
            let counts = counts.clone();
            tokio::spawn(async move {
                // However a connection ends, another one follows.
                let _ = stranger(address, from, kind, &counts).await;
                drop(permit);
            });
        }
    }
}

async fn stranger(
    address: SocketAddr,
    from: Option<Ipv4Addr>,
    kind: Kind,
    counts: &Counts,
) -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind((from, 0).into())?;
    }
    let mut socket = timeout(CONNECT_TIMEOUT, socket.connect(address)).await??;
    counts.opened.fetch_add(1, Ordering::Relaxed);
    let open = counts.open.fetch_add(1, Ordering::Relaxed) + 1;
    counts.most.fetch_max(open, Ordering::Relaxed);
    let stayed = async {
        socket.write_all(kind.says).await?;
        let mut heard = [0; 256];
        let mut due = Instant::now() + TRICKLE_EVERY;
        loop {
            tokio::select! {
                read = socket.read(&mut heard) => if read? == 0 { return Ok(()) },
                () = tokio::time::sleep_until(due), if kind.trickles => {
                    socket.write_all(b"a").await?;
                    due += TRICKLE_EVERY;
                }
            }
        }
    }
    .await;
    counts.open.fetch_sub(1, Ordering::Relaxed);
    stayed
}
