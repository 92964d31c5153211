//! What is private here and reads bytes of backends, for the fuzz targets alone.

use http::StatusCode;
use weir_probe::Answer;
use weir_proto::v1::ProbeOutcome;

use super::engine::Engine;
use super::judge;

/// What an answer to a probe was taken for: the outcome, its text, and the name that the model calls itself by.
pub type Judged = (ProbeOutcome, String, Option<String>);

/// Cache use and queue of an engine's page.
pub fn engine(page: &str) -> (Option<f64>, Option<u64>) {
    let engine = Engine::read(page);
    (engine.cache_used, engine.queue)
}

/// The judgement of a completion and of an embedding.
pub fn judge(status: StatusCode, retry_after: bool, body: &[u8], asked: &str) -> [Judged; 2] {
    let answer = Answer { status, retry_after, body: body.to_vec().into(), with_credential: true };
    [judge::completion, judge::embedding].map(|judge| {
        let (found, name) = judge(&answer, asked, None);
        (found.outcome, found.detail, name)
    })
}

/// Of the models wanted, those that are not on a list.
pub fn missing<'a>(list: &[u8], wanted: &[&'a str]) -> Vec<&'a str> {
    judge::missing(list, wanted)
}

/// Tokens that an answer says it wrote, of so many asked for.
pub fn tokens_written(body: &[u8], asked: u32) -> Option<u64> {
    judge::tokens_written(body, asked)
}
