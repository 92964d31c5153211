//! Prefix affinity: requests with the same prefix go to the same backend from every gateway, so that the backend's prefix
//! cache is used. A bound spreads a popular prefix over as many backends as its load needs.

use weir_ratelimit::Bound;

use super::schedule::{Order, Top};
use super::weight::View;

/// A hash that is the same in every process and version (FNV-1a, then `mix`).
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01B3);
    mix(bytes.iter().fold(0xCBF2_9CE4_8422_2325, fnv))
}

/// Mixes the bits of a number (the finalizer of splitmix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The hash of the tenant and of the prompt's prefix.
pub fn prefix_hash(tenant: u64, prefix: &[u8]) -> u64 {
    mix(tenant.rotate_left(32) ^ stable_hash(prefix))
}

/// Weighted rendezvous: the indices of `views` in order of preference for `prefix`. Depends only on the
/// prefix, the ids and the configured weights, so every gateway computes the same order.
pub(super) fn rendezvous(prefix: u64, views: &[View]) -> Order {
    first_rendezvous(prefix, views.iter().map(|view| (view.id, view.weight)), views.len())
}

/// The first `most` of that order, of backends with these ids and weights.
pub(super) fn first_rendezvous(
    prefix: u64,
    backends: impl IntoIterator<Item = (u64, f64)>,
    most: usize,
) -> Order {
    let mut top = Top::of(most);
    for (index, (id, weight)) in backends.into_iter().enumerate() {
        // Strictly between 0 and 1.
        let uniform = ((mix(prefix ^ id) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        // Most are seen to be too late without their logarithm, since -ln(u) >= 1 - u. The margin is for rounding.
        let least = top.least().map_or(f64::INFINITY, |least| -least);
        if (1.0 - uniform) * 0.999_999 > least * weight {
            continue;
        }
        let arrival = if weight > 0.0 { -uniform.ln() / weight } else { f64::INFINITY };
        top.offer(-arrival, index);
    }
    top.into_order()
}

/// What backends have in flight, and the weights by which it is to be divided.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Loads {
    capacity: f64,
    in_flight: f64,
    backends: usize,
}

impl Loads {
    /// Of these backends.
    pub(super) fn of<'a>(views: impl IntoIterator<Item = &'a View>) -> Self {
        views.into_iter().fold(Self::default(), |sum, view| Self {
            capacity: sum.capacity + view.capacity(),
            in_flight: sum.in_flight + view.in_flight,
            backends: sum.backends + 1,
        })
    }

    /// The bound of one of them on requests in flight, below which another request may go there because of its prefix:
    /// `bound` times its share by weight. The limiter enforces it with exact counts of the backends that it is asked about;
    /// what others have is known here. The estimate is used where the limiter cannot, and it is as old as the last report of
    /// other gateways' requests.
    pub(super) fn bound(&self, view: &View, bound: f64) -> Bound {
        let share = if self.capacity > 0.0 {
            view.capacity() / self.capacity
        } else {
            1.0 / self.backends.max(1) as f64
        };
        let estimate = (bound * (self.in_flight + 1.0) * share).ceil().max(1.0) as u32;
        Bound {
            millionths: (bound * share * 1e6) as u32,
            elsewhere: 0,
            estimate: estimate.min(view.max_concurrency),
        }
    }

    /// What all but `views` have in flight.
    pub(super) fn except<'a>(&self, views: impl IntoIterator<Item = &'a View>) -> u32 {
        let there: f64 = views.into_iter().map(|view| view.in_flight).sum();
        (self.in_flight - there).max(0.0).round() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::super::weight::tests::idle;
    use super::*;

    #[test]
    fn the_hash_is_the_same_for_ever() {
        // Recorded values: gateways of different versions must compute the same.
        assert_eq!(stable_hash(b"backend-1"), 0x3635_40F6_99AE_A3CE);
        assert_eq!(prefix_hash(1, b"You are"), 0xB6FB_57F5_0920_55C3);
    }

    #[test]
    fn prefixes_spread_by_weight_and_move_little_when_a_backend_leaves() {
        let mut views: Vec<View> = (0..4).map(|i| idle(stable_hash(&[i]))).collect();
        views[3].weight = 300.0;
        let first = |views: &[View]| -> Vec<u64> {
            (0..20_000u64).map(|p| views[rendezvous(mix(p), views)[0]].id).collect()
        };
        let before = first(&views);
        let share = before.iter().filter(|&&id| id == views[3].id).count() as f64 / 20_000.0;
        assert!((share - 0.5).abs() < 0.02, "{share}");
        let gone = views.remove(0).id;
        let after = first(&views);
        let moved = before.iter().zip(&after).filter(|(b, a)| b != a).count();
        assert_eq!(moved, before.iter().filter(|&&id| id == gone).count(), "only those of the one that left");
    }

    #[test]
    fn bounds_follow_weights_and_what_is_in_flight() {
        let busy = |id, in_flight| View { in_flight, ..idle(id) };
        let views = [busy(1, 30.0), busy(2, 9.0), busy(3, 0.0)];
        let bounds = |views: &[View]| -> Vec<Bound> {
            let loads = Loads::of(views);
            views.iter().map(|view| loads.bound(view, 1.25)).collect()
        };
        let bound = |millionths, estimate| Bound { millionths, elsewhere: 0, estimate };
        assert_eq!(bounds(&views), [bound(416_666, 17); 3]);
        assert_eq!(bounds(&views[2..]), [bound(1_250_000, 2)]);
        let few = View { max_concurrency: 4, ..busy(1, 40.0) };
        assert_eq!(bounds(&[few])[0].estimate, 4, "never more than its slots");
        assert_eq!(Loads::of(&views).except(&views[1..]), 30);
    }

    #[test]
    fn the_first_of_a_preference_are_those_of_the_whole() {
        let weights = [0.0, 1.0, 5.0, 100.0, 100.0, 100.0, 1000.0];
        let views: Vec<View> =
            (0..300).map(|i| View { weight: weights[i % weights.len()], ..idle(i as u64 + 1) }).collect();
        for prefix in 0..2000 {
            let mut whole: Vec<(f64, usize)> = (0..views.len())
                .map(|index| {
                    let View { id, weight, .. } = views[index];
                    let uniform = ((mix(prefix ^ id) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
                    (if weight > 0.0 { -uniform.ln() / weight } else { f64::INFINITY }, index)
                })
                .collect();
            whole.sort_by(|a, b| a.0.total_cmp(&b.0));
            let whole: Vec<usize> = whole.into_iter().map(|(_, index)| index).collect();
            assert_eq!(rendezvous(prefix, &views).as_slice(), whole);
            let backends = views.iter().map(|view| (view.id, view.weight));
            assert_eq!(first_rendezvous(prefix, backends, 8).as_slice(), &whole[..8]);
        }
    }
}
