//! Takes a request's body within its bounds of size, time and memory.
//!
//! A body is held until its request ends, because it may have to be sent again. What all of them take together is
//! bounded too: ten thousand connections with a full body each would be 500 GiB. Answers that are not streamed are held
//! until the client has taken them, and count as well.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::{Instant, timeout_at};

use super::joined::Joined;
use crate::error::GatewayError;

/// So much of a body must come within [`BODY_TIMEOUT`], and a larger one at no lower speed.
const BODY_TIMEOUT_BYTES: usize = 16 << 20;
/// A body must come within so long, and each part of it within [`BODY_PART_TIMEOUT`].
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two parts of a body.
const BODY_PART_TIMEOUT: Duration = Duration::from_secs(10);

/// The memory that bodies of requests, and of answers that are not streamed, may take together.
#[derive(Debug)]
pub struct BodyMemory {
    used: AtomicUsize,
    max: usize,
    gauge: Gauge,
}

impl BodyMemory {
    /// With a bound in bytes; `gauge` shows what is in use.
    pub fn new(max: usize, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max, gauge })
    }

    /// Room for a body that nothing has come of yet.
    pub fn room(self: &Arc<Self>) -> Room {
        Room { memory: self.clone(), bytes: 0 }
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.max);
        // Relaxed: nothing else is published through this number.
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok();
        if taken {
            self.gauge.inc_by(bytes as i64);
        }
        taken
    }
}

/// Room that one body takes; given back on drop.
#[derive(Debug)]
pub struct Room {
    memory: Arc<BodyMemory>,
    bytes: usize,
}

impl Room {
    /// Takes room for so many bytes more.
    ///
    /// # Errors
    /// [`GatewayError::BodyMemory`] when all bodies together have all there is.
    pub fn grow(&mut self, bytes: usize) -> Result<(), GatewayError> {
        if !self.memory.take(bytes) {
            return Err(GatewayError::BodyMemory);
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.memory.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.memory.gauge.dec_by(self.bytes as i64);
    }
}

/// How long a body may have taken of which so many bytes have come: 60 s, and more as long as it comes as fast as it must.
fn time_for(bytes: usize) -> Duration {
    let beyond = bytes.saturating_sub(BODY_TIMEOUT_BYTES) as f64 / BODY_TIMEOUT_BYTES as f64;
    BODY_TIMEOUT + BODY_TIMEOUT.mul_f64(beyond)
}

/// Takes the body of at most `max` bytes; the room it needs is held as long as the second value lives.
///
/// # Errors
/// When it is encoded, larger than `max`, too slow, broken, or more than the memory for all bodies holds.
pub async fn take(
    memory: &Arc<BodyMemory>,
    max: usize,
    headers: &HeaderMap,
    mut body: Incoming,
) -> Result<(Bytes, Room), GatewayError> {
    if headers.get(header::CONTENT_ENCODING).is_some_and(|v| v != "identity") {
        return Err(GatewayError::UnsupportedEncoding);
    }
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    let too_large = GatewayError::BodyTooLarge { max: max as u64 };
    if announced.is_some_and(|n| n > max) {
        return Err(too_large);
    }
    let mut room = memory.room();
    let began = Instant::now();
    let mut taken = Joined::of(announced);
    loop {
        let by = (began + time_for(taken.len())).min(Instant::now() + BODY_PART_TIMEOUT);
        let Some(frame) = timeout_at(by, body.frame()).await.map_err(|_| GatewayError::BodyTimeout)? else {
            break;
        };
        let Ok(data) = frame.map_err(|_| GatewayError::BrokenBody)?.into_data() else { continue };
        if taken.len() + data.len() > max {
            return Err(too_large);
        }
        room.grow(data.len())?;
        taken.push(data);
    }
    Ok((taken.finish(), room))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_body_has_its_time_as_long_as_it_comes_fast_enough() {
        assert_eq!(time_for(0), Duration::from_secs(60));
        assert_eq!(time_for(16 << 20), Duration::from_secs(60));
        assert_eq!(time_for(48 << 20), Duration::from_secs(180));
        assert!(time_for(usize::MAX) > time_for(1 << 40), "no overflow");
    }

    #[test]
    fn room_is_bounded_over_all_bodies_and_given_back() {
        let memory = BodyMemory::new(100, Gauge::default());
        let room = || Room { memory: memory.clone(), bytes: 0 };
        let (mut one, mut other) = (room(), room());
        one.grow(60).expect("fits");
        other.grow(40).expect("fits exactly");
        assert!(matches!(other.grow(1), Err(GatewayError::BodyMemory)));
        assert!(matches!(other.grow(usize::MAX), Err(GatewayError::BodyMemory)), "no overflow");
        drop(one);
        assert_eq!(memory.gauge.get(), 40);
        other.grow(60).expect("what was given back fits");
        drop(other);
        assert_eq!((memory.used.load(Ordering::Relaxed), memory.gauge.get()), (0, 0));
    }
}
