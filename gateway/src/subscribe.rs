//! Keeps the snapshot fresh: what a gateway does with the configuration it subscribes to.

use std::sync::Arc;

use weir_discovery::{Apply, Refused};
use weir_proto::resource::Resource;

use crate::live::Live;
use crate::snapshot::{Snapshot, read_secret};

/// Compiles each configuration and publishes it.
#[derive(Debug)]
pub struct Publisher(pub Arc<Live>);

impl Publisher {
    fn compile(&self, epoch: &str, revision: u64, resources: &[Resource]) -> (Snapshot, Vec<Refused>) {
        Snapshot::compile(epoch, revision, resources, &self.0.snapshot(), &read_secret)
    }
}

impl Apply for Publisher {
    fn apply(&mut self, epoch: &str, revision: u64, resources: &[Resource]) -> Vec<Refused> {
        let (snapshot, refused) = self.compile(epoch, revision, resources);
        self.0.publish(snapshot);
        refused
    }

    fn check(&self, epoch: &str, revision: u64, resources: &[Resource]) -> Vec<Refused> {
        self.compile(epoch, revision, resources).1
    }

    fn refused(&mut self, count: usize) {
        self.0.set_config_refused(count);
    }

    fn connected(&mut self, connected: bool) {
        self.0.set_connected(connected);
    }
}
