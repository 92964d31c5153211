//! What an answer to a probe says of the backend. Pure.

use http::StatusCode;
use serde_json::Value;
use weir_probe::{Answer, Finding, mentions};
use weir_proto::v1::ProbeOutcome;

use crate::api::response::is_error_body;
use crate::api::upstream_error::{self, Meaning};
use crate::api::usage::OVERSHOOT_TOKENS_MAX;

/// Of the name that a model calls itself by, so much is remembered; an answer may be all name.
const NAME_BYTES_MAX: usize = 256;

/// A completion of one token. `known` is the name the backend gave last time, if it was another than asked for.
pub(super) fn completion(answer: &Answer, asked: &str, known: Option<&str>) -> (Finding, Option<String>) {
    if let Some(found) = refused(answer) {
        return (found, None);
    }
    let (status, body) = (answer.status, answer.body.as_ref());
    match status.as_u16() {
        200 => match completed(body) {
            Ok(answer) => named(&answer, asked, known, "completed one token"),
            Err(text) => (Finding::new(ProbeOutcome::BadAnswer, text), None),
        },
        // The model is there and minds the form of the question: reasoning models want more than one token, others
        // another name for the bound, embedding models no chat at all.
        400 | 422 if !says_missing(body) => (
            Finding::new(
                ProbeOutcome::Pass,
                format!("answered {status}: it is there and wants another question"),
            ),
            None,
        ),
        404 | 405 | 501 if !says_missing(body) => (
            Finding::new(ProbeOutcome::Pass, "it takes no chat completions; that it answers has to do"),
            None,
        ),
        400 | 404 | 422 => {
            (Finding::new(ProbeOutcome::WrongModel, "it says that it has no such model"), None)
        }
        _ => (answer.refusal(), None),
    }
}

/// An embedding of one input; see [`completion`].
pub(super) fn embedding(answer: &Answer, asked: &str, known: Option<&str>) -> (Finding, Option<String>) {
    if let Some(found) = refused(answer) {
        return (found, None);
    }
    let body = answer.body.as_ref();
    if answer.status != StatusCode::OK {
        return match answer.status.as_u16() {
            400 | 404 | 422 if says_missing(body) => {
                (Finding::new(ProbeOutcome::WrongModel, "it says that it has no such model"), None)
            }
            _ => (answer.refusal(), None),
        };
    }
    let vector = |answer: &Value| {
        let vector = &answer["data"][0]["embedding"];
        // Numbers, or base64 of them.
        vector.as_array().is_some_and(|v| !v.is_empty()) || vector.as_str().is_some_and(|v| !v.is_empty())
    };
    match json(body) {
        Ok(answer) if vector(&answer) => named(&answer, asked, known, "embedded one input"),
        Ok(_) => (Finding::new(ProbeOutcome::BadAnswer, "a 200 without an embedding"), None),
        Err(text) => (Finding::new(ProbeOutcome::BadAnswer, text), None),
    }
}

/// A refusal that has nothing to do with the question, told apart as for requests: an empty account is no matter of
/// seconds, and under any status neither that nor a refused credential says that the model works.
fn refused(answer: &Answer) -> Option<Finding> {
    if answer.status.is_success() {
        return None;
    }
    let code = answer.status.as_u16();
    let (outcome, what) = match upstream_error::meaning(code, upstream_error::read(&answer.body).as_ref()) {
        Meaning::Quota => (ProbeOutcome::QuotaUsedUp, ": the account has no quota left"),
        Meaning::Credential => (ProbeOutcome::Status, ": it refuses our credential"),
        // Of 503 it matters more what it is than that it is one: see `Answer::refusal`.
        Meaning::Busy if code != 503 => (ProbeOutcome::Busy, ""),
        _ => return None,
    };
    Some(Finding::new(outcome, format!("answered {code}{what}")))
}

fn json(body: &[u8]) -> Result<Value, &'static str> {
    let answer = serde_json::from_slice::<Value>(body).map_err(|_| "a 200 that is not JSON")?;
    match is_error_body(body) {
        true => Err("an error inside a 200"),
        false => Ok(answer),
    }
}

/// A 200 to a question: it must hold an answer.
fn completed(body: &[u8]) -> Result<Value, &'static str> {
    let answer = json(body)?;
    let choice = answer["choices"].get(0).ok_or("a 200 without choices")?;
    let ended = choice["finish_reason"].as_str().is_some_and(|reason| !reason.is_empty());
    let wrote = choice["message"]["content"].as_str().is_some_and(|text| !text.is_empty());
    match ended || wrote {
        true => Ok(answer),
        false => Err("a completion without a token and without an end"),
    }
}

