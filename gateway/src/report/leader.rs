//! Which of the control planes is listened to.

use std::collections::BTreeMap;

use weir_proto::v1::Leadership;

/// The one that leads, as far as is known here.
#[derive(Debug, Default)]
pub(super) struct Leader {
    lane: Option<usize>,
    /// What each lane said last of itself.
    claims: BTreeMap<usize, Leadership>,
    /// The highest number heard of the newest epoch.
    highest: Leadership,
}

impl Leader {
    /// The lane that is listened to.
    pub(super) const fn lane(&self) -> Option<usize> {
        self.lane
    }

    /// A lane said something, perhaps of who leads. Whether it is to be listened to.
    pub(super) fn heard(&mut self, at: usize, leadership: Option<&Leadership>) -> bool {
        if let Some(said) = leadership {
            self.claims.insert(at, said.clone());
        }
        let leads = match self.claims.get(&at) {
            // It knows of no others.
            None => self.lane.is_none_or(|lane| lane == at),
            Some(claim) if claim.fencing == 0 => false,
            // Of another store, numbers begin anew; what it said before is of no use then.
            Some(claim) if claim.store_epoch != self.highest.store_epoch => leadership.is_some(),
            Some(claim) => claim.fencing >= self.highest.fencing,
        };
        if leads {
            if let Some(claim) = self.claims.get(&at) {
                self.highest.clone_from(claim);
            }
            if self.lane != Some(at) {
                tracing::info!(lane = at, fencing = self.highest.fencing, "this control plane leads");
                self.lane = Some(at);
            }
        } else if self.lane == Some(at) {
            self.lane = None;
        }
        leads
    }

    /// A lane is gone. Whether it was the one that is listened to.
    pub(super) fn gone(&mut self, at: usize) -> bool {
        self.claims.remove(&at);
        self.lane.take_if(|lane| *lane == at).is_some()
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
        assert!(!leader.heard(0, leads("e", 0).as_ref()), "it does not lead");
        assert!(leader.heard(1, leads("e", 5).as_ref()));
        assert!(leader.heard(1, None), "it is said once");
        assert!(!leader.heard(0, None));
        assert!(leader.heard(2, leads("e", 7).as_ref()), "elected later");
        assert!(!leader.heard(1, None), "it has not noticed yet");
        assert!(!leader.heard(1, leads("e", 5).as_ref()));
        assert!(!leader.gone(1) && leader.gone(2));
        assert!(!leader.heard(1, leads("e", 5).as_ref()), "not even when nobody leads");
        assert!(leader.heard(1, leads("e", 8).as_ref()));
        assert!(!leader.heard(1, leads("e", 0).as_ref()), "it has noticed itself");
        assert_eq!(leader.lane(), None);
    }

    #[test]
    fn another_store_begins_anew_and_one_that_says_nothing_is_alone() {
        let mut leader = Leader::default();
        assert!(leader.heard(0, None), "a control plane of before there were others");
        assert!(leader.gone(0));
        assert!(leader.heard(0, leads("old", 9).as_ref()));
        assert!(leader.gone(0));
        assert!(leader.heard(0, leads("new", 1).as_ref()), "the store was replaced");
    }
}
