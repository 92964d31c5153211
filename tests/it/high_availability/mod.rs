//! Several control planes on one etcd: each of them serves, one is the leader, and when one dies the others continue.

mod asked;
mod random;

use std::path::Path;

use http::StatusCode;
use mock_llm::Config as MockConfig;
use tokio_util::sync::CancellationToken;
use weir_gateway::config::Config;
use weir_proto::v1::{self, HealthState, ResourceKind, resource::Spec};
use weir_runtime::Secret;
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Mock, Resources, gateway_config, mock};
use weir_tests::etcd::Etcd;
use weir_tests::eventually;
use weir_tests::gate::{Door, Gate};
use weir_tests::line::Line;
use weir_tests::plane::{ADMIN_TOKEN, Admin, Plane, start, start_on, start_with};
use weir_tests::process::{command, signal};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

fn served() -> MockConfig {
    MockConfig { models: vec!["gpt-4.1".into()], ..MockConfig::default() }
}

fn tenant(name: &str, word: &str) -> v1::Resource {
    let spec = v1::TenantSpec { display_name: word.into(), ..Default::default() };
    v1::Resource { name: name.into(), spec: Some(Spec::Tenant(spec)), ..Default::default() }
}

/// A gateway of this process that knows all control planes.
struct Gateway {
    client: Client,
    running: weir_gateway::Handle,
    shutdown: CancellationToken,
}

impl Gateway {
    async fn start(planes: &str, id: &str, data: &Path) -> Self {
        let config = Config {
            control_plane: planes.to_owned(),
            gateway_token: Some(Secret::new(ADMIN_TOKEN.into())),
            id: Some(id.into()),
            ..gateway_config(data)
        };
        let shutdown = CancellationToken::new();
        let started = weir_gateway::start(config, None, shutdown.clone(), CancellationToken::new()).await;
        let running = started.expect("starts");
        Self { client: Client::new(running.address, KEY), running, shutdown }
    }

    fn health(&self, backend: &str) -> HealthState {
        let snapshot = self.running.live.snapshot();
        snapshot.backends.get(backend).map_or(HealthState::Unspecified, |b| b.state.health())
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.ended().await.expect("ends well");
    }
}

/// Three control planes over three members, some gateways, three backends.
struct World {
    etcd: Etcd,
    /// `None` while it is dead.
    planes: Vec<Option<Plane>>,
    addresses: Vec<String>,
    /// For each control plane, its connections to the members.
    lines: Vec<Vec<Line>>,
    gateways: Vec<Gateway>,
    /// The doors in front of the backends.
    gates: Vec<Gate>,
    data: tempfile::TempDir,
    _end: tokio_util::sync::DropGuard,
}

