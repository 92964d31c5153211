//! What real servers send: what an answer is, when a stream is over, who is blamed, and what the client reads.

mod cluster;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_tests::client::{Answer, Client};
use weir_tests::cluster::{Gateway, Resources, gateway};
use weir_tests::eventually;
use weir_tests::scripted::{
    Asked, Scripted, answer, chunk, delta, event, head, json_answer, stream_end, stream_head,
};

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
const POISON: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"poison"}]}"#;
const STREAM: &str = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
const JSON: (&str, &str) = ("content-type", "application/json");
const HTML: (&str, &str) = ("content-type", "text/html");
const EVENTS: (&str, &str) = ("content-type", "text/event-stream");
const CHUNKED: (&str, &str) = ("transfer-encoding", "chunked");

fn wants_stream(asked: &Asked) -> bool {
    asked.body.windows(13).any(|part| part == br#""stream":true"#)
}

/// A good answer in the form that was asked for.
fn good(asked: &Asked) -> Vec<u8> {
    match wants_stream(asked) {
        true => [stream_head(), delta("fine").into(), stream_end("").into()].concat(),
        false => json_answer("fine", ""),
    }
}

/// A backend that answers everything well.
async fn well(end: &CancellationToken) -> Scripted {
    Scripted::start(end, |asked, mut wire| async move {
        wire.send(good(&asked)).await;
        None
    })
    .await
}

/// A backend that answers everything with these bytes.
async fn saying(end: &CancellationToken, says: Vec<u8>) -> Scripted {
    Scripted::raw(end, says).await
}

async fn metric(gateway: &Gateway, name: &str, labels: &[&str]) -> f64 {
    let page = Client::new(gateway.running.ops_address, "").ask(Method::GET, "/metrics", "").await;
    let wanted = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    };
    let values = page.text().lines().filter(wanted).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<f64>().expect("a number")).sum()
}

async fn attempts(gateway: &Gateway, backend: &str, outcome: &str) -> f64 {
    metric(gateway, "weir_backend_attempts_total", &[backend, outcome]).await
}

fn error_body(message: &str, kind: &str, code: &str) -> String {
    json!({ "error": { "message": message, "type": kind, "param": null, "code": code } }).to_string()
}

/// Every answer of these is good, though one of the two backends fails in this way at everything.
async fn nobody_sees(says: Vec<u8>, outcome: &str) {
    let end = CancellationToken::new();
    let (bad, fine) = (saying(&end, says).await, well(&end).await);
    let gateway = gateway(&Resources::at(&[bad.address, fine.address]), None).await;
    for n in 0..40 {
        let answer = gateway.client.chat([CHAT, STREAM][n % 2]).await;
        assert_eq!(answer.status, StatusCode::OK, "{outcome} {n}: {}", answer.text());
        assert!(answer.text().contains("fine"), "{outcome} {n}: {}", answer.text());
    }
    assert!(attempts(&gateway, "b0", outcome).await >= 1.0, "{outcome} is counted");
    // A backend that is only busy is asked again after a second.
    assert!(
        outcome == "busy" || bad.requests() <= 8,
        "{outcome}: it is left alone after a few, and was asked {} times",
        bad.requests()
    );
    assert_eq!(attempts(&gateway, "b1", outcome).await, 0.0);
}

