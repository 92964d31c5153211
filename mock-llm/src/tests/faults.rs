//! Each fault takes effect, and ends when it is switched off.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// All bytes that one raw request gets back until the connection ends, and how it ended.
async fn raw(bench: &Bench, extra: Value) -> (Vec<u8>, std::io::Result<()>) {
    let body = chat(extra).to_string();
    let mut stream = TcpStream::connect(bench.addr).await.unwrap();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: mock\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    let ended =
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("connection stalls");
    (bytes, ended.map(|_| ()))
}

async fn with(fault: Value) -> Bench {
    let bench = Bench::start(Config::default()).await;
    bench.fault(fault);
    bench
}

#[tokio::test]
async fn error_status_comes_with_retry_after() {
    let bench = with(json!({ "error_status": { "status": 429, "retry_after_s": 7 } })).await;
    let reply = bench.chat(json!({})).await;
    assert_eq!((reply.status.as_u16(), &reply.headers["retry-after"]), (429, &"7".parse().unwrap()));
    assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    assert_eq!(bench.get("/health").await.status, 200);
}

#[tokio::test]
async fn probability_is_seeded() {
    let mut runs = Vec::new();
    for seed in [1, 1, 2] {
        let bench = Bench::start(Config { seed, ..Config::default() }).await;
        bench.fault(json!({ "error_status": { "status": 500, "probability": 0.5 } }));
        let mut run = Vec::new();
        for _ in 0..40 {
            run.push(bench.chat(json!({})).await.status.as_u16());
        }
        assert!(run.contains(&200) && run.contains(&500));
        runs.push(run);
    }
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0], runs[2]);
}

#[tokio::test]
async fn hang_at_accept_spares_admin_and_ends_when_switched_off_over_http() {
    let bench = with(json!({ "hang": { "at": "accept" } })).await;
    let release = async {
        bench.until(|counters| counters.connections == 1).await;
        assert_eq!(bench.handle.counters().requests, 0);
        bench.send(Method::DELETE, "/admin/faults", &[], "").await
    };
    let (reply, released) = tokio::join!(bench.chat(json!({})), release);
    assert_eq!((reply.status.as_u16(), released.status.as_u16()), (200, 200));
}

#[tokio::test]
async fn hang_at_headers_holds_the_slot_and_ends_when_switched_off() {
    let bench = with(json!({ "hang": { "at": "headers" } })).await;
    let mut answer = std::pin::pin!(bench.chat(json!({})));
    tokio::select! {
        _ = &mut answer => panic!("answered"),
        () = bench.until(|counters| counters.in_flight == 1) => {}
    }
    bench.fault(json!({ "slow_factor": 2.0 }));
    assert_eq!(answer.await.status, 200);
}

#[tokio::test]
async fn hang_at_headers_is_left_by_the_client() {
    let bench = with(json!({ "hang": { "at": "headers" } })).await;
    tokio::select! {
        _ = bench.chat(json!({})) => panic!("answered"),
        () = bench.until(|counters| counters.in_flight == 1) => {}
    }
    bench.until(|counters| counters.cancelled == 1 && counters.in_flight == 0).await;
}

#[tokio::test]
async fn hang_at_first_byte_and_mid_stream_stop_where_they_say() {
    for stream in [true, false] {
        for (at, tokens) in [("first_byte", 0), ("mid_stream", 5)] {
            let bench = with(json!({ "hang": { "at": at } })).await;
            let body = chat(json!({ "stream": stream, "max_tokens": 10 })).to_string();
            let response = bench.open(Method::POST, "/v1/chat/completions", &[], body).await.unwrap();
            bench.until(|counters| counters.generation_tokens == tokens).await;
            assert_eq!(bench.handle.counters().in_flight, 1, "{at}");
            bench.handle.clear_faults();
            assert!(collect(response).await.complete);
            assert_eq!(bench.handle.counters().generation_tokens, 10);
        }
    }
}

