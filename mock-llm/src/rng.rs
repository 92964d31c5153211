//! A small seeded generator, so that a run can be repeated from its seed.

/// SplitMix64: two multiplications per draw, any seed is a good seed.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// The generator of request number `request` of a server with this seed.
    pub(crate) fn new(seed: u64, request: u64) -> Self {
        let mut outer = Self(seed);
        let base = outer.next();
        Self(base ^ request.wrapping_mul(Self::STEP))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f64 {
        // An f64 holds the upper 53 bits exactly.
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// True with this probability; 0.0 never, 1.0 always.
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_seed_same_draws() {
        let draws = |seed, request| {
            let mut rng = Rng::new(seed, request);
            [rng.next(), rng.next(), rng.next()]
        };
        assert_eq!(draws(1, 2), draws(1, 2));
        assert_ne!(draws(1, 2), draws(1, 3));
        assert_ne!(draws(1, 2), draws(2, 2));
    }

    #[test]
    fn chance_is_exact_at_the_ends_and_near_between() {
        let mut rng = Rng::new(7, 0);
        assert!((0..1000).all(|_| rng.chance(1.0) && !rng.chance(0.0)));
        let hits = (0..10_000).filter(|_| rng.chance(0.3)).count();
        assert!((2_700..3_300).contains(&hits), "{hits}");
    }
}
