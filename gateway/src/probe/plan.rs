//! How a probe is made, and what a probe without a free slot comes to.

use std::sync::Arc;
use std::time::Duration;

use weir_probe::Finding;
use weir_proto::v1::ProbeOutcome;

use super::counted::Counted;
use super::tiers::{self, Depth, KnownModel, Probed};
use crate::limits::ledger::Ledger;
use crate::limits::slot_lease::SlotLease;
use crate::routing::backend::BackendEntry;
use crate::routing::entries::ModelEntry;

/// A backend without a free slot that its requests do not prove is asked with the next one, if it comes within this.
const SLOT_WAIT: Duration = Duration::from_secs(2);

/// How a probe is made.
pub(super) enum Plan {
    /// It need not be made.
    Known(Box<Probed>),
    /// It cannot be made.
    Skip,
    Liveness(Duration),
    Readiness(Box<Readiness>),
    Deep(Box<Deep>),
}

/// How a probe came to what it says.
pub(super) enum How {
    /// The backend was asked.
    Asked(Probed),
    /// Its requests said enough.
    Traffic(Probed),
    /// It had no slot free to be asked with, and its requests succeed.
    Full(Probed),
    /// It had no slot free to be asked with, and its requests did not say enough.
    NoSlot {
        /// What is as before, since nothing was probed.
        before: Option<Counted>,
    },
    /// All free checks ran; the throughput check was skipped because no slot was free.
    NotMeasured(Probed),
}

/// A probe that asks for tokens. It never waits for a slot where requests prove the backend, and where they do not it
/// goes before them: one that hangs with all its slots taken is asked with the first that a request gives up.
pub(super) struct Readiness {
    pub(super) model: Arc<ModelEntry>,
    /// What the backend knows it by.
    pub(super) name: String,
    pub(super) known: KnownModel,
    pub(super) limit: Duration,
    /// Requests succeed there.
    pub(super) proven: bool,
    pub(super) before: Option<Counted>,
}

impl Readiness {
    pub(super) async fn probe(
        self,
        ledger: &Arc<Ledger>,
        entry: &Arc<BackendEntry>,
    ) -> (How, Option<String>) {
        let slot = match SlotLease::take(ledger, entry).await {
            Ok(None) if self.proven => {
                let found = Finding::new(ProbeOutcome::Pass, "all its slots are taken, and requests succeed");
                return (How::Full(found.into()), None);
            }
            Ok(None) => SlotLease::wait(ledger, entry, &self.model, SLOT_WAIT).await,
            taken => taken,
        };
        // It is freed when the answer is there, or the question was given up.
        let Ok(Some(_slot)) = slot else { return (How::NoSlot { before: self.before }, None) };
        let probed = tiers::readiness(entry.clone(), self.name.clone(), self.known, self.limit).await;
        (How::Asked(probed), Some(self.name))
    }
}

/// A probe of speed, engine and models.
pub(super) struct Deep {
    pub(super) depth: Depth,
    /// The model whose throughput is to be measured, if traffic does not say how fast it is.
    pub(super) measure: Option<String>,
}

impl Deep {
    pub(super) async fn probe(self, ledger: &Arc<Ledger>, entry: &Arc<BackendEntry>) -> How {
        let mut probed = tiers::deep(entry, &self.depth).await;
        let Some(model) = self.measure else { return How::Asked(probed) };
        // A benchmark is no reason to wait for a slot: no slot free is no idle backend.
        let Ok(Some(_slot)) = SlotLease::take(ledger, entry).await else { return How::NotMeasured(probed) };
        tiers::measure(entry, &model, self.depth.limit, &mut probed).await;
        How::Asked(probed)
    }
}
