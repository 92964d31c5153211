//! Pauses between attempts.

use std::time::Duration;

/// Pauses that double up to a bound. Each pause is drawn at random between zero and its ceiling, so that processes
/// that failed together do not return together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    pauses: u32,
}

impl Backoff {
    /// Pauses from up to `first` to up to `longest`.
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, pauses: 0 }
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        let ceiling = self.next_ceiling();
        ceiling.mul_f64(crate::random_unit())
    }

    /// Starts again at the first pause, after a success.
    pub const fn reset(&mut self) {
        self.pauses = 0;
    }

    fn next_ceiling(&mut self) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.pauses.min(16));
        self.pauses = self.pauses.saturating_add(1);
        doubled.min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(500));
        let ceilings = |backoff: &mut Backoff| [(); 4].map(|()| backoff.next_ceiling().as_millis());
        assert_eq!(ceilings(&mut backoff), [100, 200, 400, 500]);
        backoff.reset();
        assert_eq!(ceilings(&mut backoff), [100, 200, 400, 500]);
        for _ in 0..100 {
            assert!(backoff.next_pause() <= Duration::from_millis(500));
        }
    }
}
