//! Departures of gateways: which gateways are dead, so that their leases can be freed.
//!
//! A report stream may end because of the network. A gateway counts as dead when neither its report stream nor its
//! configuration stream is open again after a time, or when another process uses its name.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// How long a gateway may be without both streams. A living gateway opens them again within a second.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// Departures kept. They are sent at once, so few are not sent yet.
const KEPT: usize = 256;
/// Gateways that can be without streams at the same time; leases of further ones expire.
const LEAVING_MAX: usize = 10_000;

/// Incarnations of dead gateways, each with a rising number.
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

    /// The departures after a number.
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

/// Gateways without a report stream, which may return.
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

    /// Records that a gateway reports: it is alive, and earlier processes with its name are dead.
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

    /// Takes the gateways whose time is over. A gateway that is still connected is checked again later.
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

    /// The time of the next check.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.iter().map(|left| left.gone_at).min()
    }
}
