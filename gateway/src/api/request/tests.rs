use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn chat(body: &str) -> Result<Request<'_>, ReadError> {
    Request::read(RouteKind::ChatCompletions, body.as_bytes())
}

fn forwarded(body: &str, model: &str, usage: bool) -> String {
    let bytes = Bytes::copy_from_slice(body.as_bytes());
    let out = chat(body).unwrap().forward(&bytes, model, usage);
    String::from_utf8(out.to_vec()).unwrap()
}

#[test]
fn reads_what_the_gateway_decides_on() {
    let body = r#" {"messages":[{"role":"user","content":"hi"}],"model":"gpt\u002d4","stream":true,
        "stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":900,"n":2} "#;
    let request = chat(body).unwrap();
    assert_eq!(request.model, "gpt-4");
    assert!(request.stream && request.include_usage);
    assert_eq!(
        request.max_output_tokens,
        Some(900),
        "the larger bound is reserved, whichever the backend honours"
    );
    assert_eq!(request.choices, 2);
    assert_eq!(request.prompt_bytes, 32);
}

#[test]
fn duplicates_are_refused_wherever_and_however_written() {
    for body in [
        r#"{"model":"a","model":"b"}"#,
        r#"{"model":"a","x":[1,{"y":2}],"mod\u0065l":"a"}"#,
        r#"{"model":"a","model":null}"#,
    ] {
        assert_eq!(chat(body), Err(ReadError::Duplicate("model")), "{body}");
    }
    let inner = r#"{"model":"a","stream_options":{"include_usage":true,"include_usag\u0065":false}}"#;
    assert_eq!(chat(inner).unwrap_err().param(), Some("stream_options.include_usage"));
    assert_eq!(chat(r#"{"model":"a","Model":"b"}"#), Err(ReadError::CaseVariant("model")));
    assert_eq!(chat(r#"{"model":"a","ſtream":true}"#), Err(ReadError::CaseVariant("stream")));
    let elsewhere = r#"{"model":"a","metadata":{"model":"x","model":"y"}}"#;
    assert!(chat(elsewhere).is_ok(), "a field that is not read may be anything");
}

#[test]
fn wrong_values_name_their_parameter() {
    for (body, param) in [
        (r#"{}"#, "model"),
        (r#"{"model":null}"#, "model"),
        (r#"{"model":3}"#, "model"),
        (r#"{"model":"a","stream":"yes"}"#, "stream"),
        (r#"{"model":"a","stream_options":[]}"#, "stream_options"),
        (r#"{"model":"a","stream_options":{"include_usage":1}}"#, "stream_options.include_usage"),
        (r#"{"model":"a","max_tokens":0}"#, "max_tokens"),
        (r#"{"model":"a","max_tokens":1.5}"#, "max_tokens"),
        (r#"{"model":"a","max_tokens":-1.5}"#, "max_tokens"),
        (r#"{"model":"a","max_tokens":1e-3}"#, "max_tokens"),
        (r#"{"model":"a","max_tokens":1e30}"#, "max_tokens"),
        (r#"{"model":"a","n":-1}"#, "n"),
        (r#"{"model":"a","n":1.5}"#, "n"),
        (r#"{"model":"a","max_completion_tokens":9223372036854775808}"#, "max_completion_tokens"),
        (r#"{"model":"a","max_output_tokens":"9"}"#, "max_output_tokens"),
        (r#"{"model":"a","n":0}"#, "n"),
        (r#"{"model":"a","n":129}"#, "n"),
        (r#"{"model":"a","best_of":1000000}"#, "best_of"),
    ] {
        assert_eq!(chat(body).unwrap_err().param(), Some(param), "{body}");
    }
    for body in ["", "[]", "\u{feff}{}", r#"{"model":"a"}x"#, r#"{"model":NaN}"#, r#"{"model":"\ud800"}"#] {
        assert_eq!(chat(body).unwrap_err().param(), None, "{body}");
    }
    assert!(Request::read(RouteKind::Completions, br#"{"model":"a","max_tokens":0}"#).is_ok());
}

#[test]
fn every_prompt_of_a_list_is_a_choice() {
    let choices = |body: &str| Request::read(RouteKind::Completions, body.as_bytes()).unwrap().choices;
    assert_eq!(choices(r#"{"model":"a","prompt":"x"}"#), 1);
    assert_eq!(choices(r#"{"model":"a","prompt":["x","y","z"],"n":2,"best_of":4}"#), 12);
    assert_eq!(choices(r#"{"model":"a","prompt":[1,2,3]}"#), 1);
    assert_eq!(choices(r#"{"model":"a","prompt":[[1,2],[3]]}"#), 2);
}

#[test]
fn negative_bounds_are_none_and_whole_floats_are_integers() {
    for (bound, most) in
        [("-1", None), ("-2e3", None), ("100.0", Some(100)), ("1e3", Some(1000)), ("null", None)]
    {
        for field in ["max_tokens", "max_completion_tokens", "max_output_tokens"] {
            let body = format!(r#"{{"model":"a","{field}":{bound}}}"#);
            assert_eq!(chat(&body).expect(&body).max_output_tokens, most, "{body}");
            assert_eq!(forwarded(&body, "a", true), body, "forwarded as it is");
        }
    }
    let both = r#"{"model":"a","max_tokens":-1,"max_completion_tokens":5}"#;
    assert_eq!(chat(both).expect(both).max_output_tokens, None, "no bound is the largest");
    assert_eq!(chat(r#"{"model":"a","n":2.0,"best_of":3e0}"#).expect("whole").choices, 3);
}

#[test]
fn background_is_refused_by_its_name_where_it_means_something() {
    let responses = |body: &str| Request::read(RouteKind::Responses, body.as_bytes()).map(drop);
    let error = responses(r#"{"model":"a","input":"x","background":true}"#).expect_err("refused");
    assert_eq!(error.param(), Some("background"));
    assert!(error.to_string().contains("set it to false"), "{error}");
    assert_eq!(
        responses(r#"{"model":"a","background":1}"#).expect_err("refused").param(),
        Some("background")
    );
    assert_eq!(
        responses(r#"{"model":"a","background":false,"background":true}"#),
        Err(ReadError::Duplicate("background"))
    );
    for fine in [r#"{"model":"a","background":false}"#, r#"{"model":"a","background":null}"#] {
        assert_eq!(responses(fine), Ok(()), "{fine}");
    }
    assert!(chat(r#"{"model":"a","background":true}"#).is_ok(), "other endpoints do not know it");
}

#[test]
fn a_byte_order_mark_is_named() {
    let error = chat("\u{feff}{\"model\":\"a\"}").expect_err("no JSON");
    assert!(error.to_string().contains("byte order mark"), "{error}");
}

#[test]
fn base64_is_no_text_wherever_it_stands() {
    let letters = "QUJD+/=_-9".repeat(10_000);
    let image = format!("data:image/png;base64,{letters}");
    let lines = letters.as_bytes().chunks(76).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\r\n");
    let slashes = letters.replace('/', "\\/");
    for part in [
        json!({"type": "image_url", "image_url": {"url": image}}),
        json!({"type": "image_url", "image_url": {"url": image.replacen("data", "DATA", 1)}}),
        json!({"type": "input_audio", "input_audio": {"data": letters, "format": "wav"}}),
        json!({"type": "image", "image": image}),
        json!({"type": "image", "image": image.replacen("data", "Data", 1)}),
        json!({"type": "image", "source": {"type": "base64", "data": letters}}),
        json!({"inline_data": {"mime_type": "image/png", "data": lines}}),
        json!({"type": "video", "video": [image]}),
        json!({"type": "image_embeds", "image_embeds": letters}),
        json!({"type": "text", "text": image}),
    ] {
        for body in [
            json!({"model": "m", "messages": [{"role": "user", "content": [part]}]}),
            json!({"model": "m", "input": [{"role": "user", "content": [part]}]}),
            json!({"model": "m", "tools": [{"type": "function", "function": {"name": "f", "x": part}}]}),
        ] {
            let body = body.to_string();
            let request = chat(&body).expect("JSON");
            assert!(request.prompt_bytes < 250 && request.attachments == 1, "{}", &body[..120]);
            assert!(!request.text_only);
        }
    }
    let escaped = format!(r#"{{"model":"m","messages":[{{"content":"{slashes}"}}]}}"#);
    assert_eq!(chat(&escaped).expect("JSON").attachments, 1);
}

#[test]
fn text_is_text_however_long() {
    let prose = "The quick brown fox. ".repeat(1000);
    for text in [prose, "A".repeat(BASE64_BYTES_MIN - 1), format!("{}é", "A".repeat(5000)), "a,".repeat(3000)]
    {
        let body = json!({"model": "m", "messages": [{"role": "user", "content": text}]}).to_string();
        let request = chat(&body).expect("JSON");
        assert!(request.attachments == 0 && request.text_only && request.prompt_bytes > text.len() as u64);
    }
    let prompt = json!({"model": "m", "prompt": "A".repeat(5000)}).to_string();
    assert_eq!(chat(&prompt).expect("JSON").attachments, 0, "a raw prompt is read as it is");
}

#[test]
fn what_refers_to_more_than_text_teaches_no_estimate() {
    let text_only = |kind, body: &str| Request::read(kind, body.as_bytes()).expect(body).text_only;
    for body in [
        r#"{"model":"m","messages":[{"content":[{"type":"image_url","image_url":{"url":"https://h/a.png"}}]}]}"#,
        r#"{"model":"m","input":[{"content":[{"type":"input_file","file_id":"file-1"}]}]}"#,
        r#"{"model":"m","input":"hi","previous_response_id":"resp_1"}"#,
        r#"{"model":"m","input":"hi","conversation":"conv_1"}"#,
    ] {
        assert!(!text_only(RouteKind::Responses, body), "{body}");
    }
    for body in [
        r#"{"model":"m","input":"hi"}"#,
        r#"{"model":"m","input":"hi","previous_response_id":null}"#,
        r#"{"model":"m","input":"hi","tools":[{"type":"function","name":"f","parameters":{"properties":{"url":{"type":"string"}}}}]}"#,
    ] {
        assert!(text_only(RouteKind::Responses, body), "{body}");
    }
    let more = |tool: &str| {
        let body = format!(r#"{{"model":"m","messages":[],"tools":[{tool}]}}"#);
        chat(&body).expect("JSON").reads_more_than_body
    };
    for server in [
        r#"{"type":"web_search"}"#,
        r#"{"type":"web_search_20250305","name":"web_search"}"#,
        r#"{"google_search":{}}"#,
    ] {
        assert!(more(server), "{server}");
    }
    for client in [
        r#"{"type":"function","function":{"name":"f"}}"#,
        r#"{"name":"f","input_schema":{}}"#,
        r#"{"type":"custom","custom":{}}"#,
    ] {
        assert!(!more(client), "{client}");
    }
}

#[test]
fn token_ids_count_as_text() {
    let body = r#"{"model":"a","input":[1,2,3,4]}"#;
    assert!(Request::read(RouteKind::Embeddings, body.as_bytes()).unwrap().prompt_bytes >= 16);
}

#[test]
fn an_unchanged_body_is_shared() {
    let body = Bytes::from_static(br#"{"model":"a","stream":true,"stream_options":{"include_usage":true}}"#);
    let request = Request::read(RouteKind::ChatCompletions, &body).unwrap();
    assert_eq!(request.forward(&body, "a", true).as_ptr(), body.as_ptr());
}

#[test]
fn splices_every_form_of_stream_options() {
    for options in [
        "",
        r#","stream_options":null"#,
        r#","stream_options": { }"#,
        r#","stream_options":{"x":1}"#,
        r#","stream_options":{"include_usage" : false , "x":1}"#,
        r#","stream_options":{"x":1,"include_usage":null}"#,
    ] {
        for body in [
            format!(r#"{{ "model" : "a" , "stream":true{options}}}"#),
            format!(r#"{{"stream":true{options},"model":"a"}}"#),
        ] {
            let value: Value = serde_json::from_str(&forwarded(&body, "b\"\n", true)).unwrap();
            assert_eq!(value["model"], "b\"\n", "{body}");
            assert_eq!(value["stream_options"]["include_usage"], true, "{body}");
        }
    }
    let plain = r#"{"model":"a","stream":false}"#;
    assert_eq!(forwarded(plain, "a", true), plain, "usage is only added to streams");
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((any::<String>(), inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn agrees_with_a_tree_and_changes_only_what_it_should(
        model in any::<String>(), upstream in any::<String>(), stream in any::<Option<bool>>(),
        options in proptest::option::of(proptest::option::of((any::<Option<bool>>(), any_value()))),
        bound in proptest::option::of(1u32..), n in proptest::option::of(1u32..=128),
        noise in proptest::collection::vec(("x[a-z\"é\\\\]{0,4}", any_value()), 0..4), pretty in any::<bool>(),
    ) {
        let mut tree = json!({"model": model, "stream": stream, "max_tokens": bound, "n": n});
        for (name, value) in noise {
            tree[name] = value;
        }
        if let Some(options) = &options {
            tree["stream_options"] = match options {
                None => Value::Null,
                Some((None, other)) => json!({"other": other}),
                Some((Some(flag), other)) => json!({"include_usage": flag, "other": other}),
            };
        }
        let text = if pretty { serde_json::to_string_pretty(&tree) } else { serde_json::to_string(&tree) };
        let body = Bytes::from(text.unwrap());
        let request = Request::read(RouteKind::ChatCompletions, &body).unwrap();
        prop_assert_eq!(&*request.model, &*model);
        prop_assert_eq!(request.stream, stream.unwrap_or(false));
        prop_assert_eq!(request.max_output_tokens, bound);
        prop_assert_eq!(request.choices, n.unwrap_or(1));
        let sent: Value = serde_json::from_slice(&request.forward(&body, &upstream, true)).unwrap();
        tree["model"] = Value::from(upstream);
        if request.stream {
            if !tree["stream_options"].is_object() {
                tree["stream_options"] = json!({});
            }
            tree["stream_options"]["include_usage"] = Value::from(true);
        }
        prop_assert_eq!(sent, tree);
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _verdict = Request::read(RouteKind::Responses, &bytes);
    }

    #[test]
    fn mutated_bodies_never_panic(at in 0usize..120, byte in any::<u8>()) {
        let mut body = br#"{"model":"a\u0062","stream":true,"stream_options":{"include_usage":false},"prompt":["\n",[1]],"n":1}"#.to_vec();
        let at = at % body.len();
        body[at] = byte;
        let bytes = Bytes::from(body);
        if let Ok(request) = Request::read(RouteKind::Completions, &bytes) {
            let sent = request.forward(&bytes, "other", true);
            prop_assert!(serde_json::from_slice::<Value>(&sent).is_ok());
        }
    }
}
