//! The fields of a request body, each read at most once.

use std::ops::Range;

use super::media::Media;
use super::{BYTES_PER_TOKEN_ID, CHOICES_MAX, ReadError, RouteKind, UsageEditPoint};
use crate::api::json_number::whole;
use crate::api::json_scanner::{Fault, Kind, Scanner, Text};

/// Names read at the top level, of all endpoints: a lenient backend may honour one that its endpoint does not have.
const TOP: [&str; 17] = [
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
    "messages",
    "prompt",
    "input",
    "instructions",
    "tools",
    "functions",
    "suffix",
    "response_format",
    "background",
];
/// Top-level members that make a model read what the request does not hold.
const REFERRING: [&str; 5] =
    ["conversation", "file_ids", "plugins", "previous_response_id", "web_search_options"];
const OPTIONS: [&str; 1] = ["include_usage"];
const OPTIONS_PARAM: [&str; 1] = ["stream_options.include_usage"];

#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    pub(super) model: Option<Text<'a>>,
    pub(super) stream: Option<bool>,
    pub(super) include_usage: Option<bool>,
    pub(super) usage_edit_point: UsageEditPoint,
    pub(super) max_output_tokens: Option<u32>,
    /// One of the bounds is negative.
    unbounded: bool,
    pub(super) n: Option<u32>,
    pub(super) best_of: Option<u32>,
    pub(super) prompts: u32,
    pub(super) prompt_bytes: u64,
    pub(super) prompt: std::ops::Range<usize>,
    pub(super) attachments: u32,
    /// The model may read what the body does not hold, by the endpoint or by a tool of the server.
    pub(super) reads_more: bool,
    /// The body names what the model reads beside it.
    pub(super) refers: bool,
    pub(super) predicts: bool,
    pub(super) inside: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn read(kind: RouteKind, body: &'a [u8]) -> Result<Self, ReadError> {
        let mut scanner = Scanner::new(body)?;
        if scanner.kind()? != Kind::Object {
            scanner.skip()?;
            scanner.end()?;
            return Err(ReadError::NotObject);
        }
        let mut fields = Self {
            inside: scanner.position() + 1,
            // The server may hold earlier turns, prompts and tools of its own.
            reads_more: kind == RouteKind::Responses,
            ..Self::default()
        };
        let mut seen = NamesSeen::default();
        scanner.object(|scanner, name| match seen.find(name, &TOP, &TOP)? {
            Some(field) => fields.member(kind, scanner, field),
            None => {
                let there = scanner.kind()? != Kind::Null;
                fields.refers |= there && REFERRING.contains(&name.raw);
                fields.predicts |= there && name.raw == "prediction";
                Ok(scanner.skip()?)
            }
        })?;
        scanner.end()?;
        if fields.unbounded {
            fields.max_output_tokens = None;
        }
        Ok(fields)
    }

    fn member(&mut self, kind: RouteKind, s: &mut Scanner<'a>, field: &'static str) -> Result<(), ReadError> {
        match field {
            "model" => match s.kind()? {
                Kind::String => self.model = Some(s.string()?),
                Kind::Null => s.null()?,
                _ => return Err(ReadError::WrongType { param: "model", expected: "a string" }),
            },
            "stream" => self.stream = flag(s, "stream")?,
            "stream_options" => self.options(s)?,
            "n" => self.n = integer(s, "n", 1, CHOICES_MAX)?,
            "best_of" => self.best_of = integer(s, "best_of", 1, CHOICES_MAX)?,
            // The old endpoint may be asked for no output at all, to have the prompt scored.
            "max_tokens" if kind == RouteKind::Completions => self.bound(s, field, 0)?,
            "max_tokens" | "max_completion_tokens" | "max_output_tokens" => self.bound(s, field, 1)?,
            "background" if kind != RouteKind::Responses => s.skip()?,
            "background" => {
                if flag(s, "background")? == Some(true) {
                    let reason = "an answer that is fetched later cannot be accounted for; leave it out or set it to false";
                    return Err(ReadError::Unsupported { param: "background", reason });
                }
            }
            _ => self.text(s, field)?,
        }
        Ok(())
    }

    fn bound(&mut self, s: &mut Scanner<'a>, field: &'static str, min: u32) -> Result<(), ReadError> {
        match number(s, field)? {
            None => {}
            Some(Number::Negative) => self.unbounded = true,
            // `None` is less than any number.
            Some(Number::Whole(most)) => {
                self.max_output_tokens =
                    self.max_output_tokens.max(Some(within(field, most, min, u32::MAX)?));
            }
        }
        Ok(())
    }

    fn options(&mut self, s: &mut Scanner<'a>) -> Result<(), ReadError> {
        match s.kind()? {
            Kind::Null => {
                let range = ranged(s, |s| s.null())?;
                self.usage_edit_point = UsageEditPoint::Null(range);
                Ok(())
            }
            Kind::Object => {
                let at = s.position() + 1;
                let mut seen = NamesSeen::default();
                let mut empty = true;
                let mut edit_point = None;
                s.object(|s, name| -> Result<(), ReadError> {
                    empty = false;
                    if seen.find(name, &OPTIONS, &OPTIONS_PARAM)?.is_none() {
                        return Ok(s.skip()?);
                    }
                    s.kind()?;
                    let start = s.position();
                    self.include_usage = flag(s, OPTIONS_PARAM[0])?;
                    edit_point = Some(UsageEditPoint::Flag(start..s.position()));
                    Ok(())
                })?;
                self.usage_edit_point = edit_point.unwrap_or(UsageEditPoint::Object { at, empty });
                Ok(())
            }
            _ => Err(ReadError::WrongType { param: "stream_options", expected: "an object" }),
        }
    }

    /// Counts what the model will read of a value.
    fn text(&mut self, s: &mut Scanner<'a>, field: &'static str) -> Result<(), ReadError> {
        let kind = s.kind()?;
        if kind == Kind::Null {
            return Ok(s.null()?);
        }
        let (start, shrink, numbers) = (s.position(), s.shrink(), s.numbers());
        let mut media = Media::of(field);
        if field == "prompt" && kind == Kind::Array {
            // A list of texts or of lists of token ids is that many prompts; a list of ids is one.
            s.array(|s| -> Result<(), Fault> {
                self.prompts = self.prompts.saturating_add(u32::from(s.kind()? != Kind::Number));
                s.skip()
            })?;
        } else {
            media.read(s)?;
        }
        if matches!(field, "messages" | "prompt" | "input") {
            self.prompt = start..s.position();
        }
        let ids = if matches!(field, "prompt" | "input") { s.numbers() - numbers } else { 0 };
        let bytes = (s.position() - start) - (s.shrink() - shrink) - media.bytes;
        self.prompt_bytes = self.prompt_bytes + bytes as u64 + ids as u64 * BYTES_PER_TOKEN_ID;
        self.attachments = self.attachments.saturating_add(media.attachments);
        self.refers |= media.refers;
        self.reads_more |= media.server_tools;
        Ok(())
    }
}

