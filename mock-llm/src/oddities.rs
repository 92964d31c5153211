//! Answers that no specification foresees: pages instead of answers, usage in other forms, streams with odd ends.

use hyper::header::HeaderValue;
use serde::{Deserialize, Serialize};

/// The share of a fault that does not name one.
pub(crate) fn always() -> f64 {
    1.0
}

/// The longest body and the longest header value of a [`Reply`], bytes.
pub(crate) const REPLY_BYTES_MAX: usize = 32 * 1024;

/// A reply instead of every answer: a login page, an error of a provider, an empty body.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// HTTP status, 200 to 599.
    pub status: u16,
    /// Value of `Content-Type`; none if left out.
    #[serde(default)]
    pub content_type: Option<String>,
    /// The body, at most 32 KiB.
    #[serde(default)]
    pub body: String,
    /// Value of `Retry-After`, in any form; none if left out.
    #[serde(default)]
    pub retry_after: Option<String>,
    /// Also instead of health, lists and metrics, like a login page before the whole server; never of `/admin/`.
    #[serde(default)]
    pub everywhere: bool,
    /// Share of requests, 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
}

impl Reply {
    /// Whether its texts can be sent.
    pub(crate) fn is_sendable(&self) -> bool {
        let header = |text: &Option<String>| {
            text.as_ref().is_none_or(|t| t.len() <= REPLY_BYTES_MAX && HeaderValue::from_str(t).is_ok())
        };
        self.body.len() <= REPLY_BYTES_MAX && header(&self.content_type) && header(&self.retry_after)
    }
}

/// The form of usage; `openai` is that of the API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UsageForm {
    /// `prompt_tokens`, `completion_tokens`, `total_tokens`.
    #[default]
    Openai,
    /// The same fields with zeros.
    Zeros,
    /// The same fields as numbers with a fraction, such as 12.0.
    Floats,
    /// The same fields beside details that are null.
    NullDetails,
    /// Zeros under the names of the Responses API beside the usual fields (new-api).
    ZerosBeside,
    /// As many reasoning tokens again, in the total and the details only (xAI).
    ReasoningBeside,
    /// As many reasoning tokens again, in the total only (Gemini's compatible endpoint).
    ReasoningInTotal,
    /// Half of the prompt read from a cache, as hit and miss (DeepSeek).
    CacheHits,
    /// Half of the prompt read from a cache, in `prompt_tokens_details`.
    CachedDetails,
    /// Inside the last choice of a stream (Moonshot).
    InChoice,
    /// Inside `x_groq` of the last chunk of a stream (Groq).
    XGroq,
}

impl UsageForm {
    /// The value of `usage`.
    pub(crate) fn json(self, prompt: u64, output: u64) -> String {
        let total = prompt + output;
        let plain = |prompt: u64, output: u64, total: u64, more: &str| {
            format!(
                r#"{{"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{total}{more}}}"#
            )
        };
        let cached = prompt / 2;
        match self {
            Self::Openai | Self::InChoice | Self::XGroq => plain(prompt, output, total, ""),
            Self::Zeros => plain(0, 0, 0, ""),
            Self::Floats => {
                format!(
                    r#"{{"prompt_tokens":{prompt}.0,"completion_tokens":{output}.0,"total_tokens":{total}.0}}"#
                )
            }
            Self::NullDetails => plain(
                prompt,
                output,
                total,
                r#","prompt_tokens_details":null,"completion_tokens_details":null,"cost":null"#,
            ),
            Self::ZerosBeside => plain(
                prompt,
                output,
                total,
                r#","input_tokens":0,"output_tokens":0,"input_tokens_details":null"#,
            ),
            Self::ReasoningBeside => {
                let details = format!(r#","completion_tokens_details":{{"reasoning_tokens":{output}}}"#);
                plain(prompt, output, total + output, &details)
            }
            Self::ReasoningInTotal => {
                plain(prompt, output, total + output, r#","completion_tokens_details":null"#)
            }
            Self::CacheHits => {
                let miss = prompt - cached;
                let more =
                    format!(r#","prompt_cache_hit_tokens":{cached},"prompt_cache_miss_tokens":{miss}"#);
                plain(prompt, output, total, &more)
            }
            Self::CachedDetails => {
                let more = format!(r#","prompt_tokens_details":{{"cached_tokens":{cached}}}"#);
                plain(prompt, output, total, &more)
            }
        }
    }
}

/// What a stream does after its last event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamTail {
    /// The connection is closed without the end of the body.
    Close,
    /// The connection stays open, and nothing comes.
    Hang,
    /// An error event follows.
    Error,
}
