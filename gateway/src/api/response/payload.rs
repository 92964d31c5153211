//! What one JSON payload of an answer says. It is read in pieces, so that its length has no bound.

use std::ops::Range;

use smallvec::SmallVec;
use weir_proto::resource::Dialect;

use super::endpoint::{Endpoint, Place, REASONING_FORMS, Report};
use crate::api::json_number::whole;
use crate::api::json_scanner::{DEPTH_MAX, Fault};
use crate::api::json_stream::{Container, Reader, Sink, Text, Word};
use crate::api::request::RouteKind;
use crate::api::usage::{Counts, Part, Usage};

/// Places that name the model, of one payload. An answer has one or two; one of nothing but names would become many times
/// larger when each is replaced.
const MODELS_MAX: usize = 8;

/// The facts of one payload.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Payload {
    pub(super) usage: Option<Usage>,
    /// The largest count of tokens that usage holds anywhere, sums and details included; zero without any.
    pub(super) most_tokens: u64,
    /// Where the model is named: at the top, and inside `response` for `/v1/responses`.
    pub(super) models: SmallVec<[Range<usize>; 2]>,
    /// Where a `usage` of the answer itself is null: from its name to the end of its value.
    pub(super) null_usage: Option<Range<usize>>,
    /// Which members of the answer itself are arrays.
    pub(super) lists: Lists,
    pub(super) deltas: u32,
    pub(super) content_bytes: u64,
    /// Bytes that the model wrote in all, where the payload repeats the whole answer.
    pub(super) output_bytes: u64,
    /// A bit for each choice that is there.
    pub(super) begun: u128,
    /// A bit for each choice that has a finish reason.
    pub(super) ended: u128,
    /// The type says that the answer is complete.
    pub(super) finished: bool,
    pub(super) error: bool,
    /// The error has a text where clients of the endpoint look for one.
    error_is_plain: bool,
    /// There is an error at the top.
    error_at_top: bool,
    /// Tokens of the answer as clients read them: in `usage` at the top, under OpenAI's names.
    pub(super) shown_completion: Option<u64>,
    choices: Option<u32>,
    typed: bool,
}

/// Arrays of which each endpoint's answers have one.
const LISTS: [&str; 3] = ["choices", "data", "output"];

/// Some of [`LISTS`], a bit each.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lists(u8);

impl Lists {
    fn of(name: &[u8]) -> Self {
        Self(LISTS.iter().position(|list| list.as_bytes() == name).map_or(0, |at| 1 << at))
    }

    pub(super) fn contains(self, name: &str) -> bool {
        let list = Self::of(name.as_bytes());
        list.0 != 0 && self.0 & list.0 == list.0
    }
}

impl Payload {
    /// Reads a payload that is there as a whole.
    pub(super) fn read(text: &[u8], endpoint: Endpoint, dialect: Dialect) -> Result<Self, Fault> {
        let mut reader = PayloadReader::new(endpoint, dialect);
        reader.feed(text)?;
        reader.finish()
    }

    /// Where the error stands that clients do not find, or find without its text.
    pub(super) fn untold_error(&self) -> Option<UntoldError> {
        match (self.error, self.error_is_plain, self.error_at_top) {
            (false, ..) | (_, true, _) => None,
            (true, false, true) => Some(UntoldError::AtTop),
            (true, false, false) => Some(UntoldError::Elsewhere),
        }
    }

    /// The chunk that exists only to carry usage: it has no choices and is of no other type.
    pub(super) fn usage_only(&self) -> bool {
        self.usage.is_some() && self.choices.unwrap_or(0) == 0 && !self.error && !self.typed
    }
}

/// Where an error stands that clients of OpenAI's API do not find, or find without its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UntoldError {
    /// In `error` at the top, where clients find that there is one.
    AtTop,
    /// Where they do not look.
    Elsewhere,
}

/// Reads a payload piece by piece, in some hundred bytes of memory.
#[derive(Debug, Clone)]
pub(super) struct PayloadReader {
    reader: Reader,
    facts: Facts,
}

impl PayloadReader {
    pub(super) fn new(endpoint: Endpoint, dialect: Dialect) -> Self {
        Self { reader: Reader::default(), facts: Facts::new(endpoint, dialect) }
    }

    pub(super) fn feed(&mut self, piece: &[u8]) -> Result<(), Fault> {
        self.reader.feed(piece, &mut self.facts)
    }

    /// Bytes of content so far, the string that is being read included: never more than there will be at the end.
    pub(super) fn content_so_far(&self) -> u64 {
        self.facts.content_so_far(self.reader.open_string())
    }

    pub(super) fn finish(mut self) -> Result<Payload, Fault> {
        self.reader.finish(&mut self.facts)?;
        self.facts.finish()
    }
}