#[tokio::test]
async fn cut_resets_the_connection_after_the_tokens() {
    let bench = with(json!({ "cut_after_tokens": { "tokens": 3 } })).await;
    let (bytes, ended) = raw(&bench, json!({ "stream": true })).await;
    let text = String::from_utf8(bytes).unwrap();
    assert_eq!(text.matches("\"delta\":{\"content\":").count(), 3, "{text}");
    assert!(!text.contains("[DONE]"));
    assert_eq!(ended.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(bench.handle.counters().cut, 1);
    let whole = bench.chat(json!({})).await;
    assert!(!whole.complete && whole.body.ends_with(b"the weir holds "));
}

#[tokio::test]
async fn cut_on_http2_ends_only_its_stream() {
    let bench = with(json!({ "cut_after_tokens": { "tokens": 3 } })).await;
    let mut client = bench.h2().await;
    let body = Bytes::from(chat(json!({ "stream": true })).to_string());
    let ask = || request(Method::POST, "/v1/chat/completions", &[], body.clone());
    assert!(!collect(client.send_request(ask()).await.unwrap()).await.complete);
    bench.handle.clear_faults();
    assert!(collect(client.send_request(ask()).await.unwrap()).await.complete);
}

#[tokio::test]
async fn garbage_replaces_connection_body_or_event() {
    let bench = with(json!({ "garbage": { "at": "wire" } })).await;
    let (bytes, _) = raw(&bench, json!({})).await;
    assert!(bytes.starts_with(b"\x00\xff\xfe"));

    bench.fault(json!({ "garbage": { "at": "response" } }));
    for stream in [true, false] {
        let reply = bench.chat(json!({ "stream": stream })).await;
        assert_eq!(reply.status, 200);
        assert!(std::str::from_utf8(&reply.body).is_err());
    }

    bench.fault(json!({ "garbage": { "at": "event" } }));
    let reply = bench.chat(json!({ "stream": true, "max_tokens": 4 })).await;
    let events: Vec<_> =
        reply.body.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"data: ")).collect();
    let broken: Vec<_> = (0..events.len()).filter(|i| std::str::from_utf8(events[*i]).is_err()).collect();
    assert_eq!((events.len(), broken), (7, vec![3]));
    assert!(reply.body.ends_with(b"data: [DONE]\n\n"));
}

#[tokio::test]
async fn loading_is_503_for_health_and_generation_only() {
    let bench = with(json!({ "loading": true })).await;
    assert_eq!(bench.get("/health").await.status, 503);
    assert_eq!(bench.chat(json!({})).await.json()["error"]["code"], "model_loading");
    assert_eq!(bench.get("/metrics").await.status, 200);
    bench.handle.clear_faults();
    assert_eq!(
        (bench.get("/health").await.status, bench.chat(json!({})).await.status.as_u16()),
        (StatusCode::OK, 200)
    );
}

#[tokio::test]
async fn error_in_stream_replaces_the_rest() {
    let bench = with(json!({ "error_in_stream": { "after_tokens": 2 } })).await;
    let events = bench.chat(json!({ "stream": true })).await.events();
    assert_eq!((events.len(), &events[4]), (5, &json!("[DONE]")));
    assert_eq!(events[3]["error"]["type"], "server_error");
    let whole = bench.chat(json!({})).await;
    assert_eq!(
        (whole.status.as_u16(), whole.json()["error"]["code"].as_str()),
        (200, Some("simulated_error"))
    );
    bench.fault(json!({ "error_in_stream": {} }));
    assert!(bench.chat(json!({ "stream": true })).await.events()[0]["error"].is_object());
    let ask = json!({ "model": "mock-model", "input": "x", "stream": true });
    assert_eq!(bench.post("/v1/responses", ask).await.events()[0]["type"], "error");
}

#[tokio::test]
async fn dialects_of_real_engines() {
    let bench = with(json!({ "no_usage": true })).await;
    let ask = json!({ "stream": true, "max_tokens": 1, "stream_options": { "include_usage": true } });
    let events = bench.chat(ask.clone()).await.events();
    assert!(events.len() == 4 && events.iter().all(|event| event["usage"].is_null()));
    assert!(bench.chat(json!({})).await.json().get("usage").is_none());

    bench.fault(json!({ "no_done": true, "usage_on_last_choice": true, "wrong_model_name": "o\"ther" }));
    let events = bench.chat(json!({ "stream": true, "max_tokens": 1 })).await.events();
    assert_eq!((events.len(), &events[2]["choices"][0]["finish_reason"]), (3, &json!("length")));
    assert_eq!((&events[2]["usage"]["total_tokens"], &events[0]["model"]), (&json!(3), &json!("o\"ther")));
}

