//! Finds in what a model is to read the parts that are no text.

use super::BASE64_BYTES_MIN;
use crate::api::json_scanner::{Fault, Kind, Scanner};

/// Names inside messages and inputs under which a model is given what is no text, or what the body does not hold: images,
/// files, sounds and films.
const REFERRING: [&str; 18] = [
    "audio",
    "audio_url",
    "file",
    "file_data",
    "file_id",
    "file_uri",
    "file_url",
    "image",
    "image_embeds",
    "image_url",
    "images",
    "inline_data",
    "input_audio",
    "source",
    "url",
    "video",
    "video_url",
    "videos",
];
/// Longest head of a data URL, bytes: type, parameters and the comma.
const DATA_HEAD_BYTES_MAX: usize = 256;

/// The member names under which the API takes base64 of any length.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Name {
    Url,
    InputAudio,
    Data,
    Other,
}

/// Walks a value and sets aside base64 that is no text: of any length in the places that the API has for it, and long
/// strings in all others.
#[derive(Debug, Default)]
pub(super) struct Media {
    /// Strings that were set aside.
    pub(super) attachments: u32,
    /// Their bytes.
    pub(super) bytes: usize,
    /// Something was named that is not text: its tokens are not bounded by its bytes.
    pub(super) refers: bool,
    /// A tool is the server's own, such as a search of the web: it may add what it finds to the prompt.
    pub(super) server_tools: bool,
    /// It is `messages` or `input`: places of the API count.
    parts: bool,
    tools: bool,
}

impl Media {
    /// For the value of a top-level field.
    pub(super) fn of(field: &str) -> Self {
        Self { parts: matches!(field, "messages" | "input"), tools: field == "tools", ..Self::default() }
    }

    /// Reads the whole value.
    pub(super) fn read(&mut self, s: &mut Scanner<'_>) -> Result<(), Fault> {
        match s.kind()? {
            Kind::Array if self.tools => s.array(|s| self.tool(s)),
            _ => self.value(s, Name::Other, Name::Other),
        }
    }

    /// A tool of the client is a function or has a name; all others are the server's.
    fn tool(&mut self, s: &mut Scanner<'_>) -> Result<(), Fault> {
        if s.kind()? != Kind::Object {
            return self.value(s, Name::Other, Name::Other);
        }
        let (mut named, mut typed) = (false, None);
        s.object(|s, key| {
            named |= matches!(key.raw, "name" | "function");
            if key.raw == "type" && s.kind()? == Kind::String {
                typed = Some(matches!(s.string()?.raw, "function" | "custom"));
                return Ok(());
            }
            self.value(s, Name::Other, Name::Other)
        })?;
        self.server_tools |= !typed.unwrap_or(named);
        Ok(())
    }

    fn value(&mut self, s: &mut Scanner<'_>, parent: Name, name: Name) -> Result<(), Fault> {
        match s.kind()? {
            Kind::Object => s.object(|s, key| {
                let name_of = match key.raw {
                    "url" | "image_url" | "file_data" => Name::Url,
                    "input_audio" => Name::InputAudio,
                    "data" => Name::Data,
                    _ => Name::Other,
                };
                self.refers |= self.parts && REFERRING.contains(&key.raw);
                self.value(s, name, name_of)
            }),
            Kind::Array => s.array(|s| self.value(s, Name::Other, Name::Other)),
            Kind::String => {
                let text = s.string()?;
                let place = self.parts
                    && match name {
                        Name::Url => is_data_url(text.raw),
                        Name::Data => parent == Name::InputAudio,
                        Name::InputAudio | Name::Other => false,
                    };
                if place || ((self.parts || self.tools) && is_base64(text.raw)) {
                    self.attachments = self.attachments.saturating_add(1);
                    self.bytes += text.len();
                }
                Ok(())
            }
            Kind::Number | Kind::Bool | Kind::Null => s.skip(),
        }
    }
}

fn is_data_url(raw: &str) -> bool {
    raw.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// Whether a string, still escaped, is long and has no other letters than those of base64 and its URL-safe form, line
/// breaks included; a data URL has its head before them.
fn is_base64(raw: &str) -> bool {
    if raw.len() < BASE64_BYTES_MIN {
        return false;
    }
    let head = is_data_url(raw).then(|| raw.bytes().take(DATA_HEAD_BYTES_MAX).position(|b| b == b','));
    let from = head.flatten().map_or(0, |comma| comma + 1);
    let mut letters = raw.bytes().skip(from);
    while let Some(letter) = letters.next() {
        let of_base64 = match letter {
            // What a writer escapes: a line break, and in old ones the slash.
            b'\\' => matches!(letters.next(), Some(b'n' | b'r' | b'/')),
            b'+' | b'/' | b'-' | b'_' | b'=' => true,
            letter => letter.is_ascii_alphanumeric(),
        };
        if !of_base64 {
            return false;
        }
    }
    true
}