/// Takes facts from the values in their places.
#[derive(Debug, Clone)]
struct Facts {
    endpoint: Endpoint,
    dialect: Dialect,
    payload: Payload,
    /// The place of each open container; those deeper than the table hold no facts.
    open: [Place; DEPTH_MAX as usize],
    depth: usize,
    /// The place of the value that comes next.
    next: Place,
    is_object: bool,
    event: Event,
    delta_bytes: u64,
    choice: Choice,
    counts: Counts,
    /// Where the usage in the payload is from.
    report: Option<Report>,
    /// There is an `error`, with nothing in it.
    empty_error: bool,
    /// There is something that only answers have.
    answers: bool,
    /// Where `usage` of the answer itself is named, if its value comes next.
    usage_named: Option<usize>,
    /// The list of the answer itself that is named, if its value comes next.
    list_named: Lists,
}

/// What is known of the choice that is read.
#[derive(Debug, Clone, Default)]
struct Choice {
    index: Option<u64>,
    finished: bool,
    content: u64,
    reasoning: [u64; REASONING_FORMS],
}

/// The types of events that matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Delta,
    Finished,
    Failed,
    Other,
}

impl Event {
    fn of(name: &[u8]) -> Self {
        match name {
            b"response.completed" | b"response.incomplete" | b"response.cancelled" => Self::Finished,
            b"response.failed" | b"error" => Self::Failed,
            // Sound is base64, and what is said in it comes as a transcript too.
            b"response.audio.delta" | b"response.output_audio.delta" => Self::Other,
            _ if name.ends_with(b".delta") => Self::Delta,
            _ => Self::Other,
        }
    }
}

impl Facts {
    fn new(endpoint: Endpoint, dialect: Dialect) -> Self {
        Self {
            endpoint,
            dialect,
            payload: Payload::default(),
            open: [Place::Nowhere; DEPTH_MAX as usize],
            depth: 0,
            next: Place::Root,
            is_object: false,
            event: Event::Other,
            delta_bytes: 0,
            choice: Choice::default(),
            counts: Counts::default(),
            report: None,
            empty_error: false,
            answers: false,
            usage_named: None,
            list_named: Lists::default(),
        }
    }

    fn finish(mut self) -> Result<Payload, Fault> {
        if !self.is_object {
            return Err(Fault { at: 0, what: "expected an object" });
        }
        match self.event {
            Event::Delta => self.wrote(self.delta_bytes),
            Event::Finished => self.payload.finished = true,
            Event::Failed => {
                self.payload.error = true;
                self.payload.error_is_plain |= self.endpoint == Endpoint::Of(RouteKind::Responses);
            }
            Event::Other => {}
        }
        // Some servers send an empty error with every good answer; with nothing beside it, it is one.
        self.payload.error |= self.empty_error && !self.answers;
        Ok(self.payload)
    }

    /// Says which place the value has that begins.
    fn place(&mut self) -> Place {
        let next = self.next;
        if matches!(next, Place::InError | Place::InTopError | Place::ErrorMessage) {
            self.error_at(next);
        }
        if let Some(holder) = self.depth.checked_sub(1).and_then(|at| self.open.get(at)) {
            // Until the next name; in an array it is the place of the next item too.
            self.next = holder.item();
        }
        next
    }

    fn error_at(&mut self, place: Place) {
        self.payload.error = true;
        self.payload.error_at_top |=
            matches!(place, Place::TopError | Place::InTopError | Place::ErrorMessage);
    }

    /// Content so far, with so many bytes of the value that comes next.
    fn content_so_far(&self, open: u64) -> u64 {
        let (mut content, mut reasoning) = (self.choice.content, self.choice.reasoning);
        match self.next {
            Place::Content | Place::Arguments => content += open,
            Place::Reasoning(form) => {
                if let Some(bytes) = reasoning.get_mut(usize::from(form)) {
                    *bytes += open;
                }
            }
            _ => {}
        }
        if self.event == Event::Delta {
            let open = if self.next == Place::Delta { open } else { 0 };
            content += self.delta_bytes.max(open);
        }
        self.payload.content_bytes + content + reasoning.into_iter().max().unwrap_or(0)
    }

    fn wrote(&mut self, bytes: u64) {
        self.payload.deltas += u32::from(bytes > 0);
        self.payload.content_bytes += bytes;
    }

    fn opened(&mut self, place: Place, container: Container) {
        match (place, container) {
            (Place::Root, Container::Object) => self.is_object = true,
            (Place::Choices, Container::Array) => {
                self.payload.choices.get_or_insert(0);
                self.answers = true;
            }
            (Place::Choice, _) => self.choice = Choice::default(),
            (Place::Error | Place::TopError, _) => self.empty_error = true,
            (Place::Usage(_, Part::All), _) => self.counts = Counts::default(),
            (Place::Data | Place::Output | Place::Response, _) => self.answers = true,
            _ => {}
        }
    }

    fn closed(&mut self, place: Place) {
        match place {
            Place::Choice => self.choice_over(),
            Place::Usage(report, Part::All) => self.usage_over(report),
            _ => {}
        }
    }

