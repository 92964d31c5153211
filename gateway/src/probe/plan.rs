//! How a look is made, and what a look without a free slot comes to.

use std::sync::Arc;
use std::time::Duration;

use weir_proto::v1::ProbeOutcome;

use super::counted::Counted;
use super::judge::Seen;
use super::look::{self, Depth, Known, Looked};
use crate::limits::ledger::Ledger;
use crate::limits::slot_lease::SlotLease;
use crate::routing::backend::BackendEntry;
use crate::routing::entries::ModelEntry;

/// A backend without a free slot that its requests do not prove is asked with the next one, if it comes within this.
const SLOT_WAIT: Duration = Duration::from_secs(2);

/// How a look is made.
pub(super) enum Plan {
    /// It need not be made.
    Known(Box<Looked>),
    /// It cannot be made.
    Skip,
    Liveness(Duration),
    Readiness(Box<Readiness>),
    /// And the model whose throughput is to be measured, if traffic does not say how fast it is.
    Deep(Depth, Option<String>),
}

/// How a look came to what it says.
pub(super) enum How {
    /// The backend was asked.
    Asked(Looked),
    /// Its requests said enough.
    Traffic(Looked),
    /// It had no slot free to be asked with, and its requests succeed.
    Full(Looked),
    /// It had no slot free to be asked with, and its requests did not say enough.
    NoSlot {
        /// What is as before, since nothing was looked at.
        before: Option<Counted>,
    },
    /// It was asked for all that takes no slot; for the measurement there was none.
    NotMeasured(Looked),
}

/// A probe that asks for tokens. It never waits for a slot where requests prove the backend, and where they do not it
/// goes before them: one that hangs with all its slots taken is asked with the first that a request gives up.
pub(super) struct Readiness {
    pub(super) model: Arc<ModelEntry>,
    /// What the backend knows it by.
    pub(super) name: String,
    pub(super) known: Known,
    pub(super) limit: Duration,
    /// Requests succeed there.
    pub(super) proven: bool,
    pub(super) before: Option<Counted>,
}

impl Readiness {
    pub(super) async fn look(self, ledger: &Arc<Ledger>, entry: &Arc<BackendEntry>) -> (How, Option<String>) {
        let slot = match SlotLease::take(ledger, entry).await {
            Ok(None) if self.proven => {
                let seen = Seen::new(ProbeOutcome::Pass, "all its slots are taken, and requests succeed");
                return (How::Full(seen.into()), None);
            }
            Ok(None) => SlotLease::wait(ledger, entry, &self.model, SLOT_WAIT).await,
            taken => taken,
        };
        // It is freed when the answer is there, or the question was given up.
        let Ok(Some(_slot)) = slot else { return (How::NoSlot { before: self.before }, None) };
        let looked = look::readiness(entry.clone(), self.name.clone(), self.known, self.limit).await;
        (How::Asked(looked), Some(self.name))
    }
}
