//! Random faults under concurrent writes: control planes and members of etcd are killed, leaders included, and
//! paused; gateways and discovery clients are killed, restarted, cut off and delayed; clients refuse some resources.
//! In the end the history is linearizable, nothing acknowledged is lost, nothing happened twice, and everybody holds
//! what the store holds, byte for byte, except for refused resources.

mod follower;
mod history;
mod holders;
mod writers;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use weir_control_plane::store::{EtcdConfig, EtcdStore, Store};
use weir_tests::process::Process;
use weir_tests::random::{Random, given, seed};
use weir_tests::stack::CREDENTIAL;

use self::follower::Follower;
use self::writers::{Writers, mark};
use super::*;

const WRITERS: usize = 6;
const GATEWAYS: usize = 2;
const FOLLOWERS: usize = 3;

/// The faults.
#[derive(Debug, Clone, Copy)]
enum Accident {
    LeaderKilled,
    PlaneKilled,
    PlanePaused,
    /// It gets nothing from the store, without knowing it.
    PlaneCutOff,
    EtcdLeaderKilled,
    EtcdMemberKilled,
    GatewayKilled,
    GatewayRestarted,
    FollowerRestarted,
    LinesCut,
    LinesSilent,
}

const ACCIDENTS: [Accident; 11] = [
    Accident::LeaderKilled,
    Accident::PlaneKilled,
    Accident::PlanePaused,
    Accident::PlaneCutOff,
    Accident::EtcdLeaderKilled,
    Accident::EtcdMemberKilled,
    Accident::GatewayKilled,
    Accident::GatewayRestarted,
    Accident::FollowerRestarted,
    Accident::LinesCut,
    Accident::LinesSilent,
];

/// Three control planes over three members, and all that follow them.
struct Stage {
    /// With gateways in this process.
    world: World,
    /// A gateway as a process.
    process: Process,
    followers: Vec<Follower>,
    end: CancellationToken,
}

async fn gateway_process(world: &World) -> Process {
    let directory = world.data.path().join("gateway-process");
    let token = world.data.path().join("token");
    std::fs::write(&token, ADMIN_TOKEN).expect("written");
    let urls = world.urls();
    let args = [
        "--id=process",
        "--listen=127.0.0.1:0",
        "--ops-listen=127.0.0.1:0",
        "--control-plane",
        &urls,
        "--gateway-token-file",
        token.to_str().expect("UTF-8"),
        "--data-dir",
        directory.to_str().expect("UTF-8"),
    ];
    Process::start_with("weir-gateway", &args, &[(CREDENTIAL, "x")], "serving").await
}

impl Stage {
    async fn start() -> Self {
        let end = CancellationToken::new();
        let world = World::start(GATEWAYS).await;
        let process = gateway_process(&world).await;
        let mut followers = Vec::new();
        for k in 0..FOLLOWERS {
            let id = format!("c{k}");
            let directory = world.data.path().join(&id);
            followers.push(Follower::start(&id, &world.addresses, &directory, &end).await);
        }
        Self { world, process, followers, end }
    }

    async fn happen(&mut self, what: Accident, dice: &mut Random) {
        let moment = Duration::from_millis(300 + dice.below(1200));
        let (plane, gateway, member) = (dice.index(3), dice.index(GATEWAYS), dice.index(3));
        let follower = dice.index(FOLLOWERS);
        let Self { world, process, followers, .. } = self;
        match what {
            Accident::LeaderKilled | Accident::PlaneKilled => {
                let plane = if matches!(what, Accident::LeaderKilled) { world.leader().await } else { plane };
                world.kill(plane).await;
                tokio::time::sleep(moment).await;
                world.restart(plane).await;
            }
            Accident::PlanePaused => {
                let paused = &world.planes[plane].as_ref().expect("it runs").child;
                signal(paused, "-STOP").await;
                tokio::time::sleep(moment * 2).await;
                signal(paused, "-CONT").await;
            }
            Accident::PlaneCutOff => {
                world.lines[plane].iter().for_each(Line::silence);
                tokio::time::sleep(moment * 2).await;
                world.lines[plane].iter().for_each(Line::mend);
            }
            Accident::EtcdLeaderKilled | Accident::EtcdMemberKilled => {
                let leads = matches!(what, Accident::EtcdLeaderKilled);
                let member = if leads { world.etcd.leader().await } else { member };
                world.etcd.kill(member).await;
                tokio::time::sleep(moment).await;
                world.etcd.restart(member).await;
            }
            Accident::GatewayKilled => {
                process.kill().await;
                *process = gateway_process(world).await;
            }
            Accident::GatewayRestarted => {
                world.gateways.remove(gateway).stop().await;
                world.add_gateway(gateway).await;
                let back = world.gateways.pop().expect("added");
                world.gateways.insert(gateway, back);
            }
            Accident::FollowerRestarted => followers[follower].restart().await,
            Accident::LinesCut => {
                followers[follower].cut();
                tokio::time::sleep(moment).await;
                followers[follower].mend();
            }
            Accident::LinesSilent => {
                followers[follower].silence();
                tokio::time::sleep(moment * 2).await;
                followers[follower].mend();
            }
        }
    }

    /// The revision of the store.
    async fn revision(&self) -> u64 {
        self.store().await.revision
    }

