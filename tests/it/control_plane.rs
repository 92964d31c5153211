//! The promises of the failure matrix for the control plane, its store and the gateway's copy on disk.

use std::collections::BTreeMap;
use std::path::Path;

use http::StatusCode;
use mock_llm::Config as MockConfig;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use weir_gateway::config::Config;
use weir_proto::v1::{self, ResourceKind, resource::Spec};
use weir_runtime::Secret;
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Mock, Resources, mock};
use weir_tests::etcd::Etcd;
use weir_tests::plane::{ADMIN_TOKEN, Admin, Plane, start, start_on};
use weir_tests::{eventually, process};

/// A gateway alone finds a dead backend within ten seconds; a machine that is busy with other tests has twice as
/// many.
const BACKEND_FOUND: std::time::Duration = std::time::Duration::from_secs(20);
const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

fn served() -> MockConfig {
    MockConfig { models: vec!["gpt-4.1".into()], ..MockConfig::default() }
}

fn tenant(name: &str, word: &str) -> v1::Resource {
    let spec = v1::TenantSpec { display_name: word.into(), ..Default::default() };
    v1::Resource { name: name.into(), spec: Some(Spec::Tenant(spec)), ..Default::default() }
}

async fn put(admin: &mut Admin, name: &str, word: &str) -> Result<u64, tonic::Status> {
    let request = v1::ApplyRequest {
        resources: vec![tenant(name, word)],
        apply_set: name.into(),
        ..Default::default()
    };
    admin.apply(request).await.map(|answer| answer.into_inner().revision)
}

