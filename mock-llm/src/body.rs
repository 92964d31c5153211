//! Response bodies. A generated answer is a list of parts that is sent over time and never held as a whole: tokens
//! are slices of one block per answer, so a body of any length needs the memory of one block.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::connection::Control;
use crate::engine::{Active, Pace};
use crate::faults::HangAt;
use crate::handle::Shared;

/// Size at which a block of repeated tokens is long enough to make writes cheap.
const BLOCK_BYTES: usize = 64 * 1024;
/// The data of a garbage event: neither UTF-8 nor JSON.
const GARBAGE_EVENT: &[u8] = b"data: {\"choices\":[{\xff\xfe\x00]]\n\n";

/// The event of one token, repeated.
#[derive(Debug)]
pub(crate) struct Frames {
    kind: Kind,
    next: usize,
}

#[derive(Debug)]
enum Kind {
    /// Built once; tokens are slices of the block.
    Fixed { block: Bytes, ends: Vec<usize> },
    /// Events with a number are built when they are due, into a buffer that is reused.
    Numbered {
        words: Vec<Bytes>,
        before: String,
        between: String,
        after: String,
        first: u64,
        buffer: BytesMut,
    },
}

impl Frames {
    /// `count` times `before`, the next word, `after`.
    pub(crate) fn fixed(count: u64, words: &[Bytes], before: &str, after: &str) -> Self {
        let mut block = BytesMut::new();
        let mut ends = Vec::new();
        // Only complete rounds of words, so that the order continues at the start of the block.
        'rounds: while block.len() < BLOCK_BYTES {
            for word in words {
                if ends.len() as u64 >= count {
                    break 'rounds;
                }
                for piece in [before.as_bytes(), word, after.as_bytes()] {
                    block.extend_from_slice(piece);
                }
                ends.push(block.len());
            }
        }
        Self { kind: Kind::Fixed { block: block.freeze(), ends }, next: 0 }
    }

    /// Events `before`, the next word, `between`, a number that rises from `first`, `after`.
    pub(crate) fn numbered(
        words: Vec<Bytes>,
        before: String,
        between: String,
        after: String,
        first: u64,
    ) -> Self {
        Self {
            kind: Kind::Numbered { words, before, between, after, first, buffer: BytesMut::new() },
            next: 0,
        }
    }

    /// At least one and at most `count` events (`count` above 0), and their number.
    fn take(&mut self, count: u64) -> (Bytes, u64) {
        let count_max = usize::try_from(count).unwrap_or(usize::MAX);
        match &mut self.kind {
            Kind::Fixed { block, ends } => {
                let (start, end) = (self.next, self.next.saturating_add(count_max).min(ends.len()));
                self.next = if end == ends.len() { 0 } else { end };
                let offset = |frame: usize| frame.checked_sub(1).and_then(|frame| ends.get(frame)).copied();
                (block.slice(offset(start).unwrap_or(0)..offset(end).unwrap_or(0)), (end - start) as u64)
            }
            Kind::Numbered { words, before, between, after, first, buffer } => {
                let mut taken = 0;
                while taken < count_max && (taken == 0 || buffer.len() < BLOCK_BYTES) {
                    let word = words.get(self.next % words.len()).map_or(&[][..], AsRef::as_ref);
                    let number = *first + self.next as u64;
                    for piece in [before.as_bytes(), word, between.as_bytes()] {
                        buffer.extend_from_slice(piece);
                    }
                    let mut writer = bytes::BufMut::writer(&mut *buffer);
                    // Writing to memory does not fail.
                    let _ = write!(writer, "{number}");
                    buffer.extend_from_slice(after.as_bytes());
                    self.next += 1;
                    taken += 1;
                }
                (buffer.split().freeze(), taken as u64)
            }
        }
    }

    /// The bytes of `count` events; `None` if they are not of fixed size.
    fn len(&self, count: u64) -> Option<u64> {
        let Kind::Fixed { block, ends } = &self.kind else { return None };
        let frames = ends.len() as u64;
        let rounds = count.checked_div(frames)? * block.len() as u64;
        let rest = usize::try_from(count % frames).ok()?;
        let rest = rest.checked_sub(1).and_then(|frame| ends.get(frame)).copied().unwrap_or(0);
        Some(rounds + rest as u64)
    }
}

/// A part of an answer.
#[derive(Debug)]
pub(crate) enum Part {
    /// Sent at once.
    Bytes(Bytes),
    /// Tokens: timed, counted, interruptible.
    Tokens { frames: Frames, left: u64 },
    /// A repeated text, as the Responses API sends it; it takes no time and is not counted.
    Text { frames: Frames, left: u64 },
    /// The connection is closed without the end of the body.
    Close,
    /// Nothing is sent until the faults change.
    Hang,
}

impl Part {
    pub(crate) fn text(text: String) -> Self {
        Self::Bytes(text.into())
    }

