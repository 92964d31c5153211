//! Ten thousand changes as fast as the control plane takes them, while gateways follow: each gets a few merged
//! deltas, one that never answers costs a bounded amount of memory, and in the end all hold the same.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use weir_discovery::{Apply, Disk, Identity, Link, Refused, Subscriber, Update};
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::{self, ResourceKind, SubscriberRole, resource::Spec, stream_config_request::Message};
use weir_runtime::Secret;
use weir_tests::eventually;
use weir_tests::plane::{ADMIN_TOKEN, Admin, start};

const WRITES: u64 = 10_000;
/// Concurrent writers: enough that the store never waits for one.
const WRITERS: u64 = 32;
/// Resources that are written again and again.
const NAMES: u64 = 200;
const GATEWAYS: usize = 4;
/// A gateway that leaves a delta unanswered is stale after 30 s, and its stream ends after 120 s.
const GIVEN_UP_AFTER_S: f64 = 110.0;
/// Gateways that receive deltas and never answer.
const SILENT: usize = 60;
/// Deltas that a gateway may receive per second.
const DELTAS_PER_S: f64 = 10.0;
/// The memory by which the control plane may grow. It keeps the last 4096 changes for watchers, which are some 10 MiB
/// here. With a queue of changes for each gateway that does not answer it would be 600 000.
const GROWTH_KIB: u64 = 40 << 10;

/// Counts the deltas applied.
#[derive(Debug, Default)]
struct Counts(Arc<AtomicUsize>);

impl Apply for Counts {
    fn apply(&mut self, _update: &Update<'_>) -> Vec<Refused> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Vec::new()
    }

    fn connected(&mut self, _connected: bool) {}
}

struct Gateway {
    deltas: Arc<AtomicUsize>,
    disk: Disk,
    _end: tokio_util::sync::DropGuard,
}

fn identity(id: &str) -> Identity {
    Identity {
        id: id.into(),
        role: SubscriberRole::Gateway,
        incarnation: id.into(),
        region: String::new(),
        token: Some(Secret::new(ADMIN_TOKEN.into())),
    }
}

fn gateway(id: &str, plane: &str, data: &Path) -> Gateway {
    let (counts, disk) = (Counts::default(), Disk::new(&data.join(id)).expect("made"));
    let deltas = Arc::clone(&counts.0);
    let links = Link::all(plane, None, None).expect("a URL");
    let subscriber = Subscriber::new(counts, identity(id), links, Some(disk.clone()));
    let end = CancellationToken::new();
    tokio::spawn(subscriber.run(end.clone()));
    Gateway { deltas, disk, _end: end.drop_guard() }
}

/// A gateway that sends its hello, receives a delta, and neither answers nor reads on. Returns what keeps it
/// connected.
async fn silent(id: &str, plane: &str) -> impl Sized + use<> {
    let (say, said) = mpsc::channel(2);
    let hello = v1::Hello { gateway_id: id.into(), incarnation: id.into(), ..Default::default() };
    let hello = v1::StreamConfigRequest { message: Some(Message::Hello(hello)) };
    say.send(hello).await.expect("room");
    let request: Request<_> = identity(id).request(ReceiverStream::new(said)).expect("a token");
    let mut client = DiscoveryServiceClient::connect(plane.to_owned()).await.expect("there");
    let mut stream = client.stream_config(request).await.expect("accepted").into_inner();
    stream.message().await.expect("answered").expect("a delta");
    (say, stream)
}

async fn put(admin: &mut Admin, name: &str, word: &str) {
    let spec = v1::TenantSpec { display_name: word.into(), ..Default::default() };
    let resource = v1::Resource { name: name.into(), spec: Some(Spec::Tenant(spec)), ..Default::default() };
    let request =
        v1::ApplyRequest { resources: vec![resource], apply_set: name.into(), ..Default::default() };
    admin.apply(request).await.expect("applied");
}