async fn word(admin: &mut Admin, name: &str) -> Option<String> {
    let r#ref = Some(v1::ResourceRef { kind: ResourceKind::Tenant.into(), name: name.into() });
    let answer = admin.get_resource(v1::GetResourceRequest { r#ref }).await.ok()?.into_inner();
    match answer.resource?.spec? {
        Spec::Tenant(spec) => Some(spec.display_name),
        _ => None,
    }
}

async fn audit_problem(admin: &mut Admin) -> String {
    admin.verify_audit(v1::VerifyAuditRequest::default()).await.expect("answers").into_inner().problem
}

/// Writers that continue until the process is killed. Every acknowledged write must be there afterwards.
async fn kill_among_writes(wanted: usize, start: impl AsyncFn() -> Plane) {
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    let (mut done, mut round) = (0, 0);
    while done < wanted {
        round += 1;
        let plane = start().await;
        let (told, mut answers) = tokio::sync::mpsc::channel(64);
        let admin = plane.admin().await;
        let writers: Vec<_> = (0..16)
            .map(|writer| {
                let (mut admin, told) = (admin.clone(), told.clone());
                let name = format!("w{writer}");
                let from = acknowledged.get(&name).copied().unwrap_or_default();
                tokio::spawn(async move {
                    for n in from + 1.. {
                        if put(&mut admin, &name, &n.to_string()).await.is_err() {
                            return;
                        }
                        if told.send((name.clone(), n)).await.is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        drop(told);
        let until = done + wanted / 4 + 1;
        let mut plane = Some(plane);
        while let Some((name, n)) = answers.recv().await {
            acknowledged.insert(name, n);
            done += 1;
            if done >= until
                && let Some(plane) = plane.take()
            {
                plane.kill().await;
            }
        }
        for writer in writers {
            writer.await.expect("ends");
        }
        let plane = start().await;
        let mut admin = plane.admin().await;
        for (name, n) in &mut acknowledged {
            let found: u64 = word(&mut admin, name).await.expect("there").parse().expect("a number");
            // One more write may have been made whose answer was lost.
            assert!(found == *n || found == *n + 1, "{name}: told {n}, found {found}");
            *n = found;
        }
        assert_eq!(audit_problem(&mut admin).await, "", "and no half of a change");
        plane.kill().await;
    }
    println!("{done} acknowledged writes in {round} rounds");
}

/// The number of writes: half a minute's on a busy machine of two cores, or WEIR_TEST_WRITES.
fn writes() -> usize {
    std::env::var("WEIR_TEST_WRITES").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_among_writes_loses_nothing_acknowledged() {
    let data = tempfile::tempdir().expect("a directory");
    kill_among_writes(writes(), async || start("127.0.0.1:0", data.path(), None).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_9_among_writes_into_etcd_loses_nothing_acknowledged() {
    let (data, etcd) = (tempfile::tempdir().expect("a directory"), Etcd::start(1).await);
    let store = etcd.url("weir");
    kill_among_writes(writes(), async || start_on("127.0.0.1:0", data.path(), &store).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_changes_says_so_and_goes_on_when_there_is_room() {
    let data = tempfile::tempdir().expect("a directory");
    // The shell's limit holds for every file; the store is the one that grows.
    let plane = start("127.0.0.1:0", data.path(), Some(6 << 10)).await;
    let mut admin = plane.admin().await;
    let big = "x".repeat(60);
    let mut acknowledged = Vec::new();
    let refused = loop {
        let batch: Vec<_> = (0..200).map(|i| tenant(&format!("t{}-{i}", acknowledged.len()), &big)).collect();
        let request = v1::ApplyRequest { resources: batch, ..Default::default() };
        match admin.apply(request).await {
            Ok(_) => acknowledged.push(format!("t{}-199", acknowledged.len())),
            Err(status) => break status,
        }
        assert!(acknowledged.len() < 500, "the limit has to be met");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("the disk of the store is full"), "{refused}");
    // It can still be read, also by gateways, and continues to refuse writes.
    for name in &acknowledged {
        assert_eq!(word(&mut admin, name).await.as_deref(), Some(big.as_str()), "{name}");
    }
    plane.kill().await;
    let plane = start("127.0.0.1:0", data.path(), None).await;
    let mut admin = plane.admin().await;
    for name in &acknowledged {
        assert_eq!(word(&mut admin, name).await.as_deref(), Some(big.as_str()), "{name}");
    }
    put(&mut admin, "after", "there is room").await.expect("room");
    assert_eq!(audit_problem(&mut admin).await, "");
    plane.kill().await;
}

/// A gateway in this process that follows a control plane.
struct Follower {
    client: Client,
    running: weir_gateway::Handle,
    shutdown: CancellationToken,
}

async fn follow(plane: &Plane, id: &str, data: &Path) -> Follower {
    let config = Config {
        control_plane: plane.url.clone(),
        gateway_token: Some(Secret::new(ADMIN_TOKEN.into())),
        id: Some(id.into()),
        ..weir_tests::cluster::gateway_config(data)
    };
    let shutdown = CancellationToken::new();
    let started = weir_gateway::start(config, None, shutdown.clone(), CancellationToken::new()).await;
    let running = started.expect("starts");
    running.serving().await;
    Follower { client: Client::new(running.address, KEY), running, shutdown }
}

impl Follower {
    async fn chats(&self) -> StatusCode {
        self.client.chat(CHAT).await.status
    }

    async fn serves(&self) {
        eventually("the gateway serves", || async { self.chats().await == StatusCode::OK }).await;
    }
}

/// Mocks, a control plane that knows them, and a gateway that serves.
async fn cluster(data: &Path, mocks: &[Mock]) -> (Plane, Admin, Follower) {
    let plane = start("127.0.0.1:0", &data.join("plane"), None).await;
    let mut admin = plane.admin().await;
    let resources = Resources::in_front_of(mocks).all();
    admin.apply(v1::ApplyRequest { resources, ..Default::default() }).await.expect("applied");
    let gateway = follow(&plane, "g", &data.join("gateway")).await;
    gateway.serves().await;
    (plane, admin, gateway)
}

async fn listed(admin: &mut Admin) -> v1::Gateway {
    let all = admin.list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner().gateways;
    all.into_iter().find(|g| g.id == "g").unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_comes_back_with_an_empty_store_takes_no_backend_away_and_an_alarm_is_raised() {
    let (data, end) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
    // One backend only: even that pool is not emptied.
    let mocks = [mock(served(), &end).await];
    let (plane, admin, gateway) = cluster(data.path(), &mocks).await;
    let listen = plane.address();
    drop(admin);
    plane.kill().await;
    let plane = start(&listen, &data.path().join("empty"), None).await;
    let mut admin = plane.admin().await;
    eventually("the gateway has refused", || {
        let mut admin = admin.clone();
        async move { listed(&mut admin).await.sync() == v1::SyncState::Error }
    })
    .await;
    let refused = listed(&mut admin).await;
    assert!(refused.errors[0].message.contains("allow_mass_removal"), "{:?}", refused.errors);
    assert_eq!(gateway.running.live.config_refused(), 1, "the gateway's metric shows it too");
    assert_eq!(gateway.chats().await, StatusCode::OK);
    // The operator applies the same files again: the content is the same, so nothing is removed.
    let resources = Resources::in_front_of(&mocks).all();
    let revision = admin
        .apply(v1::ApplyRequest { resources, ..Default::default() })
        .await
        .expect("applied")
        .into_inner()
        .revision;
    let wait = v1::WaitAppliedRequest { revision, timeout: None };
    let applied = admin.wait_applied(wait).await.expect("answers").into_inner();
    assert_eq!((applied.applied, applied.connected), (1, 1));
    assert_eq!(gateway.running.live.config_refused(), 0);
    assert_eq!(gateway.chats().await, StatusCode::OK);
    gateway.shutdown.cancel();
    plane.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_control_plane_is_down_no_request_fails_and_a_restart_sends_nothing_again() {
    let (data, end) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
    let death = CancellationToken::new();
    let mocks = [mock(served(), &end).await, mock(served(), &death).await];
    let (plane, _, gateway) = cluster(data.path(), &mocks).await;
    let listen = plane.address();
    let revision = gateway.running.live.snapshot().revision;
    plane.kill().await;
    eventually("it is noticed", || async { !gateway.running.live.is_connected() }).await;
    for _ in 0..50 {
        assert_eq!(gateway.chats().await, StatusCode::OK);
    }
    // A backend that dies meanwhile is not used any more, and costs no request either.
    death.cancel();
    let died = tokio::time::Instant::now();
    // By this gateway's own verdict, or, while its last assignments go on for a minute, by its local ejection.
    let is_out = || {
        let snapshot = gateway.running.live.snapshot();
        let backend = &snapshot.backends["b1"];
        backend.state.health() == v1::HealthState::Unhealthy
            || snapshot.pools[&backend.spec.pool].state.is_ejected(&backend.name)
    };
    while !is_out() {
        assert_eq!(gateway.chats().await, StatusCode::OK);
        assert!(died.elapsed() < BACKEND_FOUND, "it is still in rotation after {:?}", died.elapsed());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    for _ in 0..20 {
        assert_eq!(gateway.chats().await, StatusCode::OK);
    }
    assert_eq!(gateway.running.live.snapshot().revision, revision, "the configuration stands still");
    assert!(gateway.running.live.published_for() >= died.elapsed(), "and grows older");
    let plane = start(&listen, &data.path().join("plane"), None).await;
    let mut admin = plane.admin().await;
    eventually("the gateway is back and in sync", || {
        let mut admin = admin.clone();
        async move { listed(&mut admin).await.sync() == v1::SyncState::Synced }
    })
    .await;
    assert_eq!(gateway.running.live.snapshot().revision, revision);
    let answer = admin
        .get_gateway_config(v1::GetGatewayConfigRequest { gateway_id: "g".into() })
        .await
        .expect("answers")
        .into_inner();
    assert!(answer.differences.is_empty() && !answer.resource_versions.is_empty());
    gateway.shutdown.cancel();
    plane.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_change_that_a_gateway_refuses_the_rest_applies_and_what_ran_goes_on() {
    let (data, end) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
    let mocks = [mock(served(), &end).await];
    let (plane, mut admin, gateway) = cluster(data.path(), &mocks).await;
    let mut resources = Resources::in_front_of(&mocks).all();
    for resource in &mut resources {
        if let Some(Spec::Backend(spec)) = &mut resource.spec {
            spec.credential = "env:NO_SUCH_CREDENTIAL".into();
        }
    }
    resources.push(tenant("beside", "it"));
    let answer = admin.apply(v1::ApplyRequest { resources, ..Default::default() }).await.expect("applied");
    let revision = answer.into_inner().revision;
    let wait = v1::WaitAppliedRequest { revision, timeout: None };
    let waited = admin.wait_applied(wait).await.expect("answers").into_inner();
    assert!(waited.pending.is_empty(), "it has said its word: {waited:?}");
    assert_eq!(waited.refused[0].gateway_id, "g");
    let error = &waited.refused[0].errors[0];
    assert_eq!(error.r#ref.as_ref().map(|r| r.name.as_str()), Some("b0"));
    assert_eq!(gateway.chats().await, StatusCode::OK, "the backend that was in force still is");
    let answer = admin
        .get_gateway_config(v1::GetGatewayConfigRequest { gateway_id: "g".into() })
        .await
        .expect("answers")
        .into_inner();
    assert_eq!(answer.differences.len(), 1);
    assert!(!answer.differences[0].refusal.is_empty());
    assert!(answer.resource_versions.iter().any(|applied| applied.name == "beside"), "the rest is applied");
    gateway.shutdown.cancel();
    plane.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_an_operator_has_work_on_a_running_stack() {
    let up = process::up(&["--gateways", "2"]).await;
    let weir = async |args: &[&str], wanted: i32| {
        let (code, out, err) = up.weir(args).await;
        assert_eq!(code, wanted, "{args:?}: {out}{err}");
        format!("{out}{err}")
    };
    assert!(weir(&["gateways"], 0).await.contains("synced"));
    let before: u64 = weir(&["-o", "json", "whoami"], 0)
        .await
        .lines()
        .find_map(|line| line.trim().strip_prefix("\"revision\": ")?.trim_end_matches(',').parse().ok())
        .expect("a revision");
    weir(&["weight", "sgp", "7"], 0).await;
    let history = weir(&["history", "backend", "sgp"], 0).await;
    assert!(history.contains("weight:") && history.contains("-> 7"), "{history}");
    assert!(weir(&["rollback", &before.to_string(), "--dry-run"], 0).await.contains("7 ->"));
    weir(&["rollback", &before.to_string()], 0).await;
    assert!(weir(&["audit", "--verify"], 0).await.contains("follow from each other"));
    assert!(weir(&["watch", "backend", "--once"], 0).await.contains("present backend sgp"));
    assert!(weir(&["gateway", "config", "gateway-0"], 0).await.contains("backend"));
    assert!(
        weir(&["gateway", "diff", "gateway-1"], 0)
            .await
            .contains("has applied the newest revision completely")
    );
    assert!(weir(&["wait"], 0).await.contains("applied on 2 of 2 gateways"));
    assert!(weir(&["check"], 0).await.contains("ok     the hash chain of the audit log is intact"));
    assert!(weir(&["explain", "backend.weight"], 0).await.contains("backend.weight  <whole number>"));
    assert!(weir(&["drain", "sgp"], 0).await.contains("drained: no request is in progress"));
    weir(&["undrain", "sgp"], 0).await;
    let token = weir(&["token", "create", "ci", "--role", "viewer"], 0).await;
    assert!(token.starts_with("weirtok_"), "{token}");
    assert!(weir(&["token", "list"], 0).await.contains("viewer"));
    weir(&["token", "revoke", "ci"], 0).await;
    let file = tempfile::tempdir().expect("a directory").path().join("no-such-directory/backup");
    assert!(weir(&["backup", file.to_str().expect("UTF-8")], 1).await.contains("cannot write"));
    assert!(weir(&["gateway", "diff", "nobody"], 2).await.contains("not found"));
}
