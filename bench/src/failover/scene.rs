//! One cluster for one trial: a control plane, gateways, three backends of which one will fail.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::time::Instant;
use weir_proto::v1::{self, resource::Spec};

use super::relay::Relay;
use crate::fleet::ControlPlane;
use crate::load::Connection;
use crate::resources::{Resources, backend};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs, fetch};

pub(super) const MODEL: &str = "gpt-4.1";
/// The tokens of an answer and their rate: 100 ms in all.
pub(super) const TOKENS: u64 = 10;
const TOKENS_PER_S: f64 = 100.0;
/// The backend that fails.
const VICTIM: &str = "b0";
/// The factor of a slow backend.
const SLOW_FACTOR: f64 = 10.0;
/// Every gateway must have a verdict of the control plane within this time.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// A fault of one backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// Its process is killed: connections break, new ones are refused.
    Kill,
    /// Its process is stopped: it accepts and does not answer.
    Hang,
    /// No packet passes in either direction.
    BlackHole,
    /// It takes ten times as long.
    Slow,
    /// It answers 500 at once, and its health page is good.
    FastFail,
}

impl Fault {
    pub(super) const ALL: [Self; 5] = [Self::Kill, Self::Hang, Self::BlackHole, Self::Slow, Self::FastFail];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Hang => "hang",
            Self::BlackHole => "black_hole",
            Self::Slow => "slow",
            Self::FastFail => "fast_fail",
        }
    }
}

/// The cluster.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) gateways: Vec<Gateway>,
    control_plane: ControlPlane,
    mocks: Vec<Mock>,
    relay: Relay,
}

/// The state of the failing backend at one gateway.
#[derive(Debug, Clone, Default)]
pub(super) struct Sight {
    /// The gateway ejected it by its own observations.
    pub(super) ejected: bool,
    /// The gateway has the verdict that it is unhealthy.
    pub(super) unhealthy: bool,
    /// Good answers from it.
    pub(super) answers: u64,
    /// Attempts at any backend.
    pub(super) attempts: u64,
    /// The gateway has the verdict that it is healthy.
    pub(super) healthy: bool,
    /// The part of its weight that its health leaves here.
    pub(super) health_factor: f64,
    /// The delays of verdicts here.
    pub(super) pushes: Pushes,
}

/// The delays of verdicts from their decision until they were in force: a histogram of a gateway's metrics.
#[derive(Debug, Clone, Default)]
pub(super) struct Pushes {
    pub(super) count: u64,
    /// (Upper edge in seconds, count up to it), by edge.
    buckets: Vec<(f64, u64)>,
}

impl Pushes {
    pub(super) fn add(&mut self, other: &Self) {
        self.count += other.count;
        for (edge, count) in &other.buckets {
            match self.buckets.iter_mut().find(|(own, _)| own == edge) {
                Some((_, own)) => *own += count,
                None => self.buckets.push((*edge, *count)),
            }
        }
        self.buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    }

    /// The difference to an earlier reading.
    pub(super) fn since(&self, before: &Self) -> Self {
        let old =
            |edge: f64| before.buckets.iter().find(|(own, _)| *own == edge).map_or(0, |(_, count)| *count);
        let buckets = self.buckets.iter().map(|(edge, count)| (*edge, count.saturating_sub(old(*edge))));
        Self { count: self.count.saturating_sub(before.count), buckets: buckets.collect() }
    }

    /// The count up to this number of seconds, which must be an edge.
    pub(super) fn within(&self, seconds: f64) -> u64 {
        self.buckets.iter().find(|(edge, _)| *edge >= seconds).map_or(0, |(_, count)| *count)
    }

    /// The upper edge of the bucket with the slowest value; infinite above the last edge.
    pub(super) fn slowest_ms(&self) -> f64 {
        let edge = self.buckets.iter().find(|(_, count)| *count == self.count).map(|(edge, _)| *edge);
        edge.unwrap_or(f64::INFINITY) * 1e3
    }

    fn read(&mut self, name: &str, value: f64) {
        if name.ends_with("_count") {
            self.count = value as u64;
        } else if let Some((_, rest)) = name.split_once("le=\"")
            && let Some(edge) = rest.split('"').next().and_then(|edge| edge.parse().ok())
        {
            self.buckets.push((edge, value as u64));
        }
    }
}

fn mock_args(port: u16) -> MockArgs {
    MockArgs {
        model: MODEL.into(),
        port,
        slots: 1000,
        decode_tokens_per_s: TOKENS_PER_S,
        ..MockArgs::default()
    }
}

