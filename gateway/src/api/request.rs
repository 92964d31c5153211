//! Reads from a request body what the gateway decides on, in one borrowing pass, and splices changes into it.
//!
//! Invariants:
//! - The bytes that were checked are the bytes that are forwarded. A changed model name or an added `include_usage`
//!   is spliced in; nothing is re-serialised.
//! - A field that is read has one meaning. A second occurrence is refused, names being compared after unescaping;
//!   so is a name that differs only in case, because backends written in Go would take it for the same field.
//! - What is reserved is never less than what the backend may spend: of several output bounds the largest counts, and
//!   `choices` multiplies `n` (or `best_of`) by the number of prompts in the request.

mod fields;
mod media;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

use self::fields::Fields;
use super::json_edit::{Edit, quoted, splice};
use super::json_scanner::Fault;

/// Most choices one request may ask for.
pub const CHOICES_MAX: u32 = 128;

/// What a token id given in place of text counts for, in bytes of text.
pub const BYTES_PER_TOKEN_ID: u64 = 4;

/// Shortest string that is taken for an attachment wherever it stands, if it has no other letters than those of base64.
/// Prose has blanks long before.
pub const BASE64_BYTES_MIN: usize = 512;

/// The endpoint a body was sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RouteKind {
    /// `/v1/chat/completions`
    #[default]
    ChatCompletions,
    /// `/v1/completions`
    Completions,
    /// `/v1/embeddings`
    Embeddings,
    /// `/v1/responses`
    Responses,
}

impl RouteKind {
    /// How many there are.
    pub const COUNT: usize = 4;

    /// Whether streams of this endpoint carry usage only when `stream_options` ask for it.
    pub fn takes_include_usage(self) -> bool {
        matches!(self, Self::ChatCompletions | Self::Completions)
    }
}