#[tokio::test]
async fn one_backend_of_two_that_fails_at_everything_is_left_and_no_client_sees_it() {
    let page = "<!DOCTYPE html><html><body>Please sign in.</body></html>";
    let refused = error_body(
        "Incorrect API key provided: sk-abcdefghijkl.",
        "invalid_request_error",
        "invalid_api_key",
    );
    let quota = error_body("You exceeded your current quota.", "insufficient_quota", "insufficient_quota");
    for (says, outcome) in [
        (answer(200, &[HTML], page), "invalid_answer"),
        (answer(200, &[JSON], ""), "invalid_answer"),
        (answer(200, &[JSON], r#"{"choices":[{"mess"#), "invalid_answer"),
        (answer(200, &[EVENTS], page), "invalid_answer"),
        (answer(200, &[JSON], error_body("no memory", "server_error", "500")), "server_error"),
        (answer(500, &[("content-type", "text/plain")], "Internal Server Error"), "server_error"),
        (answer(500, &[JSON], error_body("boom", "server_error", "")), "server_error"),
        (answer(400, &[HTML], "<html>The plain HTTP request was sent to HTTPS port</html>"), "server_error"),
        (answer(403, &[HTML], "<html>blocked</html>"), "server_error"),
        (answer(404, &[JSON], r#"{"detail":"Not Found"}"#), "server_error"),
        (answer(404, &[JSON], error_body("The model `x` does not exist", "", "model_not_found")), "no_model"),
        (answer(405, &[HTML], ""), "server_error"),
        (answer(302, &[("location", "http://127.0.0.1/login")], ""), "server_error"),
        (answer(401, &[JSON], &refused), "credential_refused"),
        (answer(401, &[HTML], page), "credential_refused"),
        (answer(403, &[JSON], error_body("not allowed", "permission_error", "")), "credential_refused"),
        (answer(429, &[JSON], &quota), "quota_used_up"),
        (answer(402, &[JSON], error_body("Insufficient Balance", "", "")), "quota_used_up"),
        (answer(529, &[JSON], error_body("Overloaded", "overloaded_error", "")), "busy"),
    ] {
        nobody_sees(says, outcome).await;
    }
}

#[tokio::test]
async fn a_caller_who_sends_only_poison_ejects_nobody_and_reads_the_providers_words() {
    for (status, kind) in
        [(500, "json"), (500, "text"), (501, "json"), (400, "page"), (200, "error"), (200, "empty")]
    {
        let end = CancellationToken::new();
        let backend = || {
            Scripted::start(&end, move |asked, mut wire| async move {
                let poison = asked.body.windows(6).any(|part| part == b"poison");
                let body = error_body("grammar: missing role", "InternalServerError", "");
                let says = match (poison, kind) {
                    (false, _) => good(&asked),
                    (true, "json" | "error") => answer(status, &[JSON], body),
                    (true, "text") => {
                        answer(status, &[("content-type", "text/plain")], "Internal Server Error")
                    }
                    (true, "page") => answer(status, &[HTML], "<html>blocked by the firewall</html>"),
                    (true, _) => answer(status, &[JSON], ""),
                };
                wire.send(says).await;
                None
            })
        };
        let (one, two) = (backend().await, backend().await);
        let gateway = gateway(&Resources::at(&[one.address, two.address]), None).await;
        for n in 0..120 {
            let answer = gateway.client.chat(POISON).await;
            assert!(answer.status.is_client_error() || answer.status.is_server_error(), "{kind} {n}");
            if kind == "json" {
                assert_eq!(answer.status.as_u16(), status);
                assert!(answer.text().contains("grammar: missing role"), "{}", answer.text());
            }
            if n == 0 && matches!(kind, "json" | "text" | "page") {
                assert_eq!(answer.headers["x-should-retry"], "false", "two backends failed alike: {kind}");
            }
        }
        // Each backend still gets its share of what is good.
        let (before_one, before_two) = (one.requests(), two.requests());
        for n in 0..20 {
            assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK, "{kind} {n}");
        }
        let (more_one, more_two) = (one.requests() - before_one, two.requests() - before_two);
        assert!(more_one >= 5 && more_two >= 5, "{kind}: {more_one} and {more_two} of 20");
    }
}

#[tokio::test]
async fn the_requests_own_mistakes_reach_the_client_and_are_nobodys_fault() {
    let flagged =
        r#"{"error":{"code":403,"message":"Your input was flagged","metadata":{"reasons":["violence"]}}}"#;
    for (status, says, message) in [
        (404, error_body("Response with id 'resp_x' not found.", "NotFoundError", ""), "resp_x"),
        (403, flagged.to_owned(), "flagged"),
        (402, error_body("Payment is required for this feature", "invalid_request_error", ""), "Payment"),
        (451, error_body("Not in your country", "", ""), "country"),
        (400, error_body("maximum context length is 8192", "", "context_length_exceeded"), "8192"),
        (409, error_body("conflict", "", ""), "conflict"),
        (413, "<html>too large</html>".to_owned(), "413"),
        (422, r#"{"detail":[{"loc":["body","n"],"msg":"not an integer"}]}"#.to_owned(), "not an integer"),
        (404, r#"{"error":"no such adapter"}"#.to_owned(), "no such adapter"),
    ] {
        let end = CancellationToken::new();
        let says = answer(status, &[HTML], says);
        let (one, two) = (saying(&end, says.clone()).await, saying(&end, says).await);
        let gateway = gateway(&Resources::at(&[one.address, two.address]), None).await;
        for n in 0..8 {
            let answer = gateway.client.chat([CHAT, STREAM][n % 2]).await;
            assert_eq!(answer.status.as_u16(), status, "{message}");
            assert_eq!(answer.headers["content-type"], "application/json", "{message}");
            let error = &answer.json()["error"];
            assert!(error["message"].as_str().is_some_and(|text| text.contains(message)), "{error}");
        }
        assert_eq!(one.requests() + two.requests(), 8, "{message}: nothing is tried twice");
        assert!(one.requests() >= 2 && two.requests() >= 2, "{message}: nobody is ejected");
    }
}

#[tokio::test]
async fn an_error_in_the_first_event_goes_elsewhere_however_it_is_cut() {
    let failure = event(r#"{"error":{"message":"Provider returned error","code":502}}"#);
    for (name, parts) in [
        ("whole", vec![failure.clone()]),
        ("behind comments", vec![": PROCESSING\n\n".into(), ": PROCESSING\n\n".into(), failure.clone()]),
        ("in two parts", vec![failure[..20].to_owned(), failure[20..].to_owned()]),
        ("byte by byte", failure.chars().map(String::from).collect()),
        ("typed", vec!["event: error\n".into(), failure.clone()]),
    ] {
        let end = CancellationToken::new();
        let bad = Scripted::start(&end, move |_, mut wire| {
            let parts = parts.clone();
            async move {
                wire.send(head(200, &[EVENTS, CHUNKED])).await;
                for part in parts {
                    wire.send(chunk(part)).await;
                    tokio::task::yield_now().await;
                }
                wire.send(chunk("")).await;
                None
            }
        })
        .await;
        let fine = well(&end).await;
        let gateway = gateway(&Resources::at(&[bad.address, fine.address]), None).await;
        for n in 0..6 {
            let answer = gateway.client.chat(STREAM).await;
            assert!(
                answer.text().contains("fine") && !answer.text().contains("error"),
                "{name} {n}: {}",
                answer.text()
            );
        }
        assert!(bad.requests() > 0, "{name}");
    }
}

#[tokio::test]
async fn an_event_stream_is_one_whatever_it_is_called() {
    for kind in [
        "text/plain; charset=utf-8",
        "application/json",
        "text/html",
        "application/octet-stream",
        "Text/Event-Stream",
    ] {
        let end = CancellationToken::new();
        let stream =
            [head(200, &[("content-type", kind)]), delta("fine").into(), stream_end("").into()].concat();
        let backend = saying(&end, stream).await;
        let gateway = gateway(&Resources::at(&[backend.address]), None).await;
        let answer = gateway.client.chat(STREAM).await;
        assert_eq!(answer.status, StatusCode::OK, "{kind}: {}", answer.text());
        assert!(
            answer.headers["content-type"]
                .to_str()
                .expect("text")
                .to_ascii_lowercase()
                .starts_with("text/event-stream"),
            "{kind}"
        );
        assert!(answer.text().contains("fine") && answer.text().ends_with("data: [DONE]\n\n"), "{kind}");
    }
}

/// A stream that is over by what it said, and then this happens to its connection.
async fn over(then: &'static str) -> (Gateway, Scripted, tokio_util::sync::DropGuard) {
    let end = CancellationToken::new();
    let backend = Scripted::start(&end, move |_, mut wire| async move {
        let begin = [head(200, &[EVENTS, CHUNKED]), chunk(delta("fine")), chunk(stream_end(""))].concat();
        wire.send(begin).await;
        match then {
            "closes" => None,
            "hangs" => {
                wire.until_closed().await;
                None
            }
            "talks on" => {
                wire.send(chunk(event(r#"{"error":{"message":"late"}}"#))).await;
                wire.until_closed().await;
                None
            }
            _ => {
                wire.send(chunk("")).await;
                Some(wire)
            }
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    (gateway, backend, end.drop_guard())
}

#[tokio::test]
async fn after_done_a_stream_is_over_whatever_its_connection_does() {
    for then in ["ends", "closes", "hangs", "talks on"] {
        let (gateway, _backend, _end) = over(then).await;
        let began = Instant::now();
        for n in 0..6 {
            let answer = gateway.client.chat(STREAM).await;
            assert!(answer.text().ends_with("data: [DONE]\n\n"), "{then} {n}: {}", answer.text());
            assert!(!answer.text().contains("error"), "{then} {n}: {}", answer.text());
        }
        // Clocks of minutes would run otherwise.
        assert!(began.elapsed() < Duration::from_secs(20), "{then}: {:?}", began.elapsed());
        eventually("six good answers", || async { attempts(&gateway, "b0", "outcome=\"ok\"").await == 6.0 })
            .await;
        eventually("nothing is in flight", || async {
            metric(&gateway, "weir_requests_in_flight", &[]).await == 0.0
        })
        .await;
    }
}

#[tokio::test]
async fn a_connection_whose_stream_is_over_is_used_again() {
    let (gateway, backend, _end) = over("ends").await;
    for _ in 0..10 {
        assert!(gateway.client.chat(STREAM).await.text().ends_with("data: [DONE]\n\n"));
    }
    assert_eq!(backend.requests(), 10);
    assert!(
        backend.connections() <= 3,
        "{} connections for 10 streams one after the other",
        backend.connections()
    );
}

#[tokio::test]
async fn a_responses_stream_is_over_at_its_last_event() {
    let end = CancellationToken::new();
    let backend = Scripted::start(&end, |_, mut wire| async move {
        let completed = json!({
            "type": "response.completed",
            "response": { "object": "response", "model": "gpt-4.1", "output": [], "usage": { "input_tokens": 5, "output_tokens": 2 } },
        });
        let delta = json!({ "type": "response.output_text.delta", "delta": "fine" });
        let events = [chunk(event(&delta.to_string())), chunk(event(&completed.to_string()))];
        wire.send([head(200, &[EVENTS, CHUNKED]), events.concat()].concat()).await;
        wire.until_closed().await;
        None
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    let request = r#"{"model":"gpt-4.1","input":"hi","stream":true}"#;
    let answer = gateway.client.ask(Method::POST, "/v1/responses", request).await;
    assert!(
        answer.text().contains("response.completed") && !answer.text().contains("error"),
        "{}",
        answer.text()
    );
    eventually("it is counted as good", || async { attempts(&gateway, "b0", "outcome=\"ok\"").await == 1.0 })
        .await;
}

#[tokio::test]
async fn stream_options_that_a_backend_refuses_are_taken_back_and_that_is_remembered() {
    for refusal in [
        r#"{"object":"error","message":{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"],"msg":"Extra inputs are not permitted"}]},"type":"invalid_request_error","param":null,"code":null}"#,
        r#"{"error":{"message":"Unrecognized request argument supplied: stream_options","type":"invalid_request_error"}}"#,
        r#"{"error":"unknown field `stream_options`"}"#,
        r#"{"detail":"Extra inputs are not permitted"}"#,
    ] {
        let end = CancellationToken::new();
        let refusal = refusal.to_owned();
        let backend = Scripted::start(&end, move |asked, mut wire| {
            let has = asked.body.windows(14).any(|part| part == b"stream_options");
            let says = if has { answer(422, &[JSON], refusal.clone()) } else { good(&asked) };
            async move {
                wire.send(says).await;
                None
            }
        })
        .await;
        let gateway = gateway(&Resources::at(&[backend.address]), None).await;
        for n in 0..5 {
            let answer = gateway.client.chat(STREAM).await;
            assert_eq!(answer.status, StatusCode::OK, "{n}: {}", answer.text());
        }
        assert_eq!(backend.requests(), 6, "it was asked for in vain once");
        // What the client itself asks for is the client's.
        let own =
            r#"{"model":"gpt-4.1","stream":true,"stream_options":{"include_usage":true},"messages":[]}"#;
        assert_eq!(gateway.client.chat(own).await.status.as_u16(), 422);
    }
}

#[tokio::test]
async fn a_refusal_that_is_not_about_the_addition_leaves_it_in_place() {
    let end = CancellationToken::new();
    let refuses = Arc::new(AtomicBool::new(true));
    let now = refuses.clone();
    let backend = Scripted::start(&end, move |asked, mut wire| {
        let says = match now.load(Ordering::SeqCst) {
            true => answer(400, &[JSON], r#"{"error":{"message":"unknown field 'foo'"}}"#),
            false => good(&asked),
        };
        async move {
            wire.send(says).await;
            None
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    let refused = gateway.client.chat(STREAM).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(refused.text().contains("foo"));
    refuses.store(false, Ordering::SeqCst);
    let before = backend.requests();
    assert_eq!(gateway.client.chat(STREAM).await.status, StatusCode::OK);
    assert_eq!(backend.requests(), before + 1);
}

async fn wait_of(headers: &[(&str, &str)], body: &str) -> Option<u64> {
    let end = CancellationToken::new();
    let backend = saying(&end, answer(429, &[headers, &[JSON]].concat(), body)).await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    let answer: Answer = gateway.client.chat(CHAT).await;
    assert_eq!(
        (answer.status.as_u16(), answer.error_code().as_str()),
        (503, "upstream_busy"),
        "429 is the caller's alone"
    );
    answer.headers["retry-after"].to_str().ok()?.parse().ok()
}

#[tokio::test]
async fn the_client_is_told_when_to_come_back_in_whatever_form_the_backend_says_so() {
    let busy = error_body("slow down", "rate_limit", "rate_limit_exceeded");
    let date = httpdate::fmt_http_date(weir_runtime::wall_clock() + Duration::from_secs(31));
    assert!(wait_of(&[("retry-after", &date)], &busy).await.is_some_and(|wait| (20..=31).contains(&wait)));
    for headers in [
        &[("retry-after", "30")][..],
        &[("retry-after", "29.5")],
        &[("retry-after-ms", "29500"), ("retry-after", "1")],
        &[("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "29.5s")],
    ] {
        assert_eq!(wait_of(headers, &busy).await, Some(30), "{headers:?}");
    }
    assert_eq!(wait_of(&[], &error_body("Please try again in 29.5s.", "tokens", "")).await, Some(30));
}

#[tokio::test]
async fn the_reason_of_a_failed_attempt_is_kept_for_the_operator_and_no_key_is_in_it() {
    let end = CancellationToken::new();
    let body = error_body("Incorrect API key provided: sk-secret-abcdef123.", "", "invalid_api_key");
    let backend = saying(&end, answer(401, &[JSON], body)).await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    let answer = gateway.client.chat(CHAT).await;
    assert_eq!((answer.status.as_u16(), answer.error_code().as_str()), (502, "upstream_credential_refused"));
    assert!(
        !answer.text().contains("sk-secret") && !answer.text().contains("Incorrect"),
        "{}",
        answer.text()
    );
    let body: Value = answer.json();
    assert_eq!(body["error"]["type"], "server_error");
}
