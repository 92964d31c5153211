//! Random choices that a seed repeats.

use std::time::{Duration, UNIX_EPOCH};

/// A generator of pseudo-random numbers (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The generator of a seed. Neighbouring seeds give unrelated numbers.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// An index of a list of this length.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("an index")
    }

    /// True in this percentage of cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.index(all.len())]
    }

    /// A time of up to this number of milliseconds.
    pub fn pause(&mut self, up_to_ms: u64) -> Duration {
        Duration::from_millis(self.below(up_to_ms))
    }
}

/// A number from the environment.
pub fn given(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number: {text}")))
}

/// The seed in `WEIR_TEST_SEED`, or the one of `otherwise`. It is printed, so that a failure can be repeated.
pub fn seed(otherwise: impl FnOnce() -> u64) -> u64 {
    let seed = given("WEIR_TEST_SEED").unwrap_or_else(otherwise);
    println!("seed {seed}: WEIR_TEST_SEED={seed} makes the same choices again");
    seed
}

/// Another seed at each time.
pub fn seed_of_now() -> u64 {
    let now = weir_runtime::wall_clock().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_micros() as u64
}
