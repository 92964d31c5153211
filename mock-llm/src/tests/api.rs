//! The answers of a server without faults.

use super::*;

fn role_text_finish(events: &[Value]) -> (String, String, Vec<Value>) {
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let choices: Vec<_> = events.iter().filter(|event| !event["choices"][0].is_null()).collect();
    let text = choices.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    let finish = choices.last().unwrap()["choices"][0]["finish_reason"].as_str().unwrap().to_owned();
    (text, finish, events[choices.len()..].to_vec())
}

#[tokio::test]
async fn whole_chat_answer_has_text_and_usage() {
    let bench = Bench::start(Config::default()).await;
    let reply = bench.chat(json!({ "max_tokens": 3 })).await;
    assert_eq!(reply.status, 200);
    let body = reply.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"][0]["message"]["content"], "the weir holds ");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    assert_eq!(body["usage"], json!({ "prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5 }));
    let counters = bench.handle.counters();
    assert_eq!((counters.prompt_tokens, counters.generation_tokens, counters.completed), (2, 3, 1));
}

#[tokio::test]
async fn output_is_the_smaller_of_asked_and_configured() {
    let bench = Bench::start(Config { output_tokens: 5, ..Config::default() }).await;
    for (extra, tokens, finish) in [
        (json!({}), 5, "stop"),
        (json!({ "max_tokens": 100 }), 5, "stop"),
        (json!({ "max_completion_tokens": 2, "max_tokens": 4 }), 2, "length"),
    ] {
        let body = bench.chat(extra).await.json();
        assert_eq!(body["usage"]["completion_tokens"], tokens);
        assert_eq!(body["choices"][0]["finish_reason"], finish);
    }
}

