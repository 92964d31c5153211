//! Slots, queue, cancellation, shutdown. Streams are held open by a hang in their middle, not by time.

use super::*;

async fn held(config: Config) -> Bench {
    let bench = Bench::start(config).await;
    bench.fault(json!({ "hang": { "at": "mid_stream" } }));
    bench
}

#[tokio::test]
async fn queue_overflow_is_429_and_the_waiting_go_on_in_turn() {
    let bench = held(Config { slots: 1, queue: 1, ..Config::default() }).await;
    let running = bench.open_stream("4").await;
    let waiting = bench.chat(json!({}));
    let overflow = async {
        bench.until(|counters| counters.waiting == 1).await;
        let metrics = bench.get("/metrics").await;
        assert!(metrics.text().contains("vllm:num_requests_waiting{model_name=\"mock-model\"} 1"));
        assert!(metrics.text().contains("vllm:num_requests_running{model_name=\"mock-model\"} 1"));
        assert!(!metrics.text().contains("vllm:kv_cache_usage_perc{model_name=\"mock-model\"} 0\n"));
        let reply = bench.chat(json!({})).await;
        assert_eq!((reply.status.as_u16(), &reply.headers["retry-after"]), (429, &"1".parse().unwrap()));
        assert_eq!(reply.json()["error"]["code"], "rate_limit_exceeded");
        bench.handle.clear_faults();
    };
    let (waited, ()) = tokio::join!(waiting, overflow);
    assert_eq!(waited.status, 200);
    assert!(collect(running).await.complete);
    let counters = bench.handle.counters();
    assert_eq!((counters.rejected, counters.max_in_flight, counters.in_flight), (1, 1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_flight_never_exceeds_slots() {
    let config = Config { slots: 3, queue: 1000, decode_tokens_per_s: 20_000.0, ..Config::default() };
    let bench = std::sync::Arc::new(Bench::start(config).await);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..60 {
        let bench = std::sync::Arc::clone(&bench);
        clients.spawn(async move {
            bench.chat(json!({ "stream": client % 2 == 0, "max_tokens": 20 })).await.status
        });
    }
    while let Some(status) = clients.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    let counters = bench.handle.counters();
    assert_eq!((counters.max_in_flight, counters.in_flight, counters.completed), (3, 0, 60));
}

#[tokio::test]
async fn client_gone_mid_stream_is_cancelled_and_frees_the_slot() {
    let bench = held(Config { slots: 1, ..Config::default() }).await;
    let mut response = bench.open_stream("10").await;
    response.frame().await.unwrap().unwrap();
    assert_eq!(bench.handle.counters().in_flight, 1);
    drop(response);
    bench.until(|counters| counters.cancelled == 1 && counters.in_flight == 0).await;
    bench.handle.clear_faults();
    assert_eq!(bench.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn client_gone_in_an_endless_stream_is_cancelled() {
    let bench = Bench::start(Config::default()).await;
    let mut response = bench.open_stream("10000000").await;
    response.frame().await.unwrap().unwrap();
    drop(response);
    bench.until(|counters| counters.cancelled == 1 && counters.in_flight == 0).await;
    assert!(bench.handle.counters().generation_tokens < 10_000_000);
}

#[tokio::test]
async fn client_gone_in_the_queue_leaves_it() {
    let bench = held(Config { slots: 1, ..Config::default() }).await;
    let _running = bench.open_stream("10").await;
    tokio::select! {
        _ = bench.chat(json!({})) => panic!("there is no slot"),
        () = bench.until(|counters| counters.waiting == 1) => {}
    }
    bench.until(|counters| counters.cancelled == 1 && counters.waiting == 0).await;
}

#[tokio::test]
async fn cold_start_is_loading_until_it_is_over() {
    let bench = Bench::start(Config { cold_start: Duration::from_millis(300), ..Config::default() }).await;
    assert_eq!(
        (bench.get("/health").await.status, bench.chat(json!({})).await.status.as_u16()),
        (StatusCode::SERVICE_UNAVAILABLE, 503)
    );
    let ready = async { while bench.get("/health").await.status != 200 {} };
    tokio::time::timeout(PATIENCE, ready).await.unwrap();
    assert_eq!(bench.chat(json!({})).await.status, 200);
}

#[tokio::test]
async fn shutdown_lets_answers_end_and_cuts_those_that_do_not() {
    for (release, complete) in [(true, true), (false, false)] {
        let drain = if release { PATIENCE } else { Duration::from_millis(20) };
        let server = Server::bind("127.0.0.1:0", Config { drain, ..Config::default() }).await.unwrap();
        let (addr, handle, stop) = (server.local_addr(), server.handle(), CancellationToken::new());
        let running = tokio::spawn(server.run(stop.clone()));
        let bench = Bench { addr, handle, _stop: stop.clone().drop_guard() };
        bench.fault(json!({ "hang": { "at": "mid_stream" } }));
        let response = bench.open_stream("10").await;
        stop.cancel();
        if release {
            bench.handle.clear_faults();
        }
        let reply = collect(response).await;
        assert_eq!(reply.complete, complete);
        tokio::time::timeout(PATIENCE, running).await.unwrap().unwrap();
        assert!(TcpStream::connect(addr).await.is_err());
        assert_eq!(bench.handle.counters().in_flight, 0);
    }
}

#[tokio::test]
async fn invalid_configuration_is_refused() {
    let error = Server::bind("127.0.0.1:0", Config { slots: 0, ..Config::default() }).await.unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("slots")), (std::io::ErrorKind::InvalidInput, true));
}
