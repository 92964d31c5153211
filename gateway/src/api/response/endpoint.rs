//! Where the facts of an answer stand, endpoint by endpoint.
//!
//! A fact is taken from its own place alone, never from an object that happens to have a member of the same name: which
//! place a value has follows from the place of what holds it and the value's name, and whatever is in no table is passed
//! over.

use crate::api::request::RouteKind;
use crate::api::usage::{Field, Named, Part};

/// Whose answer is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// The answers of one endpoint.
    Of(RouteKind),
    /// Any of them, where it is only asked whether it is an error and where it names its model.
    Any,
}

/// Where a `usage` object stands. Of several in one payload the first of this order counts, and the others where it
/// says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Report {
    /// `usage` of the answer.
    Answer,
    /// `x_groq.usage`
    Groq,
    /// `usage` of a choice.
    Choice,
}

/// Forms in which reasoning is sent; some backends send the same text in several of them.
pub(super) const REASONING_FORMS: usize = 5;

/// The place of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nothing is taken from here.
    Nowhere,
    /// The payload itself.
    Root,
    /// The response that an event of `/v1/responses` carries.
    Response,
    /// The name of the model.
    Model,
    /// The type of an event.
    Type,
    /// The type of an object.
    Object,
    /// What an event of `/v1/responses` adds.
    Delta,
    /// An error, unless there is nothing in it.
    Error,
    /// The same at the top of the payload, where clients look for one.
    TopError,
    /// A member of an error.
    InError,
    /// A member of the error at the top.
    InTopError,
    /// The text of the error at the top.
    ErrorMessage,
    /// What has no facts, and whose presence shows that this is an answer.
    Data,
    Choices,
    Choice,
    Index,
    FinishReason,
    /// What a choice adds, or all of it.
    Message,
    /// Text of the model, also deep inside parts.
    Content,
    /// The arguments of a tool call: all text in them.
    Arguments,
    /// Text of the model's reasoning, in one of its forms.
    Reasoning(u8),
    ToolCalls,
    ToolCall,
    Function,
    Audio,
    /// What `/v1/responses` wrote, all of it.
    Output,
    Groq,
    Usage(Report, Part),
    Count(Field),
}

impl Place {
    /// The place of a member of an object.
    pub(super) fn member(self, endpoint: Endpoint, name: &[u8]) -> Self {
        match self {
            Self::Root => endpoint.root(name),
            Self::Response => response(name),
            Self::Error => Self::InError,
            Self::TopError => match name {
                b"message" => Self::ErrorMessage,
                _ => Self::InTopError,
            },
            Self::Choice => choice(name),
            Self::Message => message(name),
            Self::Content => match name {
                b"text" | b"thinking" | b"refusal" | b"content" | b"transcript" => Self::Content,
                _ => Self::Nowhere,
            },
            Self::Arguments => Self::Arguments,
            Self::Reasoning(form) => match name {
                b"text" | b"summary" | b"thinking" | b"content" => Self::Reasoning(form),
                _ => Self::Nowhere,
            },
            Self::ToolCall => match name {
                b"function" | b"custom" => Self::Function,
                _ => Self::Nowhere,
            },
            Self::Function => match name {
                b"name" => Self::Content,
                b"arguments" | b"input" => Self::Arguments,
                _ => Self::Nowhere,
            },
            Self::Audio => match name {
                b"transcript" => Self::Content,
                _ => Self::Nowhere,
            },
            Self::Output => match name {
                b"text" | b"refusal" | b"transcript" | b"arguments" | b"input" | b"code" | b"content"
                | b"summary" => Self::Output,
                _ => Self::Nowhere,
            },
            Self::Groq => match name {
                b"usage" => Self::Usage(Report::Groq, Part::All),
                b"error" => Self::Error,
                _ => Self::Nowhere,
            },
            Self::Usage(report, part) => match part.named(name) {
                Some(Named::Number(field)) => Self::Count(field),
                Some(Named::Details(part)) => Self::Usage(report, part),
                None => Self::Nowhere,
            },
            _ => Self::Nowhere,
        }
    }

    /// The place of an item of an array.
    pub(super) fn item(self) -> Self {
        match self {
            Self::Choices => Self::Choice,
            Self::ToolCalls => Self::ToolCall,
            Self::Error => Self::InError,
            Self::TopError => Self::InTopError,
            Self::Content | Self::Arguments | Self::Reasoning(_) | Self::Output => self,
            _ => Self::Nowhere,
        }
    }
}

impl Endpoint {
    fn root(self, name: &[u8]) -> Place {
        match (self, name) {
            (_, b"model") => Place::Model,
            (_, b"error") => Place::TopError,
            (_, b"object") => Place::Object,
            (_, b"type") => Place::Type,
            (Self::Any, b"response") => Place::Response,
            (Self::Any, b"data" | b"output" | b"usage" | b"delta") => Place::Data,
            (Self::Any, b"choices") => Place::Choices,
            (Self::Any, b"x_groq") => Place::Groq,
            (Self::Any, _) => Place::Nowhere,
            (Self::Of(_), b"usage" | b"usageMetadata") => Place::Usage(Report::Answer, Part::All),
            (Self::Of(kind), name) => match kind {
                RouteKind::ChatCompletions | RouteKind::Completions => match name {
                    b"choices" => Place::Choices,
                    b"x_groq" => Place::Groq,
                    _ => Place::Nowhere,
                },
                RouteKind::Embeddings => match name {
                    b"data" => Place::Data,
                    _ => Place::Nowhere,
                },
                RouteKind::Responses => match name {
                    b"response" => Place::Response,
                    b"delta" => Place::Delta,
                    b"output" => Place::Output,
                    _ => Place::Nowhere,
                },
            },
        }
    }
}

/// `instructions` and `tools` of a response repeat the request and are nothing that the model wrote.
fn response(name: &[u8]) -> Place {
    match name {
        b"model" => Place::Model,
        b"error" => Place::Error,
        b"usage" => Place::Usage(Report::Answer, Part::All),
        b"output" => Place::Output,
        _ => Place::Nowhere,
    }
}

fn choice(name: &[u8]) -> Place {
    match name {
        b"index" => Place::Index,
        b"finish_reason" => Place::FinishReason,
        b"delta" | b"message" => Place::Message,
        b"text" => Place::Content,
        b"usage" => Place::Usage(Report::Choice, Part::All),
        b"error" => Place::Error,
        _ => Place::Nowhere,
    }
}

/// Members of unknown names count as one more form of reasoning, if they are text: a backend that writes under a name of
/// its own is not free, and one that repeats its reasoning there is not counted twice.
fn message(name: &[u8]) -> Place {
    const UNKNOWN: u8 = REASONING_FORMS as u8 - 1;
    match name {
        b"content" | b"refusal" => Place::Content,
        b"reasoning" => Place::Reasoning(0),
        b"reasoning_content" => Place::Reasoning(1),
        b"reasoning_details" => Place::Reasoning(2),
        b"tool_calls" => Place::ToolCalls,
        b"function_call" => Place::Function,
        b"audio" => Place::Audio,
        b"role"
        | b"id"
        | b"type"
        | b"name"
        | b"signature"
        | b"images"
        | b"image"
        | b"annotations"
        | b"citations"
        | b"tool_call_id"
        | b"provider_specific_fields" => Place::Nowhere,
        _ if [b"reasoning".as_slice(), b"thinking", b"thought"].iter().any(|form| name.starts_with(form)) => {
            Place::Reasoning(3)
        }
        _ => Place::Reasoning(UNKNOWN),
    }
}
