//! A discovery client that refuses some of the resources and keeps the configuration in force.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use weir_discovery::{Apply, Disk, Identity, Link, Refused, Subscriber, Update};
use weir_proto::resource::{Resource, Spec};
use weir_proto::v1::{ResourceKind, SubscriberRole};
use weir_runtime::Secret;
use weir_tests::line::Line;
use weir_tests::plane::ADMIN_TOKEN;

use super::writers::mark;

/// The history of a follower.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// The newest revision in force.
    pub(super) revision: u64,
    /// The tenants in force, with their words.
    pub(super) in_force: BTreeMap<String, String>,
    /// Every tenant that was ever in force.
    pub(super) ever: BTreeSet<String>,
    /// The resources that it refused so far.
    pub(super) refusals: usize,
}

#[derive(Debug)]
struct Owner {
    mark: String,
    seen: Arc<Mutex<Seen>>,
}

fn words(resources: &[Resource]) -> BTreeMap<String, String> {
    let word = |resource: &Resource| match &resource.spec {
        Spec::Tenant(tenant) => Some((resource.name.to_string(), tenant.display_name.clone())),
        _ => None,
    };
    resources.iter().filter_map(word).collect()
}

impl Apply for Owner {
    fn apply(&mut self, update: &Update<'_>) -> Vec<Refused> {
        let revision = update.revision;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(revision >= seen.revision, "{}: from {} back to {revision}", self.mark, seen.revision);
        seen.revision = revision;
        seen.in_force = words(&update.all());
        let names: Vec<String> = seen.in_force.keys().cloned().collect();
        seen.ever.extend(names);
        let refused = seen.in_force.values().find(|word| word.ends_with(&self.mark));
        assert_eq!(refused, None, "what is refused is never in force");
        Vec::new()
    }

    fn check(&self, update: &Update<'_>) -> Vec<Refused> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let refused: Vec<Refused> = words(&update.all())
            .into_iter()
            .filter(|(_, word)| word.ends_with(&self.mark))
            .map(|(name, word)| Refused {
                kind: ResourceKind::Tenant,
                name,
                message: format!("'{word}' is not for me"),
            })
            .collect();
        seen.refusals += refused.len();
        refused
    }

    fn connected(&mut self, _connected: bool) {}
}

/// One follower, with its own connection to each control plane.
#[derive(Debug)]
pub(super) struct Follower {
    pub(super) id: String,
    pub(super) directory: PathBuf,
    pub(super) seen: Arc<Mutex<Seen>>,
    lines: Vec<Line>,
    running: Option<(JoinHandle<()>, CancellationToken)>,
}

impl Follower {
    /// Starts it with its copy in a directory; the connections end with `end`.
    pub(super) async fn start(
        id: &str,
        planes: &[String],
        directory: &Path,
        end: &CancellationToken,
    ) -> Self {
        let mut lines = Vec::new();
        for plane in planes {
            lines.push(Line::to(plane.parse::<SocketAddr>().expect("an address"), end).await);
        }
        let mut follower = Self {
            id: id.into(),
            directory: directory.to_owned(),
            seen: Arc::default(),
            lines,
            running: None,
        };
        follower.run();
        follower
    }

    fn run(&mut self) {
        let identity = Identity {
            id: self.id.clone(),
            role: SubscriberRole::Gateway,
            incarnation: uuid::Uuid::now_v7().to_string(),
            region: String::new(),
            token: Some(Secret::new(ADMIN_TOKEN.into())),
        };
        let urls: Vec<String> = self.lines.iter().map(|line| format!("http://{}", line.address)).collect();
        let links = Link::all(&urls.join(","), None, None).expect("URLs");
        // A configuration in force that was not on disk at its end is lost: it starts with its copy.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).revision = 0;
        let owner = Owner { mark: mark(&self.id), seen: Arc::clone(&self.seen) };
        let disk = Disk::new(&self.directory).expect("made");
        let (stop, subscriber) =
            (CancellationToken::new(), Subscriber::new(owner, identity, links, Some(disk)));
        self.running = Some((tokio::spawn(subscriber.run(stop.clone())), stop));
    }

    /// Stops it at once, at any point, and starts it again with its copy.
    pub(super) async fn restart(&mut self) {
        self.stop().await;
        self.run();
    }

    /// Stops it.
    pub(super) async fn stop(&mut self) {
        let (task, stop) = self.running.take().expect("it runs");
        stop.cancel();
        task.await.expect("no assertion of it failed");
    }

    pub(super) fn cut(&self) {
        self.lines.iter().for_each(Line::cut);
    }

    pub(super) fn silence(&self) {
        self.lines.iter().for_each(Line::silence);
    }

    pub(super) fn mend(&self) {
        self.lines.iter().for_each(Line::mend);
    }
}