    /// The resources of the store.
    async fn store(&self) -> weir_control_plane::store::Range {
        let config = EtcdConfig::parse(&self.world.etcd.url("weir")).expect("a URL");
        EtcdStore::open(config).await.expect("opens").range("c/r/").await.expect("reads")
    }

    /// Waits until every control plane reports that all have answered a revision.
    async fn rest(&self, revision: u64) {
        let everybody = GATEWAYS + 1 + FOLLOWERS;
        for plane in 0..3 {
            let mut admin = self.world.admin(plane).await;
            let mut waited = v1::WaitAppliedResponse::default();
            let all = async {
                loop {
                    let wait = v1::WaitAppliedRequest { revision, timeout: None };
                    let answer = admin.wait_applied(wait).await.expect("answers").into_inner();
                    if answer.connected as usize == everybody && answer.pending.is_empty() {
                        return;
                    }
                    waited = answer;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            let heard = tokio::time::timeout(Duration::from_secs(60), all).await;
            assert!(
                heard.is_ok(),
                "control plane {plane} has heard of all at revision {revision}: {waited:?}"
            );
            let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.expect("answers");
            assert_eq!(verified.into_inner().problem, "", "control plane {plane}");
        }
    }

    /// The audit log of revisions from..=to, the oldest first; every control plane has the same.
    async fn log(&self, from: u64, to: u64) -> Vec<v1::AuditEntry> {
        let mut told: Option<Vec<v1::AuditEntry>> = None;
        for plane in 0..3 {
            let mut admin = self.world.admin(plane).await;
            let (mut log, mut page_token) = (Vec::new(), String::new());
            loop {
                let request = v1::HistoryRequest { page_size: 1000, page_token, ..Default::default() };
                let page = admin.history(request).await.expect("answers").into_inner();
                let older = page.entries.last().is_none_or(|oldest| oldest.revision < from);
                log.extend(page.entries);
                page_token = page.next_page_token;
                if older || page_token.is_empty() {
                    break;
                }
            }
            log.retain(|entry| (from..=to).contains(&entry.revision));
            log.reverse();
            if let Some(told) = &told {
                let differ = told.iter().zip(&log).find(|(one, other)| one != other);
                assert_eq!(differ, None, "control plane {plane} tells another history");
                assert_eq!(told.len(), log.len(), "control plane {plane} tells another history");
            }
            told = Some(log);
        }
        told.expect("three of them")
    }
}

async fn run(seed: u64, accidents: usize) {
    let mut dice = Random::new(seed);
    let mut stage = Stage::start().await;
    let first = stage.revision().await;
    let writers = Arc::new(Writers {
        planes: stage.world.addresses.iter().map(|address| format!("http://{address}")).collect(),
        end: AtomicBool::new(false),
        answered: AtomicU64::new(0),
        first,
        newest: AtomicU64::new(first),
        refusing: stage.followers.iter().map(|follower| follower.id.clone()).collect(),
    });
    let writing = writers::start(&writers, seed, WRITERS);
    let mut left = Vec::new();
    for _ in 0..accidents {
        if left.is_empty() {
            left = ACCIDENTS.to_vec();
        }
        let what = left.swap_remove(dice.index(left.len()));
        let started = tokio::time::Instant::now();
        stage.happen(what, &mut dice).await;
        let before = writers.answered.load(Ordering::Relaxed);
        let go_on = || async { writers.answered.load(Ordering::Relaxed) >= before + 60 };
        eventually("writes go on", go_on).await;
        println!("{what:?}, {:.1} s", started.elapsed().as_secs_f64());
    }
    writers.end.store(true, Ordering::Relaxed);
    let mut calls = Vec::new();
    for task in writing {
        calls.extend(task.await.expect("ends well"));
    }

    let last = stage.revision().await;
    stage.rest(last).await;
    let log = stage.log(first + 1, last).await;
    assert_eq!(log.last().map(|entry| entry.revision), Some(last), "the log ends where the store does");
    let (states, summary) = match history::check(first, history::State::default(), &calls, &log) {
        Ok(found) => found,
        Err(wrong) => panic!("seed {seed}: {wrong}"),
    };
    println!("{} calls: {summary:?}", calls.len());
    assert!(summary.writes > 100 && summary.refused > 10, "something was tried: {summary:?}");
    holders::the_store_holds_what_the_model_says(&stage, states.last().expect("the first at least")).await;
    let deleted: BTreeSet<String> = log
        .iter()
        .flat_map(|entry| &entry.changes)
        .filter(|change| change.action() == v1::ChangeAction::Delete)
        .filter_map(|change| Some(change.r#ref.as_ref()?.name.clone()))
        .collect();
    holders::check(&mut stage, &deleted).await;
    for follower in &stage.followers {
        let refusals = follower.seen.lock().expect("not poisoned").refusals;
        println!("{} refused {refusals} times", follower.id);
        assert!(refusals > 0, "words that end in {} were written", mark(&follower.id));
    }
    stage.world.all_serve().await;
    for follower in &mut stage.followers {
        follower.stop().await;
    }
    stage.process.kill().await;
    for gateway in stage.world.gateways {
        gateway.stop().await;
    }
    stage.end.cancel();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_random_accidents_nothing_acknowledged_is_lost_and_every_gateway_holds_what_the_store_holds() {
    let accidents = given("WEIR_TEST_ACCIDENTS").unwrap_or(ACCIDENTS.len() as u64);
    run(seed(|| 20_261_123), accidents as usize).await;
}
