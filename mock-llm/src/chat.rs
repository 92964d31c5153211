//! Answers of `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`.

use std::collections::VecDeque;

use bytes::Bytes;
use data_encoding::BASE64;
use serde_json::json;

use crate::body::{Frames, Part};
use crate::openai::Endpoint;

/// Words of an answer; plain ASCII, so that they need no escaping.
const WORDS: [&str; 16] = [
    "the ", "weir ", "holds ", "water ", "back ", "and ", "lets ", "it ", "through ", "at ", "a ", "rate ",
    "that ", "rivers ", "can ", "carry ",
];
/// End of a stream.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// Where a stream tells its usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    Nowhere,
    /// On a chunk of its own with empty `choices`, as the API says.
    OwnChunk,
    /// On the last chunk with `finish_reason`.
    LastChoice,
}

/// Everything an answer says, decided before the first byte.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) endpoint: Endpoint,
    pub(crate) id: String,
    /// Unix time, seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) choices: u32,
    /// Per choice.
    pub(crate) tokens: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) finish_reason: &'static str,
    /// 0: natural words.
    pub(crate) chunk_bytes: usize,
    pub(crate) usage: Usage,
    pub(crate) done: bool,
}

impl Answer {
    /// The text of one token each, in the order they repeat.
    pub(crate) fn words(&self) -> Vec<Bytes> {
        match self.chunk_bytes {
            0 => WORDS.map(|word| Bytes::from_static(word.as_bytes())).to_vec(),
            bytes => vec![vec![b'x'; bytes].into()],
        }
    }

    pub(crate) fn output_tokens(&self) -> u64 {
        self.tokens * u64::from(self.choices)
    }

    /// Usage as chat and completions name it.
    fn usage_json(&self) -> String {
        let (prompt, output) = (self.prompt_tokens, self.output_tokens());
        let total = prompt + output;
        format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{output},"total_tokens":{total}}}"#)
    }

    fn is_chat(&self) -> bool {
        self.endpoint == Endpoint::Chat
    }

    /// Start of every JSON object of the answer, up to and with the `[` of `choices`.
    fn head(&self, object: &str) -> String {
        let model = json!(self.model);
        let (id, created) = (&self.id, self.created);
        format!(r#"{{"id":"{id}","object":"{object}","created":{created},"model":{model},"choices":["#)
    }

    /// The stream of chat and completions: role, tokens, reason of the end per choice; then usage; then `[DONE]`.
    pub(crate) fn stream(&self) -> VecDeque<Part> {
        let head = self.head(if self.is_chat() { "chat.completion.chunk" } else { "text_completion" });
        let tail = if self.usage == Usage::OwnChunk { "],\"usage\":null}\n\n" } else { "]}\n\n" };
        let words = self.words();
        let mut parts = VecDeque::new();
        for index in 0..self.choices {
            let rest = format!(r#""logprobs":null,"finish_reason":null}}{tail}"#);
            let finish = format!(r#""logprobs":null,"finish_reason":"{}"}}"#, self.finish_reason);
            let choice = format!(r#"data: {head}{{"index":{index},"#);
            let tail = if self.usage == Usage::LastChoice && index + 1 == self.choices {
                format!("],\"usage\":{}}}\n\n", self.usage_json())
            } else {
                tail.to_owned()
            };
            let (before, after) = if self.is_chat() {
                let role = r#""delta":{"role":"assistant","content":""},"#;
                parts.push_back(Part::text(format!("{choice}{role}{rest}")));
                (format!(r#"{choice}"delta":{{"content":""#), format!(r#""}},{rest}"#))
            } else {
                (format!(r#"{choice}"text":""#), format!(r#"",{rest}"#))
            };
            let frames = Frames::fixed(self.tokens, &words, &before, &after);
            parts.push_back(Part::Tokens { frames, left: self.tokens });
            let empty = if self.is_chat() { r#""delta":{},"# } else { r#""text":"","# };
            parts.push_back(Part::text(format!("{choice}{empty}{finish}{tail}")));
        }
        if self.usage == Usage::OwnChunk {
            parts.push_back(Part::text(format!("data: {head}],\"usage\":{}}}\n\n", self.usage_json())));
        }
        if self.done {
            parts.push_back(Part::text(DONE.to_owned()));
        }
        parts
    }

    /// The one JSON object of chat and completions.
    pub(crate) fn whole(&self) -> VecDeque<Part> {
        let head = self.head(if self.is_chat() { "chat.completion" } else { "text_completion" });
        let words = self.words();
        let mut parts = VecDeque::from([Part::text(head)]);
        let finish = format!(r#""logprobs":null,"finish_reason":"{}"}}"#, self.finish_reason);
        for index in 0..self.choices {
            let comma = if index > 0 { "," } else { "" };
            let (before, after) = if self.is_chat() {
                (r#""message":{"role":"assistant","content":""#, r#"","refusal":null},"#)
            } else {
                (r#""text":""#, r#"","#)
            };
            parts.push_back(Part::text(format!(r#"{comma}{{"index":{index},{before}"#)));
            let frames = Frames::fixed(self.tokens, &words, "", "");
            parts.push_back(Part::Tokens { frames, left: self.tokens });
            parts.push_back(Part::text(format!("{after}{finish}")));
        }
        let end = match self.usage {
            Usage::Nowhere => "]}".to_owned(),
            Usage::OwnChunk | Usage::LastChoice => format!("],\"usage\":{}}}", self.usage_json()),
        };
        parts.push_back(Part::text(end));
        parts
    }

    /// An embedding list; vectors are the same for every input, of length 1.
    pub(crate) fn embeddings(&self, inputs: usize, dimensions: usize, base64: bool) -> VecDeque<Part> {
        let value = 1.0 / (dimensions as f32).sqrt();
        let vector = if base64 {
            let bytes: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), dimensions).flatten().collect();
            // As OpenAI's SDKs ask for it.
            format!("\"{}\"", BASE64.encode(&bytes))
        } else {
            let numbers = vec![value.to_string(); dimensions];
            format!("[{}]", numbers.join(","))
        };
        let vector = Bytes::from(vector);
        let mut parts = VecDeque::from([Part::text(r#"{"object":"list","data":["#.to_owned())]);
        for index in 0..inputs {
            let comma = if index > 0 { "," } else { "" };
            let before = format!(r#"{comma}{{"object":"embedding","index":{index},"embedding":"#);
            parts.extend([Part::text(before), Part::Bytes(vector.clone()), Part::text("}".to_owned())]);
        }
        let prompt = self.prompt_tokens;
        let usage = match self.usage {
            Usage::Nowhere => String::new(),
            Usage::OwnChunk | Usage::LastChoice => {
                format!(r#","usage":{{"prompt_tokens":{prompt},"total_tokens":{prompt}}}"#)
            }
        };
        parts.push_back(Part::text(format!(r#"],"model":{}{usage}}}"#, json!(self.model))));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::BASE64;

    #[test]
    fn base64_matches_the_test_vectors_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(BASE64.encode(plain.as_bytes()), encoded);
        }
    }
}