#[tokio::test]
async fn stream_is_role_tokens_finish_usage_done() {
    let bench = Bench::start(Config::default()).await;
    let options = json!({ "stream": true, "max_tokens": 20, "stream_options": { "include_usage": true } });
    let reply = bench.chat(options).await;
    assert!(reply.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let events = reply.events();
    assert_eq!(events.len(), 1 + 20 + 1 + 1 + 1);
    let (text, finish, rest) = role_text_finish(&events);
    assert_eq!((text.split(' ').count(), finish.as_str()), (21, "length"));
    assert_eq!(rest[0]["choices"], json!([]));
    assert_eq!(rest[0]["usage"]["completion_tokens"], 20);
    assert_eq!(rest[1], "[DONE]");
    let ids: std::collections::HashSet<_> =
        events[..23].iter().map(|event| event["id"].to_string()).collect();
    assert_eq!(ids.len(), 1);
    let whole = bench.chat(json!({ "max_tokens": 20 })).await.json();
    assert_eq!(whole["choices"][0]["message"]["content"], text);
}

#[tokio::test]
async fn stream_without_include_usage_has_none() {
    let bench = Bench::start(Config::default()).await;
    let events = bench.chat(json!({ "stream": true, "max_tokens": 2 })).await.events();
    assert!(events.iter().all(|event| event.get("usage").is_none()));
    assert_eq!((events.len(), &events[4]), (5, &json!("[DONE]")));
}

#[tokio::test]
async fn timed_stream_sends_the_same_as_an_instant_one() {
    let timed =
        Config { decode_tokens_per_s: 5_000.0, prefill_tokens_per_s: 1e6, jitter: 1.0, ..Config::default() };
    let timed = Bench::start(timed).await;
    let instant = Bench::start(Config::default()).await;
    let text = |events: Vec<Value>| role_text_finish(&events).0;
    let ask = json!({ "stream": true, "max_tokens": 40 });
    assert_eq!(text(timed.chat(ask.clone()).await.events()), text(instant.chat(ask).await.events()));
    assert!(
        timed
            .get("/metrics")
            .await
            .text()
            .contains("vllm:generation_tokens_total{model_name=\"mock-model\"} 40")
    );
}

#[tokio::test]
async fn several_choices_are_told_apart() {
    let bench = Bench::start(Config::default()).await;
    let body = bench.chat(json!({ "n": 2, "max_tokens": 3 })).await.json();
    assert_eq!(body["choices"].as_array().unwrap().len(), 2);
    assert_eq!((&body["choices"][1]["index"], &body["usage"]["completion_tokens"]), (&json!(1), &json!(6)));
    let events = bench.chat(json!({ "n": 2, "max_tokens": 3, "stream": true })).await.events();
    let second = events.iter().filter(|event| event["choices"][0]["index"] == 1).count();
    assert_eq!((second, events.len()), (5, 11));
}

#[tokio::test]
async fn completions_answer_and_stream() {
    let bench = Bench::start(Config::default()).await;
    let ask = json!({ "model": "mock-model", "prompt": "abcdefgh", "max_tokens": 2 });
    let body = bench.post("/v1/completions", ask.clone()).await.json();
    assert_eq!(
        (&body["object"], &body["choices"][0]["text"]),
        (&json!("text_completion"), &json!("the weir "))
    );
    let events = bench.post("/v1/completions", merged(ask, json!({ "stream": true }))).await.events();
    let texts: Vec<_> = events.iter().map(|event| event["choices"][0]["text"].clone()).collect();
    assert_eq!(texts, [json!("the "), json!("weir "), json!(""), Value::Null]);
}

#[tokio::test]
async fn responses_events_are_named_and_numbered() {
    let bench = Bench::start(Config::default()).await;
    let ask = json!({ "model": "mock-model", "input": "abcdefgh", "max_output_tokens": 20 });
    let body = bench.post("/v1/responses", ask.clone()).await.json();
    let text = body["output"][0]["content"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!((&body["status"], &body["usage"]["output_tokens"]), (&json!("completed"), &json!(20)));
    let reply = bench.post("/v1/responses", merged(ask, json!({ "stream": true }))).await;
    let events = reply.events();
    let names: Vec<_> = reply.text().lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(
        names[..4],
        ["created", "in_progress", "output_item.added", "content_part.added"].map(prefixed)
    );
    assert!(names[4..24].iter().all(|name| *name == "response.output_text.delta"));
    let end = ["output_text.done", "content_part.done", "output_item.done", "completed"];
    assert_eq!(names[24..], end.map(prefixed));
    for (number, event) in events.iter().enumerate() {
        assert_eq!((&event["sequence_number"], &event["type"]), (&json!(number), &json!(names[number])));
    }
    let deltas: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!((&deltas, &events[24]["text"]), (&text, &json!(text)));
    assert_eq!(events[27]["response"]["output"][0]["content"][0]["text"], text);
    assert_eq!(events[27]["response"]["usage"]["total_tokens"], 22);
}

fn prefixed(name: &str) -> String {
    format!("response.{name}")
}

#[tokio::test]
async fn embeddings_answer_each_input() {
    let bench = Bench::start(Config::default()).await;
    let ask = json!({ "model": "mock-model", "input": ["abcd", "efgh"], "dimensions": 4 });
    let body = bench.post("/v1/embeddings", ask.clone()).await.json();
    assert_eq!(body["data"].as_array().unwrap().len(), 2);
    assert_eq!(body["data"][1]["embedding"], json!([0.5, 0.5, 0.5, 0.5]));
    assert_eq!(body["usage"], json!({ "prompt_tokens": 2, "total_tokens": 2 }));
    let body = bench.post("/v1/embeddings", merged(ask, json!({ "encoding_format": "base64" }))).await.json();
    assert_eq!(body["data"][0]["embedding"], "AAAAPwAAAD8AAAA/AAAAPw==");
}

#[tokio::test]
async fn large_stream_arrives_whole_in_bounded_pieces() {
    let bench = Bench::start(Config::default()).await;
    let headers = [("x-mock-output-tokens", "4096"), ("x-mock-chunk-bytes", "51200")];
    let body = chat(json!({ "stream": true })).to_string();
    let mut response = bench.open(Method::POST, "/v1/chat/completions", &headers, body).await.unwrap();
    let (mut bytes, mut largest) = (0, 0);
    while let Some(frame) = response.frame().await {
        let length = frame.unwrap().into_data().unwrap().len();
        bytes += length;
        largest = largest.max(length);
    }
    assert!(bytes > 200 * 1024 * 1024 && bytes < 202 * 1024 * 1024, "{bytes}");
    assert!(largest <= 1024 * 1024, "{largest}");
    assert_eq!(bench.handle.counters().generation_tokens, 4096);
}

#[tokio::test]
async fn wrong_requests_are_refused_in_openais_shape() {
    let bench = Bench::start(Config::default()).await;
    let refused = [
        (bench.chat(json!({ "model": "other" })).await, 404, json!("model_not_found")),
        (bench.send(Method::POST, "/v1/chat/completions", &[], "{").await, 400, Value::Null),
        (bench.chat(json!({ "messages": [] })).await, 400, json!("invalid_value")),
        (bench.chat(json!({ "max_tokens": 0 })).await, 400, json!("invalid_value")),
        (bench.chat(json!({ "n": 129 })).await, 400, json!("invalid_value")),
        (bench.get("/v1/chat/completions").await, 405, json!("method_not_allowed")),
        (bench.get("/nowhere").await, 404, json!("unknown_url")),
    ];
    for (reply, status, code) in refused {
        assert_eq!((reply.status.as_u16(), &reply.json()["error"]["code"]), (status, &code));
        assert!(reply.json()["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn too_large_body_is_refused_before_it_is_sent() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let bench = Bench::start(Config::default()).await;
    let mut stream = TcpStream::connect(bench.addr).await.unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: mock\r\ncontent-length: 33554433\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 413");
}

#[tokio::test]
async fn request_id_is_echoed_and_counted_and_the_server_named() {
    let bench = Bench::start(Config { region: "sgp".into(), ..Config::default() }).await;
    let body = chat(json!({})).to_string();
    for _ in 0..2 {
        let headers = [("x-request-id", "abc")];
        let reply = bench.send(Method::POST, "/v1/chat/completions", &headers, body.clone()).await;
        assert_eq!(
            (&reply.headers["x-request-id"], &reply.headers["x-mock-region"]),
            (&"abc".parse().unwrap(), &"sgp".parse().unwrap())
        );
        assert_eq!(reply.headers["x-mock-instance"], format!("mock-{}", bench.addr.port()));
    }
    assert_eq!((bench.handle.request_id_count("abc"), bench.handle.request_id_count("x")), (2, 0));
    assert_eq!(bench.handle.counters().with_request_id, 2);
}

#[tokio::test]
async fn models_health_metrics_and_stats_answer() {
    let bench = Bench::start(Config { models: vec!["a".into(), "b".into()], ..Config::default() }).await;
    assert_eq!(bench.get("/v1/models").await.json()["data"][1]["id"], "b");
    assert_eq!(bench.get("/health").await.status, 200);
    assert_eq!(bench.send(Method::HEAD, "/health", &[], "").await.status, 200);
    bench.chat(json!({ "model": "b", "max_tokens": 7 })).await;
    let metrics = bench.get("/metrics").await;
    for line in [
        "vllm:num_requests_running{model_name=\"b\"} 0",
        "vllm:num_requests_waiting{model_name=\"a\"} 0",
        "vllm:kv_cache_usage_perc{model_name=\"a\"} 0",
        "vllm:gpu_cache_usage_perc{model_name=\"a\"} 0",
        "vllm:prompt_tokens_total{model_name=\"b\"} 2",
        "vllm:generation_tokens_total{model_name=\"b\"} 7",
        "vllm:time_to_first_token_seconds_count{model_name=\"b\"} 1",
        "vllm:e2e_request_latency_seconds_count{model_name=\"b\"} 1",
    ] {
        assert!(metrics.text().lines().any(|found| found == line), "{line}\n{}", metrics.text());
    }
    assert_eq!(bench.get("/admin/stats").await.json()["generation_tokens"], 7);
}

#[tokio::test]
async fn http2_without_tls_streams_as_well() {
    let bench = Bench::start(Config::default()).await;
    let body = chat(json!({ "stream": true, "max_tokens": 3 })).to_string();
    let response = bench
        .h2()
        .await
        .send_request(request(Method::POST, "/v1/chat/completions", &[], body.into()))
        .await
        .unwrap();
    assert_eq!(response.version(), hyper::Version::HTTP_2);
    assert_eq!(collect(response).await.events().len(), 6);
}
