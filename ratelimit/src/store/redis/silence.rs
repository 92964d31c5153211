//! For how long the server has said nothing, in the time in which this process was able to listen.
//!
//! After a timeout it is not known which side was slow. In a process that gets too little CPU answers lie unread in
//! the sockets while timers expire. If that counted as silence, the gateway would decide alone and admit what the
//! store refuses. So a task that wants to run every ten milliseconds counts how often it did.
//!
//! One call that is late says little as long as others are answered. What counts is that calls wait and nothing at
//! all is heard.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The interval at which the clock wants to run.
const TICK: Duration = Duration::from_millis(10);
/// A run that is later than that counts as one tick, however late it is.
const LATE: Duration = Duration::from_millis(15);
/// The time that every call has, however long the server has been silent before: somebody must find out that it is
/// back.
const CALL_MIN: Duration = Duration::from_millis(50);

/// A clock that stands while the process does not run. Reading it costs a few atomic loads.
#[derive(Debug)]
struct Awake {
    born: Instant,
    /// When the task last ran, and the time counted until then, in microseconds.
    last_tick: AtomicU64,
    counted: AtomicU64,
}

impl Awake {
    fn since_birth(&self) -> u64 {
        micros(self.born.elapsed())
    }

    fn now(&self) -> u64 {
        let counted = self.counted.load(Ordering::Relaxed);
        counted + self.since_birth().saturating_sub(self.last_tick.load(Ordering::Relaxed)).min(micros(TICK))
    }

    async fn run(&self) {
        loop {
            let since = self.since_birth();
            self.last_tick.store(since, Ordering::Relaxed);
            tokio::time::sleep(TICK).await;
            let took = self.since_birth().saturating_sub(since);
            let counts = if took > micros(TICK + LATE) { micros(TICK) } else { took };
            self.counted.fetch_add(counts, Ordering::Relaxed);
        }
    }
}

/// Watches for silence.
#[derive(Debug)]
pub(super) struct Silence {
    awake: Awake,
    /// The silence after which the server counts as away.
    longest: Duration,
    /// The longest time of one call while others are answered.
    call_max: Duration,
    /// Calls without an answer yet.
    waiting: AtomicU64,
    /// Since when nothing was heard although calls waited, in microseconds of the clock; zero if none waits.
    since: AtomicU64,
}

/// A call that waits. Once it has ended, nothing is left to hear; a silence that counts goes on without calls.
struct Waiting<'a>(&'a Silence);

impl Silence {
    pub(super) fn new(longest: Duration, call_max: Duration) -> Arc<Self> {
        Arc::new(Self {
            awake: Awake { born: Instant::now(), last_tick: AtomicU64::new(0), counted: AtomicU64::new(0) },
            longest,
            call_max,
            waiting: AtomicU64::new(0),
            since: AtomicU64::new(0),
        })
    }

    /// The silence after which the server counts as away.
    pub(super) const fn longest(&self) -> Duration {
        self.longest
    }

    /// Runs the clock for ever.
    pub(super) async fn run(&self) {
        self.awake.run().await;
    }

    /// Records a sign of life beside the answers of calls.
    pub(super) fn heard(&self) {
        let waits = self.waiting.load(Ordering::Relaxed) > 0;
        self.since.store(if waits { self.awake.now().max(1) } else { 0 }, Ordering::Relaxed);
    }

