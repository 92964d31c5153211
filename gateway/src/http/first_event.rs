//! The beginning of a stream: everything up to its first event with data. It decides whether another backend may be
//! tried, over comments and however the bytes were cut.

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use crate::api::answer::{Beginning, beginning};
use crate::api::response::is_error_object;
use crate::api::sse::{Events, Piece, data_lines};
use crate::routing::upstream::AnswerBody;

/// What is held of a stream before its first event is over. An event that is longer is no error: those are short.
const HELD_MAX_BYTES: usize = 64 << 10;

/// How a 200 to a request for a stream begins.
#[derive(Debug)]
pub enum Begun {
    /// With an event: all bytes so far, the event's own payload among them.
    Event {
        /// Everything that came.
        bytes: Bytes,
        /// The first payload, if the event is whole.
        payload: Option<Bytes>,
    },
    /// As JSON: the server did not stream.
    Json(Bytes),
    /// As something else, such as a page.
    Other,
    /// It ended, cleanly, before an event with data, after so many bytes of comments and the like.
    Ended {
        /// The bytes.
        bytes: usize,
    },
    /// The connection broke before.
    Broken,
}

/// Reads a body until its first event with data is there.
pub async fn read(body: &mut AnswerBody) -> Begun {
    let mut held = Held::default();
    loop {
        let data = match body.frame().await {
            None => return held.ended(),
            Some(Err(_)) => return Begun::Broken,
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => data,
                Err(_) => continue,
            },
        };
        if let Some(begun) = held.take(data) {
            return begun;
        }
    }
}

/// What came of a stream that has not begun.
#[derive(Debug, Default)]
struct Held {
    /// The only part so far, which is not copied.
    first: Option<Bytes>,
    joined: BytesMut,
    events: Events,
    is_stream: bool,
    payload: Option<Bytes>,
}

impl Held {
    fn take(&mut self, data: Bytes) -> Option<Begun> {
        if data.is_empty() {
            return None;
        }
        let fed = self.len();
        match (&self.first, self.joined.is_empty()) {
            (None, true) => self.first = Some(data),
            (Some(first), true) => {
                self.joined.extend_from_slice(&first[..]);
                self.joined.extend_from_slice(&data);
            }
            _ => self.joined.extend_from_slice(&data),
        }
        if !self.is_stream {
            match beginning(self.bytes()) {
                Beginning::Open if self.len() <= HELD_MAX_BYTES => return None,
                Beginning::Open | Beginning::Other => return Some(Begun::Other),
                Beginning::Json => return Some(Begun::Json(self.all())),
                Beginning::Events => self.is_stream = true,
            }
            self.feed(0);
        } else {
            self.feed(fed);
        }
        match self.payload.is_some() || self.len() > HELD_MAX_BYTES {
            true => Some(self.begun()),
            false => None,
        }
    }

    /// Looks for the first payload in what came after so many bytes.
    fn feed(&mut self, from: usize) {
        let Self { first, joined, events, payload, .. } = self;
        let bytes: &[u8] = match joined.is_empty() {
            true => first.as_deref().unwrap_or_default(),
            false => joined,
        };
        events.feed(&bytes[from..], |piece| note(payload, piece));
    }

    fn ended(mut self) -> Begun {
        let mut payload = self.payload.take();
        self.events.finish(|piece| note(&mut payload, piece));
        // An event without the empty line that ends it may be the beginning of one.
        match payload.filter(|payload| is_whole(payload)) {
            Some(payload) => Begun::Event { bytes: self.all(), payload: Some(payload) },
            None if self.len() > 0 && !self.is_stream => Begun::Other,
            None => Begun::Ended { bytes: self.len() },
        }
    }

    fn begun(&mut self) -> Begun {
        Begun::Event { payload: self.payload.take(), bytes: self.all() }
    }

    fn len(&self) -> usize {
        self.joined.len().max(self.first.as_ref().map_or(0, Bytes::len))
    }

    fn bytes(&self) -> &[u8] {
        match self.joined.is_empty() {
            true => self.first.as_deref().unwrap_or_default(),
            false => &self.joined,
        }
    }

