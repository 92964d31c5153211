//! Random accidents while everybody writes: control planes and members of etcd are killed, the leaders among them,
//! gateways restart. In the end nothing acknowledged is lost, nothing happened twice, the order of all writes is that in
//! which they were seen to happen, and every gateway holds what the store holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use prost::Message as _;
use tonic::Code;
use weir_control_plane::store::{EtcdConfig, EtcdStore, Store};
use weir_discovery::{Disk, Held};
use weir_tests::plane::admin_at;

use super::*;

/// For one call: above what a control plane waits for its store.
const CALL: Duration = Duration::from_secs(20);
/// Writers with a resource of their own.
const WRITERS: usize = 4;
/// Writers of one resource that all of them count up.
const COUNTERS: usize = 3;

/// A small generator; its seed is printed, so that a failure can be looked into.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides) as usize
    }
}

/// An acknowledged write.
#[derive(Debug)]
struct Write {
    began: Instant,
    ended: Instant,
    revision: u64,
}

/// What the writers share.
struct Writers {
    planes: Vec<String>,
    end: AtomicBool,
    /// Acknowledged so far.
    done: AtomicU64,
}

impl Writers {
    /// Calls until there is an answer, the same request at one control plane after the other.
    async fn call<A, F>(&self, from: usize, call: impl Fn(Admin) -> F) -> Result<A, tonic::Status>
    where
        F: Future<Output = Result<tonic::Response<A>, tonic::Status>>,
    {
        for at in from.. {
            let admin = admin_at(&self.planes[at % self.planes.len()]);
            match tokio::time::timeout(CALL, call(admin)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                // What is not known is asked again; its request id sees to it that it is done once.
                Err(_) => {}
                Ok(Err(status))
                    if matches!(
                        status.code(),
                        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
                    ) => {}
                Ok(Err(status)) => return Err(status),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("it asks for ever")
    }

    async fn write(&self, writer: usize) -> (u64, Vec<Write>) {
        let (mut n, mut history) = (0, Vec::new());
        while !self.end.load(Ordering::Relaxed) {
            let began = Instant::now();
            let request = v1::ApplyRequest {
                resources: vec![tenant(&format!("w{writer}"), &(n + 1).to_string())],
                apply_set: format!("w{writer}"),
                request_id: uuid(),
                ..Default::default()
            };
            let answer = self
                .call(writer + n as usize, |mut admin| {
                    let request = request.clone();
                    async move { admin.apply(request).await }
                })
                .await;
            let revision = match answer {
                Ok(answer) => answer.revision,
                // Many at once: it was not done.
                Err(status) if status.code() == Code::Aborted => continue,
                Err(status) => panic!("{status}"),
            };
            n += 1;
            history.push(Write { began, ended: Instant::now(), revision });
            self.done.fetch_add(1, Ordering::Relaxed);
        }
        (n, history)
    }

    async fn count(&self, writer: usize) -> (u64, Vec<Write>) {
        let (mut n, mut history, mut tries) = (0, Vec::new(), writer);
        while !self.end.load(Ordering::Relaxed) {
            tries += 1;
            let r#ref = Some(v1::ResourceRef { kind: ResourceKind::Tenant.into(), name: "counter".into() });
            let get = v1::GetResourceRequest { r#ref };
            let read = self
                .call(tries, |mut admin| {
                    let get = get.clone();
                    async move { admin.get_resource(get).await }
                })
                .await;
            // One that lags may not have it yet.
            let Some(mut found) = read.ok().and_then(|answer| answer.resource) else { continue };
            let Some(Spec::Tenant(spec)) = &mut found.spec else { panic!("a tenant") };
            spec.display_name = (spec.display_name.parse::<u64>().expect("a number") + 1).to_string();
            let began = Instant::now();
            let request =
                v1::UpdateResourceRequest { resource: Some(found), request_id: uuid(), ..Default::default() };
            match self
                .call(tries, |mut admin| {
                    let request = request.clone();
                    async move { admin.update_resource(request).await }
                })
                .await
            {
                Ok(answer) => {
                    n += 1;
                    let revision = answer.resource.expect("the one made").revision;
                    history.push(Write { began, ended: Instant::now(), revision });
                    self.done.fetch_add(1, Ordering::Relaxed);
                }
                // Somebody else was faster.
                Err(status) if status.code() == Code::Aborted => {}
                Err(status) => panic!("{status}"),
            }
        }
        (n, history)
    }
}

fn uuid() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// Whoever began after another one had ended has a later revision, and no two have the same.
fn is_in_order(mut writes: Vec<Write>) {
    writes.sort_by_key(|write| write.revision);
    // The latest beginning of all that come before: nobody behind may have ended before that.
    let mut begun: Option<&Write> = None;
    for pair in writes.windows(2) {
        assert_ne!(pair[0].revision, pair[1].revision, "two writes made one revision");
    }
    for write in &writes {
        if let Some(before) = begun {
            assert!(
                before.began <= write.ended,
                "{write:?} was over before {before:?} began, and comes after it"
            );
        }
        if begun.is_none_or(|before| before.began < write.began) {
            begun = Some(write);
        }
    }
}

/// What the store holds, as gateways are to hold it.
async fn stored(etcd: &Etcd) -> BTreeMap<(i32, String), v1::Resource> {
    let store = EtcdStore::open(EtcdConfig::parse(&etcd.url("weir")).expect("a URL")).await.expect("opens");
    let entries = store.range("c/r/").await.expect("reads").entries;
    let resource = |value: &[u8]| v1::Resource::decode(value).expect("a resource");
    let bare = |r: v1::Resource| v1::Resource { name: r.name, spec: r.spec, ..Default::default() };
    let rows = entries.iter().map(|entry| bare(resource(&entry.value)));
    rows.map(|r| ((weir_proto::resource::kind_of(&r) as i32, r.name.clone()), r)).collect()
}

async fn accident(world: &mut World, dice: &mut Dice) {
    let what = dice.roll(10);
    println!("accident {what}");
    match what {
        0..=2 => {
            let leader = world.leader().await;
            world.kill(leader).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
            world.restart(leader).await;
        }
        3..=4 => {
            let one = dice.roll(3);
            world.kill(one).await;
            world.restart(one).await;
        }
        5..=7 => {
            let leader = world.etcd.leader().await;
            world.etcd.kill(leader).await;
            tokio::time::sleep(Duration::from_millis(1500)).await;
            world.etcd.restart(leader).await;
        }
        _ => {
            let k = dice.roll(3);
            let gateway = world.gateways.remove(k);
            gateway.stop().await;
            world.add_gateway(k).await;
            let back = world.gateways.pop().expect("added");
            world.gateways.insert(k, back);
        }
    }
}

async fn run(seed: u64, accidents: usize) {
    println!("seed {seed}");
    let mut dice = Dice(seed | 1);
    let mut world = World::start(3).await;
    let apply = v1::ApplyRequest {
        resources: vec![tenant("counter", "0")],
        apply_set: "c".into(),
        ..Default::default()
    };
    world.admin(0).await.apply(apply).await.expect("applied");
    let planes = world.addresses.iter().map(|address| format!("http://{address}")).collect();
    let writers = Arc::new(Writers { planes, end: AtomicBool::new(false), done: AtomicU64::new(0) });
    let spawn = |counts: bool, writer: usize| {
        let writers = writers.clone();
        tokio::spawn(
            async move { if counts { writers.count(writer).await } else { writers.write(writer).await } },
        )
    };
    let own: Vec<_> = (0..WRITERS).map(|writer| spawn(false, writer)).collect();
    let counters: Vec<_> = (0..COUNTERS).map(|writer| spawn(true, writer)).collect();
    for _ in 0..accidents {
        accident(&mut world, &mut dice).await;
        let before = writers.done.load(Ordering::Relaxed);
        eventually("writes go on", async || writers.done.load(Ordering::Relaxed) >= before + 20).await;
    }
    writers.end.store(true, Ordering::Relaxed);
    let (mut history, mut counted) = (Vec::new(), 0);
    let mut acknowledged = BTreeMap::new();
    for (writer, task) in own.into_iter().enumerate() {
        let (n, writes) = task.await.expect("ends well");
        acknowledged.insert(format!("w{writer}"), n);
        history.extend(writes);
    }
    for task in counters {
        let (n, writes) = task.await.expect("ends well");
        counted += n;
        history.extend(writes);
    }
    acknowledged.insert("counter".into(), counted);
    println!("{} acknowledged writes, {counted} of them on one resource", history.len());
    is_in_order(history);
    // Everything comes to rest; every control plane says so.
    world.change_everywhere(0, "last").await;
    let stored = stored(&world.etcd).await;
    for (name, n) in &acknowledged {
        let found = &stored[&(ResourceKind::Tenant as i32, name.clone())];
        assert_eq!(found.spec, tenant(name, &n.to_string()).spec, "{name}: all that was told, and once");
    }
    for plane in 0..3 {
        let mut admin = world.admin(plane).await;
        let verified =
            admin.verify_audit(v1::VerifyAuditRequest::default()).await.expect("answers").into_inner();
        assert_eq!(verified.problem, "", "control plane {plane}");
        for k in 0..3 {
            let request = v1::GetGatewayConfigRequest { gateway_id: format!("g{k}") };
            let config = admin.get_gateway_config(request).await.expect("answers").into_inner();
            assert!(
                config.differences.is_empty(),
                "control plane {plane}, gateway {k}: {:?}",
                config.differences
            );
        }
    }
    for k in 0..3 {
        let held = Disk::new(&world.data.path().join(format!("gateway-{k}"))).expect("there").load();
        let Held { resources, .. } = held.expect("a copy");
        let held =
            resources.into_iter().map(|(key, (_, body))| (key, v1::Resource::decode(body).expect("whole")));
        assert_eq!(held.collect::<BTreeMap<_, _>>(), stored, "gateway {k} holds what the store holds");
    }
    world.all_serve().await;
    for gateway in world.gateways {
        gateway.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_random_accidents_nothing_acknowledged_is_lost_and_every_gateway_holds_what_the_store_holds() {
    let given = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seed = given("WEIR_TEST_SEED").unwrap_or(20_261_123);
    let accidents = given("WEIR_TEST_ACCIDENTS").unwrap_or(6);
    run(seed, accidents as usize).await;
}
