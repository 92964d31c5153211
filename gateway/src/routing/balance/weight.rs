//! The effective weight: the configured weight times measured factors.
//!
//! `effective = weight x load x latency x health`. Each factor is kept beside the product, so that metrics and
//! `weir backends` show why a backend has its weight.

use std::time::Duration;

/// The share of its weight with which a recovered backend starts.
const RAMP_FLOOR: f64 = 0.1;
/// The default duration of a slow start.
pub const RAMP: Duration = Duration::from_secs(60);
/// The health factor of a degraded backend.
const DEGRADED: f64 = 0.5;

/// Whether a backend may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usability {
    /// The backend is used.
    Healthy,
    /// The backend is used in panic mode only.
    Unhealthy,
}

/// One backend at the time of a choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    /// Stable over restarts and equal on every gateway, such as [`super::stable_hash`] of the name.
    pub id: u64,
    /// The configured weight.
    pub weight: f64,
    /// The backend's slots in the whole cluster; fewer in a slow start.
    pub max_concurrency: u32,
    /// Those of them that a slow start holds back from requests that find a slot elsewhere.
    pub held_back: u32,
    /// Requests in flight over all gateways, as far as this gateway knows; its own are included.
    pub in_flight: f64,
    /// Requests of this gateway in flight.
    pub local: u32,
    /// See [`health_factor`].
    pub health: f64,
    /// The preference: the lowest rank comes first.
    pub rank: u32,
    /// Whether it may be used.
    pub usability: Usability,
}

impl View {
    /// The free share of the slots, 0 to 1.
    pub fn load_factor(&self) -> f64 {
        (1.0 - self.in_flight / f64::from(self.max_concurrency.max(1))).clamp(0.0, 1.0)
    }

    /// The configured weight times the health factor, which do not change with every request.
    pub fn capacity(&self) -> f64 {
        self.weight * self.health
    }

    /// The effective weight, given the factor of [`super::Speeds::factor`].
    pub fn effective(&self, latency: f64) -> Effective {
        Effective { weight: self.weight, load: self.load_factor(), latency, health: self.health }
    }
}

/// The factors of an effective weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Effective {
    /// The configured weight.
    pub weight: f64,
    /// The free share of the slots, 0 to 1.
    pub load: f64,
    /// The speed relative to the pool, 0.2 to 2; more is faster.
    pub latency: f64,
    /// 1, or less while the backend is degraded or in slow start.
    pub health: f64,
}

impl Effective {
    /// The product.
    pub fn value(&self) -> f64 {
        self.weight * self.load * self.latency * self.health
    }
}

/// The factor of a backend's health. `recovering_for` is the elapsed part of a slow start, if there is one.
pub fn health_factor(degraded: bool, recovering_for: Option<Duration>) -> f64 {
    match recovering_for {
        Some(since) => (since.as_secs_f64() / RAMP.as_secs_f64()).clamp(RAMP_FLOOR, 1.0),
        None if degraded => DEGRADED,
        None => 1.0,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A small generator, so that tests are the same each time.
    pub(in crate::routing::balance) fn uniform(seed: u64) -> impl FnMut() -> f64 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 53) as f64
        }
    }

    /// An idle, healthy backend of weight 100 with 50 slots.
    pub(in crate::routing::balance) fn idle(id: u64) -> View {
        View {
            id,
            weight: 100.0,
            max_concurrency: 50,
            held_back: 0,
            in_flight: 0.0,
            local: 0,
            health: 1.0,
            rank: 0,
            usability: Usability::Healthy,
        }
    }

    #[test]
    fn load_is_the_free_share_of_the_clusters_slots() {
        let at = |in_flight| View { in_flight, ..idle(1) }.effective(1.0).value();
        assert_eq!([at(0.0), at(25.0), at(50.0), at(70.0)], [100.0, 50.0, 0.0, 0.0]);
        let none = View { max_concurrency: 0, in_flight: 1.0, ..idle(1) };
        assert_eq!(none.effective(1.0).value(), 0.0);
    }

    #[test]
    fn a_backend_that_comes_back_is_ramped_and_a_degraded_one_gets_half() {
        let ramp = |s| health_factor(false, Some(Duration::from_secs(s)));
        assert_eq!([ramp(0), ramp(3), ramp(30), ramp(60), ramp(600)], [0.1, 0.1, 0.5, 1.0, 1.0]);
        assert_eq!((health_factor(true, None), health_factor(false, None)), (0.5, 1.0));
    }
}
