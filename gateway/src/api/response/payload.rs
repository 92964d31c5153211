//! What one JSON payload of an answer says, in the forms of all endpoints and of the engines behind them.

use std::ops::Range;

use smallvec::SmallVec;

use crate::api::json_scanner::{Fault, Kind, Scanner, Text};
use crate::api::usage::Usage;

/// Places that name the model, of one payload. An answer has one or two; one of nothing but names would become many times
/// larger when each is replaced.
const MODELS_MAX: usize = 8;

/// The facts of one payload.
#[derive(Debug, Default)]
pub(super) struct Payload {
    pub(super) usage: Option<Usage>,
    /// The largest count of tokens that usage holds anywhere, sums and details included; zero without any.
    pub(super) most_tokens: u64,
    /// Where the model is named: at the top, and inside `response` for `/v1/responses`.
    pub(super) models: SmallVec<[Range<usize>; 2]>,
    pub(super) deltas: u32,
    pub(super) content_bytes: u64,
    pub(super) finished: bool,
    pub(super) error: bool,
    choices: Option<u32>,
    typed: bool,
    text_delta: Option<u64>,
}

impl Payload {
    pub(super) fn read(text: &[u8]) -> Result<Self, Fault> {
        let mut payload = Self::default();
        let mut kind = Event::Other;
        let mut s = Scanner::new(text)?;
        if s.kind()? != Kind::Object {
            return Err(Fault { at: s.position(), what: "expected an object" });
        }
        s.object(|s, name| match name.raw {
            "choices" if s.kind()? == Kind::Array => {
                payload.choices = Some(0);
                s.array(|s| payload.choice(s))
            }
            "type" if s.kind()? == Kind::String => {
                payload.typed = true;
                kind = Event::of(s.string()?.raw);
                Ok(())
            }
            "delta" if s.kind()? == Kind::String => {
                payload.text_delta = Some(s.string()?.len() as u64);
                Ok(())
            }
            "response" if s.kind()? == Kind::Object => s.object(|s, name| payload.common(s, name)),
            _ => payload.common(s, name),
        })?;
        s.end()?;
        match kind {
            Event::Delta => payload.content(payload.text_delta.unwrap_or(0)),
            Event::Finished => payload.finished = true,
            Event::Failed => payload.error = true,
            Event::Other => {}
        }
        Ok(payload)
    }

    /// The chunk that exists only to carry usage: it has no choices and is of no other type.
    pub(super) fn usage_only(&self) -> bool {
        self.usage.is_some() && self.choices == Some(0) && !self.error && !self.typed
    }

    /// Members that mean the same at the top and inside `response`.
    fn common(&mut self, s: &mut Scanner<'_>, name: Text<'_>) -> Result<(), Fault> {
        match (name.raw, s.kind()?) {
            ("model", Kind::String) => {
                let range = s.string()?.range();
                if self.models.len() < MODELS_MAX {
                    self.models.push(range);
                }
            }
            ("usage", Kind::Object) => {
                let mut most = 0;
                self.usage = read_usage(s, &mut most)?.or(self.usage);
                self.most_tokens = self.most_tokens.max(most);
            }
            ("error", kind) => {
                self.error |= kind != Kind::Null;
                s.skip()?;
            }
            _ => s.skip()?,
        }
        Ok(())
    }

    fn choice(&mut self, s: &mut Scanner<'_>) -> Result<(), Fault> {
        self.choices = self.choices.map(|count| count + 1);
        if s.kind()? != Kind::Object {
            return s.skip();
        }
        let mut bytes = 0;
        s.object(|s, name| match (name.raw, s.kind()?) {
            ("finish_reason", kind) => {
                self.finished |= kind == Kind::String;
                s.skip()
            }
            ("delta" | "message", Kind::Object) => content(s, &mut bytes),
            ("text", Kind::String) => {
                bytes += s.string()?.len() as u64;
                Ok(())
            }
            _ => s.skip(),
        })?;
        self.content(bytes);
        Ok(())
    }

    fn content(&mut self, bytes: u64) {
        self.deltas += u32::from(bytes > 0);
        self.content_bytes += bytes;
    }
}

/// The types of `/v1/responses` events that matter here.
#[derive(Debug, Clone, Copy)]
enum Event {
    Delta,
    Finished,
    Failed,
    Other,
}

impl Event {
    fn of(name: &str) -> Self {
        match name {
            "response.completed" | "response.incomplete" => Self::Finished,
            "response.failed" | "error" => Self::Failed,
            _ if name.ends_with(".delta") => Self::Delta,
            _ => Self::Other,
        }
    }
}

/// Adds up the strings a model wrote. Names of fields, functions' ids and the role are not its tokens.
fn content(s: &mut Scanner<'_>, bytes: &mut u64) -> Result<(), Fault> {
    match s.kind()? {
        Kind::Object => s.object(|s, name| match name.raw {
            "role" | "id" | "type" => s.skip(),
            _ => content(s, bytes),
        }),
        Kind::Array => s.array(|s| content(s, bytes)),
        Kind::String => {
            *bytes += s.string()?.len() as u64;
            Ok(())
        }
        Kind::Number | Kind::Bool | Kind::Null => s.skip(),
    }
}

/// Reads a usage object; `None` when it holds none of the counts. `most` becomes the largest count in it.
fn read_usage(s: &mut Scanner<'_>, most: &mut u64) -> Result<Option<Usage>, Fault> {
    let mut usage = None;
    s.object(|s, name| {
        match s.kind()? {
            Kind::Number => {}
            // `prompt_tokens_details` and its like.
            Kind::Object => return read_usage(s, most).map(drop),
            _ => return s.skip(),
        }
        let digits = s.number()?;
        let count = digits.parse::<u64>();
        if name.raw.ends_with("tokens") {
            // Digits that do not fit are a number beyond all bounds; fractions and negative numbers are no counts.
            let beyond = digits.bytes().all(|b| b.is_ascii_digit());
            *most = (*most).max(count.clone().unwrap_or(if beyond { u64::MAX } else { 0 }));
        }
        match (name.raw, count) {
            ("prompt_tokens" | "input_tokens", Ok(count)) => {
                usage.get_or_insert_with(Usage::default).prompt = Some(count);
            }
            ("completion_tokens" | "output_tokens", Ok(count)) => {
                usage.get_or_insert_with(Usage::default).completion = Some(count);
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(usage)
}
