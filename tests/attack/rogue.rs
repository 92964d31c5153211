//! A gateway that lies about its identity and about what it observes.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::stream_config_request::Message as Said;
use weir_proto::v1::{self, ProbeOutcome, ProbeTier};
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::gate::{Door, Gate};
use weir_tests::plane::{self, ADMIN_TOKEN};
use weir_tests::stack::Stack;

const GW1: &str = "token-of-gateway-1-of-the-tests";
const GW2: &str = "token-of-gateway-2-of-the-tests";

async fn channel(url: &str) -> Channel {
    Channel::from_shared(url.to_owned()).expect("a URL").connect().await.expect("connects")
}

fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a value"));
    request
}

fn hello(id: &str, incarnation: &str) -> v1::Hello {
    v1::Hello { gateway_id: id.into(), incarnation: incarnation.into(), ..v1::Hello::default() }
}

/// A stream of either kind; it ends when its sender is dropped.
struct Open<Q, A> {
    said: mpsc::Sender<Q>,
    heard: Streaming<A>,
}

impl<Q, A> Open<Q, A> {
    /// How the stream ended.
    async fn end(mut self) -> Code {
        let ended = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                match self.heard.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Code::Ok,
                    Err(status) => return status.code(),
                }
            }
        });
        ended.await.expect("it ends")
    }
}

type Configuration = Open<v1::StreamConfigRequest, v1::StreamConfigResponse>;
type Reports = Open<v1::StreamReportsRequest, v1::StreamReportsResponse>;

async fn say_hello(url: &str, token: &str, hello: v1::Hello) -> Configuration {
    let (said, requests) = mpsc::channel(4);
    said.try_send(v1::StreamConfigRequest { message: Some(Said::Hello(hello)) }).expect("room");
    let mut client = DiscoveryServiceClient::new(channel(url).await);
    let heard = client.stream_config(with(token, ReceiverStream::new(requests))).await.expect("opens");
    Open { said, heard: heard.into_inner() }
}

async fn report(url: &str, token: &str, first: v1::StreamReportsRequest) -> Reports {
    let (said, requests) = mpsc::channel(4);
    said.try_send(first).expect("room");
    let mut client = ReportServiceClient::new(channel(url).await);
    let heard = client.stream_reports(with(token, ReceiverStream::new(requests))).await.expect("opens");
    Open { said, heard: heard.into_inner() }
}

/// Waits for a part of the configuration.
async fn is_served(configuration: &mut Configuration) {
    let heard = tokio::time::timeout(Duration::from_secs(60), configuration.heard.message()).await;
    heard.expect("soon").expect("no refusal").expect("something");
}

/// The gateways that the control plane knows: id, incarnation and whether it is connected.
async fn gateways(plane: &plane::Plane) -> Vec<(String, String, bool)> {
    let list =
        plane.admin().await.list_gateways(v1::ListGatewaysRequest {}).await.expect("listed").into_inner();
    list.gateways.into_iter().map(|g| (g.id, g.incarnation, g.connected)).collect()
}

fn of(id: &str, incarnation: &str) -> v1::StreamReportsRequest {
    v1::StreamReportsRequest {
        gateway_id: id.into(),
        incarnation: incarnation.into(),
        sequence: 1,
        ..Default::default()
    }
}

/// A control plane with nothing to tell, and a gateway that stops to report.
#[tokio::test]
async fn a_report_stream_hears_something_every_ten_seconds_and_ends_when_nothing_is_reported() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let mut reports = report(&plane.url, ADMIN_TOKEN, of("gwx", "real")).await;
    let (opened, mut heard, mut silence) = (Instant::now(), Instant::now(), Duration::ZERO);
    let ended = loop {
        let next = tokio::time::timeout(Duration::from_secs(60), reports.heard.message()).await;
        match next.expect("neither a message nor an end") {
            Ok(Some(_)) => {
                silence = silence.max(heard.elapsed());
                heard = Instant::now();
            }
            other => break other,
        }
    };
    assert_eq!(ended.expect_err("it is ended").code(), Code::DeadlineExceeded);
    let lasted = opened.elapsed();
    println!("ended after {lasted:?}; the longest silence was {silence:?}");
    assert!(lasted >= Duration::from_secs(25), "a report may be late: {lasted:?}");
    assert!(silence < Duration::from_secs(20), "a gateway takes 30 s of it for the end: {silence:?}");
}

