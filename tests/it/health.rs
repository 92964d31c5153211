//! One verdict for the cluster: faults that some gateways see, faults that all see, and the operator's settings.

use std::time::Duration;

use http::StatusCode;
use mock_llm::Config;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::HealthState;
use weir_tests::cluster::{Resources, gateway, mock};
use weir_tests::eventually;
use weir_tests::gate::{Door, Gate};
use weir_tests::stack::{CREDENTIAL, Stack};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

/// A pool with frequent probes, so that a test does not wait for regular rounds.
fn manifest(gates: &[Gate]) -> String {
    let mut text = "kind: pool\nname: chat\nspec:\n  health: { liveness_interval: 1s, timeout: 1s, readiness_interval: 1s, \
                    slow_start: 2s, paid_probes_per_hour: 100000 }\n"
        .to_owned();
    for (i, gate) in gates.iter().enumerate() {
        text += &format!(
            "---\nkind: backend\nname: b{i}\nspec: {{ pool: chat, url: \"http://{}\", credential: \"env:{CREDENTIAL}\", \
             models: {{ gpt-4.1: \"\" }} }}\n",
            gate.address
        );
    }
    text + "---\nkind: model\nname: gpt-4.1\nspec: { pool: chat }\n---\nkind: tenant\nname: acme\nspec: {}\n"
}

struct World {
    stack: Stack,
    gates: Vec<Gate>,
    _end: tokio_util::sync::DropGuard,
}

impl World {
    async fn start(gateways: usize, backends: usize) -> Self {
        Self::with(gateways, backends, Config::default()).await
    }

    async fn with(gateways: usize, backends: usize, config: Config) -> Self {
        let end = CancellationToken::new();
        let mut gates = Vec::new();
        for _ in 0..backends {
            let config = Config { models: vec!["gpt-4.1".into()], ..config.clone() };
            gates.push(Gate::start(mock(config, &end).await.address, &end).await);
        }
        let stack = Stack::start(gateways, &manifest(&gates)).await;
        let world = Self { stack, gates, _end: end.drop_guard() };
        for i in 0..backends {
            world.until(i, "healthy").await;
        }
        world
    }

    async fn json(&self, args: &[&str]) -> Value {
        let args = [&["-o", "json"], args].concat();
        serde_json::from_str(&self.stack.weir(&args).await).expect("JSON")
    }

    async fn state(&self, backend: usize) -> String {
        let backends = self.json(&["backends"]).await;
        backends[backend]["health"].as_str().expect("a state").to_owned()
    }

    async fn until(&self, backend: usize, state: &str) {
        eventually(&format!("b{backend} is {state}"), async || self.state(backend).await == state).await;
    }

    /// Messages of events of a kind about a subject.
    async fn events(&self, subject: &str, kind: &str) -> Vec<String> {
        let events = self.json(&["events", subject]).await;
        let events = events.as_array().expect("a list").iter().filter(|event| event["kind"] == kind);
        events.map(|event| event["message"].as_str().expect("text").to_owned()).collect()
    }

    async fn falls(&self, backend: &str) -> u64 {
        let events = self.json(&["events", backend]).await;
        let fell = |event: &&Value| {
            event["message"].as_str().is_some_and(|message| message.contains("-> unhealthy"))
        };
        let fell = events.as_array().expect("a list").iter().filter(fell);
        fell.map(|event| event["count"].as_u64().expect("a count")).sum()
    }

    /// Gateway `k` serves although the first so many backends hang, for it alone.
    async fn serves_while_hanging(&self, k: usize, backends: usize) {
        let gateway = format!("gateway-{k}");
        self.gates[..backends].iter().for_each(|gate| gate.set(&gateway, Door::Silent));
        let mut requests = JoinSet::new();
        for _ in 0..6 {
            let client = self.stack.client(k);
            requests.spawn(async move { client.chat(CHAT).await });
        }
        let answered = async {
            while let Some(answer) = requests.join_next().await {
                let answer = answer.expect("no panic");
                assert_eq!(answer.status, StatusCode::OK, "{gateway}: {}", answer.text());
            }
        };
        tokio::time::timeout(ANSWERED_WITHIN, answered).await.expect("no request waits for its total");
        for (i, gate) in self.gates[..backends].iter().enumerate() {
            gate.set(&gateway, Door::Open);
            assert_eq!(self.falls(&format!("b{i}")).await, 0);
        }
    }

