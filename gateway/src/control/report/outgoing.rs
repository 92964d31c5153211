//! The unsent part of the reports of one stream. Unsent observations are merged: counts are added, the latest state wins.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use weir_proto::v1::{BackendReport, LimitReport, ProbeResult, TrafficReport};

/// Unsent probe results; beyond this the oldest are dropped.
const RESULTS_MAX: usize = 4096;

/// The observations of one report interval.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Observed {
    pub(super) backends: Vec<BackendReport>,
    pub(super) results: Vec<ProbeResult>,
    pub(super) traffic: Option<TrafficReport>,
    pub(super) limits: Vec<LimitReport>,
}

/// The unsent observations of one stream. Bounded by the number of backends and of results.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// `None` without a stream, because observations are outdated when it is open again.
    waiting: Mutex<Option<Waiting>>,
    filled: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// By backend name.
    backends: BTreeMap<String, BackendReport>,
    results: Vec<ProbeResult>,
    traffic: Option<TrafficReport>,
    limits: Vec<LimitReport>,
    any: bool,
}

impl Outgoing {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self) {
        *self.waiting() = Some(Waiting::default());
    }

    pub(super) fn close(&self) {
        *self.waiting() = None;
    }

    pub(super) fn is_open(&self) -> bool {
        self.waiting().is_some()
    }

    /// Adds observations if the stream is open.
    pub(super) fn add(&self, observed: &Observed) {
        let mut stream = self.waiting();
        let Some(waiting) = &mut *stream else { return };
        let mut before = std::mem::take(&mut waiting.backends);
        // Deleted backends are not reported.
        for new in &observed.backends {
            let merged = match before.remove(&new.backend) {
                Some(old) => merge(&old, new),
                None => new.clone(),
            };
            waiting.backends.insert(new.backend.clone(), merged);
        }
        waiting.results.extend_from_slice(&observed.results);
        let surplus = waiting.results.len().saturating_sub(RESULTS_MAX);
        waiting.results.drain(..surplus);
        waiting.traffic = match (waiting.traffic.take(), &observed.traffic) {
            (Some(old), Some(new)) => Some(add_up(&old, new)),
            (old, new) => new.or(old),
        };
        let old = std::mem::replace(&mut waiting.limits, observed.limits.clone());
        for limit in &mut waiting.limits {
            let same = |old: &&LimitReport| {
                (&old.scope_kind, &old.scope, &old.kind) == (&limit.scope_kind, &limit.scope, &limit.kind)
            };
            if let Some(old) = old.iter().find(same) {
                limit.refusals += old.refusals;
                limit.consumed = limit.consumed.saturating_add(old.consumed);
            }
        }
        waiting.any = true;
        drop(stream);
        self.filled.notify_one();
    }

    /// Returns when there are unsent observations. Cancel-safe.
    pub(super) async fn filled(&self) {
        loop {
            if self.waiting().as_ref().is_some_and(|waiting| waiting.any) {
                return;
            }
            self.filled.notified().await;
        }
    }

    /// Takes the unsent observations.
    pub(super) fn take(&self) -> Option<Observed> {
        let mut stream = self.waiting();
        let waiting = stream.as_mut().filter(|waiting| waiting.any)?;
        let taken = std::mem::take(waiting);
        Some(Observed {
            backends: taken.backends.into_values().collect(),
            results: taken.results,
            traffic: taken.traffic,
            limits: taken.limits,
        })
    }
}

fn add_up(old: &TrafficReport, new: &TrafficReport) -> TrafficReport {
    TrafficReport {
        succeeded: old.succeeded + new.succeeded,
        rate_limited: old.rate_limited + new.rate_limited,
        client_errors: old.client_errors + new.client_errors,
        server_errors: old.server_errors + new.server_errors,
        cancelled: old.cancelled + new.cancelled,
        in_flight: new.in_flight,
        input_tokens: old.input_tokens + new.input_tokens,
        output_tokens: old.output_tokens + new.output_tokens,
    }
}

fn merge(old: &BackendReport, new: &BackendReport) -> BackendReport {
    let mut first_byte_counts = new.first_byte_counts.clone();
    first_byte_counts.resize(first_byte_counts.len().max(old.first_byte_counts.len()), 0);
    first_byte_counts.iter_mut().zip(&old.first_byte_counts).for_each(|(new, old)| *new += old);
    let sum = |a: Option<prost_types::Duration>, b: Option<prost_types::Duration>| match (a, b) {
        (Some(a), Some(b)) => {
            let nanos = i64::from(a.nanos) + i64::from(b.nanos);
            let seconds = a.seconds.saturating_add(b.seconds).saturating_add(nanos / 1_000_000_000);
            Some(prost_types::Duration { seconds, nanos: (nanos % 1_000_000_000) as i32 })
        }
        (a, b) => a.or(b),
    };
    BackendReport {
        successes: old.successes + new.successes,
        connect_failures: old.connect_failures + new.connect_failures,
        server_errors: old.server_errors + new.server_errors,
        timeouts: old.timeouts + new.timeouts,
        busy: old.busy + new.busy,
        answering: old.answering || new.answering,
        suspected_failures: old.suspected_failures + new.suspected_failures,
        // Of two means the newer one is kept.
        first_byte_mean: new.first_byte_mean.or(old.first_byte_mean),
        output_tokens: old.output_tokens + new.output_tokens,
        decode_time: sum(old.decode_time, new.decode_time),
        timed_answers: old.timed_answers + new.timed_answers,
        first_byte_counts,
        ..new.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(successes: u64, in_flight: u32, results: usize) -> Observed {
        let decode_time = Some(prost_types::Duration { seconds: 1, nanos: 600_000_000 });
        let backend =
            BackendReport { backend: "b".into(), successes, in_flight, decode_time, ..Default::default() };
        Observed {
            backends: vec![backend],
            results: vec![ProbeResult::default(); results],
            ..Observed::default()
        }
    }

    #[test]
    fn what_waits_is_merged_and_bounded_and_goes_with_the_lane() {
        let stream = Outgoing::default();
        stream.add(&observed(1, 1, 1));
        assert!(!stream.is_open() && stream.take().is_none(), "nothing waits for a stream that is away");
        stream.open();
        assert!(stream.take().is_none());
        stream.add(&observed(2, 5, 1));
        stream.add(&observed(3, 4, RESULTS_MAX));
        let taken = stream.take().unwrap();
        assert_eq!((taken.backends[0].successes, taken.backends[0].in_flight), (5, 4));
        let decode = prost_types::Duration { seconds: 3, nanos: 200_000_000 };
        assert_eq!((taken.backends[0].decode_time, taken.results.len()), (Some(decode), RESULTS_MAX));
        assert!(stream.take().is_none());
        stream.add(&observed(1, 1, 0));
        stream.add(&Observed::default());
        assert_eq!(stream.take(), Some(Observed::default()), "a backend that is gone is not reported");
        stream.add(&observed(1, 1, 0));
        stream.close();
        stream.open();
        assert!(stream.take().is_none());
    }
}