#[tokio::test]
async fn a_shared_token_cannot_take_the_id_of_a_gateway_that_is_connected() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let mut real = say_hello(&plane.url, ADMIN_TOKEN, hello("gwx", "real")).await;
    is_served(&mut real).await;
    let _reports = report(&plane.url, ADMIN_TOKEN, of("gwx", "real")).await;
    for status_only in [false, true] {
        let rogue = v1::Hello { status_only, ..hello("gwx", "rogue") };
        assert_eq!(say_hello(&plane.url, ADMIN_TOKEN, rogue).await.end().await, Code::Aborted);
    }
    eventually("its reports are taken", || async {
        report(&plane.url, ADMIN_TOKEN, of("gwx", "rogue")).await.end().await == Code::Aborted
    })
    .await;
    assert_eq!(gateways(&plane).await, [("gwx".to_owned(), "real".to_owned(), true)]);
    // The process itself reconnects before its dead connection is noticed.
    let mut again = say_hello(&plane.url, ADMIN_TOKEN, hello("gwx", "real")).await;
    is_served(&mut again).await;
    assert_eq!(real.end().await, Code::Aborted);
    // After it has left, a new process gets its id at once.
    drop(again);
    eventually("the next process is taken", || async {
        let mut next = say_hello(&plane.url, ADMIN_TOKEN, hello("gwx", "next")).await;
        matches!(next.heard.message().await, Ok(Some(_)))
    })
    .await;
}

#[tokio::test]
async fn a_token_of_one_gateway_speaks_for_no_other_and_nobody_else_for_it() {
    let data = tempfile::tempdir().expect("a directory");
    let tokens = tempfile::tempdir().expect("a directory");
    let write = |id: &str, token: &str| std::fs::write(tokens.path().join(id), token).expect("written");
    write("gw-1", GW1);
    let directory = tokens.path().to_str().expect("UTF-8");
    let plane =
        plane::start_with("127.0.0.1:0", data.path(), None, &["--gateway-tokens-dir", directory]).await;
    let mut real = say_hello(&plane.url, GW1, hello("gw-1", "1")).await;
    is_served(&mut real).await;
    for (id, token) in [("gw-2", GW1), ("gw-1", ADMIN_TOKEN)] {
        let refused = say_hello(&plane.url, token, hello(id, "2")).await.end().await;
        assert_eq!(refused, Code::PermissionDenied, "hello as {id}");
        let refused = report(&plane.url, token, of(id, "2")).await.end().await;
        assert_eq!(refused, Code::PermissionDenied, "reports as {id}");
    }
    let mut admin = weir_proto::v1::admin_service_client::AdminServiceClient::new(channel(&plane.url).await);
    let refused = admin.list_gateways(with(GW1, v1::ListGatewaysRequest {})).await.expect_err("no operator");
    assert_eq!(refused.code(), Code::PermissionDenied);
    // Its next process takes over, whatever happened to the last one.
    let mut next = say_hello(&plane.url, GW1, hello("gw-1", "2")).await;
    is_served(&mut next).await;
    assert_eq!(real.end().await, Code::Aborted);
    // Gateways can be added and removed without a restart.
    write("gw-2", GW2);
    eventually("a new token is known", || async {
        let mut client = DiscoveryServiceClient::new(channel(&plane.url).await);
        let silent = with(GW2, tokio_stream::pending::<v1::StreamConfigRequest>());
        client.stream_config(silent).await.is_ok()
    })
    .await;
    let mut added = say_hello(&plane.url, GW2, hello("gw-2", "1")).await;
    is_served(&mut added).await;
    std::fs::remove_file(tokens.path().join("gw-1")).expect("removed");
    assert_eq!(next.end().await, Code::Unauthenticated, "its stream ends with its token");
}

#[tokio::test]
async fn one_token_is_one_observer_however_many_gateway_ids_it_uses() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let issue = v1::IssueTokenRequest {
        name: "liar".into(),
        role: v1::Role::Gateway.into(),
        gateway_id: "liar".into(),
        ..Default::default()
    };
    let token = plane.admin().await.issue_token(issue).await.expect("issued").into_inner().secret;
    for n in 0..10 {
        let id = format!("liar-{n}");
        assert_eq!(
            report(&plane.url, &token, of(&id, "1")).await.end().await,
            Code::PermissionDenied,
            "{id}"
        );
    }
    let mut own = report(&plane.url, &token, of("liar", "1")).await;
    assert!(own.heard.message().await.expect("taken").is_some());
    drop(own);
}

