//! The same in `weir up` with two gateways and a control plane, under traffic: what clients see, what `weir why` shows, and who
//! is left out.

use std::fmt::Write as _;
use std::sync::atomic::AtomicUsize;

use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use weir_tests::process::{Up, up_with};

use super::*;

/// Between two requests for one model: 20 requests/s.
const PACE: Duration = Duration::from_millis(50);
/// Requests under way at once for one model: fewer than there are slots.
const IN_FLIGHT_MAX: usize = 8;
/// A server that lists no models says nothing of which it has.
const NO_MODELS: &str = r#"{"object":"list","data":[]}"#;

/// What becomes of one of two backends.
struct Turn {
    /// Its pool's and model's name; its own is `NAME-bad`, that of the other one `NAME-well`.
    name: &'static str,
    /// Its answer from then on, also to probes.
    says: Vec<u8>,
    /// It answers everything else well.
    streams_only: bool,
    /// What `weir why` shows of it: outcome, status and what was seen.
    shown: [&'static str; 3],
}

fn turns() -> Vec<Turn> {
    let page = "<!DOCTYPE html><html><body>Please sign in.</body></html>";
    let key = error_body(
        "Incorrect API key provided: sk-abcdefghijkl.",
        "invalid_request_error",
        "invalid_api_key",
    );
    let boom = error_body("CUDA error: an illegal memory access", "InternalServerError", "");
    let waf = r#"{"message":"Forbidden"}"#;
    let turn = |name, says, shown| Turn { name, says, streams_only: false, shown };
    vec![
        turn("login", answer(200, &[HTML], page), ["invalid_answer", "200", "JSON"]),
        Turn {
            streams_only: true,
            ..turn(
                "login-streams",
                answer(200, &[HTML], page),
                ["invalid_answer", "200", "neither the event stream"],
            )
        },
        turn("error-json", answer(500, &[JSON], boom), ["server_error", "500", "illegal memory access"]),
        turn(
            "error-page",
            answer(500, &[HTML], "<html>Out of order</html>"),
            ["server_error", "500", "Out of order"],
        ),
        turn("firewall", answer(403, &[JSON], waf), ["server_error", "403", "Forbidden"]),
        turn(
            "key",
            answer(401, &[JSON], key),
            ["credential_refused", "401", "Incorrect API key provided: [redacted]"],
        ),
        turn("key-page", answer(401, &[HTML], page), ["credential_refused", "401", "Please sign in"]),
    ]
}

/// The part of an answer that HEAD gets.
fn head_of(answer: &[u8]) -> Vec<u8> {
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    answer[..end].to_vec()
}

/// A backend that answers well, until `turned` and as the turn says from then on.
async fn backend(end: &CancellationToken, turned: &Arc<AtomicBool>, turn: Option<&Turn>) -> Scripted {
    let turned = turned.clone();
    let (says, streams_only) =
        turn.map_or((None, false), |turn| (Some(turn.says.clone()), turn.streams_only));
    Scripted::start(end, move |asked, mut wire| {
        let is_turned = turned.load(Ordering::SeqCst) && (!streams_only || wants_stream(&asked));
        let says = match says.as_ref().filter(|_| is_turned) {
            Some(says) => says.clone(),
            None => well_said(&asked),
        };
        let says = if asked.head.starts_with("HEAD") { head_of(&says) } else { says };
        async move {
            wire.send(says).await;
            None
        }
    })
    .await
}

/// A good answer, to a probe too.
fn well_said(asked: &Asked) -> Vec<u8> {
    match asked.head.starts_with("POST") {
        true => good(asked),
        false => answer(200, &[JSON], NO_MODELS),
    }
}

/// A pool with a model and these backends.
fn pool(name: &str, backends: &[(&str, &Scripted)]) -> String {
    let mut text = format!(
        "---\nkind: pool\nname: {name}\nspec: {{}}\n---\nkind: model\nname: {name}\nspec: {{ pool: {name} }}\n"
    );
    for (backend, of) in backends {
        let _ = writeln!(
            text,
            "---\nkind: backend\nname: {name}-{backend}\nspec: {{ pool: {name}, url: \"http://{}\", models: {{ {name}: gpt-4.1 }} }}",
            of.address
        );
    }
    text
}

fn body(model: &str, stream: bool, text: &str) -> String {
    json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": text }] }).to_string()
}

/// Asks for a model so many times at 20 requests/s, at each gateway in turn, streams and whole answers; gives what was not as
/// it should be.
async fn traffic(clients: Vec<Client>, model: String, requests: usize) -> Vec<String> {
    let mut clock = tokio::time::interval(PACE);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut asked, mut wrong) = (JoinSet::new(), Vec::new());
    let mut note = |answer: Result<Answer, tokio::task::JoinError>| {
        let answer = answer.expect("no panic");
        let text = answer.text();
        if answer.status != StatusCode::OK || !text.contains("fine") || text.contains("\"error\"") {
            wrong.push(format!("{model}: {} {text}", answer.status));
        }
    };
    for n in 0..requests {
        clock.tick().await;
        // A machine that is slower than the pace is not to be overloaded.
        if asked.len() >= IN_FLIGHT_MAX
            && let Some(answer) = asked.join_next().await
        {
            note(answer);
        }
        let client = clients[n % clients.len()].clone();
        // A third, since a gateway that uses two backends in turn would send each second request to the same one.
        let body = body(&model, n / clients.len() % 3 == 1, "hi");
        asked.spawn(async move { client.chat(&body).await });
    }
    while let Some(answer) = asked.join_next().await {
        note(answer);
    }
    wrong
}

