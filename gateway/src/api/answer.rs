//! What an answer is, by its bytes: an answer of its endpoint, an event stream, or neither. The type that the backend
//! declares does not decide.

use serde_json::{Map, Value, json};

use super::json_scanner::{Fault, Kind, Scanner};
use super::request::RouteKind;
use super::response::ReadAnswer;

/// Why a body is not the answer that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Nothing at all.
    #[error("it is empty")]
    Empty,
    /// Not JSON, or cut off.
    #[error("it is not a JSON object: {0}")]
    NotJson(#[from] Fault),
    /// JSON of something else.
    #[error("it has no '{0}', which answers of this endpoint have")]
    Lacks(&'static str),
}

/// The member that each answer of the endpoint has, and its type.
fn mark_of(kind: RouteKind) -> (&'static str, Kind) {
    match kind {
        RouteKind::ChatCompletions | RouteKind::Completions => ("choices", Kind::Array),
        RouteKind::Embeddings => ("data", Kind::Array),
        RouteKind::Responses => ("output", Kind::Array),
    }
}

/// Whether a body that was read is an answer of the endpoint; [`check`] says what is wrong with one that is none.
pub fn is_of(kind: RouteKind, read: &ReadAnswer) -> bool {
    read.has_list(mark_of(kind).0)
}

/// Checks that a complete body is a JSON object of the endpoint. White space around the object is allowed: some servers
/// send blank lines while they wait for the model.
///
/// # Errors
/// What it is instead.
pub fn check(kind: RouteKind, body: &[u8]) -> Result<(), NoAnswer> {
    let body = body.trim_ascii();
    if body.is_empty() {
        return Err(NoAnswer::Empty);
    }
    let (mark, of_kind) = mark_of(kind);
    let mut found = false;
    let mut s = Scanner::new(body)?;
    if s.kind()? != Kind::Object {
        return Err(Fault { at: s.position(), what: "expected an object" }.into());
    }
    s.object(|s, name| -> Result<(), Fault> {
        found |= name.raw == mark && s.kind()? == of_kind;
        s.skip()
    })?;
    s.end()?;
    if found { Ok(()) } else { Err(NoAnswer::Lacks(mark)) }
}

/// How a body begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beginning {
    /// Too little of it is there to tell.
    Open,
    /// An event stream.
    Events,
    /// JSON.
    Json,
    /// Neither.
    Other,
}

/// Names of the fields of an event stream; an empty one is a comment.
const FIELDS: [&[u8]; 5] = [b"data", b"event", b"id", b"retry", b""];

/// Tells an event stream from JSON and from anything else by its first bytes, of which a byte order mark and empty lines
/// say nothing.
pub fn beginning(bytes: &[u8]) -> Beginning {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    let bytes = match bytes.strip_prefix(MARK) {
        Some(rest) => rest,
        None if MARK.starts_with(bytes) => return Beginning::Open,
        None => bytes,
    };
    let bytes = bytes.trim_ascii_start();
    match bytes.first() {
        None => return Beginning::Open,
        Some(b'{' | b'[') => return Beginning::Json,
        Some(_) => {}
    }
    let end = bytes.iter().position(|b| matches!(b, b':' | b'\n' | b'\r'));
    let name = &bytes[..end.unwrap_or(bytes.len())];
    let fits = |field: &&[u8]| match end {
        Some(_) => name == *field,
        None => field.starts_with(name),
    };
    match (FIELDS.iter().any(fits), end) {
        (true, Some(_)) => Beginning::Events,
        (true, None) => Beginning::Open,
        (false, _) => Beginning::Other,
    }
}

/// A complete answer as the event stream that was asked for, from a server that does not stream; `None` when the body is
/// no JSON object. `body` has passed [`check`].
pub fn as_events(kind: RouteKind, body: &[u8]) -> Option<String> {
    let Value::Object(mut answer) = serde_json::from_slice(body.trim_ascii()).ok()? else { return None };
    if kind == RouteKind::Responses {
        let event = json!({ "type": "response.completed", "sequence_number": 0, "response": answer });
        return Some(format!("event: response.completed\ndata: {event}\n\n"));
    }
    let usage = answer.remove("usage").filter(|usage| !usage.is_null());
    if kind == RouteKind::ChatCompletions {
        answer.insert("object".into(), "chat.completion.chunk".into());
        answer.get_mut("choices").and_then(Value::as_array_mut).into_iter().flatten().for_each(as_delta);
    }
    let mut head: Map<String, Value> = answer.clone();
    head.insert("choices".into(), json!([]));
    let mut out = format!("data: {}\n\n", Value::Object(answer));
    if let Some(usage) = usage {
        head.insert("usage".into(), usage);
        out.push_str(&format!("data: {}\n\n", Value::Object(head)));
    }
    out.push_str("data: [DONE]\n\n");
    Some(out)
}