    fn all(&mut self) -> Bytes {
        match self.joined.is_empty() {
            true => self.first.take().unwrap_or_default(),
            false => std::mem::take(&mut self.joined).freeze(),
        }
    }
}

fn is_whole(payload: &[u8]) -> bool {
    payload.trim_ascii() == b"[DONE]" || is_error_object(payload).is_ok()
}

/// Keeps the first payload: the data lines of the first event that has any.
fn note(payload: &mut Option<Bytes>, piece: Piece<'_>) {
    let Piece::Event(event) = piece else { return };
    if payload.is_some() {
        return;
    }
    let lines: Vec<&[u8]> = data_lines(event).collect();
    if lines.iter().any(|line| !line.trim_ascii().is_empty()) {
        *payload = Some(lines.join(&b'\n').into());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a body in these parts begins with: its kind, its first payload and how many bytes were held.
    fn begun(parts: &[&[u8]]) -> (&'static str, Option<Vec<u8>>) {
        let mut held = Held::default();
        let begun = parts.iter().find_map(|part| held.take(Bytes::copy_from_slice(part)));
        match begun.unwrap_or_else(|| held.ended()) {
            Begun::Event { payload, bytes } => {
                let sent = parts.concat();
                assert!(sent.starts_with(&bytes), "what is held is what came");
                ("event", payload.map(|payload| payload.to_vec()))
            }
            Begun::Json(_) => ("json", None),
            Begun::Other => ("other", None),
            Begun::Ended { .. } => ("ended", None),
            Begun::Broken => ("broken", None),
        }
    }

    #[test]
    fn the_first_event_with_data_counts_over_comments_and_empty_ones() {
        for (body, expected) in [
            ("data: a\n\ndata: b\n\n", ("event", Some("a"))),
            (": PROCESSING\n\n: PROCESSING\n\ndata: a\n\n", ("event", Some("a"))),
            ("event: x\n\ndata:\n\nid: 1\ndata: a\n\n", ("event", Some("a"))),
            ("\u{feff}data: a\r\n\r\n", ("event", Some("a"))),
            ("data: a\rdata: b\r\r", ("event", Some("a\nb"))),
            ("data: {\"a\":1}", ("event", Some("{\"a\":1}"))),
            ("data: [DONE]\n", ("event", Some("[DONE]"))),
            ("data: {\"a\":", ("ended", None)),
            (": ping\n\ndata: a", ("ended", None)),
            (": ping\n\n", ("ended", None)),
            ("", ("ended", None)),
            ("{\"a\":1}", ("json", None)),
            ("<html>", ("other", None)),
            ("\n\n\n", ("other", None)),
        ] {
            let expected = (expected.0, expected.1.map(|text| text.as_bytes().to_vec()));
            assert_eq!(begun(&[body.as_bytes()]), expected, "{body:?}");
            let bytes: Vec<&[u8]> = body.as_bytes().chunks(1).collect();
            assert_eq!(begun(&bytes), expected, "{body:?} byte by byte");
            for cut in 0..=body.len() {
                let (one, two) = body.as_bytes().split_at(cut);
                assert_eq!(begun(&[one, two]), expected, "{body:?} at {cut}");
            }
        }
    }

    #[test]
    fn what_is_held_is_bounded() {
        let part = [b'x'; 1000];
        let mut held = Held::default();
        assert!(held.take(Bytes::from_static(b"data: ")).is_none());
        let taken = (0..1000).position(|_| held.take(Bytes::copy_from_slice(&part)).is_some());
        assert!(taken.is_some_and(|parts| parts * part.len() <= HELD_MAX_BYTES), "{taken:?}");
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(body in "(\u{feff})?(data: a|data:|: c|event: e|\n|\r|\r\n|\\{|<){0,12}", cuts in proptest::collection::vec(0usize..60, 0..6)) {
            let body = body.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(body.len())).collect();
            cuts.extend([0, body.len()]);
            cuts.sort_unstable();
            let parts: Vec<&[u8]> = cuts.windows(2).map(|pair| &body[pair[0]..pair[1]]).collect();
            prop_assert_eq!(begun(&parts), begun(&[body]));
        }
    }
}