impl World {
    async fn start(gateways: usize) -> Self {
        let (data, end) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
        let (mut mocks, mut gates) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let Mock { address, handle } = mock(served(), &end).await;
            let gate = Gate::start(address, &end).await;
            mocks.push(Mock { address: gate.address, handle });
            gates.push(gate);
        }
        let etcd = Etcd::start(3).await;
        let mut world = Self {
            etcd,
            planes: Vec::new(),
            addresses: Vec::new(),
            lines: Vec::new(),
            gateways: Vec::new(),
            gates,
            data,
            _end: end.clone().drop_guard(),
        };
        for k in 0..3 {
            let mut lines = Vec::new();
            for member in world.etcd.addresses() {
                lines.push(Line::to(member, &end).await);
            }
            world.lines.push(lines);
            let directory = world.data.path().join(format!("plane-{k}"));
            let plane = start_on("127.0.0.1:0", &directory, &world.store(k)).await;
            world.addresses.push(plane.address());
            world.planes.push(Some(plane));
        }
        let mut resources = Resources::in_front_of(&mocks);
        let health = v1::HealthProfile {
            liveness_interval: prost_types::Duration::try_from(std::time::Duration::from_secs(1)).ok(),
            ..Default::default()
        };
        resources.put("chat", Spec::Pool(v1::PoolSpec { health: Some(health), ..Default::default() }));
        let apply = v1::ApplyRequest { resources: resources.all(), ..Default::default() };
        world.admin(0).await.apply(apply).await.expect("applied");
        for k in 0..gateways {
            world.add_gateway(k).await;
        }
        for gateway in &world.gateways {
            gateway.running.serving().await;
        }
        world
    }

    /// The store, as a control plane finds it.
    fn store(&self, plane: usize) -> String {
        let lines: Vec<_> = self.lines[plane].iter().map(|line| line.address).collect();
        Etcd::url_by(&lines, "weir")
    }

    fn urls(&self) -> String {
        self.addresses.iter().map(|address| format!("http://{address}")).collect::<Vec<_>>().join(",")
    }

    async fn add_gateway(&mut self, k: usize) {
        let directory = self.data.path().join(format!("gateway-{k}"));
        let gateway = Gateway::start(&self.urls(), &format!("g{k}"), &directory).await;
        self.gateways.push(gateway);
    }

    async fn admin(&self, plane: usize) -> Admin {
        self.planes[plane].as_ref().expect("it runs").admin().await
    }

    async fn kill(&mut self, plane: usize) {
        self.planes[plane].take().expect("it runs").kill().await;
    }

    async fn restart(&mut self, plane: usize) {
        let directory = self.data.path().join(format!("plane-{plane}"));
        self.planes[plane] = Some(start_on(&self.addresses[plane], &directory, &self.store(plane)).await);
    }

    /// The leader; waits until there is exactly one.
    async fn leader(&self) -> usize {
        self.leader_but(None).await
    }

    /// The same without asking one of them.
    async fn leader_but(&self, unasked: Option<usize>) -> usize {
        loop {
            let mut leading = Vec::new();
            for (k, plane) in self.planes.iter().enumerate().filter(|(k, _)| Some(*k) != unasked) {
                if let Some(plane) = plane
                    && plane.leads().await
                {
                    leading.push(k);
                }
            }
            if let [one] = leading[..] {
                return one;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }

    /// Makes a change through one control plane, and waits at each one until all gateways have it.
    async fn change_everywhere(&self, through: usize, name: &str) {
        let apply = v1::ApplyRequest {
            resources: vec![tenant(name, "x")],
            apply_set: name.into(),
            ..Default::default()
        };
        let revision = self.admin(through).await.apply(apply).await.expect("applied").into_inner().revision;
        for (k, plane) in self.planes.iter().enumerate() {
            let Some(plane) = plane else { continue };
            let gateways = self.gateways.len() as u32;
            eventually(&format!("control plane {k} sees revision {revision} on all gateways"), async || {
                let wait = v1::WaitAppliedRequest { revision, timeout: None };
                let answer = plane.admin().await.wait_applied(wait).await.expect("answers").into_inner();
                (answer.applied, answer.connected) == (gateways, gateways)
            })
            .await;
        }
    }

    /// The door of every caller of a backend.
    fn door(&self, backend: usize, door: Door) {
        self.gates[backend].set("*", door);
    }

    async fn all_serve(&self) {
        for gateway in &self.gateways {
            assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK);
        }
    }

    async fn until(&self, backend: &str, state: HealthState) {
        for (k, gateway) in self.gateways.iter().enumerate() {
            eventually(&format!("{backend} is {state:?} for gateway {k}"), async || {
                gateway.health(backend) == state
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_control_plane_serves_and_knows_all_gateways_and_one_leads() {
    let world = World::start(3).await;
    let leader = world.leader().await;
    for through in 0..3 {
        world.change_everywhere(through, &format!("through-{through}")).await;
    }
    // Wherever gateways are followed, each is listed everywhere once.
    for k in 0..3 {
        let mut admin = world.admin(k).await;
        let list = admin.list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner();
        let ids: Vec<_> = list.gateways.iter().map(|g| (g.id.as_str(), g.sync())).collect();
        let synced = v1::SyncState::Synced;
        assert_eq!(ids, [("g0", synced), ("g1", synced), ("g2", synced)], "control plane {k}");
        for id in ["g0", "g1", "g2"] {
            let request = v1::GetGatewayConfigRequest { gateway_id: id.into() };
            let config = admin.get_gateway_config(request).await.expect("answers").into_inner();
            assert!(
                config.differences.is_empty() && !config.resource_versions.is_empty(),
                "control plane {k}, {id}"
            );
        }
    }
    world.until("b0", HealthState::Healthy).await;
    world.door(0, Door::Broken);
    world.until("b0", HealthState::Unhealthy).await;
    for k in 0..3 {
        // Each control plane computes verdicts by itself, from the same reports.
        eventually(&format!("control plane {k} sees it too"), async || {
            let request = v1::ListBackendStatusRequest {};
            let answer =
                world.admin(k).await.list_backend_status(request).await.expect("answers").into_inner();
            answer.backends[0].health.as_ref().is_some_and(|h| h.state() == HealthState::Unhealthy)
        })
        .await;
    }
    assert_eq!(world.leader().await, leader, "and the leader is still the same");
    for gateway in world.gateways {
        gateway.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_dies_another_one_leads_changes_go_on_and_verdicts_too() {
    let mut world = World::start(2).await;
    world.until("b1", HealthState::Healthy).await;
    let first = world.leader().await;
    world.kill(first).await;
    world.all_serve().await;
    // A command that names the dead one first uses the next.
    let mut addresses = world.addresses.clone();
    addresses.rotate_left(first);
    let done = command("weir")
        .args(["weight", "b0", "7", "--server", &addresses.join(",")])
        .env("WEIR_TOKEN", ADMIN_TOKEN)
        .output()
        .await
        .expect("runs");
    let text = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success() && text.contains("applied on 2 of 2 gateways"), "{text}");
    let second = world.leader().await;
    assert_ne!(first, second);
    world.door(1, Door::Broken);
    world.until("b1", HealthState::Unhealthy).await;
    world.restart(first).await;
    world.change_everywhere(first, "back").await;
    assert_eq!(world.leader().await, second, "who comes back does not take the lead away");
    world.all_serve().await;
    for gateway in world.gateways {
        gateway.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_paused_for_longer_than_its_lease_is_fenced_off() {
    let world = World::start(2).await;
    world.until("b1", HealthState::Healthy).await;
    let first = world.leader().await;
    let paused = world.planes[first].as_ref().expect("it runs");
    signal(&paused.child, "-STOP").await;
    let second =
        tokio::time::timeout(std::time::Duration::from_secs(60), world.leader_but(Some(first))).await;
    let second = second.expect("another one leads");
    world.door(1, Door::Broken);
    world.until("b1", HealthState::Unhealthy).await;
    signal(&paused.child, "-CONT").await;
    eventually("the first one notices", async || !paused.leads().await).await;
    assert_eq!(world.leader().await, second);
    // It had never heard that the backend is down; gateways do not ask it.
    for gateway in &world.gateways {
        assert_eq!(gateway.health("b1"), HealthState::Unhealthy);
    }
    world.door(1, Door::Open);
    for gateway in &world.gateways {
        eventually("it may be used again", async || gateway.health("b1") != HealthState::Unhealthy).await;
    }
    for gateway in world.gateways {
        gateway.stop().await;
    }
}

/// A file store moves to etcd by a backup, with its history and a new epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_any_store_is_restored_into_etcd_with_its_history_under_a_new_epoch() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = start("127.0.0.1:0", &data.path().join("file"), None).await;
    let mut admin = plane.admin().await;
    for i in 0..300 {
        let apply = v1::ApplyRequest {
            resources: vec![tenant("t", &i.to_string())],
            apply_set: "t".into(),
            ..Default::default()
        };
        admin.apply(apply).await.expect("applied");
    }
    let who = admin.who_am_i(v1::WhoAmIRequest {}).await.expect("answers").into_inner();
    let mut copy = admin.backup(v1::BackupRequest {}).await.expect("answers").into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = copy.message().await.expect("whole") {
        bytes.extend(chunk.chunk);
    }
    let file = data.path().join("backup");
    std::fs::write(&file, bytes).expect("written");
    plane.kill().await;

    let etcd = Etcd::start(1).await;
    let store = etcd.url("weir");
    let args = ["--store", &store, "--restore", file.to_str().expect("UTF-8")];
    let plane = start_with("127.0.0.1:0", &data.path().join("etcd"), None, &args).await;
    let mut admin = plane.admin().await;
    let now = admin.who_am_i(v1::WhoAmIRequest {}).await.expect("answers").into_inner();
    assert_eq!(now.revision, who.revision);
    assert_ne!(now.store_epoch, who.store_epoch);
    let history = v1::HistoryRequest { page_size: 1000, ..Default::default() };
    let history = admin.history(history).await.expect("answers").into_inner();
    assert_eq!(history.entries.len(), 300);
    let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.expect("answers").into_inner();
    assert_eq!(verified.problem, "");
    let r#ref = Some(v1::ResourceRef { kind: ResourceKind::Tenant.into(), name: "t".into() });
    let found = admin.get_resource(v1::GetResourceRequest { r#ref }).await.expect("there").into_inner();
    assert_eq!(found.resource.expect("there").spec, tenant("t", "299").spec);
    // A backup is not restored twice to the same place.
    let mut again = command("weir-control-plane");
    again.args(["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data-dir"]).arg(data.path());
    let refused = again.args(args).env("WEIR_ADMIN_TOKEN", ADMIN_TOKEN).output().await.expect("runs");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(64) && text.contains("name another prefix"), "{text}");
    plane.kill().await;
}