/// Resident memory of a process.
fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_ten_thousand_changes_each_gateway_is_sent_a_few_deltas_and_memory_stays_bounded() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = start("127.0.0.1:0", &data.path().join("plane"), None).await;
    let admin = plane.admin().await;
    for n in 0..NAMES {
        put(&mut admin.clone(), &format!("t{n}"), "before").await;
    }
    let gateways: Vec<_> =
        (0..GATEWAYS).map(|k| gateway(&format!("g{k}"), &plane.url, data.path())).collect();
    // They are admitted a few at a time, and those that do not answer keep nobody out.
    let all = (0..SILENT).map(|k| {
        let plane = plane.url.clone();
        tokio::spawn(async move { silent(&format!("silent-{k}"), &plane).await })
    });
    let mut silent_ones = Vec::new();
    for one in all.collect::<Vec<_>>() {
        let one = tokio::time::timeout(Duration::from_secs(60), one).await;
        silent_ones.push(one.expect("it is let in").expect("it is sent everything"));
    }
    let fresh = gateway("fresh", &plane.url, data.path());
    for gateway in gateways.iter().chain([&fresh]) {
        eventually("every gateway is in sync", async || gateway.deltas.load(Ordering::Relaxed) > 0).await;
    }
    let pid = plane.child.id().expect("it runs");
    let before = resident_kib(pid);
    let counted: Vec<_> = gateways.iter().map(|g| g.deltas.load(Ordering::Relaxed)).collect();

    let began = Instant::now();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let mut admin = admin.clone();
            tokio::spawn(async move {
                for n in (writer..WRITES).step_by(WRITERS as usize) {
                    put(&mut admin, &format!("t{}", n % NAMES), &format!("{n}")).await;
                }
            })
        })
        .collect();
    let peak = Arc::new(std::sync::atomic::AtomicU64::new(before));
    let watching = tokio::spawn({
        let peak = Arc::clone(&peak);
        async move {
            loop {
                peak.fetch_max(resident_kib(pid), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    for writer in writers {
        writer.await.expect("every change was made");
    }
    let written = began.elapsed();
    let revision = admin.clone().who_am_i(v1::WhoAmIRequest {}).await.expect("answers").into_inner().revision;
    for gateway in &gateways {
        eventually("every gateway is at the last revision", async || {
            gateway.disk.load().is_some_and(|held| held.revision == revision)
        })
        .await;
    }
    let elapsed = began.elapsed().as_secs_f64();
    watching.abort();

    let most = DELTAS_PER_S * elapsed + 2.0;
    let mut sent = Vec::new();
    for (gateway, before) in gateways.iter().zip(counted) {
        sent.push(gateway.deltas.load(Ordering::Relaxed) - before);
    }
    let grown = peak.load(Ordering::Relaxed).saturating_sub(before);
    println!("{WRITES} changes in {written:.1?}; deltas {sent:?}; {before} KiB and {grown} more at the most");
    assert!(
        sent.iter().all(|n| *n >= 1 && (*n as f64) <= most),
        "{sent:?} deltas where {most:.0} are the most"
    );
    assert!(grown < GROWTH_KIB, "grew by {grown} KiB");

    // The same everywhere, and the same as the store.
    let held = gateways[0].disk.load().expect("a copy").bodies();
    for gateway in &gateways[1..] {
        assert_eq!(gateway.disk.load().expect("a copy").bodies(), held);
    }
    let request =
        v1::ListResourcesRequest { kind: ResourceKind::Tenant.into(), page_size: 1000, ..Default::default() };
    let list = admin.clone().list_resources(request).await.expect("answers").into_inner().resources;
    let desired: BTreeMap<_, _> = list.into_iter().map(|r| (r.name, r.spec)).collect();
    let decoded = held.iter().map(|((_, name), (_, body))| {
        let resource = <v1::Resource as prost::Message>::decode(body.clone()).expect("whole");
        (name.clone(), resource.spec)
    });
    assert_eq!(decoded.collect::<BTreeMap<_, _>>(), desired);
    assert_eq!(desired.len() as u64, NAMES);
    // Those that never answered are still at their first delta, and are shown so.
    let list = admin.clone().list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner();
    let waiting = list.gateways.iter().filter(|g| g.unanswered_since.is_some() && g.connected).count();
    // If the changes took longer than the time for an answer, these are disconnected, as they should be.
    assert!(waiting == SILENT || elapsed >= GIVEN_UP_AFTER_S, "{waiting} of {SILENT} after {elapsed:.0} s");
    drop(silent_ones);
    plane.kill().await;
}