    fn len(&self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes.len() as u64),
            Self::Tokens { frames, left } | Self::Text { frames, left } => frames.len(*left),
            Self::Close | Self::Hang => None,
        }
    }
}

/// A fault that interrupts an answer after a number of tokens.
#[derive(Debug)]
pub(crate) enum Action {
    Hang(HangAt),
    Cut,
    Garbage,
    /// Everything that is left is replaced by these bytes.
    Replace(Bytes),
}

#[derive(Debug)]
pub(crate) struct Interrupt {
    pub(crate) after_tokens: u64,
    pub(crate) action: Action,
}

/// The next step of an answer.
enum Next {
    Bytes(Bytes),
    /// Nothing yet: a part has ended, or a token is not due.
    Later,
    End,
}

/// An answer that is being sent.
pub(crate) struct Generation {
    parts: VecDeque<Part>,
    /// Sorted by `after_tokens`.
    interrupts: VecDeque<Interrupt>,
    pace: Pace,
    /// When the next token is due. Only used if tokens take time.
    due: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
    hang: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    cutting: bool,
    closing: bool,
    /// Everything was sent, and the body does not end.
    lingers: bool,
    sent_tokens: u64,
    left_bytes: Option<u64>,
    shared: Arc<Shared>,
    control: Arc<Control>,
    /// `None` once the answer has ended.
    active: Option<Active>,
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").field("sent_tokens", &self.sent_tokens).finish_non_exhaustive()
    }
}

impl Generation {
    pub(crate) fn new(
        active: Active,
        parts: VecDeque<Part>,
        mut interrupts: Vec<Interrupt>,
        pace: Pace,
        shared: Arc<Shared>,
        control: Arc<Control>,
    ) -> Self {
        interrupts.sort_by_key(|interrupt| interrupt.after_tokens);
        let due = Instant::now() + pace.prefill();
        let sleep = (!pace.prefill().is_zero()).then(|| Box::pin(sleep_until(due)));
        Self {
            left_bytes: None,
            parts,
            interrupts: interrupts.into(),
            pace,
            due,
            sleep,
            hang: None,
            cutting: false,
            closing: false,
            lingers: false,
            sent_tokens: 0,
            shared,
            control,
            active: Some(active),
        }
    }

    /// Sets `Content-Length`. Only for answers whose parts are not replaced while they are sent.
    pub(crate) fn with_known_length(mut self) -> Self {
        self.left_bytes = self.parts.iter().map(Part::len).sum();
        self
    }

    /// Applies a due interrupt. `Some` is the result of the poll; `None` means that the caller must check again.
    fn interrupt(&mut self, action: Action, context: &Context<'_>) -> Option<Poll<Bytes>> {
        match action {
            Action::Hang(at) => self.hang = Some(Box::pin(self.shared.hang_released(at))),
            Action::Cut => {
                // The connection is polled once first, so that everything before the cut is sent.
                self.cutting = true;
                context.waker().wake_by_ref();
                return Some(Poll::Pending);
            }
            Action::Garbage => {
                if let Some(Part::Tokens { left, .. }) = self.parts.front_mut() {
                    *left = left.saturating_sub(1);
                    self.sent_tokens += 1;
                }
                return Some(Poll::Ready(Bytes::from_static(GARBAGE_EVENT)));
            }
            Action::Replace(bytes) => {
                self.interrupts.clear();
                self.parts.clear();
                self.parts.push_back(Part::Bytes(bytes));
            }
        }
        None
    }