/// A choice of a complete answer as a choice of a chunk: `message` is its one `delta`, in which tool calls are numbered.
fn as_delta(choice: &mut Value) {
    let Some(choice) = choice.as_object_mut() else { return };
    let mut delta = choice.remove("message").unwrap_or_else(|| json!({}));
    let calls = delta.get_mut("tool_calls").and_then(Value::as_array_mut);
    for (index, call) in calls.into_iter().flatten().enumerate() {
        if let Some(call) = call.as_object_mut() {
            call.entry("index").or_insert_with(|| index.into());
        }
    }
    choice.insert("delta".into(), delta);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weir_proto::resource::Dialect;

    use super::*;

    /// By one pass over all that is read of an answer.
    fn is_read_as(kind: RouteKind, body: &str) -> bool {
        ReadAnswer::of(body.as_bytes(), kind, Dialect::OpenAi).is_ok_and(|read| is_of(kind, &read))
    }

    #[test]
    fn an_answer_is_an_object_of_its_endpoint() {
        use RouteKind::{ChatCompletions, Completions, Embeddings, Responses};
        for (kind, body) in [
            (ChatCompletions, r#"{"id":"1","choices":[]}"#),
            (ChatCompletions, "\n\n {\"choices\":[{\"message\":{}}]} \n"),
            (Completions, r#"{"choices":[{"text":"x"}],"error":""}"#),
            (Embeddings, r#"{"object":"list","data":[]}"#),
            (Responses, r#"{"object":"response","output":[]}"#),
            (ChatCompletions, r#"{"choices":null,"choices":[[1]],"data":{}}"#),
        ] {
            assert_eq!(check(kind, body.as_bytes()), Ok(()), "{body}");
            assert!(is_read_as(kind, body), "{body}");
        }
        for (kind, body) in [
            (ChatCompletions, ""),
            (ChatCompletions, " \n"),
            (ChatCompletions, "<!DOCTYPE html><html></html>"),
            (ChatCompletions, r#"{"choices":[{"message":{"content":"x"#),
            (ChatCompletions, r#"{"choices":[]}{"choices":[]}"#),
            (ChatCompletions, r#"[{"choices":[]}]"#),
            (ChatCompletions, r#""choices""#),
            (ChatCompletions, "{}"),
            (ChatCompletions, r#"{"choices":null}"#),
            (ChatCompletions, r#"{"choices":{"a":[]},"b":[]}"#),
            (ChatCompletions, r#"{"detail":"Not authenticated"}"#),
            (ChatCompletions, r#"{"a":{"choices":[]}}"#),
            (Embeddings, r#"{"choices":[]}"#),
            (Responses, r#"{"choices":[]}"#),
            (ChatCompletions, "data: {\"choices\":[]}\n\n"),
        ] {
            assert!(check(kind, body.as_bytes()).is_err() && !is_read_as(kind, body), "{body}");
        }
    }

    #[test]
    fn bytes_tell_what_a_body_is_and_not_its_declared_type() {
        for (bytes, expected) in [
            ("data: {}", Beginning::Events),
            ("data:{}\n\n", Beginning::Events),
            (": OPENROUTER PROCESSING\n", Beginning::Events),
            ("\n\r\n: ping\n\n", Beginning::Events),
            ("event: x\ndata: {}", Beginning::Events),
            ("id: 1\n", Beginning::Events),
            ("retry: 1\n", Beginning::Events),
            ("data\n\n", Beginning::Events),
            ("\u{feff}data: {}", Beginning::Events),
            ("{\"a\":1}", Beginning::Json),
            ("  \n[", Beginning::Json),
            ("", Beginning::Open),
            ("\n\n", Beginning::Open),
            ("da", Beginning::Open),
            ("event", Beginning::Open),
            ("dat: x", Beginning::Other),
            ("database", Beginning::Other),
            ("<!DOCTYPE html>", Beginning::Other),
            ("Internal Server Error", Beginning::Other),
            ("error: x", Beginning::Other),
            ("\u{1f}\u{8b}", Beginning::Other),
        ] {
            assert_eq!(beginning(bytes.as_bytes()), expected, "{bytes:?}");
        }
    }

    #[test]
    fn an_answer_that_is_not_streamed_becomes_a_stream() {
        let body = r#"{"id":"1","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi","tool_calls":[{"id":"a"},{"id":"b"}]},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
        let events = as_events(RouteKind::ChatCompletions, body.as_bytes()).expect("events");
        let payloads: Vec<&str> =
            events.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        let [chunk, usage, done] = payloads[..] else { panic!("{events}") };
        let (chunk, usage): (Value, Value) =
            (serde_json::from_str(chunk).unwrap(), serde_json::from_str(usage).unwrap());
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["choices"][0]["delta"]["content"], "hi");
        assert_eq!(chunk["choices"][0]["delta"]["tool_calls"][1]["index"], 1);
        assert_eq!(chunk["choices"][0]["finish_reason"], "stop");
        assert!(chunk.get("usage").is_none() && chunk["choices"][0].get("message").is_none());
        assert_eq!((&usage["choices"], &usage["usage"]["prompt_tokens"]), (&json!([]), &json!(1)));
        assert_eq!(done, "[DONE]");
        let body = r#"{"object":"response","output":[],"usage":{"input_tokens":1}}"#;
        let events = as_events(RouteKind::Responses, body.as_bytes()).expect("events");
        assert!(events.starts_with("event: response.completed\ndata: {") && !events.contains("[DONE]"));
        assert_eq!(as_events(RouteKind::Completions, b"[]"), None);
    }

    proptest! {
        #[test]
        fn more_bytes_never_change_what_was_told(bytes in "(\u{feff})?(\n|\r| ){0,3}(data|event|dat|<|\\{|:|id|x){1,3}(:|\n|a){0,3}") {
            let bytes = bytes.as_bytes();
            let whole = beginning(bytes);
            for end in 0..bytes.len() {
                let part = beginning(&bytes[..end]);
                prop_assert!(part == Beginning::Open || part == whole, "{end}: {part:?} then {whole:?}");
            }
        }
    }
}