/// Which names of a table occurred.
#[derive(Debug, Default)]
struct NamesSeen(u32);

impl NamesSeen {
    /// The table's entry for `name`; `params` are the names to show in an error.
    fn find<const N: usize>(
        &mut self,
        name: Text<'_>,
        table: &[&'static str; N],
        params: &[&'static str; N],
    ) -> Result<Option<&'static str>, ReadError> {
        let name = name.decode();
        let Some(index) = table.iter().position(|field| same_but_case(&name, field)) else {
            return Ok(None);
        };
        if name != table[index] {
            return Err(ReadError::CaseVariant(params[index]));
        }
        if self.0 & 1 << index != 0 {
            return Err(ReadError::Duplicate(params[index]));
        }
        self.0 |= 1 << index;
        Ok(Some(table[index]))
    }
}

/// Equality as Go's JSON decoder sees it: two letters beyond ASCII fold into it.
fn same_but_case(name: &str, field: &str) -> bool {
    if name.is_ascii() {
        return name.eq_ignore_ascii_case(field);
    }
    let fold = |c: char| match c {
        '\u{17F}' => 's',
        '\u{212A}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    name.chars().map(fold).eq(field.chars())
}

fn ranged(
    s: &mut Scanner<'_>,
    read: impl FnOnce(&mut Scanner<'_>) -> Result<(), Fault>,
) -> Result<Range<usize>, Fault> {
    let start = s.position();
    read(s)?;
    Ok(start..s.position())
}

fn flag(s: &mut Scanner<'_>, param: &'static str) -> Result<Option<bool>, ReadError> {
    match s.kind()? {
        Kind::Null => s.null().map(|()| None).map_err(ReadError::from),
        Kind::Bool => Ok(Some(s.boolean()?)),
        _ => Err(ReadError::WrongType { param, expected: "a boolean" }),
    }
}

/// A number of tokens or answers.
enum Number {
    Whole(u64),
    Negative,
}

/// Reads a whole number, however it is written: `100`, `100.0`, `1e2`.
fn number(s: &mut Scanner<'_>, param: &'static str) -> Result<Option<Number>, ReadError> {
    let wrong = ReadError::WrongType { param, expected: "an integer" };
    match s.kind()? {
        Kind::Null => Ok(s.null().map(|()| None)?),
        Kind::Number => {
            let digits = s.number()?;
            let size = digits.strip_prefix('-');
            let number = whole(size.unwrap_or(digits).as_bytes()).ok_or(wrong)?;
            Ok(Some(if size.is_some() && number > 0 { Number::Negative } else { Number::Whole(number) }))
        }
        _ => Err(wrong),
    }
}

fn within(param: &'static str, number: u64, min: u32, max: u32) -> Result<u32, ReadError> {
    let number = u32::try_from(number).ok().filter(|number| (min..=max).contains(number));
    number.ok_or(ReadError::OutOfRange { param, min, max })
}

fn integer(s: &mut Scanner<'_>, param: &'static str, min: u32, max: u32) -> Result<Option<u32>, ReadError> {
    match number(s, param)? {
        None => Ok(None),
        Some(Number::Whole(number)) => within(param, number, min, max).map(Some),
        Some(Number::Negative) => Err(ReadError::OutOfRange { param, min, max }),
    }
}