    /// The next bytes, `None` at the end, or `Err` where a fault cuts the answer.
    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Cut>>> {
        loop {
            if let Some(hang) = self.hang.as_mut() {
                ready!(hang.as_mut().poll(context));
                (self.hang, self.lingers) = (None, false);
            }
            if self.closing {
                return Poll::Ready(Some(Err(Cut)));
            }
            if self.cutting {
                self.parts.clear();
                self.control.arm_reset();
                if let Some(active) = self.active.take() {
                    active.cut();
                }
                return Poll::Ready(Some(Err(Cut)));
            }
            if let Some(sleep) = self.sleep.as_mut() {
                ready!(sleep.as_mut().poll(context));
                self.sleep = None;
            }
            match self.parts.front() {
                Some(Part::Close) => {
                    self.parts.clear();
                    self.end();
                    // The connection is polled once first, as before a cut. The answer is complete, so nothing is
                    // reset.
                    (self.closing, self.lingers) = (true, true);
                    context.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Some(Part::Hang) => {
                    self.parts.pop_front();
                    self.end();
                    self.lingers = true;
                    self.hang = Some(Box::pin(self.shared.tail_released()));
                    continue;
                }
                _ => {}
            }
            let before_interrupt = match self.interrupts.front() {
                Some(interrupt) if interrupt.after_tokens <= self.sent_tokens => {
                    let Some(interrupt) = self.interrupts.pop_front() else { continue };
                    match self.interrupt(interrupt.action, context) {
                        Some(answer) => return answer.map(|bytes| Some(Ok(bytes))),
                        None => continue,
                    }
                }
                Some(interrupt) => interrupt.after_tokens - self.sent_tokens,
                None => u64::MAX,
            };
            let bytes = match self.next_bytes(before_interrupt) {
                Next::Bytes(bytes) => bytes,
                Next::Later => continue,
                Next::End => {
                    self.end();
                    return Poll::Ready(None);
                }
            };
            if self.parts.is_empty() {
                // The slot is freed before the client can see the end, so that its next request finds it free.
                self.end();
            }
            if !bytes.is_empty() {
                return Poll::Ready(Some(Ok(bytes)));
            }
        }
    }

    /// The due bytes of the next part, with at most as many tokens as there are before the next interrupt.
    fn next_bytes(&mut self, before_interrupt: u64) -> Next {
        match self.parts.front_mut() {
            None => Next::End,
            // Handled before, where the connection is at hand.
            Some(Part::Close | Part::Hang) => Next::Later,
            Some(Part::Tokens { left: 0, .. } | Part::Text { left: 0, .. }) => {
                self.parts.pop_front();
                Next::Later
            }
            Some(Part::Bytes(bytes)) => {
                let bytes = std::mem::take(bytes);
                self.parts.pop_front();
                Next::Bytes(bytes)
            }
            Some(Part::Text { frames, left }) => {
                let (bytes, taken) = frames.take(*left);
                *left -= taken;
                Next::Bytes(bytes)
            }
            Some(Part::Tokens { frames, left }) => {
                let count = if self.pace.has_token_delay() {
                    if Instant::now() < self.due {
                        self.sleep = Some(Box::pin(sleep_until(self.due)));
                        return Next::Later;
                    }
                    self.due += self.pace.next_token();
                    1
                } else {
                    before_interrupt
                };
                let (bytes, taken) = frames.take(count.min(*left));
                *left -= taken;
                self.sent_tokens += taken;
                if let Some(active) = self.active.as_mut() {
                    active.sent(taken);
                }
                Next::Bytes(bytes)
            }
        }
    }

    fn end(&mut self) {
        self.interrupts.clear();
        if let Some(active) = self.active.take() {
            active.done();
        }
    }
}

/// A fault ended the body early.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("answer cut by a fault")]
pub(crate) struct Cut;

/// The body of any response of this server.
#[derive(Debug)]
pub(crate) enum Body {
    Full(Full<Bytes>),
    Generation(Box<Generation>),
}

impl Body {
    pub(crate) fn full(bytes: impl Into<Bytes>) -> Self {
        Self::Full(Full::new(bytes.into()))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match self.get_mut() {
            Self::Full(full) => Pin::new(full).poll_frame(context).map_err(|never| match never {}),
            Self::Generation(generation) => {
                let bytes = ready!(generation.poll_bytes(context));
                if let (Some(Ok(bytes)), Some(left)) = (&bytes, generation.left_bytes.as_mut()) {
                    *left = left.saturating_sub(bytes.len() as u64);
                }
                Poll::Ready(bytes.map(|bytes| bytes.map(Frame::data)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(full) => full.is_end_stream(),
            Self::Generation(generation) => generation.active.is_none() && !generation.lingers,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(full) => full.size_hint(),
            Self::Generation(generation) => {
                generation.left_bytes.map_or_else(SizeHint::default, SizeHint::with_exact)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> Vec<Bytes> {
        ["a", "bb", "ccc"].map(Bytes::from_static_str).to_vec()
    }

    trait FromStaticStr {
        fn from_static_str(text: &'static str) -> Self;
    }

    impl FromStaticStr for Bytes {
        fn from_static_str(text: &'static str) -> Self {
            Self::from_static(text.as_bytes())
        }
    }

    fn all(mut frames: Frames, count: u64, step: u64) -> String {
        let (mut text, mut left) = (String::new(), count);
        while left > 0 {
            let (bytes, taken) = frames.take(step.min(left));
            assert!(taken >= 1 && taken <= step);
            text.push_str(std::str::from_utf8(&bytes).unwrap());
            left -= taken;
        }
        text
    }

    #[test]
    fn fixed_frames_do_not_depend_on_how_they_are_taken() {
        let count = 100_000;
        let frames = || Frames::fixed(count, &words(), "<", ">");
        let one_by_one = all(frames(), count, 1);
        assert!(one_by_one.starts_with("<a><bb><ccc><a>"));
        assert_eq!(one_by_one, all(frames(), count, u64::MAX));
        assert_eq!(one_by_one.len() as u64, frames().len(count).unwrap());
        assert_eq!(Frames::fixed(2, &words(), "<", ">").len(2), Some(7));
    }

    #[test]
    fn numbered_frames_count_up() {
        let frames = Frames::numbered(words(), "<".into(), ":".into(), ">".into(), 4);
        assert_eq!(all(frames, 4, 3), "<a:4><bb:5><ccc:6><a:7>");
    }
}
