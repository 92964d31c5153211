//! The number of gateways: each gateway with a configuration or a report stream counts once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// The connected gateways. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Membership {
    /// Open streams by gateway.
    streams: Arc<Mutex<BTreeMap<String, usize>>>,
    count: watch::Sender<u32>,
}

/// One open stream of a gateway; dropping it removes the stream.
#[derive(Debug)]
pub(crate) struct OpenStream {
    membership: Membership,
    gateway: String,
}

impl Membership {
    fn streams(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an open stream of a gateway.
    pub(crate) fn enter(&self, gateway: &str) -> OpenStream {
        let mut streams = self.streams();
        *streams.entry(gateway.to_owned()).or_default() += 1;
        self.tell(&streams);
        OpenStream { membership: self.clone(), gateway: gateway.to_owned() }
    }

    /// The number of gateways and its changes.
    pub(crate) fn count(&self) -> watch::Receiver<u32> {
        self.count.subscribe()
    }

    fn tell(&self, streams: &BTreeMap<String, usize>) {
        let now = u32::try_from(streams.len()).unwrap_or(u32::MAX);
        self.count.send_if_modified(|count| std::mem::replace(count, now) != now);
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut streams = self.membership.streams();
        if let Some(open) = streams.get_mut(&self.gateway) {
            *open -= 1;
            if *open == 0 {
                streams.remove(&self.gateway);
            }
        }
        self.membership.tell(&streams);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_with_two_streams_is_one_until_both_are_gone() {
        let membership = Membership::default();
        let count = membership.count();
        let (config, report, other) = (membership.enter("g"), membership.enter("g"), membership.enter("h"));
        assert_eq!(*count.borrow(), 2);
        drop(config);
        assert_eq!(*count.borrow(), 2);
        drop((report, other));
        assert_eq!(*count.borrow(), 0);
    }
}
