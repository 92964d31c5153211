//! The live page over a real socket: what it lets browsers do, who sees its data, and what it may change.

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client as Http;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use v1::Role;

use super::*;

pub(super) type Incoming = hyper_util::client::legacy::ResponseFuture;

pub(super) fn send(plane: &Plane, method: Method, path: &str, token: Option<&str>, body: &str) -> Incoming {
    let mut request =
        http::Request::builder().method(method).uri(format!("http://{}{path}", plane.running.http_addr));
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
    Http::builder(TokioExecutor::new()).build_http().request(request.body(body).unwrap())
}

async fn read(answer: Incoming) -> (StatusCode, http::HeaderMap, String) {
    let (head, body) = soon(answer).await.unwrap().into_parts();
    let body = soon(body.collect()).await.unwrap().to_bytes();
    (head.status, head.headers, String::from_utf8(body.to_vec()).unwrap())
}

/// The stream of a page.
pub(super) struct Events<B> {
    body: B,
    buffer: String,
}

impl<B> Events<B>
where
    B: http_body_util::BodyExt + http_body_util::BodyExt<Data = Bytes> + Unpin,
    B::Error: std::fmt::Debug,
{
    pub(super) async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let piece: String = self.buffer.drain(..end + 2).collect();
                let (event, data) = piece.trim_end().split_once('\n').unwrap();
                let value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
                return Some((event.strip_prefix("event: ").unwrap().to_owned(), value));
            }
            let frame = soon(self.body.frame()).await?.ok()?;
            self.buffer.push_str(std::str::from_utf8(&frame.into_data().ok()?).unwrap());
        }
    }

    /// The next event of a kind that is as wanted.
    pub(super) async fn wanted(&mut self, kind: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        soon(async {
            loop {
                let (event, value) = self.next().await.expect("the stream goes on");
                if event == kind && wanted(&value) {
                    return value;
                }
            }
        })
        .await
    }
}

pub(super) fn events<B>(answer: Response<B>) -> Events<B> {
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()[header::CONTENT_TYPE], "text/event-stream");
    Events { body: answer.into_body(), buffer: String::new() }
}

async fn token(plane: &Plane, name: &str, role: Role) -> String {
    let request = v1::IssueTokenRequest { name: name.into(), role: role.into(), ..Default::default() };
    plane.admin().await.issue_token(request).await.unwrap().into_inner().secret
}

#[tokio::test]
async fn the_page_may_load_its_own_files_and_nothing_else() {
    let plane = Plane::memory(vec![]).await;
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let (status, headers, text) = read(send(&plane, Method::GET, path, None, "")).await;
        assert_eq!(status, StatusCode::OK);
        assert!(headers[header::CONTENT_TYPE].to_str().unwrap().starts_with(kind));
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; script-src 'self'"), "{policy}");
        assert!(!policy.contains("unsafe") && !policy.contains("http"), "{policy}");
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(headers[header::CACHE_CONTROL], "no-store");
        assert_eq!(headers["cross-origin-resource-policy"], "same-origin");
        assert!(!headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
        // Nothing inline, which the policy would refuse, nothing from elsewhere, no text that could become markup.
        for wrong in ["<style", "style=\"", "onclick", "src=\"http", "href=\"http", "innerHTML", "eval("] {
            assert!(!text.contains(wrong), "{path} has {wrong}");
        }
    }
    plane.stop().await;
}