    /// Every gateway serves.
    async fn all_serve(&self, requests: usize) {
        for k in 0..self.stack.gateways.len() {
            let client = self.stack.client(k);
            for i in 0..requests {
                let answer = client.chat(CHAT).await;
                assert_eq!(answer.status, StatusCode::OK, "gateway {k}, request {i}: {}", answer.text());
            }
        }
    }
}

#[tokio::test]
async fn what_some_gateways_alone_see_ejects_nothing_and_what_all_see_does() {
    let world = World::start(5, 2).await;
    // One of five gateways is cut off from a healthy backend.
    world.gates[0].set("gateway-0", Door::Broken);
    eventually("the others are asked and outvote it", async || {
        let cleared = world.events("b0", "suspect_cleared").await;
        cleared.iter().any(|message| message.contains("for gateway-0 alone"))
    })
    .await;
    world.all_serve(5).await;
    // Three of five; two still reach it.
    for gateway in ["gateway-1", "gateway-2"] {
        world.gates[0].set(gateway, Door::Silent);
    }
    eventually("they are outvoted too", async || {
        let cleared = world.events("b0", "suspect_cleared").await;
        ["gateway-1", "gateway-2"]
            .iter()
            .any(|g| cleared.iter().any(|m| m.contains(&format!("for {g} alone"))))
    })
    .await;
    world.all_serve(3).await;
    assert_eq!(world.falls("b0").await, 0, "{:?}", world.events("b0", "state").await);
    // No gateway reaches it.
    world.gates[0].set("*", Door::Broken);
    for k in 0..5 {
        world.gates[0].set(&format!("gateway-{k}"), Door::Broken);
    }
    world.until(0, "unhealthy").await;
    world.all_serve(3).await;
    let why = world.json(&["why", "b0"]).await;
    // No completion arrives either: whichever round comes first.
    let rule = why["status"]["rule"].as_str().expect("a rule");
    assert!(["liveness_quorum", "readiness_quorum"].contains(&rule), "{why:#}");
    assert!(why["votes"].as_array().expect("votes").len() >= 2, "{why:#}");
    assert!(why["may_return_time"].is_string(), "{why:#}");
    // And back, slowly.
    world.gates[0].set("*", Door::Open);
    for k in 0..5 {
        world.gates[0].set(&format!("gateway-{k}"), Door::Open);
    }
    world.until(0, "healthy").await;
    let states = world.events("b0", "state").await;
    assert!(states.iter().any(|message| message.contains("unhealthy -> recovering")), "{states:?}");
    assert_eq!(world.falls("b1").await, 0);
}

/// A unary answer has no clock but its total, an hour. Which of the gateways probe the backend is the control plane's choice:
/// the others have it probed by themselves while their requests wait.
#[tokio::test]
async fn a_request_that_one_gateway_alone_sees_hang_is_answered_by_another_backend() {
    let world = World::start(4, 2).await;
    for gateway in 0..4 {
        world.serves_while_hanging(gateway, 1).await;
    }
}

#[tokio::test]
async fn where_two_backends_hang_for_one_gateway_alone_a_third_one_answers() {
    let world = World::start(4, 3).await;
    for gateway in 0..2 {
        world.serves_while_hanging(gateway, 2).await;
    }
}

/// Two probes that time out after a second each, and room for a machine that is busy.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);

/// The number of repetitions: twenty, which take half a minute, or `WEIR_TEST_TRIALS`.
fn trials() -> usize {
    std::env::var("WEIR_TEST_TRIALS").map_or(20, |text| text.parse().expect("a number of trials"))
}

/// Concurrent trials: each has processes of its own, and mostly waits for probes.
const TRIALS_AT_ONCE: usize = 3;