    /// Waits for an answer. `None` after the longest silence of the server, or if this answer alone is far too late.
    pub(super) async fn within<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        let asked = self.awake.now().max(1);
        let waiting = self.begin(asked);
        let mut answer = std::pin::pin!(answer);
        loop {
            let left = self.left(asked);
            if left.is_zero() {
                return None;
            }
            if let Ok(answer) = tokio::time::timeout(left, &mut answer).await {
                drop(waiting);
                self.heard();
                return Some(answer);
            }
        }
    }

    /// How long a call that was sent at `asked` still waits.
    fn left(&self, asked: u64) -> Duration {
        let since = match self.since.load(Ordering::Relaxed) {
            0 => asked,
            since => since,
        };
        let now = self.awake.now();
        let silent = (since + micros(self.longest)).max(asked + micros(CALL_MIN));
        let until = silent.min(asked + micros(self.call_max));
        Duration::from_micros(until.saturating_sub(now))
    }

    fn begin(&self, now: u64) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Only the first of several calls begins a silence.
        let _ = self.since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        Waiting(self)
    }

    /// Whether the server has been silent for the longest time.
    pub(super) fn is_over(&self) -> bool {
        let since = self.since.load(Ordering::Relaxed);
        since != 0 && self.awake.now() >= since + micros(self.longest)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.0.waiting.fetch_sub(1, Ordering::Relaxed) == 1 && !self.0.is_over() {
            self.0.since.store(0, Ordering::Relaxed);
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{advance, sleep};

    use super::*;

    const LONGEST: Duration = Duration::from_secs(1);
    const CALL_MAX: Duration = Duration::from_secs(3);

    fn watched() -> Arc<Silence> {
        let silence = Silence::new(LONGEST, CALL_MAX);
        // Ends with the test's runtime.
        tokio::spawn({
            let silence = silence.clone();
            async move { silence.run().await }
        });
        silence
    }

    /// A call without an answer: for how long it waits.
    async fn unanswered(silence: &Silence) -> Duration {
        let began = Instant::now();
        assert_eq!(silence.within(pending::<()>()).await, None);
        began.elapsed()
    }

    fn about(expected: Duration, found: Duration) {
        let off = expected.abs_diff(found);
        assert!(off <= 3 * TICK, "{found:?} and not {expected:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn all_calls_end_with_the_silence_and_later_ones_soon() {
        let silence = watched();
        let early = tokio::spawn({
            let silence = silence.clone();
            async move { unanswered(&silence).await }
        });
        sleep(Duration::from_millis(800)).await;
        about(Duration::from_millis(200), unanswered(&silence).await);
        about(LONGEST, early.await.expect("ended"));
        about(CALL_MIN, unanswered(&silence).await);
        assert_eq!(silence.within(async { 7 }).await, Some(7));
        about(LONGEST, unanswered(&silence).await);
        silence.heard();
        about(LONGEST, unanswered(&silence).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_waits_while_others_are_answered_but_not_for_ever() {
        let silence = watched();
        let late = tokio::spawn({
            let silence = silence.clone();
            async move { unanswered(&silence).await }
        });
        for _ in 0..40 {
            sleep(Duration::from_millis(100)).await;
            assert_eq!(silence.within(async { 7 }).await, Some(7));
        }
        about(CALL_MAX, late.await.expect("ended"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_leaves_leaves_no_silence_behind() {
        let silence = watched();
        let left = tokio::time::timeout(LONGEST / 2, silence.within(pending::<()>())).await;
        assert!(left.is_err());
        sleep(10 * LONGEST).await;
        about(LONGEST, unanswered(&silence).await);
        // Callers that leave one after the other show the silence all the same.
        silence.heard();
        let first = tokio::spawn({
            let silence = silence.clone();
            async move { tokio::time::timeout(Duration::from_millis(600), unanswered(&silence)).await.is_err() }
        });
        sleep(Duration::from_millis(500)).await;
        about(LONGEST / 2, unanswered(&silence).await);
        assert!(first.await.expect("ended"));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_process_did_not_run_is_no_silence() {
        let silence = watched();
        let call = tokio::spawn({
            let silence = silence.clone();
            async move { unanswered(&silence).await }
        });
        tokio::task::yield_now().await;
        for _ in 0..50 {
            advance(Duration::from_millis(80)).await;
            tokio::task::yield_now().await;
        }
        assert!(!call.is_finished(), "50 ticks in four seconds are half a second");
        assert!(call.await.expect("ended") < Duration::from_secs(4) + LONGEST);
    }
}
