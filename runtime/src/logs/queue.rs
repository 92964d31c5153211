//! A bounded queue of log lines, and the one thread that writes them.
//!
//! Invariants: [`Queue::push`] never waits for the sink and never fails. Every line is either written completely or
//! counted as lost, once. Lines keep their order. A loss is reported at its place among the lines.
//!
//! tracing-appender's `NonBlocking` is no replacement: its queue is bounded in lines but not in bytes, a line that
//! cannot be written is lost without being counted or reported, and its guard uses `println!` when the writer hangs,
//! which panics or hangs in turn.

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;

use super::{Form, Value, beginning, line};

/// The maximum of queued lines.
const LINES_MAX: usize = 8192;
/// The maximum of queued bytes: as much as [`LINES_MAX`] lines of requests, which are about 500 bytes each. The
/// writer may hold as much again, so the log takes at most 8 MiB.
const BYTES_MAX: usize = 4 << 20;
/// The longest line, bytes. A longer one is cut.
const LINE_MAX_BYTES: usize = 64 << 10;
/// The bytes that are kept of a line that is too long. As a text inside another line they may take six times as much.
const CUT_TO_BYTES: usize = 8 << 10;
/// One write takes complete lines of up to this number of bytes. A pipe takes so much in one piece (`PIPE_BUF`), so
/// that lines of several processes on one pipe do not mix.
const WRITE_MAX_BYTES: usize = 4096;
/// After a write the writer lets lines gather for this time. Otherwise the serving threads would wake it for every
/// line.
const GATHER: Duration = Duration::from_millis(5);
/// The pause after which a sink that takes nothing without blocking (`O_NONBLOCK`) is tried again.
const RETRY_WOULD_BLOCK: Duration = Duration::from_millis(10);
/// The interval at which a broken sink is offered the count of lost lines while nothing else is logged.
const RETRY_REPORT: Duration = Duration::from_secs(1);

/// The queue; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Queue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Wakes the writer.
    wake: Condvar,
    /// Wakes the callers of [`Queue::flush`].
    settled: Condvar,
    form: Form,
    lost: Counter,
}

#[derive(Debug)]
struct State {
    waiting: Batch,
    /// The number of lines taken into the queue.
    pushed: u64,
    /// The number of these lines that the writer has written or given up.
    settled: u64,
    writer: Activity,
    /// Whether a caller waits for the log to be written, so that the writer does not gather lines.
    force: bool,
}

/// The state of the writer. It is woken only if it would not see a line in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activity {
    /// It sleeps until there is a line.
    Waiting,
    /// It checks by itself within [`GATHER`].
    Gathering,
    /// It checks after it has written what it holds.
    Writing,
}

/// Consecutive lines.
#[derive(Debug)]
struct Batch {
    text: Vec<u8>,
    /// The end of each line in `text`.
    ends: Vec<usize>,
    /// Lines that came after these and were dropped for lack of room.
    lost: u64,
}

impl Batch {
    /// All room is reserved at the start: the system provides memory as it is used, and nothing is moved while others
    /// wait.
    fn new() -> Self {
        Self { text: Vec::with_capacity(BYTES_MAX), ends: Vec::with_capacity(LINES_MAX), lost: 0 }
    }

    fn push(&mut self, line: &[u8]) -> bool {
        // After the first dropped line, all lines are dropped until the writer has come. So there is one gap, and it
        // is reported at its place.
        let room = self.lost == 0 && self.ends.len() < LINES_MAX && line.len() <= BYTES_MAX - self.text.len();
        if room {
            self.text.extend_from_slice(line);
            self.ends.push(self.text.len());
        } else {
            self.lost += 1;
        }
        room
    }

    fn is_empty(&self) -> bool {
        self.ends.is_empty() && self.lost == 0
    }

    fn half_full(&self) -> bool {
        self.ends.len() >= LINES_MAX / 2 || self.text.len() >= BYTES_MAX / 2
    }

    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
        self.lost = 0;
    }
}

impl Queue {
    /// Starts the thread that writes to `sink`. `lost` counts unwritten lines.
    pub(super) fn start(sink: Box<dyn Write + Send>, form: Form, lost: Counter) -> io::Result<Self> {
        let state =
            State { waiting: Batch::new(), pushed: 0, settled: 0, writer: Activity::Gathering, force: false };
        let queue = Self(Arc::new(Inner {
            state: Mutex::new(state),
            wake: Condvar::new(),
            settled: Condvar::new(),
            form,
            lost,
        }));
        let writer = Writer { queue: queue.clone(), sink, unreported: 0, torn: false };
        std::thread::Builder::new().name("weir-log".into()).spawn(move || writer.run())?;
        Ok(queue)
    }

    /// The form of lines.
    pub(super) fn form(&self) -> Form {
        self.0.form
    }

    /// Takes a line, which ends with a newline, or drops and counts it. It waits only for other threads that copy a
    /// line in or take lines out.
    pub(super) fn push(&self, line: &[u8]) {
        let line = self.within_bounds(line);
        let mut state = self.state();
        if !state.waiting.push(&line) {
            drop(state);
            self.0.lost.inc();
            return;
        }
        state.pushed += 1;
        let wake = match state.writer {
            Activity::Waiting => true,
            Activity::Gathering => state.waiting.half_full(),
            Activity::Writing => false,
        };
        drop(state);
        if wake {
            self.0.wake.notify_one();
        }
    }