    fn choice_over(&mut self) {
        let position = self.payload.choices.unwrap_or(0);
        self.payload.choices = Some(position.saturating_add(1));
        let choice = std::mem::take(&mut self.choice);
        let index = choice.index.unwrap_or(u64::from(position)).min(u64::from(u128::BITS - 1));
        self.payload.begun |= 1 << index;
        self.payload.ended |= u128::from(choice.finished) << index;
        self.wrote(choice.content + choice.reasoning.into_iter().max().unwrap_or(0));
    }

    fn usage_over(&mut self, report: Report) {
        let counts = std::mem::take(&mut self.counts);
        self.payload.most_tokens = self.payload.most_tokens.max(counts.most);
        let kind = match self.endpoint {
            Endpoint::Of(kind) => kind,
            Endpoint::Any => RouteKind::ChatCompletions,
        };
        if report == Report::Answer {
            self.payload.shown_completion = counts.shown_completion().or(self.payload.shown_completion);
        }
        let Some(read) = counts.read(kind, self.dialect) else { return };
        let (usage, best) = match (self.payload.usage, self.report) {
            (Some(earlier), Some(best)) if best < report => (read.then(earlier), best),
            (Some(earlier), Some(_)) => (earlier.then(read), report),
            _ => (read, report),
        };
        (self.payload.usage, self.report) = (Some(usage), Some(best));
    }
}

impl Sink for Facts {
    fn open(&mut self, container: Container) {
        let place = self.place();
        // An object in place of a list, or the reverse, holds no facts.
        let place = match (place, container) {
            (Place::Choices | Place::ToolCalls, Container::Object) => Place::Nowhere,
            (Place::Root | Place::Response | Place::Choice | Place::Message, Container::Array) => {
                Place::Nowhere
            }
            (place, _) => place,
        };
        if self.depth == 1 && container == Container::Array {
            self.payload.lists.0 |= self.list_named.0;
        }
        self.opened(place, container);
        if let Some(open) = self.open.get_mut(self.depth) {
            *open = place;
        }
        self.depth += 1;
        self.next = place.item();
    }

    fn close(&mut self) {
        self.depth -= 1;
        if let Some(place) = self.open.get(self.depth).copied() {
            self.closed(place);
        }
        let holder = self.depth.checked_sub(1).and_then(|at| self.open.get(at));
        self.next = holder.map_or(Place::Nowhere, |holder| holder.item());
    }

    fn name(&mut self, name: Text<'_>) {
        let holder = self.depth.checked_sub(1).and_then(|at| self.open.get(at));
        let holder = holder.copied().unwrap_or(Place::Nowhere);
        if self.depth == 1 {
            self.usage_named = name.is(b"usage").then_some(name.start);
            self.list_named = Lists::of(name.short.unwrap_or_default());
        }
        // A long name is in no table, and in the arguments of a tool all values count.
        self.next = holder.member(self.endpoint, name.short.unwrap_or_default());
    }

    fn string(&mut self, text: Text<'_>) {
        match self.place() {
            Place::Model if self.payload.models.len() < MODELS_MAX => self.payload.models.push(text.range()),
            Place::Type if !self.payload.typed => {
                self.payload.typed = true;
                let event = text.short.map_or(Event::Other, Event::of);
                let typed = matches!(self.endpoint, Endpoint::Any | Endpoint::Of(RouteKind::Responses));
                self.event = if typed || event == Event::Failed { event } else { Event::Other };
            }
            Place::Object => self.payload.error |= text.is(b"error"),
            Place::Delta => (self.delta_bytes, self.answers) = (self.delta_bytes.max(text.len), true),
            Place::ErrorMessage => self.payload.error_is_plain |= text.len > 0,
            place @ (Place::Error | Place::TopError) => match text.len {
                0 => self.empty_error = true,
                _ => self.error_at(place),
            },
            // Some servers write an empty reason, or the word "null", in each chunk before the last.
            Place::FinishReason => {
                self.choice.finished = text.len > 0 && !text.is(b"null");
                self.payload.error |= text.is(b"error");
            }
            Place::Content | Place::Arguments => self.choice.content += text.len,
            Place::Reasoning(form) => {
                if let Some(bytes) = self.choice.reasoning.get_mut(usize::from(form)) {
                    *bytes += text.len;
                }
            }
            Place::Output => self.payload.output_bytes += text.len,
            _ => {}
        }
    }

    fn number(&mut self, text: Text<'_>) {
        match self.place() {
            Place::Count(field) => self.counts.take(field, text.short),
            Place::Index => self.choice.index = text.short.and_then(whole),
            place @ (Place::Error | Place::TopError) => match text.short.and_then(whole) {
                Some(0) => self.empty_error = true,
                _ => self.error_at(place),
            },
            _ => {}
        }
    }

    fn word(&mut self, word: Word, end: usize) {
        // At this depth a value follows its own name.
        if let Some(start) = self.usage_named.filter(|_| self.depth == 1 && word == Word::Null) {
            self.payload.null_usage.get_or_insert(start..end);
        }
        match (self.place(), word) {
            (place @ (Place::Error | Place::TopError), Word::True) => self.error_at(place),
            (Place::Error | Place::TopError, Word::False) => self.empty_error = true,
            _ => {}
        }
    }
}