#[tokio::test]
async fn what_a_gateway_says_of_itself_is_short_and_plain() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let long = "x".repeat(200);
    for id in ["", " ", "a b", "a\nb", "a\u{1b}[31m", "\u{202e}gw", &long] {
        let refused = say_hello(&plane.url, ADMIN_TOKEN, hello(id, "1")).await.end().await;
        assert_eq!(refused, Code::InvalidArgument, "hello as {id:?}");
        let refused = report(&plane.url, ADMIN_TOKEN, of(id, "1")).await.end().await;
        assert_eq!(refused, Code::InvalidArgument, "reports as {id:?}");
    }
    for text in [long.as_str(), "a\nb", "\u{1b}]0;x\u{7}"] {
        for hello in [
            v1::Hello { region: text.into(), ..hello("g", "1") },
            v1::Hello { build: text.into(), ..hello("g", "1") },
            hello("g", text),
        ] {
            let refused = say_hello(&plane.url, ADMIN_TOKEN, hello).await.end().await;
            assert_eq!(refused, Code::InvalidArgument, "{text:?}");
        }
    }
    assert!(gateways(&plane).await.is_empty(), "none of them is shown");
}

#[tokio::test]
async fn streams_of_one_gateways_token_are_bounded() {
    let data = tempfile::tempdir().expect("a directory");
    let tokens = tempfile::tempdir().expect("a directory");
    std::fs::write(tokens.path().join("gw-1"), GW1).expect("written");
    let directory = tokens.path().to_str().expect("UTF-8");
    let plane =
        plane::start_with("127.0.0.1:0", data.path(), None, &["--gateway-tokens-dir", directory]).await;
    let mut client = ReportServiceClient::new(channel(&plane.url).await);
    let mut held = Vec::new();
    let refused = loop {
        // It sends nothing at first, so that no stream replaces another.
        let (said, requests) = mpsc::channel::<v1::StreamReportsRequest>(1);
        match client.stream_reports(with(GW1, ReceiverStream::new(requests))).await {
            Ok(heard) => held.push((said, heard)),
            Err(status) => break status.code(),
        }
        assert!(held.len() < 1000, "no bound on the streams of one gateway");
    };
    assert_eq!((refused, held.len()), (Code::ResourceExhausted, 4));
}

const BACKENDS: usize = 5;

/// Two honest gateways, one that lies, and five backends.
struct World {
    stack: Stack,
    gates: Vec<Gate>,
    url: String,
    token: String,
    _end: tokio_util::sync::DropGuard,
}

impl World {
    async fn start(honest: usize) -> Self {
        let end = CancellationToken::new();
        let mut gates = Vec::new();
        for _ in 0..BACKENDS {
            let config = mock_llm::Config { models: vec!["gpt-4.1".into()], ..Default::default() };
            gates.push(Gate::start(mock(config, &end).await.address, &end).await);
        }
        let mut manifest = "kind: pool\nname: chat\nspec:\n  health: { liveness_interval: 1s, timeout: 1s, \
                            readiness_interval: 1s, slow_start: 2s, paid_probes_per_hour: 100000 }\n"
            .to_owned();
        for (i, gate) in gates.iter().enumerate() {
            manifest += &format!(
                "---\nkind: backend\nname: b{i}\nspec: {{ pool: chat, url: \"http://{}\", models: {{ gpt-4.1: \"\" }} }}\n",
                gate.address
            );
        }
        manifest += "---\nkind: model\nname: gpt-4.1\nspec: { pool: chat }\n---\nkind: tenant\nname: acme\nspec: {}\n";
        let stack = Stack::start(honest, &manifest).await;
        let url = format!("http://{}", stack.control_plane.text("grpc"));
        let issued = stack.weir(&["token", "create", "liar", "--role", "gateway", "--gateway", "liar"]).await;
        let token = issued.split_whitespace().last().expect("a secret").to_owned();
        let world = Self { stack, gates, url, token, _end: end.drop_guard() };
        world.until("healthy").await;
        world
    }

