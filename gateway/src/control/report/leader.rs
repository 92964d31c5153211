//! Which control plane the gateway follows: the leader with the highest fencing token.

use std::collections::BTreeMap;

use weir_proto::v1::Leadership;

/// The leader as this gateway knows it.
#[derive(Debug, Default)]
pub(super) struct Leader {
    /// The report stream that is followed, by the index of its control plane.
    stream: Option<usize>,
    /// The last leadership claim of each stream.
    claims: BTreeMap<usize, Leadership>,
    /// The claim with the highest fencing token of the newest epoch.
    highest: Leadership,
}

impl Leader {
    /// The report stream that is followed.
    pub(super) const fn stream(&self) -> Option<usize> {
        self.stream
    }

    /// Records a message of a stream and the leadership claim in it. Returns whether the stream is to be followed.
    pub(super) fn received(&mut self, at: usize, leadership: Option<&Leadership>) -> bool {
        if let Some(said) = leadership {
            self.claims.insert(at, said.clone());
        }
        let follow = match self.claims.get(&at) {
            // A control plane that claims nothing is the only one of its store.
            None => self.stream.is_none_or(|stream| stream == at),
            Some(claim) if claim.fencing_token == 0 => false,
            // Tokens of another store start again, so only a claim made now counts.
            Some(claim) if claim.store_epoch != self.highest.store_epoch => leadership.is_some(),
            Some(claim) => claim.fencing_token >= self.highest.fencing_token,
        };
        if follow {
            if let Some(claim) = self.claims.get(&at) {
                self.highest.clone_from(claim);
            }
            if self.stream != Some(at) {
                tracing::info!(
                    control_plane = at,
                    fencing_token = self.highest.fencing_token,
                    "following a new leader"
                );
                self.stream = Some(at);
            }
        } else if self.stream == Some(at) {
            self.stream = None;
        }
        follow
    }

    /// Records the end of a stream. Returns whether it was the followed one.
    pub(super) fn disconnected(&mut self, at: usize) -> bool {
        self.claims.remove(&at);
        self.stream.take_if(|stream| *stream == at).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(epoch: &str, fencing_token: u64) -> Option<Leadership> {
        Some(Leadership { store_epoch: epoch.into(), fencing_token })
    }

    #[test]
    fn the_highest_fencing_token_is_followed_and_a_former_leader_is_not() {
        let mut leader = Leader::default();
        assert!(!leader.received(0, claim("e", 0).as_ref()), "it is not the leader");
        assert!(leader.received(1, claim("e", 5).as_ref()));
        assert!(leader.received(1, None), "the claim is sent once");
        assert!(!leader.received(0, None));
        assert!(leader.received(2, claim("e", 7).as_ref()), "elected later");
        assert!(!leader.received(1, None), "it has not noticed yet");
        assert!(!leader.received(1, claim("e", 5).as_ref()));
        assert!(!leader.disconnected(1) && leader.disconnected(2));
        assert!(!leader.received(1, claim("e", 5).as_ref()), "not even without a leader");
        assert!(leader.received(1, claim("e", 8).as_ref()));
        assert!(!leader.received(1, claim("e", 0).as_ref()), "it has noticed its loss");
        assert_eq!(leader.stream(), None);
    }

    #[test]
    fn tokens_of_another_store_start_again_and_a_control_plane_without_claims_is_followed() {
        let mut leader = Leader::default();
        assert!(leader.received(0, None), "a control plane that claims nothing");
        assert!(leader.disconnected(0));
        assert!(leader.received(0, claim("old", 9).as_ref()));
        assert!(leader.disconnected(0));
        assert!(leader.received(0, claim("new", 1).as_ref()), "the store was replaced");
    }
}