    /// Returns when all earlier lines are written or given up, or after `timeout`.
    #[expect(clippy::disallowed_methods, reason = "a thread waits here, and no runtime may be left")]
    pub(super) fn flush(&self, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut state = self.state();
        let target = state.pushed;
        while state.settled < target {
            state.force = true;
            self.0.wake.notify_one();
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.0.settled.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The line, or the kept part of one that is too long.
    fn within_bounds<'a>(&self, text: &'a [u8]) -> Cow<'a, [u8]> {
        if text.len() <= LINE_MAX_BYTES {
            return Cow::Borrowed(text);
        }
        // The beginning of a JSON line is not JSON, so it becomes a text in a line of its own.
        let kept = String::from_utf8_lossy(&text[..CUT_TO_BYTES]);
        let kept = beginning(&kept, CUT_TO_BYTES).trim_end_matches(char::REPLACEMENT_CHARACTER);
        let fields = [("line_bytes", Value::Number(text.len() as u64)), ("line", Value::Text(kept))];
        let cut = line(self.0.form, "WARN", "weir_runtime::logs", "a log line was cut", &fields);
        Cow::Owned(cut.into_bytes())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing can panic under this lock, so that the panic hook may take it.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state of the thread.
struct Writer {
    queue: Queue,
    sink: Box<dyn Write + Send>,
    /// Lost lines that are not reported in the log.
    unreported: u64,
    /// Whether the last written byte is inside a line.
    torn: bool,
}

impl Writer {
    fn run(mut self) {
        let mut batch = Batch::new();
        loop {
            self.next(&mut batch);
            self.write(&batch);
            self.unreported += batch.lost;
            if self.unreported > 0 {
                self.report();
            }
            let mut state = self.queue.state();
            state.settled += batch.ends.len() as u64;
            state.writer = Activity::Gathering;
            self.queue.0.settled.notify_all();
            let gather = |state: &mut State| !state.force && !state.waiting.half_full();
            let gathered = self.queue.0.wake.wait_timeout_while(state, GATHER, gather);
            drop(gathered.unwrap_or_else(PoisonError::into_inner));
            batch.clear();
        }
    }

    /// Takes the queued lines as soon as there are some. Also returns without lines, when there is a loss to report.
    fn next(&mut self, batch: &mut Batch) {
        let mut state = self.queue.state();
        if state.waiting.is_empty() {
            state.force = false;
            state.writer = Activity::Waiting;
            let empty = |state: &mut State| state.waiting.is_empty();
            let wake = &self.queue.0.wake;
            state = if self.unreported > 0 {
                wake.wait_timeout_while(state, RETRY_REPORT, empty).unwrap_or_else(PoisonError::into_inner).0
            } else {
                wake.wait_while(state, empty).unwrap_or_else(PoisonError::into_inner)
            };
        }
        state.writer = Activity::Writing;
        std::mem::swap(&mut state.waiting, batch);
    }

    /// Writes each line or gives it up.
    fn write(&mut self, batch: &Batch) {
        let ends = &batch.ends;
        // The first line that is neither written nor given up, and the first unwritten byte.
        let (mut next, mut at) = (0, 0);
        while next < ends.len() {
            // A loss is reported before the lines that follow it. A sink that does not take the report takes no line
            // either.
            let begun = at > next.checked_sub(1).map_or(0, |before| ends[before]);
            if self.unreported > 0 && !begun && !self.report() {
                self.give_up();
                (next, at) = (next + 1, ends[next]);
                continue;
            }
            let fitting = ends[next..].partition_point(|end| end - at <= WRITE_MAX_BYTES).max(1);
            match self.put(&batch.text[at..ends[next + fitting - 1]]) {
                Ok(written) => {
                    at += written;
                    next += ends[next..].partition_point(|end| *end <= at);
                    self.torn = next.checked_sub(1).map_or(0, |before| ends[before]) < at;
                }
                Err(_) => {
                    self.give_up();
                    (next, at) = (next + 1, ends[next]);
                }
            }
        }
    }

    fn give_up(&mut self) {
        self.unreported += 1;
        self.queue.0.lost.inc();
    }

    /// Reports the number of lost lines. Returns whether it was written.
    fn report(&mut self) -> bool {
        let fields = [("lost", Value::Number(self.unreported))];
        let text = line(self.queue.form(), "WARN", "weir_runtime::logs", "log lines were lost", &fields);
        // An incomplete line stays incomplete, but the next one starts on a line of its own.
        let text = if self.torn { format!("\n{text}") } else { text };
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            match self.put(rest) {
                Ok(written) => {
                    rest = &rest[written..];
                    self.torn = !rest.is_empty();
                }
                Err(_) => return false,
            }
        }
        self.unreported = 0;
        true
    }

    /// One write of at least one byte. Only this waits for the sink.
    fn put(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.sink.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    std::thread::park_timeout(RETRY_WOULD_BLOCK);
                }
                done => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests;
