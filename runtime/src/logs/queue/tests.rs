use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::time::Instant;

use super::*;

/// Long enough for a busy machine. No test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// The result of one write.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Takes all bytes.
    Take,
    /// Takes this number of bytes.
    TakePart(usize),
    /// Fails.
    Fail(io::ErrorKind),
}

#[derive(Debug, Default)]
struct Seen {
    written: Vec<u8>,
    writes: Vec<usize>,
    /// The results of the next writes; the last one holds for all later writes.
    script: VecDeque<Act>,
    broken: Option<io::ErrorKind>,
}

/// A sink whose results a test decides.
#[derive(Debug, Clone, Default)]
struct Sink(Arc<Mutex<Seen>>);

impl Sink {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().expect("no panic")
    }

    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.seen().written.clone()).expect("UTF-8").lines().map(str::to_owned).collect()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut seen = self.seen();
        let broken = seen.broken;
        let act = seen.script.pop_front().unwrap_or(broken.map_or(Act::Take, Act::Fail));
        let taken = match act {
            Act::Take => bytes.len(),
            Act::TakePart(part) => part.min(bytes.len()),
            Act::Fail(kind) => return Err(kind.into()),
        };
        seen.written.extend_from_slice(&bytes[..taken]);
        seen.writes.push(taken);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A sink with a stopped reader: each write reports its start and hangs until the test lets it continue.
struct Stopped {
    inner: Sink,
    here: Sender<()>,
    go: Receiver<()>,
}

impl Write for Stopped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.here.send(());
        // After the test has dropped its end, nothing hangs any more.
        let _ = self.go.recv();
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn queue(sink: impl Write + Send + 'static) -> (Queue, Counter) {
    let lost = Counter::default();
    (Queue::start(Box::new(sink), Form::Json, lost.clone()).expect("a thread"), lost)
}

fn push(queue: &Queue, number: usize) {
    queue.push(format!("line {number}\n").as_bytes());
}

fn json(line: &str) -> serde_json::Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}): {line:?}"))
}

#[test]
fn lines_arrive_whole_and_in_order() {
    let sink = Sink::default();
    let (queue, lost) = queue(sink.clone());
    for number in 0..5000 {
        push(&queue, number);
    }
    queue.flush(PATIENCE);
    let wanted: Vec<String> = (0..5000).map(|number| format!("line {number}")).collect();
    assert_eq!(sink.lines(), wanted);
    assert_eq!(lost.get(), 0);
    let largest = sink.seen().writes.iter().copied().max();
    assert!(largest.is_some_and(|bytes| bytes <= WRITE_MAX_BYTES), "{largest:?}");
}

#[test]
fn a_stopped_reader_keeps_nobody_waiting_and_takes_no_more_than_the_bound() {
    for (what, line_bytes) in [("bounded by lines", 20), ("bounded by bytes", 5000)] {
        let (here, is_here) = channel();
        let (go, gone_on) = channel();
        let sink = Sink::default();
        let (queue, lost) = queue(Stopped { inner: sink.clone(), here, go: gone_on });
        push(&queue, 0);
        is_here.recv_timeout(PATIENCE).expect("it writes the first line");
        // From here on the writer hangs; all of these calls return.
        let count = 3 * LINES_MAX;
        for number in 1..=count {
            queue.push(format!("line {number} {:1$}\n", "", line_bytes).as_bytes());
        }
        let (waiting, bytes) = {
            let state = queue.state();
            assert!(state.waiting.text.capacity() <= BYTES_MAX, "{what}");
            assert!(state.waiting.ends.capacity() <= LINES_MAX, "{what}");
            (state.waiting.ends.len(), state.waiting.text.len())
        };
        assert!(waiting == LINES_MAX || bytes > BYTES_MAX - line_bytes - 20, "{what}: {waiting}, {bytes}");
        assert_eq!(lost.get() as usize, count - waiting, "{what}");

        drop(go);
        queue.flush(PATIENCE);
        push(&queue, count + 1);
        queue.flush(PATIENCE);
        let lines = sink.lines();
        assert_eq!(lines.len(), 1 + waiting + 2, "{what}");
        for (number, line) in lines[..=waiting].iter().enumerate() {
            assert_eq!(line.split(' ').nth(1), Some(number.to_string().as_str()), "{what}");
        }
        let report = json(&lines[waiting + 1]);
        assert_eq!(report["message"], "log lines were lost", "{what}");
        assert_eq!((&report["level"], &report["lost"]), (&"WARN".into(), &lost.get().into()), "{what}");
        assert_eq!(lines[waiting + 2], format!("line {}", count + 1), "{what}");
    }
}

#[test]
fn a_flush_gives_up_on_a_stopped_reader_in_time() {
    let (here, is_here) = channel();
    let (go, gone_on) = channel();
    let (queue, _) = queue(Stopped { inner: Sink::default(), here, go: gone_on });
    push(&queue, 0);
    is_here.recv_timeout(PATIENCE).expect("it writes");
    let started = Instant::now();
    queue.flush(Duration::from_millis(50));
    assert!(started.elapsed() >= Duration::from_millis(50));
    drop(go);
    queue.flush(PATIENCE);
}

#[test]
fn a_sink_that_fails_loses_counted_lines_and_tells_of_them_once_it_works() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::BrokenPipe, io::ErrorKind::Other] {
        let sink = Sink::default();
        let (queue, lost) = queue(sink.clone());
        push(&queue, 0);
        queue.flush(PATIENCE);
        sink.seen().broken = Some(kind);
        for number in 1..=300 {
            push(&queue, number);
            if number % 7 == 0 {
                queue.flush(PATIENCE);
            }
        }
        queue.flush(PATIENCE);
        assert_eq!(lost.get(), 300, "{kind}");
        assert_eq!(sink.lines(), ["line 0"], "{kind}");
        sink.seen().broken = None;
        push(&queue, 301);
        queue.flush(PATIENCE);
        let lines = sink.lines();
        assert_eq!(lines.len(), 3, "{kind}: {lines:?}");
        assert_eq!(json(&lines[1])["lost"], 300, "{kind}");
        assert_eq!(lines[2], "line 301", "{kind}");
        assert_eq!(lost.get(), 300, "{kind}");
    }
}

