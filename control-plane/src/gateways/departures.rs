//! Gateways whose stream has ended, and gateways that are gone.
//!
//! A report stream may end because of the network. Its gateway is gone when neither its report stream nor its
//! configuration stream has come back for a while, or when another process uses its name.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How long a gateway may be without both streams. They come back within a second when it lives.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Departures remembered: they are sent at once, so few are unsent.
const KEPT: usize = 256;
/// Gateways that may be leaving at once; leases of more run out by themselves.
const LEAVING_MAX: usize = 10_000;

/// Incarnations that are gone, each with a number that rises.
#[derive(Debug, Clone, Default)]
pub(crate) struct Departures {
    last: u64,
    recent: VecDeque<(u64, String)>,
}

impl Departures {
    /// The number of the last one.
    pub(crate) const fn last(&self) -> u64 {
        self.last
    }

    /// Those after that number.
    pub(crate) fn after(&self, number: u64) -> Vec<String> {
        self.recent.iter().filter(|(n, _)| *n > number).map(|(_, incarnation)| incarnation.clone()).collect()
    }

    pub(super) fn add(&mut self, incarnations: Vec<String>) {
        for incarnation in incarnations {
            self.last += 1;
            self.recent.push_back((self.last, incarnation));
        }
        let surplus = self.recent.len().saturating_sub(KEPT);
        self.recent.drain(..surplus);
    }
}

/// Gateways whose report stream has ended.
#[derive(Debug, Default)]
pub(super) struct Leaving(Vec<Left>);

#[derive(Debug)]
struct Left {
    gateway: String,
    incarnation: String,
    gone_at: Instant,
}

impl Leaving {
    pub(super) fn left(&mut self, gateway: &str, incarnation: String) {
        if self.0.len() < LEAVING_MAX && !incarnation.is_empty() {
            self.0.push(Left { gateway: gateway.to_owned(), incarnation, gone_at: Instant::now() + GRACE });
        }
    }

    /// A gateway reports: it is not leaving any more, and what others under its name were is gone.
    pub(super) fn back(&mut self, gateway: &str, incarnation: &str) -> Vec<String> {
        let mut gone = Vec::new();
        self.0.retain(|left| {
            let same = left.gateway == gateway;
            if same && left.incarnation != incarnation {
                gone.push(left.incarnation.clone());
            }
            !same
        });
        gone
    }

    /// Those whose time is up. One that is still connected is looked at again later.
    pub(super) fn gone(&mut self, connected: impl Fn(&str) -> bool) -> Vec<String> {
        let (now, mut gone) = (Instant::now(), Vec::new());
        self.0.retain_mut(|left| {
            if left.gone_at > now {
                return true;
            }
            if connected(&left.gateway) {
                left.gone_at = now + GRACE;
                return true;
            }
            gone.push(left.incarnation.clone());
            false
        });
        gone
    }

    /// When the next one is to be looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.iter().map(|left| left.gone_at).min()
    }
}
