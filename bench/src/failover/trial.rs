//! One trial: a cluster of its own, one fault, and its effects.

use std::path::Path;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::scene::{Fault, MODEL, Pushes, Scene, Sight, TOKENS};
use crate::load::{self, Outcome};
use crate::resources::KEY;

/// Requests per second over all gateways.
pub(super) const PER_SECOND: f64 = 200.0;
/// Traffic before the fault, so that usual latencies are known.
const WARM_UP: Duration = Duration::from_secs(3);
/// The interval of reading the gateways' metrics, which is the precision of every time here.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The interval without traffic, where several trials run at once.
const LOOK_IDLE: Duration = Duration::from_millis(50);
/// The time of traffic before the fault, and after all gateways stopped using the backend.
const MARGIN: Duration = Duration::from_secs(1);
/// The time for reactions under traffic.
const WATCH_TRAFFIC: Duration = Duration::from_secs(8);
/// The time for reactions without traffic.
const WATCH_IDLE: Duration = Duration::from_secs(20);
/// A mended backend must be used again within this time to count.
const RETURN_MAX: Duration = Duration::from_secs(60);
/// A mended backend must have its full weight within this time.
const FULL_RETURN_MAX: Duration = Duration::from_secs(150);

/// The parameters of one trial.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) fault: Fault,
    pub(super) busy: bool,
    pub(super) gateways: u16,
    /// The pause before the fault, so that it falls into another phase of the probes in each trial.
    pub(super) pause: Duration,
    /// Whether the backend is mended and its return timed.
    pub(super) returns: bool,
    /// Whether the return to full weight is timed as well.
    pub(super) full_return: bool,
}

/// The result of one trial.
#[derive(Debug, Default)]
pub(super) struct Trial {
    /// From the fault until the last gateway ejected the backend by itself.
    pub(super) local: Option<Duration>,
    /// From the fault until the last gateway had the verdict.
    pub(super) cluster: Option<Duration>,
    /// From mending until every gateway used the backend again.
    pub(super) back: Option<Duration>,
    /// From mending until it had its full weight on every gateway.
    pub(super) full: Option<Duration>,
    pub(super) load: Option<Outcome>,
    /// Attempts at any backend, by the requests of `load`.
    pub(super) attempts: u64,
    pub(super) pushes: Pushes,
}

impl Trial {
    /// For people who watch.
    pub(super) fn line(&self) -> String {
        let ms = |time: Option<Duration>| time.map_or("-".to_owned(), |t| t.as_millis().to_string());
        let (local, cluster) = (ms(self.local), ms(self.cluster));
        let (back, full) = (ms(self.back), ms(self.full));
        let mut line = format!("local {local} ms, cluster {cluster} ms, back {back} ms, full {full} ms");
        if let Some(load) = &self.load {
            let slowest = load.latency_us.max() as f64 / 1e3;
            line +=
                &format!(", failed {} of {}, slowest {slowest:.0} ms", load.failed, load.ok + load.failed);
        }
        if let Some(why) = self.load.as_ref().and_then(|load| load.first_failure.as_ref()) {
            line += &format!(", first failure: {why}");
        }
        line
    }
}

/// Runs one.
pub(super) async fn run(plan: Plan) -> anyhow::Result<Trial> {
    let directory = tempfile::tempdir()?;
    let mut scene = Scene::start(plan.gateways, directory.path()).await?;
    let mut trial = Trial::default();
    let (mut loads, enough) = (JoinSet::new(), CancellationToken::new());
    if plan.busy {
        traffic(&scene, WARM_UP, &enough, &mut loads);
        while let Some(done) = loads.join_next().await {
            done??;
        }
    }
    let attempts = |sights: &[Sight]| sights.iter().map(|s| s.attempts).sum::<u64>();
    let before = scene.sights().await?;
    let attempts_before = attempts(&before);
    if plan.busy {
        traffic(&scene, MARGIN + WATCH_TRAFFIC, &enough, &mut loads);
        tokio::time::sleep(MARGIN).await;
    }
    tokio::time::sleep(plan.pause).await;
    let at = scene.inject(plan.fault).await?;
    (trial.local, trial.cluster) = watch(&scene, plan.busy, at).await?;
    enough.cancel();
    if plan.busy {
        let mut sum = Outcome::new();
        while let Some(done) = loads.join_next().await {
            sum.add(done??);
        }
        trial.load = Some(sum);
        trial.attempts = attempts(&scene.sights().await?).saturating_sub(attempts_before);
    }
    if plan.returns {
        (trial.back, trial.full) = returns(&mut scene, plan, directory.path()).await?;
    }
    // Delays from the start of the cluster are not counted.
    for (now, before) in scene.sights().await?.iter().zip(&before) {
        trial.pushes.add(&now.pushes.since(&before.pushes));
    }
    scene.end().await?;
    Ok(trial)
}

