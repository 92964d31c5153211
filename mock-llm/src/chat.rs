//! Answers of `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`.

use std::collections::VecDeque;

use bytes::Bytes;
use data_encoding::BASE64;
use serde_json::json;

use crate::body::{Frames, Part};
use crate::oddities::{StreamTail, UsageForm};
use crate::openai::Endpoint;

/// Words of an answer, in plain ASCII so that they need no escaping.
const WORDS: [&str; 16] = [
    "the ", "weir ", "holds ", "water ", "back ", "and ", "lets ", "it ", "through ", "at ", "a ", "rate ",
    "that ", "rivers ", "can ", "carry ",
];
/// The end of a stream.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// The place of usage in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    Nowhere,
    /// In a chunk of its own with empty `choices`, as the API specifies.
    OwnChunk,
    /// In the last chunk, with `finish_reason`.
    LastChoice,
}

/// The content of an answer, decided before the first byte.
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
    pub(crate) usage_form: UsageForm,
    pub(crate) done: bool,
    /// `""` instead of null.
    pub(crate) empty_finish_reason: bool,
    /// Comments before the first event.
    pub(crate) comments: u32,
    pub(crate) tail: Option<StreamTail>,
}

impl Answer {
    /// The texts of the tokens, in the order in which they repeat.
    pub(crate) fn words(&self) -> Vec<Bytes> {
        match self.chunk_bytes {
            0 => WORDS.map(|word| Bytes::from_static(word.as_bytes())).to_vec(),
            bytes => vec![vec![b'x'; bytes].into()],
        }
    }

    pub(crate) fn output_tokens(&self) -> u64 {
        self.tokens * u64::from(self.choices)
    }

    /// Usage with the names of chat and completions.
    fn usage_json(&self) -> String {
        self.usage_form.json(self.prompt_tokens, self.output_tokens())
    }

    fn is_chat(&self) -> bool {
        self.endpoint == Endpoint::Chat
    }

    /// The start of every JSON object of the answer, up to the `[` of `choices`.
    fn head(&self, object: &str) -> String {
        let model = json!(self.model);
        let (id, created) = (&self.id, self.created);
        format!(r#"{{"id":"{id}","object":"{object}","created":{created},"model":{model},"choices":["#)
    }

    /// The stream of chat and completions: per choice its role, tokens and finish reason; then usage; then `[DONE]`.
    pub(crate) fn stream(&self) -> VecDeque<Part> {
        let head = self.head(if self.is_chat() { "chat.completion.chunk" } else { "text_completion" });
        let tail = if self.usage == Usage::OwnChunk { "],\"usage\":null}\n\n" } else { "]}\n\n" };
        let words = self.words();
        let mut parts: VecDeque<Part> =
            (0..self.comments).map(|_| Part::text(": PROCESSING\n\n".to_owned())).collect();
        let none = if self.empty_finish_reason { r#""""# } else { "null" };
        for index in 0..self.choices {
            let is_last = index + 1 == self.choices;
            let rest = format!(r#""logprobs":null,"finish_reason":{none}}}{tail}"#);
            let inside = match self.usage_form {
                UsageForm::InChoice if is_last && self.usage != Usage::Nowhere => {
                    format!(r#","usage":{}"#, self.usage_json())
                }
                _ => String::new(),
            };
            let finish = match self.empty_finish_reason {
                true => r#""logprobs":null,"finish_reason":""}"#.to_owned(),
                false => format!(r#""logprobs":null,"finish_reason":"{}"{inside}}}"#, self.finish_reason),
            };
            let choice = format!(r#"data: {head}{{"index":{index},"#);
            let tail = match (self.usage, self.usage_form) {
                (Usage::LastChoice | Usage::OwnChunk, UsageForm::XGroq) if is_last => {
                    format!("],\"x_groq\":{{\"usage\":{}}}}}\n\n", self.usage_json())
                }
                (Usage::LastChoice, form) if is_last && form != UsageForm::InChoice => {
                    format!("],\"usage\":{}}}\n\n", self.usage_json())
                }
                _ => tail.to_owned(),
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
        if self.usage == Usage::OwnChunk && !matches!(self.usage_form, UsageForm::InChoice | UsageForm::XGroq)
        {
            parts.push_back(Part::text(format!("data: {head}],\"usage\":{}}}\n\n", self.usage_json())));
        }
        if self.done {
            parts.push_back(Part::text(DONE.to_owned()));
        }
        parts
    }

    /// What a stream does after its last event.
    pub(crate) fn tail(&self) -> Option<Part> {
        Some(match self.tail? {
            StreamTail::Error => Part::text("data: {\"error\":{\"message\":\"late\"}}\n\n".to_owned()),
            StreamTail::Close => Part::Close,
            StreamTail::Hang => Part::Hang,
        })
    }

    /// The single JSON object of chat and completions.
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

    /// A list of embeddings. The vectors are the same for every input, of length 1.
    pub(crate) fn embeddings(&self, inputs: usize, dimensions: usize, base64: bool) -> VecDeque<Part> {
        let value = 1.0 / (dimensions as f32).sqrt();
        let vector = if base64 {
            let bytes: Vec<u8> = std::iter::repeat_n(value.to_le_bytes(), dimensions).flatten().collect();
            // The encoding that OpenAI's SDKs ask for.
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