#[tokio::test]
async fn all_failing_readiness_keeps_serving_with_an_alarm_and_all_disabled_is_a_503() {
    let mut running = JoinSet::new();
    for _ in 0..trials() {
        if running.len() == TRIALS_AT_ONCE {
            running.join_next().await.expect("running").expect("no panic");
        }
        running.spawn(all_fail_and_are_then_disabled());
    }
    while let Some(done) = running.join_next().await {
        done.expect("no panic");
    }
}

async fn all_fail_and_are_then_disabled() {
    let world = World::start(2, 3).await;
    for gate in &world.gates {
        gate.set("*", Door::NotReady);
    }
    for i in 0..3 {
        world.until(i, "unhealthy").await;
    }
    let alarms = world.events("chat", "alarm").await;
    assert!(alarms.iter().any(|message| message.starts_with("panic")), "{alarms:?}");
    let backends = world.json(&["backends"]).await;
    assert!(backends.as_array().expect("all").iter().all(|b| b["overridden"] == true), "{backends:#}");
    world.all_serve(5).await;
    // The operator's settings are never overridden.
    for backend in ["b0", "b1", "b2"] {
        world.stack.weir(&["disable", backend]).await;
    }
    for k in 0..2 {
        let answer = world.stack.client(k).chat(CHAT).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (StatusCode::SERVICE_UNAVAILABLE, "no_backend_available")
        );
    }
}

#[tokio::test]
async fn p40_health_checks_outlive_changes_of_configuration() {
    let world = World::start(2, 2).await;
    for weight in ["10", "90", "100"] {
        world.stack.weir(&["weight", "b0", weight]).await;
    }
    world.gates[0].set("*", Door::Broken);
    world.until(0, "unhealthy").await;
    world.stack.weir(&["weight", "b1", "50"]).await;
    world.gates[0].set("*", Door::Open);
    world.until(0, "healthy").await;
    assert_eq!(world.falls("b1").await, 0);
}

#[tokio::test]
async fn a_model_that_embeds_alone_is_asked_for_an_embedding() {
    let world = World::with(2, 1, Config { embeds_only: true, ..Config::default() }).await;
    let detail = async || {
        let why = world.json(&["why", "b0"]).await;
        let votes = why["votes"].as_array().expect("votes").clone();
        votes
            .iter()
            .filter(|vote| vote["tier"] == "readiness")
            .map(|vote| vote["detail"].clone())
            .collect::<Vec<_>>()
    };
    eventually("it is asked for one", async || detail().await.iter().any(|d| d == "embedded one input"))
        .await;
    world.gates[0].set("*", Door::NotReady);
    world.until(0, "unhealthy").await;
}

#[tokio::test]
async fn what_was_known_survives_a_restart_of_the_control_plane() {
    let mut world = World::start(3, 2).await;
    world.gates[0].set("*", Door::Broken);
    world.until(0, "unhealthy").await;
    let (code, before) = (world.falls("b0").await, world.state(1).await);
    assert_eq!((code, before.as_str()), (1, "healthy"));
    world.stack.restart_control_plane().await;
    assert_eq!(world.state(0).await, "unhealthy", "known from the first moment");
    assert_eq!(world.falls("b0").await, 0, "and not found anew");
    world.gates[0].set("*", Door::Open);
    world.until(0, "healthy").await;
    world.all_serve(2).await;
}

#[tokio::test]
async fn without_a_control_plane_a_gateway_finds_a_dead_backend_by_itself() {
    let (end, death) = (CancellationToken::new(), CancellationToken::new());
    let config = || Config { models: vec!["gpt-4.1".into()], ..Config::default() };
    let mocks = [mock(config(), &end).await, mock(config(), &death).await];
    let alone = gateway(&Resources::in_front_of(&mocks), None).await;
    death.cancel();
    let health = |name: &str| {
        let snapshot = alone.running.live.snapshot();
        snapshot.backends.get(name).expect("configured").state.health()
    };
    eventually("its own probes say so", async || health("b1") == HealthState::Unhealthy).await;
    assert_ne!(health("b0"), HealthState::Unhealthy);
    assert_eq!(mocks[0].handle.counters().requests, 0, "alone it asks no model for anything");
}