/// When the last gateway ejected by itself, and when the last one had the verdict.
async fn watch(
    scene: &Scene,
    busy: bool,
    at: Instant,
) -> anyhow::Result<(Option<Duration>, Option<Duration>)> {
    let (most, every) = if busy { (WATCH_TRAFFIC, LOOK_EVERY) } else { (WATCH_IDLE, LOOK_IDLE) };
    let mut local = vec![None; scene.gateways.len()];
    let mut cluster = local.clone();
    let mut until = at + most;
    while Instant::now() < until {
        tokio::time::sleep(every).await;
        let sights = scene.sights().await?;
        for (i, sight) in sights.iter().enumerate() {
            if sight.ejected {
                local[i].get_or_insert_with(|| at.elapsed());
            }
            if sight.unhealthy {
                cluster[i].get_or_insert_with(|| at.elapsed());
            }
        }
        let all = |times: &[Option<Duration>]| times.iter().all(Option::is_some);
        if all(&cluster) && (!busy || all(&local)) {
            // Nothing more can happen, and without traffic there is nothing to wait for.
            until = until.min(if busy { Instant::now() + MARGIN } else { Instant::now() });
        }
    }
    Ok((last(&local), last(&cluster)))
}

fn traffic(
    scene: &Scene,
    duration: Duration,
    enough: &CancellationToken,
    loads: &mut JoinSet<std::io::Result<Outcome>>,
) {
    let per_second = PER_SECOND / scene.gateways.len() as f64;
    for gateway in &scene.gateways {
        let (address, request) = (gateway.address, load::chat(KEY, MODEL, TOKENS, false));
        let enough = enough.clone();
        loads.spawn(async move { load::open_until(address, &request, per_second, duration, &enough).await });
    }
}

/// The latest of them, if all are there.
fn last(times: &[Option<Duration>]) -> Option<Duration> {
    times.iter().copied().collect::<Option<Vec<_>>>()?.into_iter().max()
}

/// Mends the backend. Returns when it was used again, and when it had its full weight.
async fn returns(
    scene: &mut Scene,
    plan: Plan,
    directory: &Path,
) -> anyhow::Result<(Option<Duration>, Option<Duration>)> {
    let before = scene.sights().await?;
    scene.heal(plan.fault, directory).await?;
    let healed = Instant::now();
    let most = if plan.full_return { FULL_RETURN_MAX } else { RETURN_MAX };
    let mut back = None;
    let (enough, mut loads) = (CancellationToken::new(), JoinSet::new());
    if plan.busy {
        traffic(scene, most, &enough, &mut loads);
    }
    let mut full = None;
    while healed.elapsed() < most && full.is_none() {
        tokio::time::sleep(LOOK_IDLE).await;
        let now = scene.sights().await?;
        let used = now.iter().zip(&before).all(|(now, before)| {
            !now.ejected && !now.unhealthy && (!plan.busy || now.answers > before.answers)
        });
        if used {
            back.get_or_insert_with(|| healed.elapsed());
            if !plan.full_return {
                break;
            }
            full = now.iter().all(|now| now.healthy && now.health_factor >= 1.0).then(|| healed.elapsed());
        }
    }
    enough.cancel();
    while let Some(done) = loads.join_next().await {
        done??;
    }
    Ok((back, full))
}
