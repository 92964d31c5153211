//! Answers of `/v1/responses`: named events with a rising `sequence_number`; the closing events repeat the text.

use std::collections::VecDeque;

use serde_json::json;

use crate::body::{Frames, Part};
use crate::chat::{Answer, Usage};

/// Events before the first delta.
const EVENTS_BEFORE_TEXT: u64 = 4;

/// Builds events in order. Text inside an event is a part of its own.
struct Events<'a> {
    answer: &'a Answer,
    parts: VecDeque<Part>,
    number: u64,
}

impl Events<'_> {
    /// An event whose JSON is `before`, the whole text, `after` (each without the outer braces).
    fn push(&mut self, name: &str, before: &str, text_and_after: Option<&str>) {
        let number = self.number;
        self.number += 1;
        let start =
            format!("event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{number},{before}");
        self.parts.push_back(Part::text(start));
        if let Some(after) = text_and_after {
            self.parts.push_back(self.answer.repeated_text());
            self.parts.push_back(Part::text(after.to_owned()));
        }
        self.parts.push_back(Part::text("}\n\n".to_owned()));
    }
}

impl Answer {
    fn repeated_text(&self) -> Part {
        Part::Text { frames: Frames::fixed(self.tokens, &self.words(), "", ""), left: self.tokens }
    }

    fn message_id(&self) -> String {
        format!("msg_{}", self.id)
    }

    /// The response object up to the value of `output`.
    fn response_head(&self, status: &str) -> String {
        let (id, created, model) = (&self.id, self.created, json!(self.model));
        format!(
            r#"{{"id":"{id}","object":"response","created_at":{created},"status":"{status}","error":null,"incomplete_details":null,"model":{model},"output":"#
        )
    }

    /// The output message, split at the place of its text.
    fn message_around_text(&self, status: &str) -> (String, &'static str) {
        let id = self.message_id();
        let before = format!(
            r#"{{"id":"{id}","type":"message","status":"{status}","role":"assistant","content":[{{"type":"output_text","annotations":[],"text":""#
        );
        (before, r#""}]}"#)
    }

    fn response_usage(&self) -> String {
        let (input, output) = (self.prompt_tokens, self.tokens);
        let total = input + output;
        match self.usage {
            Usage::Nowhere => "null".to_owned(),
            Usage::OwnChunk | Usage::LastChoice => format!(
                r#"{{"input_tokens":{input},"input_tokens_details":{{"cached_tokens":0}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0}},"total_tokens":{total}}}"#
            ),
        }
    }

    /// The one JSON object.
    pub(crate) fn whole_response(&self) -> VecDeque<Part> {
        let (before, after) = self.message_around_text("completed");
        let head = self.response_head("completed");
        let frames = Frames::fixed(self.tokens, &self.words(), "", "");
        VecDeque::from([
            Part::text(format!("{head}[{before}")),
            Part::Tokens { frames, left: self.tokens },
            Part::text(format!(r#"{after}],"usage":{}}}"#, self.response_usage())),
        ])
    }

    /// The events of a streamed response; this API has no `[DONE]`.
    pub(crate) fn stream_response(&self) -> VecDeque<Part> {
        let item = self.message_id();
        let place = format!(r#""item_id":"{item}","output_index":0,"content_index":0,"#);
        let started = format!(r#""response":{}[],"usage":null}}"#, self.response_head("in_progress"));
        let (before, after) = self.message_around_text("completed");
        let mut events = Events { answer: self, parts: VecDeque::new(), number: 0 };
        events.push("response.created", &started, None);
        events.push("response.in_progress", &started, None);
        let empty = format!(
            r#""output_index":0,"item":{{"id":"{item}","type":"message","status":"in_progress","role":"assistant","content":[]}}"#
        );
        events.push("response.output_item.added", &empty, None);
        let part = r#""part":{"type":"output_text","annotations":[],"text":""#;
        events.push("response.content_part.added", &format!(r#"{place}{part}"}}"#), None);

        let delta = "response.output_text.delta";
        let frames = Frames::numbered(
            self.words(),
            format!("event: {delta}\ndata: {{\"type\":\"{delta}\",{place}\"delta\":\""),
            r#"","sequence_number":"#.to_owned(),
            "}\n\n".to_owned(),
            EVENTS_BEFORE_TEXT,
        );
        events.parts.push_back(Part::Tokens { frames, left: self.tokens });
        events.number += self.tokens;

        events.push("response.output_text.done", &format!(r#"{place}"text":""#), Some("\""));
        events.push("response.content_part.done", &format!("{place}{part}"), Some("\"}"));
        events.push(
            "response.output_item.done",
            &format!(r#""output_index":0,"item":{before}"#),
            Some(after),
        );
        let completed = format!(r#""response":{}[{before}"#, self.response_head("completed"));
        let end = format!(r#"{after}],"usage":{}}}"#, self.response_usage());
        events.push("response.completed", &completed, Some(&end));
        events.parts
    }
}