#[tokio::test]
async fn the_data_asks_for_the_same_token_as_the_admin_service() {
    let plane = Plane::memory(cluster(1)).await;
    for (token, status) in [(None, 401), (Some("nobody-has-this-one"), 401), (Some(GATEWAY), 403)] {
        let (seen, headers, text) = read(send(&plane, Method::GET, "/page/stream", token, "")).await;
        assert_eq!(seen.as_u16(), status, "{token:?}: {text}");
        assert!(!text.contains("b0"));
        assert!(headers.contains_key(header::CONTENT_SECURITY_POLICY));
        let change = send(&plane, Method::POST, "/page/backends/b0", token, r#"{"action":"drain"}"#);
        assert_eq!(read(change).await.0.as_u16(), status, "{token:?}");
    }
    let viewer = token(&plane, "looker", Role::Viewer).await;
    let mut seen = events(soon(send(&plane, Method::GET, "/page/stream", Some(&viewer), "")).await.unwrap());
    let (event, hello) = seen.next().await.unwrap();
    assert_eq!(
        (event.as_str(), hello),
        ("hello", json!({"name": "looker", "role": "viewer", "operates": false}))
    );
    let state = seen.wanted("state", |_| true).await;
    assert_eq!(state["backends"][0]["name"], "b0");
    let change = send(&plane, Method::POST, "/page/backends/b0", Some(&viewer), r#"{"action":"drain"}"#);
    let (status, _, text) = read(change).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "{text}");
    // A token that is revoked closes the page.
    let revoke = v1::RevokeTokenRequest { name: "looker".into(), ..Default::default() };
    plane.admin().await.revoke_token(revoke).await.unwrap();
    seen.wanted("refused", |_| true).await;
    assert!(seen.next().await.is_none());
    plane.stop().await;
}

#[tokio::test]
async fn an_operator_changes_backends_from_the_page_as_from_anywhere_else() {
    let plane = Plane::memory(cluster(2)).await;
    let operator = token(&plane, "olga", Role::Operator).await;
    let mut seen =
        events(soon(send(&plane, Method::GET, "/page/stream", Some(&operator), "")).await.unwrap());
    assert_eq!(seen.next().await.unwrap().1["operates"], true);
    seen.wanted("lines", |lines| lines["points"] == 60).await;
    let shown = seen.wanted("state", |_| true).await["backends"][0].clone();
    assert_eq!((&shown["name"], &shown["admin"]), (&json!("b0"), &json!("active")));
    let act = |body: Value| {
        let sent = send(&plane, Method::POST, "/page/backends/b0", Some(&operator), &body.to_string());
        async move {
            let (status, _, text) = read(sent).await;
            (status.as_u16(), serde_json::from_str::<Value>(&text).unwrap())
        }
    };
    let (status, answer) = act(json!({"action": "weight", "weight": 7, "etag": shown["etag"]})).await;
    assert_eq!((status, &answer["connected"]), (200, &json!(0)), "{answer}");
    let revision = answer["revision"].clone();
    seen.wanted("state", |state| state["revision"] == revision && state["backends"][0]["weight"] == 7).await;
    let log = seen.wanted("log", |log| log["changes"][0]["revision"] == revision).await;
    let change = &log["changes"][0];
    assert_eq!((&change["actor"], &change["method"]), (&json!("olga"), &json!("UpdateResource")));
    assert_eq!(change["changes"][0]["fields"][0]["path"], "weight");

    let (status, answer) = act(json!({"action": "weight", "weight": 9, "etag": shown["etag"]})).await;
    assert_eq!(status, 409, "somebody else changed it meanwhile: {answer}");
    let (status, answer) = act(json!({"action": "weight", "weight": 10_001})).await;
    assert_eq!(status, 400, "the same checks as everywhere: {answer}");
    assert!(answer["error"].as_str().unwrap().contains("weight"), "{answer}");
    for (action, admin) in
        [("drain", "draining"), ("undrain", "active"), ("disable", "disabled"), ("enable", "active")]
    {
        assert_eq!(act(json!({ "action": action })).await.0, 200, "{action}");
        seen.wanted("state", |state| state["backends"][0]["admin"] == admin).await;
    }
    let long = format!(r#"{{"action":"drain","etag":"{}"}}"#, "x".repeat(5000));
    let (status, ..) = read(send(&plane, Method::POST, "/page/backends/b0", Some(&operator), &long)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    let nowhere =
        send(&plane, Method::POST, "/page/backends/none", Some(&operator), r#"{"action":"disable"}"#);
    assert_eq!(read(nowhere).await.0, StatusCode::NOT_FOUND);
    plane.stop().await;
}

#[tokio::test]
async fn a_limit_is_shown_with_its_rate_the_use_of_the_last_minute_and_its_burst() {
    let plane = Plane::memory(vec![]).await;
    let _gateway = super::questions::reporting(&plane, "g", vec![super::questions::met(2000, 480)]).await;
    let mut seen = events(soon(send(&plane, Method::GET, "/page/stream", Some(ADMIN), "")).await.unwrap());
    let state = seen.wanted("state", |state| state["limits"][0]["last_minute"] == 480).await;
    let limit = &state["limits"][0];
    assert_eq!(
        (&limit["limit"], &limit["period"], &limit["burst"]),
        (&json!(2000), &json!("minute"), &json!(10_000))
    );
    assert_eq!(limit["fill"], 0.24, "of the rate: its bucket is all but empty");
    plane.stop().await;
}

#[tokio::test]
async fn pages_are_bounded_and_their_places_come_free() {
    let plane = Plane::memory(vec![]).await;
    let open = || send(&plane, Method::GET, "/page/stream", Some(ADMIN), "");
    let mut pages = Vec::new();
    for _ in 0..64 {
        pages.push(events(soon(open()).await.unwrap()));
    }
    let (status, headers, text) = read(open()).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{text}");
    assert!(headers.contains_key(header::RETRY_AFTER));
    pages.pop();
    soon(async {
        while soon(open()).await.unwrap().status() != StatusCode::OK {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // Everybody is shown the same picture, and nobody holds up the end.
    for page in pages.iter_mut().take(3) {
        page.wanted("state", |_| true).await;
    }
    plane.stop().await;
}
