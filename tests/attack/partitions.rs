//! Broken, silent and one-way connections to the control plane, to Redis and to a backend, while requests and streams
//! run.

use std::net::SocketAddr;
use std::time::Duration;

use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Resources, mock};
use weir_tests::eventually;
use weir_tests::line::Line;
use weir_tests::redis::Redis;

use crate::fleet::{CHAT, Fleet, Traffic, plenty, roomy};

const PAUSE: Duration = Duration::from_millis(10);
/// A change is everywhere within this time after a connection is repaired. The longest pause between two attempts to
/// connect is 5 s. A silent connection is found dead within 20 s, but continues if its line is repaired before.
const CONVERGED: Duration = Duration::from_secs(15);

/// A fault of a connection: its name and the action.
type Fate = (&'static str, fn(&Line));

const FATES: [Fate; 4] = [
    ("reset", Line::cut),
    ("a black hole", Line::silence),
    ("one-way, nothing arrives", Line::silence_to_server),
    ("one-way, nothing comes back", Line::silence_to_client),
];

fn address(url: &str) -> SocketAddr {
    url.trim_start_matches("http://").parse().expect("an address")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_cut_off_from_the_control_plane_in_any_way_serves_on_and_catches_up() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let mut fleet = Fleet::start(0, &resources, |_, _| {}).await;
    let way = Line::to(address(&fleet.plane.url), &end).await;
    fleet.join(1, |_, config| config.control_plane = format!("http://{}", way.address)).await;
    let traffic = Traffic::start(&fleet.clients(), 4, PAUSE);
    for (fate, happens) in FATES {
        traffic.more(20).await;
        happens(&way);
        traffic.more(50).await;
        let before = fleet.gateways[0].running.live.snapshot().revision;
        let revision = fleet.touch(fate).await;
        traffic.more(50).await;
        if !fate.contains("nothing arrives") {
            assert_eq!(
                fleet.gateways[0].running.live.snapshot().revision,
                before,
                "{fate}: it hears nothing"
            );
        }
        way.mend();
        let mended = Instant::now();
        let live = &fleet.gateways[0].running.live;
        let mut revisions = live.revisions();
        let caught_up = tokio::time::timeout(CONVERGED, revisions.wait_for(|now| *now >= revision)).await;
        caught_up.unwrap_or_else(|_| panic!("{fate}: not within {CONVERGED:?}")).expect("lives");
        eprintln!("control plane, {fate}: caught up after {:?}", mended.elapsed());
    }
    traffic.end().await.only(&[200], "without the control plane");
}

/// A server that accepts connections and streams, answers pings, and says nothing to any stream. Gives its address.
async fn mute(end: &CancellationToken) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = listener.local_addr().expect("an address");
    let serve = async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                let mut held = Vec::new();
                while let Some(Ok(opened)) = connection.accept().await {
                    held.push(opened);
                }
            });
        }
    };
    let end = end.clone();
    tokio::spawn(async move { end.run_until_cancelled(serve).await });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_accepts_streams_and_says_nothing_is_left_for_another() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let mocks = [mock(roomy(), &end).await];
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let mut fleet = Fleet::start(0, &resources, |_, _| {}).await;
    let mute = mute(&end).await;
    let began = Instant::now();
    // Gateways spread over control planes by their ids; g0 begins with this one.
    let both = format!("http://{mute},{}", fleet.plane.url);
    fleet.join(1, |_, config| config.control_plane = both.clone()).await;
    let took = began.elapsed();
    println!("served by the other one after {took:?}");
    assert!(took >= Duration::from_secs(20), "it began with the other one, so nothing was tried: {took:?}");
    assert_eq!(fleet.gateways[0].client.chat(CHAT).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_cut_off_from_redis_in_any_way_fails_no_request_and_comes_back() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let redis = Redis::start().await;
    let way = Line::to(redis.address(), &end).await;
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let url = format!("redis://{}", way.address);
    let fleet = Fleet::start(1, &resources, |_, config| config.redis = Some(url.clone())).await;
    let traffic = Traffic::start(&fleet.clients(), 4, PAUSE);
    for (fate, happens) in FATES {
        traffic.more(20).await;
        let before = fleet.outages().await;
        happens(&way);
        eventually(fate, || async { fleet.outages().await > before }).await;
        traffic.more(100).await;
        way.mend();
        let mended = Instant::now();
        fleet.uses_redis().await;
        eprintln!("redis, {fate}: used again after {:?}", mended.elapsed());
    }
    let counts = traffic.end().await;
    counts.only(&[200], "without Redis");
    eventually("every lease is given back", || async { redis.standing("acme").await.leases == 0 }).await;
}