#[test]
fn a_loss_is_told_though_nothing_else_is_logged() {
    let sink = Sink::default();
    let (queue, lost) = queue(sink.clone());
    sink.seen().broken = Some(io::ErrorKind::StorageFull);
    push(&queue, 0);
    queue.flush(PATIENCE);
    assert_eq!(lost.get(), 1);
    sink.seen().broken = None;
    let started = Instant::now();
    while sink.lines().is_empty() {
        assert!(started.elapsed() < PATIENCE, "nothing was told");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    assert_eq!(json(&sink.lines()[0])["lost"], 1);
}

#[test]
fn what_follows_half_a_line_begins_on_its_own() {
    let sink = Sink::default();
    sink.seen().script = [
        Act::TakePart(4),
        Act::Fail(io::ErrorKind::StorageFull),
        // Half of the report as well.
        Act::TakePart(3),
        Act::Fail(io::ErrorKind::StorageFull),
    ]
    .into();
    let (queue, lost) = queue(sink.clone());
    for number in 0..3 {
        push(&queue, number);
        queue.flush(PATIENCE);
    }
    let lines = sink.lines();
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert_eq!(lines[0], "line");
    assert_eq!(lines[1], "{\"");
    assert_eq!(json(&lines[2])["lost"], lost.get());
    assert_eq!((lines[3].as_str(), lines[4].as_str()), ("line 1", "line 2"));
}

#[test]
fn an_interrupted_or_reluctant_write_is_made_again() {
    let sink = Sink::default();
    sink.seen().script = [
        Act::Fail(io::ErrorKind::Interrupted),
        Act::TakePart(2),
        Act::Fail(io::ErrorKind::WouldBlock),
        Act::TakePart(1),
        Act::Fail(io::ErrorKind::WouldBlock),
    ]
    .into();
    let (queue, lost) = queue(sink.clone());
    push(&queue, 0);
    push(&queue, 1);
    queue.flush(PATIENCE);
    assert_eq!(sink.lines(), ["line 0", "line 1"]);
    assert_eq!(lost.get(), 0);
}

#[test]
fn a_line_beyond_the_bound_is_cut_and_still_a_line() {
    for form in [Form::Json, Form::Text] {
        let sink = Sink::default();
        let queue = Queue::start(Box::new(sink.clone()), form, Counter::default()).expect("a thread");
        // Two bytes each, from an odd position on, so the cut is inside one of them.
        let huge = format!("x{}\n", "ü\"".repeat(10 << 20));
        queue.push(huge.as_bytes());
        push(&queue, 1);
        queue.flush(PATIENCE);
        let lines = sink.lines();
        assert_eq!(lines.len(), 2, "{form:?}");
        assert!(lines[0].len() <= LINE_MAX_BYTES, "{form:?}: {}", lines[0].len());
        assert_eq!(lines[1], "line 1");
        if form == Form::Json {
            let cut = json(&lines[0]);
            assert_eq!(cut["line_bytes"], huge.len());
            let kept = cut["line"].as_str().expect("a text");
            assert!(huge.starts_with(kept) && kept.len() > CUT_TO_BYTES - 4, "{}", kept.len());
        }
    }
}

/// Whatever the sink does, a line is written completely or counted, and the reports add up.
#[test]
fn every_line_is_written_or_counted_whatever_the_sink_does() {
    for seed in 1..300_u64 {
        let mut state = seed;
        let mut random = move |below: usize| {
            // The generator of Numerical Recipes; its upper bits are good enough.
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let sink = Sink::default();
        let acts = (0..random(200)).map(|_| match random(5) {
            0 => Act::Take,
            1 | 2 => Act::TakePart(1 + random(30)),
            3 => Act::Fail(io::ErrorKind::StorageFull),
            _ => Act::Fail(io::ErrorKind::Interrupted),
        });
        sink.seen().script = acts.collect();
        let (queue, lost) = queue(sink.clone());
        let count = 1 + random(100);
        for number in 0..count {
            queue.push(format!("line {number} end\n").as_bytes());
            if random(10) == 0 {
                queue.flush(PATIENCE);
            }
        }
        queue.flush(PATIENCE);
        // The script is over when the sink has taken this, so that all losses are reported.
        sink.seen().script.clear();
        queue.push(format!("line {count} end\n").as_bytes());
        queue.flush(PATIENCE);
        let (mut written, mut told) = (Vec::new(), 0);
        for line in sink.lines() {
            if let Ok(serde_json::Value::Object(report)) = serde_json::from_str(&line) {
                told += report["lost"].as_u64().expect("a number");
            } else if let Some(number) = line.strip_prefix("line ").and_then(|l| l.strip_suffix(" end")) {
                written.push(number.parse::<usize>().expect("a number"));
            }
        }
        assert!(written.is_sorted_by(|a, b| a < b), "seed {seed}: {written:?}");
        // A line that lacks only its newline counts as unwritten. A report is repeated, a line is lost.
        assert!(told >= lost.get(), "seed {seed}: {told}, {}", lost.get());
        assert!(written.len() + lost.get() as usize > count, "seed {seed}");
        assert_eq!(written.last(), Some(&count), "seed {seed}");
    }
}
