//! How a service starts, is found healthy, guards itself and ends.

use std::process::Stdio;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use weir_proto::v1::PeekRequest;
use weir_runtime::Secret;

use crate::harness::{Redis, Service, config, eventually, free_port};

async fn health(service: &Service, name: &str) -> Result<ServingStatus, Code> {
    let request = HealthCheckRequest { service: name.into() };
    let answer = HealthClient::new(service.channel.clone()).check(request).await;
    answer.map(|a| a.into_inner().status()).map_err(|status| status.code())
}

fn scopes() -> PeekRequest {
    let rates = weir_proto::v1::Rates { requests_per_minute: Some(1), ..Default::default() };
    PeekRequest { scopes: vec![weir_proto::v1::ScopedRates { scope: None, rates: Some(rates) }] }
}

#[tokio::test]
async fn without_redis_it_runs_is_not_ready_and_comes_back_with_it() {
    let port = free_port();
    let mut config = config(None);
    config.redis = Some(format!("redis://127.0.0.1:{port}/"));
    let service = Service::start(config).await;
    eventually("says why", || async {
        let page = service.page("/readyz").await;
        page.starts_with("HTTP/1.1 503") && page.contains("see --redis")
    })
    .await;
    assert!(service.page("/livez").await.starts_with("HTTP/1.1 200"));
    let status = service.native().peek(scopes()).await.expect_err("no store");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(health(&service, "weir.v1.LimitService").await, Ok(ServingStatus::NotServing));
    let _redis = Redis::at(port);
    eventually("ready", || async { service.page("/readyz").await.starts_with("HTTP/1.1 200") }).await;
    service.native().peek(scopes()).await.expect("served");
    assert_eq!(health(&service, "weir.v1.LimitService").await, Ok(ServingStatus::Serving));
    let metrics = service.page("/metrics").await;
    assert!(metrics.contains("weir_ratelimit_store_up 1"), "{metrics}");
    assert!(metrics.contains(r#"weir_ratelimit_calls_total{method="peek",outcome="ok"} 1"#), "{metrics}");
    assert!(
        metrics.contains(r#"weir_ratelimit_calls_total{method="peek",outcome="unavailable"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_token_opens_the_limits_and_health_needs_none() {
    let mut config = config(None);
    config.token = Some(Secret::new("0123456789abcdef".into()));
    let service = Service::ready(config).await;
    let status = service.native().peek(scopes()).await.expect_err("no token");
    assert_eq!(status.code(), Code::Unauthenticated);
    let mut request = Request::new(scopes());
    request.metadata_mut().insert("authorization", MetadataValue::from_static("Bearer 0123456789abcdef"));
    service.native().peek(request).await.expect("opened");
    assert_eq!(health(&service, "").await, Ok(ServingStatus::Serving));
}

#[tokio::test]
async fn it_says_that_it_leaves_serves_on_and_then_ends() {
    let mut config = config(None);
    config.pre_stop = Duration::from_secs(600);
    let hurry = tokio_util::sync::CancellationToken::new();
    let shutdown = tokio_util::sync::CancellationToken::new();
    let running =
        weir_ratelimit_service::start(config, None, shutdown.clone(), hurry.clone()).await.expect("starts");
    let endpoint =
        tonic::transport::Channel::from_shared(format!("http://{}", running.address)).expect("a URL");
    let mut service =
        Service { channel: endpoint.connect_lazy(), running: Some(running), shutdown: shutdown.clone() };
    eventually("ready", || async { service.page("/readyz").await.starts_with("HTTP/1.1 200") }).await;
    shutdown.cancel();
    eventually("leaving", || async { service.page("/readyz").await.contains("draining") }).await;
    assert_eq!(health(&service, "").await, Ok(ServingStatus::NotServing));
    service.native().peek(scopes()).await.expect("still served");
    hurry.cancel();
    let running = service.running.take().expect("running");
    tokio::time::timeout(Duration::from_secs(20), running.ended()).await.expect("ends");
}

#[tokio::test]
async fn the_process_refuses_bad_settings_with_64_and_ends_with_0_when_told() {
    let run = |args: &[&str]| {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_weir-ratelimit"));
        for (variable, _) in std::env::vars().filter(|(name, _)| name.starts_with("WEIR_")) {
            command.env_remove(variable);
        }
        command.args(args).kill_on_drop(true).stdin(Stdio::null()).stderr(Stdio::piped());
        command
    };
    for (args, says) in [
        (["--listen", "0.0.0.0:0"], "--token-file"),
        (["--redis", "nonsense"], "--redis: "),
        (["--token-file", "/nowhere/token"], "/nowhere/token"),
    ] {
        let done = run(&args).output().await.expect("runs");
        let text = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(64), "{args:?}: {text}");
        assert!(text.contains(says), "{text}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let done = run(&["--listen", &address]).output().await.expect("runs");
    assert_eq!(done.status.code(), Some(69), "{done:?}");

    let args = ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    let mut child = run(&args).env("WEIR_PRE_STOP", "0s").spawn().expect("starts");
    let mut lines =
        tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stderr.take().expect("piped")));
    while !lines.next_line().await.expect("readable").expect("it serves").contains("serving") {}
    let id = child.id().expect("running").to_string();
    let sent = tokio::process::Command::new("kill").args(["-TERM", &id]).status().await.expect("kill runs");
    assert!(sent.success());
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let ended = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.expect("ends");
    assert_eq!(ended.expect("ended").code(), Some(0));
}
