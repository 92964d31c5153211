//! Which of the control planes is listened to.

use std::collections::BTreeMap;

use weir_proto::v1::Leadership;

/// The one that leads, as far as is known here.
#[derive(Debug, Default)]
pub(super) struct Leader {
    stream: Option<usize>,
    /// What each stream said last of itself.
    claims: BTreeMap<usize, Leadership>,
    /// The highest number heard of the newest epoch.
    highest: Leadership,
}

impl Leader {
    /// The stream that is listened to.
    pub(super) const fn stream(&self) -> Option<usize> {
        self.stream
    }

    /// A message came on a stream, perhaps of who leads. Whether it is to be listened to.
    pub(super) fn received(&mut self, at: usize, leadership: Option<&Leadership>) -> bool {
        if let Some(said) = leadership {
            self.claims.insert(at, said.clone());
        }
        let leads = match self.claims.get(&at) {
            // It knows of no others.
            None => self.stream.is_none_or(|stream| stream == at),
            Some(claim) if claim.fencing == 0 => false,
            // Of another store, numbers begin anew; what it said before is of no use then.
            Some(claim) if claim.store_epoch != self.highest.store_epoch => leadership.is_some(),
            Some(claim) => claim.fencing >= self.highest.fencing,
        };
        if leads {
            if let Some(claim) = self.claims.get(&at) {
                self.highest.clone_from(claim);
            }
            if self.stream != Some(at) {
                tracing::info!(stream = at, fencing = self.highest.fencing, "this control plane leads");
                self.stream = Some(at);
            }
        } else if self.stream == Some(at) {
            self.stream = None;
        }
        leads
    }

    /// A stream has ended. Whether it was the one that is listened to.
    pub(super) fn disconnected(&mut self, at: usize) -> bool {
        self.claims.remove(&at);
        self.stream.take_if(|stream| *stream == at).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leads(epoch: &str, fencing: u64) -> Option<Leadership> {
        Some(Leadership { store_epoch: epoch.into(), fencing })
    }

    #[test]
    fn the_highest_number_is_listened_to_and_who_led_before_is_not() {
        let mut leader = Leader::default();
        assert!(!leader.received(0, leads("e", 0).as_ref()), "it does not lead");
        assert!(leader.received(1, leads("e", 5).as_ref()));
        assert!(leader.received(1, None), "it is said once");
        assert!(!leader.received(0, None));
        assert!(leader.received(2, leads("e", 7).as_ref()), "elected later");
        assert!(!leader.received(1, None), "it has not noticed yet");
        assert!(!leader.received(1, leads("e", 5).as_ref()));
        assert!(!leader.disconnected(1) && leader.disconnected(2));
        assert!(!leader.received(1, leads("e", 5).as_ref()), "not even when nobody leads");
        assert!(leader.received(1, leads("e", 8).as_ref()));
        assert!(!leader.received(1, leads("e", 0).as_ref()), "it has noticed itself");
        assert_eq!(leader.stream(), None);
    }

    #[test]
    fn another_store_begins_anew_and_one_that_says_nothing_is_alone() {
        let mut leader = Leader::default();
        assert!(leader.received(0, None), "a control plane of before there were others");
        assert!(leader.disconnected(0));
        assert!(leader.received(0, leads("old", 9).as_ref()));
        assert!(leader.disconnected(0));
        assert!(leader.received(0, leads("new", 1).as_ref()), "the store was replaced");
    }
}
