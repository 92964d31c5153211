//! Commands and the page give the same answers at every control plane.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client as Http;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_probe_is_made_by_the_leader_whichever_control_plane_is_asked() {
    let world = World::start(2).await;
    world.until("b1", HealthState::Healthy).await;
    let leader = world.leader().await;
    let request = v1::ProbeBackendRequest { backend: "b1".into(), ..Default::default() };
    for plane in (0..3).filter(|plane| *plane != leader) {
        let refused = world.admin(plane).await.probe_backend(request.clone()).await.expect_err("refused");
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(refused.message().contains("is not the leader"), "{refused}");
    }
    let results =
        world.admin(leader).await.probe_backend(request).await.expect("probes").into_inner().results;
    assert!(!results.is_empty() && results.iter().all(|result| result.outcome() == v1::ProbeOutcome::Pass));
    // A command reaches the leader, whichever control plane it asks first.
    for first in 0..3 {
        let mut addresses = world.addresses.clone();
        addresses.rotate_left(first);
        let done = command("weir")
            .args(["probe", "b1", "--server", &addresses.join(",")])
            .env("WEIR_TOKEN", ADMIN_TOKEN)
            .output()
            .await
            .expect("runs");
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{out}{err}");
        assert!(out.contains("pass") && out.contains("backend b1 is healthy"), "{out}");
    }
    for gateway in world.gateways {
        gateway.stop().await;
    }
}

async fn send(
    plane: &Plane,
    method: Method,
    path: &str,
    body: &Value,
) -> http::Response<hyper::body::Incoming> {
    let request = Request::builder()
        .method(method)
        .uri(format!("{}{path}", plane.page))
        .header("authorization", format!("Bearer {ADMIN_TOKEN}"))
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("a request");
    Http::builder(TokioExecutor::new()).build_http().request(request).await.expect("an answer")
}

/// Reads a page until its content is as wanted.
async fn sees(plane: &Plane, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut body = send(plane, Method::GET, "/page/stream", &Value::Null).await.into_body();
    let mut text = String::new();
    let seen = async {
        loop {
            let frame = body.frame().await.expect("the stream goes on").expect("whole");
            text.push_str(std::str::from_utf8(&frame.into_data().unwrap_or_default()).expect("UTF-8"));
            while let Some(end) = text.find("\n\n") {
                let event: String = text.drain(..end + 2).collect();
                let state = event.strip_prefix("event: state\ndata: ");
                let state = state.map(|data| serde_json::from_str::<Value>(data).expect("JSON"));
                if let Some(state) = state.filter(&wanted) {
                    return state;
                }
            }
        }
    };
    let seen = tokio::time::timeout(std::time::Duration::from_secs(30), seen).await;
    seen.unwrap_or_else(|_| panic!("not within 30 s: {what}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_of_every_control_plane_shows_all_gateways_and_changes_what_all_show() {
    let world = World::start(2).await;
    let planes: Vec<&Plane> = world.planes.iter().flatten().collect();
    let synced = |state: &Value| {
        let gateways = state["gateways"].as_array().expect("a list");
        gateways.len() == 2 && gateways.iter().all(|gateway| gateway["sync"] == "in sync")
    };
    for (k, plane) in planes.iter().enumerate() {
        sees(plane, &format!("the page of control plane {k} shows both gateways in sync"), synced).await;
    }
    // Each changes a backend of its own, and every page shows all changes.
    for (k, plane) in planes.iter().enumerate() {
        let body = json!({"action": "weight", "weight": 20 + k});
        let answer = send(plane, Method::POST, &format!("/page/backends/b{k}"), &body).await;
        assert_eq!(answer.status(), StatusCode::OK);
    }
    for (k, plane) in planes.iter().enumerate() {
        let shown = |state: &Value| {
            let backends = state["backends"].as_array().expect("a list");
            (0..3).all(|b| backends[b]["weight"] == 20 + b) && synced(state)
        };
        let state = sees(plane, &format!("control plane {k} shows every weight"), shown).await;
        assert!(
            state["backends"].as_array().expect("a list").iter().all(|b| b["state"].is_string()),
            "{state}"
        );
    }
    for gateway in world.gateways {
        gateway.stop().await;
    }
}
