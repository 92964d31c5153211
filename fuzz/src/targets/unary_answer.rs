use bytes::Bytes;
use serde_json::Value;
use weir_gateway::api::usage::UsageBounds;
use weir_gateway::api::request::RouteKind;
use weir_gateway::api::response::{ModelNames, ReadAnswer, is_error_body, is_error_object};
use weir_proto::resource::Dialect;

const MODEL: &str = "cli\"ent-🦊";
const NAMES_MAX: usize = 8;

/// An answer is an object or not, as for any JSON reader; it is named as the client asked and otherwise stays what it was; what
/// it says of its usage is possible; and it grows by a few names at the most.
pub(crate) fn run(data: &[u8]) {
    let read = is_error_object(data);
    assert_eq!(is_error_body(data), read == Ok(true));
    let renamed = ModelNames::of(data).renamed(&Bytes::copy_from_slice(data), MODEL);
    assert!(renamed.len() <= data.len() + NAMES_MAX * 2 * MODEL.len(), "it grew to {}", renamed.len());
    assert_eq!(ModelNames::of(&renamed).renamed(&renamed, MODEL), renamed, "renaming twice changes it again");
    let bounds = UsageBounds { prompt: 1000, completion: 1000 };
    for (kind, dialect) in [(RouteKind::ChatCompletions, Dialect::Gemini), (RouteKind::Responses, Dialect::NewApi)] {
        let answer = ReadAnswer::of(data, kind, dialect);
        assert_eq!(answer.is_ok(), read.is_ok(), "one reading or the other takes it for JSON");
        let answer = answer.unwrap_or_default();
        assert!(answer.completion_estimate(data.len(), kind) <= data.len() as u64);
        let Ok(Some(usage)) = answer.usage(data.len(), &bounds) else { continue };
        assert!(usage.prompt.unwrap_or(0) <= 1000);
        assert!(usage.completion.unwrap_or(0) <= 1000.max(data.len() as u64));
        assert!(usage.cache_read + usage.cache_write <= usage.prompt.unwrap_or(0));
    }
    let Ok(mut theirs) = serde_json::from_slice::<Value>(data) else { return };
    assert_eq!(read.is_ok(), theirs.is_object(), "{read:?}");
    let Some(object) = theirs.as_object_mut() else {
        assert_eq!(renamed, data);
        return;
    };
    // Of repeated members this reader keeps the last one, as most do.
    let ours: Value = serde_json::from_slice(&renamed).expect("a renamed answer is JSON");
    if renamed == data {
        return;
    }
    let of = |value: &Value| value.get("model").is_some_and(Value::is_string);
    if ours["model"] == MODEL {
        object.insert("model".to_owned(), MODEL.into());
    }
    if let Some(response) = object.get_mut("response")
        && of(response)
        && ours["response"]["model"] == MODEL
    {
        response["model"] = MODEL.into();
    }
    assert_eq!(ours, theirs, "something else was changed");
}
