//! Where the rules come from: a file, or the control plane, whose configuration is followed as a gateway follows it.

use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use weir_discovery::{Apply, Disk, Identity, Link, Refused, Subscriber, Update};
use weir_proto::resource::Resource;
use weir_proto::v1::SubscriberRole;

use crate::config::Config;
use crate::error::StartError;
use crate::metrics::Metrics;
use crate::rules::Rules;

/// The rules in force and whether there are any to be in force.
#[derive(Debug, Clone)]
pub(super) struct Configuration {
    pub(super) rules: Arc<ArcSwap<Rules>>,
    /// False until the control plane or its copy on disk has been heard of.
    pub(super) known: watch::Receiver<bool>,
    /// Why no control plane is followed, with a remedy.
    pub(super) problem: watch::Receiver<Option<String>>,
}

/// Compiles each configuration and puts it in force.
#[derive(Debug)]
pub(super) struct Publisher {
    rules: Arc<ArcSwap<Rules>>,
    known: watch::Sender<bool>,
    problem: watch::Sender<Option<String>>,
    rules_held: Gauge,
    revision: Gauge,
    connected: Gauge,
}

impl Publisher {
    /// Puts resources in force.
    fn publish(&self, epoch: &str, revision: u64, resources: &[Resource]) -> Vec<Refused> {
        let (rules, refused) = Rules::compile(resources);
        self.rules_held.set(i64::try_from(rules.count).unwrap_or(i64::MAX));
        self.revision.set(i64::try_from(revision).unwrap_or(i64::MAX));
        self.rules.store(Arc::new(rules));
        self.known.send_replace(!epoch.is_empty());
        refused
    }
}

impl Apply for Publisher {
    fn apply(&mut self, update: &Update<'_>) -> Vec<Refused> {
        self.publish(update.epoch, update.revision, &update.all())
    }

    fn connected(&mut self, connected: bool) {
        self.connected.set(i64::from(connected));
    }

    fn problem(&mut self, problem: Option<String>) {
        self.problem.send_if_modified(|known| {
            let changed = *known != problem;
            *known = problem;
            changed
        });
    }
}

/// What the settings ask for; the subscriber is to be run.
pub(super) fn open(
    config: &Config,
    metrics: &Metrics,
) -> Result<(Configuration, Option<Subscriber<Publisher>>), StartError> {
    let known = watch::Sender::new(config.control_plane.is_none());
    let problem = watch::Sender::new(None);
    let configuration =
        Configuration { rules: Arc::default(), known: known.subscribe(), problem: problem.subscribe() };
    let publisher = Publisher {
        rules: Arc::clone(&configuration.rules),
        known,
        problem,
        rules_held: metrics.rules_held.clone(),
        revision: metrics.revision.clone(),
        connected: metrics.control_plane_connected.clone(),
    };
    let Some(url) = &config.control_plane else {
        match config.resources().map_err(StartError::Config)? {
            None => {
                tracing::warn!("without --control-plane or --config no rule is in force: descriptors pass")
            }
            Some(resources) => {
                // Of a file, what cannot be used is a mistake to be told at once.
                if let Some(Refused { name, message, .. }) = publisher.publish("file", 0, &resources).first()
                {
                    return Err(StartError::Config(format!("--config: {name}: {message}")));
                }
            }
        }
        return Ok((configuration, None));
    };
    let links =
        Link::all(url, None, None).map_err(|e| StartError::Config(format!("--control-plane: {e}")))?;
    let disk = config.data_dir.as_deref().map(Disk::new).transpose();
    let disk = disk.map_err(|e| StartError::Config(format!("--data-dir: {e}")))?;
    let incarnation = uuid::Uuid::now_v7().to_string();
    let identity = Identity {
        id: config.id.clone().unwrap_or_else(|| format!("limits-{}", &incarnation[24..])),
        role: SubscriberRole::LimitService,
        incarnation,
        region: config.region.clone(),
        token: config.control_plane_token().map_err(StartError::Config)?,
    };
    Ok((configuration, Some(Subscriber::new(publisher, identity, links, disk))))
}
