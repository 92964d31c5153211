//! The wall clock of a machine jumps. Timers use the monotonic clock, so only dates are affected.

use std::path::{Path, PathBuf};

use http::StatusCode;
use mock_llm::Config as MockConfig;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Resources, mock};
use weir_tests::eventually;
use weir_tests::plane::{ADMIN_TOKEN, Admin, admin_at};
use weir_tests::process::Process;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;
/// A key that ends half an hour after the start of the test.
const SHORT: &str = "weir_short_lived";

/// A clock that can be set, for processes started with its variables.
struct Clock {
    library: String,
    file: PathBuf,
}

impl Clock {
    fn new(directory: &Path) -> Self {
        let under = |directory: PathBuf| directory.join("faketime/libfaketimeMT.so.1");
        let multiarch =
            std::fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
        let found =
            multiarch.chain(["/usr/lib64".into(), "/usr/lib".into()]).map(under).find(|path| path.exists());
        let library = found.expect("libfaketime is needed: run `make tools`, or apt-get install libfaketime");
        let clock = Self { library: library.display().to_string(), file: directory.join("clock") };
        clock.set("+0");
        clock
    }

    /// This number of seconds beside the machine's clock.
    fn set(&self, offset: &str) {
        // Renamed, so that nobody reads half of it.
        let new = self.file.with_extension("new");
        std::fs::write(&new, offset).and_then(|()| std::fs::rename(&new, &self.file)).expect("written");
    }

    fn variables(&self) -> [(&str, &str); 4] {
        [
            ("LD_PRELOAD", &self.library),
            ("FAKETIME_TIMESTAMP_FILE", self.file.to_str().expect("UTF-8")),
            ("FAKETIME_CACHE_DURATION", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ]
    }
}

async fn put(admin: &mut Admin, resources: Vec<v1::Resource>, set: &str) -> u64 {
    let apply = v1::ApplyRequest { resources, apply_set: set.into(), ..Default::default() };
    admin.apply(apply).await.expect("applied").into_inner().revision
}

async fn applied(admin: &mut Admin, revision: u64) {
    let wait = v1::WaitAppliedRequest { revision, timeout: None };
    let answer = admin.wait_applied(wait).await.expect("answers").into_inner();
    assert_eq!((answer.applied, answer.connected), (1, 1), "the gateway never left");
}

async fn chats(client: &Client) -> StatusCode {
    client.chat(CHAT).await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_jumps_an_hour_either_way_disturbs_nothing_but_what_has_a_date() {
    let (data, end) = (tempfile::tempdir().expect("a directory"), CancellationToken::new());
    let clock = Clock::new(data.path());
    let variables = clock.variables();
    let mock = mock(MockConfig { models: vec!["gpt-4.1".into()], ..MockConfig::default() }, &end).await;
    let directory = |name: &str| data.path().join(name).display().to_string();
    let common = [("WEIR_ADMIN_TOKEN", ADMIN_TOKEN), ("WEIR_GATEWAY_TOKEN", ADMIN_TOKEN)];
    let env = [&variables[..], &common[..]].concat();
    let args = ["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--data-dir", &directory("plane")];
    let plane = Process::start_with("weir-control-plane", &args, &env, "control plane serves").await;
    let url = format!("http://{}", plane.text("grpc"));
    let mut admin = admin_at(&url);
    let mut resources = Resources::in_front_of(&[mock]);
    let half_an_hour = weir_runtime::wall_clock() + std::time::Duration::from_secs(1800);
    let digest = v1::KeyDigest {
        sha256: Sha256::digest(SHORT).to_vec(),
        prefix: "weir_short".into(),
        expire_time: Some(half_an_hour.into()),
    };
    let key = v1::ApiKeySpec { tenant: "acme".into(), digests: vec![digest], ..Default::default() };
    resources.put("short", Spec::ApiKey(key));
    put(&mut admin, resources.all(), "all").await;
    let args = [
        "--listen=127.0.0.1:0",
        "--ops-listen=127.0.0.1:0",
        "--id=g",
        "--control-plane",
        &url,
        "--data-dir",
        &directory("gateway"),
    ];
    let gateway = Process::start_with("weir-gateway", &args, &env, "serving").await;
    let client = Client::new(gateway.text("clients").parse().expect("an address"), KEY);
    let short = client.with_key(SHORT);
    let healthy = async || {
        let status = admin_at(&url).list_backend_status(v1::ListBackendStatusRequest {}).await;
        let status = status.expect("answers").into_inner().backends.swap_remove(0);
        status.health.is_some_and(|health| health.state() == v1::HealthState::Healthy && !health.stale)
    };
    eventually("the backend is healthy", healthy).await;
    assert_eq!(chats(&short).await, StatusCode::OK);
    for (n, (offset, ended)) in [("+3600", true), ("-3600", false), ("+0", false)].into_iter().enumerate() {
        clock.set(offset);
        let wanted = if ended { StatusCode::UNAUTHORIZED } else { StatusCode::OK };
        eventually("the key has ended, or has not", async || chats(&short).await == wanted).await;
        for _ in 0..20 {
            assert_eq!(chats(&client).await, StatusCode::OK, "at {offset}");
        }
        let tenant = v1::TenantSpec { display_name: offset.into(), ..Default::default() };
        let tenant =
            v1::Resource { name: "t".into(), spec: Some(Spec::Tenant(tenant)), ..Default::default() };
        let revision = put(&mut admin, vec![tenant], "t").await;
        assert_eq!(revision, n as u64 + 2, "at {offset}");
        applied(&mut admin, revision).await;
        assert!(healthy().await, "at {offset}");
    }
    let list = admin.list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner();
    assert_eq!(list.gateways[0].sync(), v1::SyncState::Synced);
    let events = admin.list_health_events(v1::ListHealthEventsRequest::default()).await.expect("answers");
    let fell = events.into_inner().events.into_iter().find(|event| event.message.contains("unhealthy"));
    assert_eq!(fell, None);
    let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.expect("answers").into_inner();
    assert_eq!(verified.problem, "");
}