impl Scene {
    /// Starts everything, and waits until every gateway is connected and has a verdict on every backend.
    pub(super) async fn start(gateways: u16, directory: &Path) -> anyhow::Result<Self> {
        let mut mocks = Vec::new();
        for i in 0..3 {
            mocks.push(Mock::start(&format!("b{i}"), &mock_args(0), directory).await?);
        }
        let relay = Relay::start(mocks[0].address).await?;
        let mut resources = Resources::basic();
        // Only unary answers can all be repeated elsewhere. They are hedged only if the operator wants it.
        let hedging = v1::Hedging { unary: true, ..Default::default() };
        resources.put(MODEL, Spec::Pool(v1::PoolSpec { hedging: Some(hedging), ..Default::default() }));
        for (i, mock) in mocks.iter().enumerate() {
            let address = if i == 0 { relay.address } else { mock.address };
            resources.put(&format!("b{i}"), Spec::Backend(backend(MODEL, MODEL, address, 1000)));
        }
        resources.put(MODEL, Spec::Model(v1::ModelSpec { pool: MODEL.into(), ..Default::default() }));
        let control_plane = ControlPlane::start(&resources).await?;
        let mut started = Vec::new();
        for i in 0..gateways {
            let args = GatewayArgs {
                id: format!("g{i}"),
                control_plane: Some(control_plane.access()),
                ..GatewayArgs::default()
            };
            started.push(Gateway::start(&args, &resources, directory).await?);
        }
        let scene = Self { gateways: started, control_plane, mocks, relay };
        let settled = async {
            while !scene.is_settled().await? {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(SETTLE_TIMEOUT, settled)
            .await
            .with_context(|| format!("not every backend was found healthy within {SETTLE_TIMEOUT:?}"))??;
        Ok(scene)
    }

    async fn is_settled(&self) -> anyhow::Result<bool> {
        for gateway in &self.gateways {
            let page = fetch(gateway.ops, "/metrics").await?;
            let healthy = page
                .lines()
                .filter(|line| line.starts_with("weir_backend_state") && line.contains("state=\"healthy\""));
            // And has reached it itself: an observer that never reached a backend that others reach has no vote on
            // it.
            let seen = page.lines().filter(|line| {
                line.starts_with("weir_gateway_probes_total")
                    && line.contains("tier=\"liveness\"")
                    && line.contains("outcome=\"pass\"")
            });
            if healthy.count() < self.mocks.len() || seen.count() < self.mocks.len() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Switches the fault on.
    pub(super) async fn inject(&mut self, fault: Fault) -> anyhow::Result<Instant> {
        match fault {
            Fault::Kill => self.mocks[0].process.kill().await?,
            Fault::Hang => self.mocks[0].process.signal(Signal::STOP)?,
            Fault::BlackHole => self.relay.set_dark(true),
            Fault::Slow => self.set_faults(&format!(r#"{{"slow_factor":{SLOW_FACTOR}}}"#)).await?,
            Fault::FastFail => self.set_faults(r#"{"error_status":{"status":500}}"#).await?,
        }
        Ok(Instant::now())
    }

    /// Switches the fault off.
    pub(super) async fn heal(&mut self, fault: Fault, directory: &Path) -> anyhow::Result<()> {
        match fault {
            Fault::Kill => {
                let port = self.mocks[0].address.port();
                self.mocks[0] = Mock::start("b0-again", &mock_args(port), directory).await?;
            }
            Fault::Hang => self.mocks[0].process.signal(Signal::CONT)?,
            Fault::BlackHole => self.relay.set_dark(false),
            Fault::Slow | Fault::FastFail => self.set_faults("{}").await?,
        }
        Ok(())
    }

    async fn set_faults(&self, json: &str) -> anyhow::Result<()> {
        let request = format!(
            "POST /admin/faults HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{json}",
            json.len()
        );
        let mut connection = Connection::open(self.mocks[0].address).await?;
        let (answer, body) = connection.call_for_body(request.as_bytes()).await?;
        anyhow::ensure!(answer.status < 300, "faults of a mock: {} {body}", answer.status);
        Ok(())
    }

    /// The current state of the backend at each gateway.
    pub(super) async fn sights(&self) -> anyhow::Result<Vec<Sight>> {
        let mut sights = Vec::new();
        for gateway in &self.gateways {
            sights.push(sight(&fetch(gateway.ops, "/metrics").await?));
        }
        Ok(sights)
    }

    /// Ends it.
    pub(super) async fn end(self) -> anyhow::Result<()> {
        let Self { gateways, control_plane, mocks, .. } = self;
        // A stopped process reacts to no other signal.
        drop((gateways, mocks));
        control_plane.end().await
    }
}

/// Reads a page of metrics.
fn sight(page: &str) -> Sight {
    let mut sight = Sight::default();
    for line in page.lines() {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let value: f64 = value.parse().unwrap_or(0.0);
        let of_victim = name.contains(&format!("backend=\"{VICTIM}\""));
        if name.starts_with("weir_backend_attempts_total") {
            sight.attempts += value as u64;
            if of_victim && name.contains("outcome=\"ok\"") {
                sight.answers = value as u64;
            }
        } else if of_victim && name.starts_with("weir_backend_ejected") {
            sight.ejected = value > 0.0;
        } else if of_victim && name.starts_with("weir_backend_state") && value > 0.0 {
            sight.unhealthy = name.contains("state=\"unhealthy\"");
            sight.healthy = name.contains("state=\"healthy\"");
        } else if of_victim && name.starts_with("weir_backend_health_factor") {
            sight.health_factor = value;
        } else if name.starts_with("weir_verdict_delay_seconds") {
            sight.pushes.read(name, value);
        }
    }
    sight
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_metrics_says_how_a_gateway_sees_the_backend() {
        let page = "# TYPE weir_backend_ejected gauge\n\
            weir_backend_ejected{backend=\"b0\"} 1.0\n\
            weir_backend_ejected{backend=\"b1\"} 0.0\n\
            weir_backend_state{backend=\"b0\",state=\"unhealthy\"} 1.0\n\
            weir_backend_attempts_total{backend=\"b0\",outcome=\"ok\"} 3\n\
            weir_backend_attempts_total{backend=\"b1\",outcome=\"timeout\"} 4\n";
        let sight = sight(page);
        assert!(sight.ejected && sight.unhealthy);
        assert_eq!((sight.answers, sight.attempts), (3, 7));
    }
}