/// A good answer: it must be of the model asked for. Returns the name that it calls itself by.
fn named(answer: &Value, asked: &str, known: Option<&str>, what: &str) -> (Finding, Option<String>) {
    let Some(named) = answer["model"].as_str().filter(|name| !name.is_empty()) else {
        return (Finding::new(ProbeOutcome::Pass, what), None);
    };
    let named = &named[..named.floor_char_boundary(NAME_BYTES_MAX)];
    if is_same_model(asked, named) {
        return (Finding::new(ProbeOutcome::Pass, what), Some(asked.to_owned()));
    }
    // Some servers call their models by file or by nothing of use. What they said first is what they are called; one
    // that says something else later has another model loaded.
    match known {
        Some(known) if known != named => {
            (Finding::new(ProbeOutcome::WrongModel, "another model answers than before"), None)
        }
        _ => {
            (Finding::new(ProbeOutcome::Pass, format!("{what}, under another name")), Some(named.to_owned()))
        }
    }
}

/// The name, a dated version of it, or the name without its owner or its file's ending.
fn is_same_model(asked: &str, named: &str) -> bool {
    let bare = |name: &str| {
        let name = name.rsplit('/').next().unwrap_or(name);
        name.strip_suffix(".gguf").unwrap_or(name).to_ascii_lowercase()
    };
    let (asked, named) = (bare(asked), bare(named));
    named
        .strip_prefix(asked.as_str())
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '@', ':']))
}

/// The models on a list that are missing; an empty list says nothing.
pub(super) fn missing<'a>(list: &[u8], wanted: &[&'a str]) -> Vec<&'a str> {
    let Ok(list) = serde_json::from_slice::<Value>(list) else { return Vec::new() };
    let listed: Vec<&str> =
        list["data"].as_array().into_iter().flatten().filter_map(|m| m["id"].as_str()).collect();
    if listed.is_empty() {
        return Vec::new();
    }
    wanted.iter().filter(|model| !listed.iter().any(|name| is_same_model(model, name))).copied().collect()
}

/// Tokens written, as the answer counts them; `None` when it does not, or cannot be right: `asked` were asked for, and a
/// token has one byte at the least.
pub(super) fn tokens_written(body: &[u8], asked: u32) -> Option<u64> {
    let written = serde_json::from_slice::<Value>(body).ok()?["usage"]["completion_tokens"].as_u64()?;
    let most = (u64::from(asked) + OVERSHOOT_TOKENS_MAX).max(body.len() as u64);
    (1..=most).contains(&written).then_some(written)
}