    /// The states of all backends.
    async fn states(&self) -> Vec<String> {
        let text = self.stack.weir(&["-o", "json", "backends"]).await;
        let told: Value = serde_json::from_str(&text).expect("JSON");
        let rows = told.as_array().expect("a list").iter();
        rows.map(|row| row["health"].as_str().expect("a state").to_owned()).collect()
    }

    async fn until(&self, state: &str) {
        eventually(&format!("all are {state}"), || self.are(state)).await;
    }

    async fn are(&self, state: &str) -> bool {
        let states = self.states().await;
        states.len() == BACKENDS && states.iter().all(|s| s == state)
    }

    /// Reports the same of every backend, in every way, until it is dropped.
    async fn lie(&self, outcome: ProbeOutcome) -> tokio::task::JoinHandle<()> {
        let dead = outcome != ProbeOutcome::Pass;
        let lie = move |sequence: u64| {
            let name = |i: usize| format!("b{i}");
            let results = (0..BACKENDS).flat_map(|i| {
                [ProbeTier::Liveness, ProbeTier::Readiness].map(|tier| v1::ProbeResult {
                    backend: name(i),
                    tier: tier.into(),
                    outcome: outcome.into(),
                    detail: "a lie".into(),
                    ..Default::default()
                })
            });
            let backends = (0..BACKENDS).map(|i| v1::BackendReport {
                backend: name(i),
                successes: u64::from(!dead) * 10,
                in_flight: u32::from(!dead) * 3,
                answering: !dead,
                connect_failures: u64::from(dead) * 10,
                ejected: dead,
                ..Default::default()
            });
            v1::StreamReportsRequest {
                gateway_id: "liar".into(),
                incarnation: "1".into(),
                sequence,
                can_probe: true,
                probe_results: results.collect(),
                backends: backends.collect(),
                ..Default::default()
            }
        };
        let mut configuration = say_hello(&self.url, &self.token, hello("liar", "1")).await;
        is_served(&mut configuration).await;
        let mut reports = report(&self.url, &self.token, lie(1)).await;
        tokio::spawn(async move {
            let mut sequence = 1;
            // Its stream ends with its reports.
            let _said = configuration.said;
            loop {
                tokio::select! {
                    heard = reports.heard.message() => if !matches!(heard, Ok(Some(_))) { return },
                    heard = configuration.heard.message() => if !matches!(heard, Ok(Some(_))) { return },
                    () = tokio::time::sleep(Duration::from_millis(100)) => {
                        sequence += 1;
                        if reports.said.send(lie(sequence)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        })
    }
}

#[tokio::test]
async fn one_liar_of_three_gateways_ejects_nothing() {
    let world = World::start(2).await;
    let liar = world.lie(ProbeOutcome::Refused).await;
    // Long enough for suspicion, its confirmation and a second round after the liar was outvoted.
    let end = tokio::time::Instant::now() + Duration::from_secs(12);
    while tokio::time::Instant::now() < end {
        let states = world.states().await;
        assert!(!states.iter().any(|state| state == "unhealthy"), "{states:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(!liar.is_finished(), "it was heard all the time");
    let events = world.stack.weir(&["-o", "json", "events"]).await;
    assert!(events.contains("liar"), "it was suspected of seeing things alone: {events}");
    liar.abort();
}

#[tokio::test]
async fn one_liar_of_three_gateways_keeps_no_dead_backend_in_use() {
    tokio::join!(is_found_dead_beside_a_liar(Door::Broken), is_found_dead_beside_a_liar(Door::Silent));
}

async fn is_found_dead_beside_a_liar(door: Door) {
    let world = World::start(2).await;
    let liar = world.lie(ProbeOutcome::Pass).await;
    for gate in &world.gates {
        gate.set("*", door);
    }
    // In the first seconds the control plane's last probe is still a pass. It is older than the first failure, so it
    // is no second vote beside the liar's. On a quiet machine this takes seconds.
    let dead = tokio::time::timeout(Duration::from_secs(120), async {
        while !world.are("unhealthy").await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(dead.await.is_ok(), "in use after two minutes");
    assert!(!liar.is_finished(), "it was heard all the time");
    liar.abort();
}
