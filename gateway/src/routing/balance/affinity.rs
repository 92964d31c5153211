//! Prefix affinity: requests with the same prefix go to the same backend from every gateway, so that the backend's prefix
//! cache is used. A bound spreads a popular prefix over as many backends as its load needs.

use smallvec::SmallVec;
use weir_ratelimit::Bound;

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
pub(super) fn rendezvous(prefix: u64, views: &[View]) -> SmallVec<[usize; 8]> {
    let mut ranked: SmallVec<[(f64, usize); 8]> = views
        .iter()
        .enumerate()
        .map(|(index, view)| {
            // Strictly between 0 and 1.
            let uniform = ((mix(prefix ^ view.id) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            let arrival = if view.weight > 0.0 { -uniform.ln() / view.weight } else { f64::INFINITY };
            (arrival, index)
        })
        .collect();
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    ranked.into_iter().map(|(_, index)| index).collect()
}

/// The bound of each view on requests in flight, below which another request may go there because of its prefix: `bound`
/// times the view's share by weight. The limiter enforces the bound with exact counts. The estimate is used where the
/// limiter cannot, and it is as old as the last report of other gateways' requests.
pub(super) fn bounds(views: &[View], bound: f64) -> SmallVec<[Bound; 8]> {
    let weights: f64 = views.iter().map(View::capacity).sum();
    let requests: f64 = views.iter().map(|view| view.in_flight).sum::<f64>() + 1.0;
    let of = |view: &View| {
        let share = if weights > 0.0 { view.capacity() / weights } else { 1.0 / views.len() as f64 };
        let estimate = (bound * requests * share).ceil().max(1.0) as u32;
        Bound { millionths: (bound * share * 1e6) as u32, estimate: estimate.min(view.max_concurrency) }
    };
    views.iter().map(of).collect()
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
        let bound = |millionths, estimate| Bound { millionths, estimate };
        assert_eq!(bounds(&views, 1.25).as_slice(), [bound(416_666, 17); 3]);
        assert_eq!(bounds(&views[2..], 1.25).as_slice(), [bound(1_250_000, 2)]);
        let few = View { max_concurrency: 4, ..busy(1, 40.0) };
        assert_eq!(bounds(&[few], 1.25)[0].estimate, 4, "never more than its slots");
    }
}