fn says_missing(body: &[u8]) -> bool {
    mentions(body, "model")
        && ["not found", "not_found", "does not exist", "unknown model"].iter().any(|s| mentions(body, s))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        let (status, body) = (StatusCode::from_u16(status).unwrap(), body.to_owned().into());
        Answer { status, retry_after: false, body, with_credential: true }
    }

    fn judged(status: u16, body: &str) -> ProbeOutcome {
        completion(&answer(status, body), "gpt-4.1", None).0.outcome
    }

    const GOOD: &str =
        r#"{"model":"gpt-4.1","choices":[{"message":{"content":"ok"},"finish_reason":"length"}]}"#;

    #[test]
    fn answers_of_real_servers_are_judged_by_what_they_mean() {
        use ProbeOutcome as O;
        for (status, body, expected) in [
            (200, GOOD, O::Pass),
            (200, r#"{"choices":[{"message":{"content":""},"finish_reason":"length"}]}"#, O::Pass),
            (200, r#"{"model":"gpt-4.1-2025-04-14","choices":[{"finish_reason":"length"}]}"#, O::Pass),
            (200, r#"{"model":"gpt-4.1","choices":[]}"#, O::BadAnswer),
            (200, r#"{"error":{"message":"out of memory"}}"#, O::BadAnswer),
            (200, r#"{"choices":[{"message":{"content":""},"finish_reason":null}]}"#, O::BadAnswer),
            (200, "<html>", O::BadAnswer),
            // A reasoning model that has no room to think.
            (400, r#"{"error":{"message":"max_tokens or model output limit was reached"}}"#, O::Pass),
            (400, r#"{"error":{"message":"Unsupported parameter: 'max_tokens'"}}"#, O::Pass),
            // vLLM, OpenAI.
            (404, r#"{"message":"The model `x` does not exist.","type":"NotFoundError"}"#, O::WrongModel),
            (404, r#"{"error":{"code":"model_not_found","message":"..."}}"#, O::WrongModel),
            (404, r#"{"detail":"Not Found"}"#, O::Pass),
            (401, "", O::Status),
            (429, "", O::Busy),
            (529, r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#, O::Busy),
            (500, r#"{"error":{"message":"overloaded","type":"overloaded_error"}}"#, O::Busy),
            // An empty account, by many names.
            (
                429,
                r#"{"error":{"type":"insufficient_quota","message":"You exceeded your current quota"}}"#,
                O::QuotaUsedUp,
            ),
            (429, r#"{"error":{"code":"1113","message":"Your account is in arrears"}}"#, O::QuotaUsedUp),
            (402, r#"{"error":{"message":"Insufficient Balance"}}"#, O::QuotaUsedUp),
            (403, r#"{"error":{"message":"You have run out of credits"}}"#, O::QuotaUsedUp),
            (
                400,
                r#"{"error":{"message":"Your credit balance is too low to access the API."}}"#,
                O::QuotaUsedUp,
            ),
            (503, r#"{"error":{"code":"billing_not_active","message":"..."}}"#, O::QuotaUsedUp),
            (429, r#"{"error":{"message":"Rate limit reached","type":"requests"}}"#, O::Busy),
            // Google refuses a key with 400, which is no question about the form of the question.
            (
                400,
                r#"[{"error":{"code":400,"message":"API key not valid.","details":[{"reason":"API_KEY_INVALID"}]}}]"#,
                O::Status,
            ),
            (403, r#"{"message":"User is not authorized","__type":"AccessDeniedException"}"#, O::Status),
            (500, "", O::Status),
            (503, r#"{"error":{"message":"Loading model"}}"#, O::Loading),
            (503, "", O::Status),
        ] {
            assert_eq!(judged(status, body), expected, "{status} {body}");
        }
    }

    #[test]
    fn a_name_that_changes_is_another_model_and_a_strange_one_that_stays_is_not() {
        let judged = |named: &str, known: Option<&str>| {
            let answer = answer(200, &GOOD.replace("gpt-4.1", named));
            let (found, name) = completion(&answer, "gpt-4.1", known);
            (found.outcome, name)
        };
        let (outcome, name) = judged("/models/q4.gguf", None);
        assert_eq!((outcome, name.as_deref()), (ProbeOutcome::Pass, Some("/models/q4.gguf")));
        assert_eq!(judged("/models/q4.gguf", name.as_deref()).0, ProbeOutcome::Pass);
        assert_eq!(judged("/models/other.gguf", name.as_deref()).0, ProbeOutcome::WrongModel);
        assert_eq!(judged("llama", Some("gpt-4.1")).0, ProbeOutcome::WrongModel);
    }

    #[test]
    fn of_a_name_without_end_little_is_remembered() {
        let body =
            format!(r#"{{"model":"{}","choices":[{{"finish_reason":"stop"}}]}}"#, "\u{e9}".repeat(100_000));
        let (found, name) = completion(&answer(200, &body), "m", None);
        assert_eq!(found.outcome, ProbeOutcome::Pass);
        let name = name.expect("a name");
        assert!(name.len() <= NAME_BYTES_MAX);
        let (again, _) = completion(&answer(200, &body), "m", Some(&name));
        assert_eq!(again.outcome, ProbeOutcome::Pass, "the same name is the same model");
    }

    #[test]
    fn names_of_one_model() {
        for (asked, named, same) in [
            ("gpt-4.1", "gpt-4.1", true),
            ("gpt-4.1", "gpt-4.1-2025-04-14", true),
            ("gpt-4.1", "gpt-4.10", false),
            ("Qwen/Qwen2.5-7B", "qwen2.5-7b", true),
            ("m", "/data/m.gguf", true),
            ("gpt-4", "gpt-4o", false),
        ] {
            assert_eq!(is_same_model(asked, named), same, "{asked} {named}");
        }
        let list = br#"{"data":[{"id":"a"},{"id":"b"}]}"#;
        assert_eq!(missing(list, &["a", "c"]), ["c"]);
        assert_eq!(missing(br#"{"data":[]}"#, &["a"]), [""; 0], "a server that lists nothing says nothing");
    }

    #[test]
    fn an_embedding_must_hold_one_of_the_model_asked_for() {
        let judged =
            |status: u16, body: &str| embedding(&answer(status, body), "bge-m3", Some("bge-m3")).0.outcome;
        for good in [
            r#"{"model":"bge-m3","data":[{"embedding":[0.1]}]}"#,
            r#"{"model":"BAAI/bge-m3","data":[{"embedding":"AAAA"}]}"#,
            r#"{"data":[{"embedding":[0.1]}]}"#,
        ] {
            assert_eq!(judged(200, good), ProbeOutcome::Pass, "{good}");
        }
        for bad in
            [r#"{"data":[]}"#, r#"{"data":[{"embedding":[]}]}"#, "no JSON", r#"{"error":{"message":"x"}}"#]
        {
            assert_eq!(judged(200, bad), ProbeOutcome::BadAnswer, "{bad}");
        }
        assert_eq!(
            judged(200, r#"{"model":"other","data":[{"embedding":[0.1]}]}"#),
            ProbeOutcome::WrongModel
        );
        assert_eq!(judged(404, r#"{"error":"model not found"}"#), ProbeOutcome::WrongModel);
        assert_eq!((judged(500, ""), judged(429, "")), (ProbeOutcome::Status, ProbeOutcome::Busy));
        let quota = r#"{"error":{"message":"x","code":"insufficient_quota"}}"#;
        assert_eq!(judged(429, quota), ProbeOutcome::QuotaUsedUp);
    }
}
