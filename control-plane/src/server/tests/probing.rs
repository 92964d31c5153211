use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;
use v1::HealthState;

fn quick_pool() -> v1::Resource {
    let short = |millis: i32| Some(prost_types::Duration { seconds: 0, nanos: millis * 1_000_000 });
    let health =
        v1::HealthProfile { liveness_interval: short(20), timeout: short(500), ..Default::default() };
    let spec = v1::PoolSpec { health: Some(health), ..Default::default() };
    v1::Resource { spec: Some(v1::resource::Spec::Pool(spec)), ..pool("p") }
}

/// A server that answers 404 while it is well and 500 while it is not.
async fn server(well: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let status = if well.load(Ordering::SeqCst) { "404 Not Found" } else { "500 Broken" };
            let mut buffer = [0; 1024];
            let _ = socket.read(&mut buffer).await;
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            let _ = socket.write_all(answer.as_bytes()).await;
        }
    });
    addr
}

#[tokio::test]
async fn a_dead_backend_is_found_and_gateways_are_told() {
    let well = Arc::new(AtomicBool::new(true));
    let addr = server(well.clone()).await;
    let live = backend("live", "p", "m", &format!("http://{addr}"));
    let dead = backend("dead", "p", "m", "http://127.0.0.1:1");
    let plane = Plane::memory(vec![quick_pool(), model("m", "p"), live, dead]).await;
    let mut admin = plane.admin().await;
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let (said, requests) = mpsc::channel(1);
    let first = v1::StreamReportsRequest { gateway_id: "g".into(), sequence: 1, ..Default::default() };
    said.send(first).await.unwrap();
    let mut heard = reports.stream_reports(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let mut last: std::collections::BTreeMap<String, v1::BackendHealth> = Default::default();
    let mut told = async |backend: &str, state: HealthState| loop {
        if last.get(backend).is_none_or(|verdict| verdict.state() != state) {
            let message = soon(heard.message()).await.unwrap().unwrap();
            last.extend(message.health.into_iter().map(|health| (health.backend.clone(), health)));
        }
        let verdict = last.get(backend).filter(|verdict| verdict.state() == state);
        if let Some(verdict) = verdict {
            return (verdict.rule.clone(), verdict.reason.clone());
        }
    };
    let said = |rule: &str, reason: &str| (rule.to_owned(), reason.to_owned());
    let why = told("dead", HealthState::Unhealthy).await;
    assert_eq!(why, said("liveness_alone", "control-plane: cannot connect"));
    // The live one may be told later than the dead one.
    told("live", HealthState::Healthy).await;
    let status = admin.list_backend_status(v1::ListBackendStatusRequest {}).await.unwrap().into_inner();
    let states: Vec<_> =
        status.backends.iter().map(|b| (b.backend.as_str(), b.health.as_ref().unwrap().state())).collect();
    assert_eq!(states, [("dead", HealthState::Unhealthy), ("live", HealthState::Healthy)]);

    well.store(false, Ordering::SeqCst);
    let why = told("live", HealthState::Unhealthy).await;
    assert_eq!(why, said("liveness_alone", "control-plane: answered 500"));
    well.store(true, Ordering::SeqCst);
    told("live", HealthState::Recovering).await;
    let explained = admin.explain_backend(v1::ExplainBackendRequest { backend: "live".into() });
    let explained = explained.await.unwrap().into_inner();
    let vote = &explained.votes[0];
    assert_eq!((vote.observer.as_str(), vote.outcome()), ("control-plane", v1::ProbeOutcome::Pass));
    assert!(
        explained.events.iter().any(|event| event.message.contains("unhealthy -> recovering by recovery"))
    );
    let nowhere = admin.explain_backend(v1::ExplainBackendRequest { backend: "nowhere".into() }).await;
    assert_eq!(nowhere.unwrap_err().code(), Code::NotFound);
    let events = admin.list_health_events(v1::ListHealthEventsRequest::default()).await.unwrap().into_inner();
    assert!(events.events.windows(2).all(|pair| pair[0].number < pair[1].number));
    plane.stop().await;
}

#[tokio::test]
async fn the_operations_pages_answer() {
    let plane = Plane::memory(cluster(1)).await;
    let get = async |path: &str| {
        let mut socket = tokio::net::TcpStream::connect(plane.running.http_addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        soon(socket.read_to_string(&mut text)).await.unwrap();
        text
    };
    assert!(get("/livez").await.starts_with("HTTP/1.1 200"));
    assert!(get("/readyz").await.starts_with("HTTP/1.1 200"));
    while !get("/metrics").await.contains("weir_store_revision 1") {
        tokio::task::yield_now().await;
    }
    plane.stop().await;
}

#[tokio::test]
async fn a_probe_on_demand_asks_those_who_look_anyway_and_says_what_each_saw() {
    let well = Arc::new(AtomicBool::new(true));
    let addr = server(well.clone()).await;
    let plane =
        Plane::memory(vec![quick_pool(), model("m", "p"), backend("b", "p", "m", &format!("http://{addr}"))])
            .await;
    let mut admin = plane.admin().await;
    let ask = |tier: v1::ProbeTier| v1::ProbeBackendRequest {
        backend: "b".into(),
        tier: tier.into(),
        timeout: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
    };
    let alone = admin.probe_backend(ask(v1::ProbeTier::Unspecified)).await.unwrap().into_inner();
    let seen: Vec<_> =
        alone.results.iter().map(|result| (result.observer.as_str(), result.outcome())).collect();
    assert_eq!((seen[0], alone.pending_observers.len()), (("control-plane", v1::ProbeOutcome::Pass), 0));
    // Nothing had probed it before, and what the results say of it is said with them.
    let status = alone.status.unwrap();
    assert_eq!((status.backend.as_str(), status.health.unwrap().state()), ("b", HealthState::Healthy));
    let nobody = admin.probe_backend(ask(v1::ProbeTier::Readiness)).await.unwrap_err();
    assert_eq!(nobody.code(), Code::FailedPrecondition, "{nobody}");

    // A gateway that is there is asked, and answers as it does of its own.
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let (said, requests) = mpsc::channel(4);
    let report = |sequence| v1::StreamReportsRequest {
        gateway_id: "g".into(),
        sequence,
        can_probe: true,
        ..Default::default()
    };
    said.send(report(1)).await.unwrap();
    let mut heard = reports.stream_reports(ReceiverStream::new(requests)).await.unwrap().into_inner();
    soon(async {
        while heard.message().await.unwrap().unwrap().assignments.is_none_or(|all| all.assignments.is_empty())
        {
        }
    })
    .await;
    let asked = tokio::spawn({
        let (mut admin, request) = (admin.clone(), ask(v1::ProbeTier::Readiness));
        async move { admin.probe_backend(request).await.unwrap().into_inner() }
    });
    soon(async {
        while !heard
            .message()
            .await
            .unwrap()
            .unwrap()
            .orders
            .iter()
            .any(|o| o.tier() == v1::ProbeTier::Readiness)
        {}
    })
    .await;
    let result = v1::ProbeResult {
        backend: "b".into(),
        tier: v1::ProbeTier::Readiness.into(),
        outcome: v1::ProbeOutcome::WrongModel.into(),
        detail: "another model answers".into(),
        ..Default::default()
    };
    said.send(v1::StreamReportsRequest { probe_results: vec![result], ..report(2) }).await.unwrap();
    let answer = soon(asked).await.unwrap();
    let result = &answer.results[0];
    let saw = (result.observer.as_str(), result.outcome(), result.detail.as_str());
    assert_eq!(saw, ("g", v1::ProbeOutcome::WrongModel, "another model answers"));

    // Who does not answer in time is named.
    let soon_over = v1::ProbeBackendRequest {
        timeout: Some(prost_types::Duration { seconds: 0, nanos: 50_000_000 }),
        ..ask(v1::ProbeTier::Readiness)
    };
    let answer = admin.probe_backend(soon_over).await.unwrap().into_inner();
    assert_eq!((answer.results.len(), answer.pending_observers), (0, vec!["g".to_owned()]));
    let nowhere = v1::ProbeBackendRequest { backend: "nowhere".into(), ..ask(v1::ProbeTier::Liveness) };
    assert_eq!(admin.probe_backend(nowhere).await.unwrap_err().code(), Code::NotFound);
    plane.stop().await;
}