/// One of two backends is cut off, in every direction: requests go to the other one, and cut streams report it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_cut_off_in_any_way_costs_no_request_that_has_no_answer_yet() {
    const ENDLESS: &str = r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"messages":[{"role":"user","content":"hi"}]}"#;
    let end = CancellationToken::new();
    let slow = mock_llm::Config { decode_tokens_per_s: 50.0, output_tokens: 1_000_000, ..roomy() };
    let mocks = [mock(roomy(), &end).await, mock(roomy(), &end).await, mock(slow, &end).await];
    let ways = [Line::to(mocks[0].address, &end).await, Line::to(mocks[2].address, &end).await];
    let mut resources = Resources::limited(&mocks, 10_000, plenty());
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    resources.rebuild("chat", |spec| {
        let Spec::Pool(pool) = spec else { panic!("a pool") };
        pool.hedging = Some(v1::Hedging { unary: true, ..Default::default() });
        // Few requests, because the retry budget of a quiet pool is not the subject.
        pool.retry_budget = Some(v1::RetryBudget { percent: 100, min_per_second: 100, ..Default::default() });
        let timeouts = v1::Timeouts { connect: seconds(2), idle: seconds(2), ..Default::default() };
        pool.timeouts = Some(timeouts);
    });
    resources.put("streams", Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() }));
    for (name, url, model) in [
        ("b0", ways[0].address, "gpt-4.1"),
        ("b1", mocks[1].address, "gpt-4.1"),
        ("b2", ways[1].address, "streams"),
    ] {
        resources.rebuild(name, |spec| {
            let Spec::Backend(backend) = spec else { panic!("a backend") };
            backend.url = format!("http://{url}");
            backend.models = [(model.to_owned(), "gpt-4.1".to_owned())].into();
        });
    }
    let fleet = Fleet::start(1, &resources, |_, _| {}).await;
    let client = &fleet.gateways[0].client;
    // There are no hedges before the backend is known.
    while mocks[..2].iter().any(|mock| mock.handle.counters().requests < 60) {
        assert_eq!(client.chat(CHAT).await.status, StatusCode::OK);
    }
    for (fate, happens) in FATES {
        // Both backends are used.
        eventually("the backend is used", || async {
            let before = mocks[0].handle.counters().requests;
            for _ in 0..4 {
                assert_eq!(client.chat(CHAT).await.status, StatusCode::OK, "{fate}");
            }
            mocks[0].handle.counters().requests > before
        })
        .await;
        let endless = ENDLESS.replace("gpt-4.1", "streams");
        eventually("the backend of streams is used", || async {
            client
                .try_chat(&CHAT.replace("gpt-4.1", "streams"))
                .await
                .is_ok_and(|a| a.status == StatusCode::OK)
        })
        .await;
        let answer = client.send(Method::POST, "/v1/chat/completions", endless).await;
        assert_eq!(answer.status(), StatusCode::OK, "{fate}");
        let mut stream = answer.into_body();
        stream.frame().await.expect("a chunk").expect("whole");
        ways.iter().for_each(happens);
        let traffic = Traffic::start(std::slice::from_ref(client), 2, PAUSE);
        traffic.more(60).await;
        if fate.contains("nothing arrives") {
            // Its bytes still arrive: the stream continues until its client leaves.
            stream.frame().await.expect("a chunk").expect("whole");
            drop(stream);
        } else {
            let rest = tokio::time::timeout(Duration::from_secs(10), stream.collect()).await;
            let rest = rest.unwrap_or_else(|_| panic!("{fate}: the stream hangs")).expect("ends with a word");
            let rest = String::from_utf8(rest.to_bytes().to_vec()).expect("text");
            assert!(rest.contains("\"error\"") && !rest.contains("[DONE]"), "{fate}: {rest}");
        }
        let counts = traffic.end().await;
        counts.only(&[200], fate);
        eprintln!("backend, {fate}: the slowest request took {:?}", counts.slowest);
        ways.iter().for_each(Line::mend);
    }
    let in_flight = async || fleet.gateways[0].metric("weir_requests_in_flight", "").await;
    eventually("nothing is left", || async { in_flight().await == 0.0 }).await;
}
