//! The payloads of one stream, one after another. Most begin with the same bytes as the one before it: those are not read
//! again.
//!
//! What a reader knows after some bytes depends on nothing but them, so what was known after the bytes that two payloads have in
//! common is kept, and the next payload that begins with them is read from there on.

use weir_proto::resource::Dialect;

use super::endpoint::Endpoint;
use super::payload::{Payload, PayloadReader};
use crate::api::json_scanner::Fault;

/// Bytes of a payload that are compared with the next one.
const COMPARED_MAX: usize = 1024;
/// Bytes that must be saved for each payload to come, so that keeping a state is worth it.
const WORTH_BYTES: usize = 32;

/// Reads payloads.
#[derive(Debug)]
pub(super) struct Payloads {
    endpoint: Endpoint,
    dialect: Dialect,
    /// How the last one began.
    last: Vec<u8>,
    /// What was known after so many bytes of it.
    known: Option<Box<(usize, PayloadReader)>>,
}

impl Payloads {
    pub(super) const fn new(endpoint: Endpoint, dialect: Dialect) -> Self {
        Self { endpoint, dialect, last: Vec::new(), known: None }
    }

    /// A reader for a payload by itself.
    pub(super) fn reader(&self) -> PayloadReader {
        PayloadReader::new(self.endpoint, self.dialect)
    }

    /// Reads the next payload.
    ///
    /// # Errors
    /// It is no JSON object.
    pub(super) fn read(&mut self, payload: &[u8]) -> Result<Payload, Fault> {
        let same = common(payload, &self.last);
        let (reader, from) = match self.known.as_deref() {
            Some((bytes, reader)) if *bytes <= same => (reader.clone(), *bytes),
            _ => {
                self.known = None;
                (self.reader(), 0)
            }
        };
        let read = self.read_on(reader, from, same, payload);
        self.last.clear();
        match read {
            Ok(_) => self.last.extend_from_slice(&payload[..payload.len().min(COMPARED_MAX)]),
            Err(_) => self.known = None,
        }
        read
    }

    fn read_on(
        &mut self,
        mut reader: PayloadReader,
        mut from: usize,
        same: usize,
        payload: &[u8],
    ) -> Result<Payload, Fault> {
        if same >= from + WORTH_BYTES {
            reader.feed(&payload[from..same])?;
            from = same;
            match &mut self.known {
                Some(known) => **known = (same, reader.clone()),
                None => self.known = Some(Box::new((same, reader.clone()))),
            }
        }
        reader.feed(&payload[from..])?;
        reader.finish()
    }
}

/// How many bytes both begin with.
fn common(a: &[u8], b: &[u8]) -> usize {
    const STEP: usize = 16;
    let (steps_a, steps_b) = (a.as_chunks::<STEP>().0, b.as_chunks::<STEP>().0);
    let at = steps_a.iter().zip(steps_b).take_while(|(a, b)| a == b).count() * STEP;
    at + a[at..].iter().zip(&b[at..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::api::request::RouteKind;

    const PARTS: [&str; 14] = [
        r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000000,"model":"a-model","#,
        r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1764000001,"model":"a-model","#,
        r#""choices":[{"index":0,"delta":{"content":"#,
        r#""choices":[{"index":1,"delta":{"reasoning_content":"#,
        r#"" a""#,
        r#"" another one""#,
        r#""\u00e9\ud83e\udd8a🦊""#,
        r#"},"finish_reason":null}]}"#,
        r#"},"finish_reason":"stop"}],"usage":null}"#,
        r#""choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}"#,
        r#"{"type":"response.output_text.delta","item_id":"msg_0123456789abcdef","delta":"x"}"#,
        r#"{"error":{"message":"boom"}}"#,
        "junk",
        "",
    ];

    proptest! {
        /// However payloads resemble each other, each is read as it is by itself.
        #[test]
        fn a_payload_after_others_says_what_it_says_by_itself(
            payloads in proptest::collection::vec(
                (proptest::collection::vec(0..PARTS.len(), 1..5), proptest::option::of(0usize..300)), 1..12),
            usual in any::<bool>(),
        ) {
            for endpoint in [RouteKind::ChatCompletions, RouteKind::Responses].map(Endpoint::Of) {
                let mut stream = Payloads::new(endpoint, Dialect::OpenAi);
                for (parts, cut) in &payloads {
                    let mut payload: String = match usual {
                        true => [0, 2, 4 + parts[0] % 3, 7 + parts.len() % 2].map(|part| PARTS[part]).concat(),
                        false => parts.iter().map(|part| PARTS[*part]).collect(),
                    };
                    if let Some(at) = cut.filter(|at| !usual && payload.is_char_boundary(*at)) {
                        payload.truncate(at);
                    }
                    let alone = Payload::read(payload.as_bytes(), endpoint, Dialect::OpenAi);
                    prop_assert_eq!(stream.read(payload.as_bytes()), alone, "{}", payload);
                }
            }
        }
    }

    #[test]
    fn what_usual_events_have_in_common_is_read_once() {
        let mut stream = Payloads::new(Endpoint::Of(RouteKind::ChatCompletions), Dialect::OpenAi);
        let event = |text: &str| format!("{}{}{text}{}", PARTS[0], PARTS[2], PARTS[7]);
        for text in [r#""one""#, r#"" two""#, r#"" three""#, r#""four""#] {
            stream.read(event(text).as_bytes()).expect("JSON");
        }
        let known = stream.known.as_ref().map_or(0, |known| known.0);
        assert_eq!(known, PARTS[0].len() + PARTS[2].len() + 1, "up to the text");
        stream.read(b"junk").expect_err("no JSON");
        assert!(stream.known.is_none());
    }
}