#[tokio::test(start_paused = true)]
async fn slow_factor_multiplies_time() {
    // Time is paused, so elapsed time is what the server asked for.
    let config = Config { prefill_tokens_per_s: 2.0, decode_tokens_per_s: 10.0, ..Config::default() };
    let bench = Bench::start(config).await;
    let mut seconds = Vec::new();
    for factor in [1.0, 3.0] {
        bench.fault(json!({ "slow_factor": factor }));
        let start = tokio::time::Instant::now();
        assert_eq!(bench.chat(json!({ "max_tokens": 10 })).await.status, 200);
        seconds.push(start.elapsed().as_secs_f64());
    }
    assert!((2.0..2.1).contains(&seconds[0]) && (6.0..6.1).contains(&seconds[1]), "{seconds:?}");
}

#[tokio::test]
async fn faults_are_switched_over_http() {
    let bench = Bench::start(Config::default()).await;
    let set = bench.post("/admin/faults", json!({ "loading": true, "hang": { "at": "headers" } })).await;
    assert_eq!((set.status.as_u16(), &set.json()["hang"]["probability"]), (200, &json!(1.0)));
    assert!(bench.handle.faults().loading);
    assert_eq!(bench.get("/admin/faults").await.json(), set.json());
    for wrong in [json!({ "lodaing": true }), json!({ "error_status": { "status": 99 } })] {
        assert_eq!(bench.post("/admin/faults", wrong).await.status, 400);
    }
    assert!(bench.handle.faults().loading, "a refused change changes nothing");
    assert_eq!(bench.send(Method::DELETE, "/admin/faults", &[], "").await.status, 200);
    assert_eq!(bench.handle.faults(), Faults::default());
}

#[tokio::test]
async fn a_login_page_comes_between_and_goes_again() {
    let page = json!({ "status": 200, "content_type": "text/html", "body": "<html>Sign in</html>", "everywhere": true });
    let bench = with(json!({ "reply": page })).await;
    for reply in [bench.chat(json!({})).await, bench.get("/health").await, bench.get("/v1/models").await] {
        assert_eq!((reply.status.as_u16(), reply.text()), (200, "<html>Sign in</html>"));
        assert_eq!(reply.headers["content-type"], "text/html");
    }
    bench.send(Method::DELETE, "/admin/faults", &[], "").await;
    assert!(bench.chat(json!({})).await.text().contains("choices"));
}

#[tokio::test]
async fn usage_is_told_in_the_form_of_a_provider() {
    for (form, has) in [
        ("zeros", r#""usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#),
        ("floats", r#".0,"completion_tokens":"#),
        ("zeros_beside", r#""input_tokens":0"#),
        ("reasoning_beside", r#""completion_tokens_details":{"reasoning_tokens":"#),
        ("cache_hits", r#""prompt_cache_hit_tokens":"#),
    ] {
        let bench = with(json!({ "usage_form": form })).await;
        let reply = bench.chat(json!({})).await;
        assert!(reply.text().contains(has), "{form}: {}", reply.text());
    }
    for (form, has) in
        [("in_choice", r#""finish_reason":"length","usage":{"#), ("x_groq", r#""x_groq":{"usage":{"#)]
    {
        let bench = with(json!({ "usage_form": form })).await;
        let asked = json!({ "stream": true, "max_tokens": 3, "stream_options": { "include_usage": true } });
        let text = bench.chat(asked).await.text().to_owned();
        assert!(text.contains(has) && !text.contains(r#""choices":[],"#), "{form}: {text}");
    }
}

#[tokio::test]
async fn streams_begin_and_end_oddly_and_extra_fields_are_refused() {
    let bench = with(json!({ "comments": 2, "empty_finish_reason": true, "stream_tail": "error" })).await;
    let text = bench.chat(json!({ "stream": true })).await.text().to_owned();
    assert!(text.starts_with(": PROCESSING\n\n: PROCESSING\n\ndata: "), "{text}");
    assert!(text.contains(r#""finish_reason":"""#) && !text.contains(r#""finish_reason":null"#), "{text}");
    assert!(
        text.contains("data: [DONE]") && text.trim_end().ends_with(r#"{"error":{"message":"late"}}"#),
        "{text}"
    );
    let bench = with(json!({ "refuse_stream_options": true, "never_stream": true })).await;
    let refused = bench.chat(json!({ "stream": true, "stream_options": {} })).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["error"]["param"]), (422, &json!("stream_options")));
    assert_eq!(bench.chat(json!({ "stream": true })).await.json()["object"], "chat.completion");
    let bench = with(json!({ "stream_tail": "close" })).await;
    let (bytes, _) = raw(&bench, json!({ "stream": true })).await;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(text.contains("data: [DONE]") && !text.ends_with("0\r\n\r\n"), "{text}");
}