/// The same for all of these at once.
async fn traffic_for_all(clients: &[Client], models: &[&str], requests: usize) -> Vec<String> {
    let mut running = JoinSet::new();
    for model in models {
        running.spawn(traffic(clients.to_vec(), (*model).to_owned(), requests));
    }
    let mut wrong = Vec::new();
    while let Some(more) = running.join_next().await {
        wrong.extend(more.expect("no panic"));
    }
    wrong
}

/// All of Weir in front of these pools.
struct World {
    up: Up,
}

impl World {
    async fn start(pools: &str) -> Self {
        Self { up: up_with(2, pools).await }
    }

    fn clients(&self) -> [Client; 2] {
        [self.up.client(0), self.up.client(1)]
    }

    async fn weir(&self, args: &[&str]) -> String {
        let (code, out, err) = self.up.weir(args).await;
        assert_eq!(code, 0, "weir {args:?}: {err}");
        out
    }

    /// It was never left out: not by the cluster, and by no gateway.
    async fn assert_in_use(&self, backend: &str) {
        let status = self.up.backend(backend).await;
        assert_eq!((&status["health"], &status["ejected_by"]), (&json!("healthy"), &json!([])), "{status:#}");
        let events = self.up.json(&["events", backend]).await;
        let fell =
            |event: &Value| event["message"].as_str().is_some_and(|message| message.contains("-> unhealthy"));
        assert!(!events.as_array().expect("a list").iter().any(fell), "{events:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_backend_of_two_that_turns_bad_under_traffic_is_seen_by_no_client_and_named_by_why() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let (turned, turns) = (Arc::new(AtomicBool::new(false)), turns());
    let mut pools = String::new();
    for turn in &turns {
        let (bad, well) = (backend(&end, &turned, Some(turn)).await, backend(&end, &turned, None).await);
        pools += &pool(turn.name, &[("bad", &bad), ("well", &well)]);
    }
    let world = World::start(&pools).await;
    let clients = world.clients();
    let models: Vec<&str> = turns.iter().map(|turn| turn.name).collect();
    assert_eq!(traffic_for_all(&clients, &models, 20).await, [""; 0], "all is well");
    turned.store(true, Ordering::SeqCst);
    assert_eq!(traffic_for_all(&clients, &models, 120).await, [""; 0], "no client sees it");
    for turn in &turns {
        let bad = format!("{}-bad", turn.name);
        eventually(&format!("weir why {bad} shows {:?}", turn.shown), || async {
            let why = world.weir(&["why", &bad]).await;
            why.lines().any(|line| turn.shown.iter().all(|part| line.contains(part)))
        })
        .await;
        assert!(!world.weir(&["why", &bad]).await.contains("sk-abc"), "no key is shown");
        world.assert_in_use(&format!("{}-well", turn.name)).await;
    }
}

/// How a backend answers what it cannot answer. `None` closes the connection without a word.
fn poisoned(kind: usize) -> Option<Vec<u8>> {
    let error = || error_body("grammar: missing role", "InternalServerError", "");
    Some(match kind {
        0 => answer(500, &[JSON], error()),
        1 => answer(500, &[("content-type", "text/plain")], "Internal Server Error"),
        2 => answer(400, &[HTML], "<html>blocked by the firewall</html>"),
        3 => answer(400, &[JSON], error_body("bad grammar", "invalid_request_error", "")),
        4 => answer(200, &[JSON], error()),
        5 => answer(200, &[JSON], ""),
        6 => answer(403, &[JSON], r#"{"message":"Forbidden"}"#),
        _ => return None,
    })
}
const POISONS: usize = 8;

/// A backend that answers well what is no poison.
async fn may_be_poisoned(end: &CancellationToken) -> Scripted {
    Scripted::start(end, |asked, mut wire| {
        let text = String::from_utf8_lossy(&asked.body).into_owned();
        let kind = text.split_once("poison-").and_then(|(_, rest)| rest.get(..1)?.parse().ok());
        let says = match kind {
            Some(kind) => poisoned(kind),
            None => Some(well_said(&asked)),
        };
        let is_head = asked.head.starts_with("HEAD");
        async move {
            if let Some(says) = says {
                wire.send(if is_head { head_of(&says) } else { says }).await;
            }
            None
        }
    })
    .await
}

/// A caller that sends nothing but poison, one after the other, and counts it.
async fn poisons(client: Client, sent: Arc<AtomicUsize>) {
    loop {
        let n = sent.fetch_add(1, Ordering::SeqCst);
        let body = body("mixed", n.is_multiple_of(3), &format!("poison-{}", n % POISONS));
        let answer = client.chat(&body).await;
        let failed = answer.status != StatusCode::OK || answer.text().contains("\"error\"");
        assert!(failed, "poison {}: {}", n % POISONS, answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_poisoned_requests_beside_good_ones_eject_nobody() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let (one, two) = (may_be_poisoned(&end).await, may_be_poisoned(&end).await);
    let world = World::start(&pool("mixed", &[("one", &one), ("two", &two)])).await;
    let clients = world.clients();
    let (sent, mut callers) = (Arc::new(AtomicUsize::new(0)), JoinSet::new());
    for n in 0..6 {
        callers.spawn(poisons(clients[n % 2].clone(), sent.clone()));
    }
    for block in 0.. {
        let wrong = traffic_for_all(&clients, &["mixed"], 40).await;
        assert_eq!(wrong, [""; 0], "good requests are served all the while");
        if block >= 3 && sent.load(Ordering::SeqCst) >= 400 {
            break;
        }
    }
    assert!(callers.try_join_next().is_none(), "a caller has failed");
    for backend in ["mixed-one", "mixed-two"] {
        world.assert_in_use(backend).await;
    }
    // What failed is shown all the same.
    eventually("weir why shows a failed attempt", || async {
        world.weir(&["why", "mixed-one"]).await.contains("LAST FAILED ATTEMPT")
    })
    .await;
}
