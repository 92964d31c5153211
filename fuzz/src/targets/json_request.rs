use bytes::Bytes;
use serde_json::{Map, Value, json};
use weir_gateway::api::usage::UsageBounds;
use weir_gateway::api::request::{Request, RouteKind};

use crate::input::Input;

const KINDS: [RouteKind; 4] =
    [RouteKind::ChatCompletions, RouteKind::Completions, RouteKind::Embeddings, RouteKind::Responses];
const MODEL: &str = "up\"stream\\\u{1f600}\n";
/// Members that the gateway decides on; none may be there twice.
const DECIDES: [&str; 6] = ["model", "stream", "max_tokens", "n", "messages", "stream_options"];

/// What is read of a request is what a JSON reader finds, no member that decides is there twice, and what is forwarded differs
/// from what came in the model's name and, where asked for, in the usage option alone.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.byte();
    let kind = KINDS[usize::from(flags & 3)];
    let add_usage = flags & 4 != 0;
    let body = input.rest();
    let Ok(request) = Request::read(kind, body) else { return };
    assert!(request.choices >= 1 && request.prompt_bytes <= body.len() as u64 * 4);
    assert!(request.prompt_prefix(body, 64).len() <= 64);
    UsageBounds::of(&request, body.len());
    let theirs = match serde_json::from_slice::<Value>(body) {
        Ok(theirs) => theirs,
        // See the scanner.
        Err(error) => {
            assert!(error.to_string().contains("out of range"), "{error}");
            return;
        }
    };
    let mut theirs: Map<String, Value> = theirs.as_object().cloned().expect("an object");
    assert_eq!(theirs["model"], *request.model);
    assert_eq!(theirs.get("stream").and_then(Value::as_bool).unwrap_or(false), request.stream);
    for member in DECIDES {
        // Written without escapes, at the least.
        let names = members(body).into_iter().filter(|name| name == member).count();
        assert!(names <= 1, "{member} is there {names} times");
    }
    let sent = request.forward(&Bytes::copy_from_slice(body), MODEL, add_usage);
    let sent: Value = serde_json::from_slice(&sent).expect("what is forwarded is JSON");
    theirs.insert("model".to_owned(), MODEL.into());
    if add_usage && request.stream && !request.include_usage && kind.takes_include_usage() {
        let options = theirs.entry("stream_options").or_insert(Value::Null);
        if options.is_null() {
            *options = json!({});
        }
        options["include_usage"] = true.into();
    }
    assert_eq!(sent, Value::Object(theirs));
    assert_eq!(request.clone().into_owned(), request);
}

/// The names of an object's members, repeated ones too.
fn members(body: &[u8]) -> Vec<String> {
    use weir_gateway::api::json_scanner::{Fault, Scanner};
    let mut names = Vec::new();
    let Ok(mut scanner) = Scanner::new(body) else { return names };
    let read: Result<(), Fault> = scanner.object(|scanner, name| {
        names.push(name.decode().into_owned());
        scanner.skip()
    });
    assert!(read.is_ok(), "it was read before");
    names
}
