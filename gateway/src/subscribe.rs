//! Keeps the snapshot fresh: what a gateway does with the configuration it subscribes to.

use std::sync::Arc;

use weir_discovery::{Apply, Refused};
use weir_proto::resource::Resource;

use crate::live::Live;
use crate::snapshot::{Snapshot, read_secret};

/// Compiles each configuration and publishes it.
#[derive(Debug)]
pub struct Publisher(pub Arc<Live>);

impl Apply for Publisher {
    fn apply(&mut self, epoch: &str, revision: u64, resources: &[Resource]) -> Vec<Refused> {
        let previous = self.0.snapshot();
        let (snapshot, refused) = Snapshot::compile(epoch, revision, resources, &previous, &read_secret);
        self.0.publish(snapshot);
        refused
    }

    fn connected(&mut self, connected: bool) {
        self.0.set_connected(connected);
    }
}