/// Why a body was refused; each is the client's to mend (400).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// Not JSON, or nested too deeply.
    #[error("the request body is not valid JSON: {0}")]
    NotJson(#[from] Fault),
    /// JSON, but not an object.
    #[error("the request body must be a JSON object")]
    NotObject,
    /// A required field is absent or null.
    #[error("missing required parameter: '{0}'")]
    Missing(&'static str),
    /// A field the gateway reads occurs twice.
    #[error("duplicate parameter: '{0}'")]
    Duplicate(&'static str),
    /// A name that some backends would take for a field the gateway reads.
    #[error("unknown parameter that differs from '{0}' only in case")]
    CaseVariant(&'static str),
    /// A value that asks for what the gateway cannot account for.
    #[error("unsupported value for '{param}': {reason}")]
    Unsupported {
        /// The field.
        param: &'static str,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A value of the wrong type.
    #[error("invalid type for '{param}': expected {expected}")]
    WrongType {
        /// The field.
        param: &'static str,
        /// The type it should have.
        expected: &'static str,
    },
    /// A whole number outside its bounds.
    #[error("invalid value for '{param}': expected an integer from {min} to {max}")]
    OutOfRange {
        /// The field.
        param: &'static str,
        /// Smallest value allowed.
        min: u32,
        /// Largest value allowed.
        max: u32,
    },
}

impl ReadError {
    /// The field to blame, as OpenAI's `param`.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Self::NotJson(_) | Self::NotObject => None,
            Self::Missing(param) | Self::Duplicate(param) | Self::CaseVariant(param) => Some(param),
            Self::Unsupported { param, .. }
            | Self::WrongType { param, .. }
            | Self::OutOfRange { param, .. } => Some(param),
        }
    }
}

/// What one request asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request<'a> {
    /// The endpoint.
    pub kind: RouteKind,
    /// The model as the client names it, unescaped.
    pub model: Cow<'a, str>,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Whether the client itself asked for usage in the stream.
    pub include_usage: bool,
    /// The largest of `max_tokens`, `max_completion_tokens` and `max_output_tokens`, per choice. Backends differ in
    /// which of them wins, so reserving for the largest is the only safe reading. `None` without any, and where one of them
    /// is negative, which llama.cpp and LM Studio take for no bound.
    pub max_output_tokens: Option<u32>,
    /// Answers that may be generated: `max(n, best_of)` times the number of prompts; at least 1.
    pub choices: u32,
    /// Bytes of text the model will read: the JSON of `messages`, `prompt`, `input`, `instructions`, `tools`,
    /// `functions`, `suffix` and `response_format`, as if unescaped. It is an upper estimate, since names and
    /// punctuation count. Not counted, inside `messages`, `input` and `tools`: base64 of images, files and audio in the
    /// places the API has for them (`url`, `image_url`, `file_data`, `input_audio.data`), and in any other place a string of
    /// [`BASE64_BYTES_MIN`] or more that has no other letters than those of base64.
    pub prompt_bytes: u64,
    /// Images, files and sounds whose base64 was left out of `prompt_bytes`.
    pub attachments: u32,
    /// Whether the model reads nothing but the text in the body, so that its bytes say how many tokens text has: no
    /// attachment, no address of an image or a file, no earlier response.
    pub text_only: bool,
    /// Whether the client predicts the answer. Tokens of the prediction that the model rejects are billed as output.
    pub predicts: bool,
    /// Whether the model may read what the body does not hold as text, so that its bytes do not bound the prompt: images,
    /// files, sounds, web pages, earlier responses.
    pub reads_more_than_body: bool,
    edit_points: EditPoints,
}

/// Where a body can be edited.
#[derive(Debug, Clone, PartialEq)]
struct EditPoints {
    body_len: usize,
    /// The value of `messages`, `prompt` or `input`; empty without one.
    prompt: Range<usize>,
    /// Just past the opening brace.
    inside: usize,
    model: Range<usize>,
    usage: UsageEditPoint,
}

/// What must happen to `stream_options` so that usage is asked for.
#[derive(Debug, Clone, Default, PartialEq)]
enum UsageEditPoint {
    /// No such member: put one at the beginning.
    #[default]
    Absent,
    /// `null`, at this range: put an object there.
    Null(Range<usize>),
    /// An object without the flag; `at` is just past its brace.
    Object { at: usize, empty: bool },
    /// The flag is there: put `true` at this range.
    Flag(Range<usize>),
}

impl<'a> Request<'a> {
    /// Reads the body of a request to `kind`.
    pub fn read(kind: RouteKind, body: &'a [u8]) -> Result<Self, ReadError> {
        let fields = Fields::read(kind, body)?;
        let model = fields.model.ok_or(ReadError::Missing("model"))?;
        Ok(Self {
            kind,
            model: model.decode(),
            stream: fields.stream.unwrap_or(false),
            include_usage: fields.include_usage.unwrap_or(false),
            max_output_tokens: fields.max_output_tokens,
            choices: fields
                .n
                .unwrap_or(1)
                .max(fields.best_of.unwrap_or(1))
                .saturating_mul(fields.prompts.max(1)),
            prompt_bytes: fields.prompt_bytes,
            attachments: fields.attachments,
            text_only: fields.attachments == 0 && !fields.refers,
            predicts: fields.predicts,
            reads_more_than_body: fields.reads_more || fields.refers,
            edit_points: EditPoints {
                prompt: fields.prompt,
                body_len: body.len(),
                inside: fields.inside,
                model: model.range(),
                usage: fields.usage_edit_point,
            },
        })
    }

    /// The same, free of the body's lifetime.
    pub fn into_owned(self) -> Request<'static> {
        let Self {
            kind,
            model,
            stream,
            include_usage,
            max_output_tokens,
            choices,
            prompt_bytes,
            attachments,
            text_only,
            predicts,
            reads_more_than_body,
            edit_points,
        } = self;
        let model = Cow::Owned(model.into_owned());
        Request {
            kind,
            model,
            stream,
            include_usage,
            max_output_tokens,
            choices,
            prompt_bytes,
            attachments,
            text_only,
            predicts,
            reads_more_than_body,
            edit_points,
        }
    }

    /// How the prompt begins: at most `max` bytes of its JSON, `body` being the one that was read. Empty without one.
    pub fn prompt_prefix<'b>(&self, body: &'b [u8], max: usize) -> &'b [u8] {
        let prompt = body.get(self.edit_points.prompt.clone()).unwrap_or_default();
        &prompt[..prompt.len().min(max)]
    }

    /// Whether usage has to be asked for on top of what the client asked for.
    pub fn gains_usage(&self) -> bool {
        self.stream && !self.include_usage && self.kind.takes_include_usage()
    }

    /// The body to send to a backend that knows the model as `upstream_model`, `body` being the one that was read.
    ///
    /// With `add_include_usage` a stream is made to report usage, where the endpoint has such an option. A body that
    /// needs no change is shared, not copied.
    pub fn forward(&self, body: &Bytes, upstream_model: &str, add_include_usage: bool) -> Bytes {
        debug_assert_eq!(body.len(), self.edit_points.body_len, "spliced into a body that was not read");
        let model = (upstream_model != self.model)
            .then(|| Edit::new(self.edit_points.model.clone(), quoted(upstream_model)));
        let usage = (add_include_usage && self.gains_usage())
            .then(|| self.edit_points.usage.edit(self.edit_points.inside));
        match (model, usage) {
            (None, None) => body.clone(),
            (Some(one), None) | (None, Some(one)) => splice(body, &[one]),
            (Some(one), Some(two)) if one.range.start <= two.range.start => splice(body, &[one, two]),
            (Some(one), Some(two)) => splice(body, &[two, one]),
        }
    }
}

impl UsageEditPoint {
    fn edit(&self, inside: usize) -> Edit {
        match self {
            Self::Absent => Edit::new(inside..inside, r#""stream_options":{"include_usage":true},"#),
            Self::Null(range) => Edit::new(range.clone(), r#"{"include_usage":true}"#),
            Self::Object { at, empty: true } => Edit::new(*at..*at, r#""include_usage":true"#),
            Self::Object { at, empty: false } => Edit::new(*at..*at, r#""include_usage":true,"#),
            Self::Flag(range) => Edit::new(range.clone(), "true"),
        }
    }
}
