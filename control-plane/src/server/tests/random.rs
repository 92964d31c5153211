//! Random operations against the whole: whatever happens on the way, in the end every gateway holds what the store
//! holds, byte for byte, and no acknowledged write is lost.

use std::collections::BTreeMap;

use super::*;
use v1::stream_config_response::Message as Heard;
use v1::{ResourceKind, resource::Spec};

/// A small generator: the seed is printed, so that a failure can be repeated.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // xorshift64*: good enough to choose.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }
}

type Bodies = BTreeMap<(i32, String), (String, Vec<u8>)>;

/// A gateway as its side of the protocol: it holds what it acknowledged.
#[derive(Default)]
struct Simulated {
    id: String,
    epoch: String,
    revision: u64,
    bodies: Bodies,
    stream: Option<Gateway>,
    /// A delta that is to be answered.
    unanswered: Option<v1::Delta>,
}

impl Simulated {
    async fn connect(&mut self, plane: &Plane) {
        let held = self.bodies.iter().map(|((kind, name), (version, _))| v1::ResourceVersion {
            kind: *kind,
            name: name.clone(),
            version: version.clone(),
        });
        let hello = v1::Hello {
            store_epoch: self.epoch.clone(),
            store_revision: self.revision,
            resource_versions: held.collect(),
            ..hello(&self.id)
        };
        self.unanswered = None;
        self.stream = Some(plane.gateway(hello).await);
    }

    /// Reads what is there; without anything it says so after a moment.
    async fn read(&mut self) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        let wait = tokio::time::timeout(Duration::from_millis(20), stream.heard.message());
        match wait.await {
            Ok(Ok(Some(v1::StreamConfigResponse { message: Some(Heard::Delta(delta)) }))) => {
                assert!(self.unanswered.is_none(), "one delta at a time");
                if delta.store_epoch == self.epoch {
                    assert!(delta.store_revision >= self.revision, "never backwards");
                }
                self.unanswered = Some(delta);
                true
            }
            Ok(Ok(Some(_))) => true,
            Ok(Ok(None) | Err(_)) => {
                self.stream = None;
                false
            }
            Err(_) => false,
        }
    }

    /// Answers the delta, refusing one of its resources sometimes.
    async fn answer(&mut self, refuse: Option<u64>) {
        let (Some(delta), Some(stream)) = (self.unanswered.take(), &self.stream) else { return };
        let refused = refuse.filter(|_| !delta.upserts.is_empty());
        let refused = refused.map(|n| delta.upserts[n as usize % delta.upserts.len()].clone());
        for upsert in delta.upserts.iter().filter(|u| Some(*u) != refused.as_ref()) {
            let body = (upsert.version.clone(), upsert.body.to_vec());
            self.bodies.insert((upsert.kind, upsert.name.clone()), body);
        }
        for removal in &delta.removals {
            self.bodies.remove(&(removal.kind, removal.name.clone()));
        }
        match &refused {
            None => {
                self.epoch.clone_from(&delta.store_epoch);
                self.revision = delta.store_revision;
                stream.ack(&delta).await;
            }
            Some(refused) => {
                let resource = reference(refused.kind(), &refused.name);
                stream.nack(&delta, vec![v1::ResourceError { resource, message: "no".into() }]).await;
            }
        }
    }
}

fn desired(snapshot: &crate::model::State) -> Bodies {
    let row = |(key, stored): (&crate::model::Key, &Arc<crate::model::Stored>)| {
        let published = &stored.published;
        ((i32::from(key.kind), key.name.to_string()), (published.version.clone(), published.body.to_vec()))
    };
    snapshot.resources.iter().map(row).collect()
}

/// What the store holds, read by a gateway that begins with nothing.
async fn read_all(plane: &Plane, newest: u64) -> Bodies {
    let mut fresh = Simulated { id: "reader".into(), ..Simulated::default() };
    fresh.connect(plane).await;
    soon(async {
        // What was written last may not be published yet.
        while fresh.revision < newest {
            fresh.read().await;
            fresh.answer(None).await;
        }
    })
    .await;
    fresh.bodies
}

async fn run(seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut dice = Dice(seed | 1);
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let mut plane = Plane::start(store.clone(), cluster(3)).await;
    let mut admin = plane.admin().await;
    let mut gateways: Vec<Simulated> =
        (0..4).map(|i| Simulated { id: format!("g{i}"), ..Simulated::default() }).collect();
    // Of what was acknowledged, the last word on each name.
    let mut acknowledged: BTreeMap<String, Option<u32>> = BTreeMap::new();
    for step in 0..steps {
        let name = format!("t{}", dice.roll(12));
        match dice.roll(100) {
            0..=34 => {
                let weight = u32::try_from(dice.roll(1000)).unwrap();
                let display_name = weight.to_string();
                let spec = Spec::Tenant(v1::TenantSpec { display_name, ..Default::default() });
                let resource = v1::Resource { name: name.clone(), spec: Some(spec), ..Default::default() };
                let request = v1::ApplyRequest { apply_set: name.clone(), ..apply(vec![resource]) };
                admin.apply(request).await.unwrap();
                acknowledged.insert(name, Some(weight));
            }
            35..=44 => {
                let r#ref = reference(ResourceKind::Tenant, &name);
                let gone = v1::DeleteResourceRequest { r#ref, ..Default::default() };
                if admin.delete_resource(gone).await.is_ok() {
                    acknowledged.insert(name, None);
                }
            }
            45..=49 => {
                let extra = format!("extra{}", dice.roll(3));
                let made = backend(&extra, "p", "m", "http://127.0.0.1:1");
                let r#ref = reference(ResourceKind::Backend, &extra);
                if admin.create_resource(create(made)).await.is_err() {
                    let gone = v1::DeleteResourceRequest { r#ref, ..Default::default() };
                    admin.delete_resource(gone).await.unwrap();
                }
            }
            50..=54 => {
                let g = dice.roll(4) as usize;
                gateways[g].stream = None;
            }
            55..=56 if step % 3 == 0 => {
                drop(admin);
                plane.stop().await;
                plane = Plane::start(store.clone(), vec![]).await;
                admin = plane.admin().await;
                for gateway in &mut gateways {
                    gateway.stream = None;
                }
            }
            roll => {
                let g = (roll % 4) as usize;
                if gateways[g].stream.is_none() {
                    gateways[g].connect(&plane).await;
                }
                gateways[g].read().await;
                let refuse = (dice.roll(6) == 0).then(|| dice.roll(64));
                if dice.roll(4) > 0 {
                    gateways[g].answer(refuse).await;
                }
            }
        }
    }
    // What was refused comes again with a change; then everything comes to rest.
    let last = admin.create_resource(create(tenant("last"))).await.unwrap().into_inner();
    let newest = last.resource.unwrap().revision;
    let stored = read_all(&plane, newest).await;
    for gateway in &mut gateways {
        soon(async {
            while gateway.revision < newest || gateway.unanswered.is_some() {
                if gateway.stream.is_none() {
                    gateway.connect(&plane).await;
                }
                gateway.read().await;
                gateway.answer(None).await;
            }
        })
        .await;
        assert_eq!(gateway.bodies, stored, "{} holds what the store holds", gateway.id);
    }
    for (name, value) in acknowledged {
        let get = v1::GetResourceRequest { r#ref: reference(ResourceKind::Tenant, &name) };
        let found = admin.get_resource(get).await.ok().and_then(|r| r.into_inner().resource);
        let found = found.map(|r| match r.spec {
            Some(Spec::Tenant(tenant)) => tenant.display_name.parse::<u32>().unwrap(),
            _ => panic!("a tenant"),
        });
        assert_eq!(found, value, "the last acknowledged write of {name}");
    }
    let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap().into_inner();
    assert_eq!(verified.problem, "");
    drop((admin, gateways));
    plane.stop().await;
    let store = crate::store::FileStore::open(&directory.path().join("store.redb")).unwrap();
    let state = crate::model::State::load(&store.range("c/").await.unwrap()).unwrap();
    assert_eq!(desired(&state), stored, "and the file holds the same");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_random_operations_every_gateway_holds_what_the_store_holds() {
    let given = std::env::var("WEIR_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    match given {
        Some(seed) => run(seed, 2000).await,
        None => {
            for seed in [1, 20_261_123, 0xdead_beef] {
                run(seed, 250).await;
            }
        }
    }
}

#[tokio::test]
async fn a_gateway_that_does_not_answer_holds_up_nobody_and_a_burst_is_merged() {
    let plane = Plane::memory(cluster(1)).await;
    let mut stuck = plane.gateway(hello("stuck")).await;
    stuck.delta().await;
    let mut well = plane.gateway(hello("well")).await;
    let first = well.delta().await;
    well.ack(&first).await;
    let admin = plane.admin().await;
    let start = tokio::time::Instant::now();
    let writes = (0..400).map(|i| {
        let mut admin = admin.clone();
        async move { admin.create_resource(create(tenant(&format!("t{i}")))).await.unwrap() }
    });
    let writing = tokio::spawn(futures_util::future::join_all(writes));
    let (mut deltas, mut resources, mut revision) = (0_u32, 0, 0);
    while revision < 401 {
        let delta = well.delta().await;
        well.ack(&delta).await;
        deltas += 1;
        resources += delta.upserts.len();
        revision = delta.store_revision;
    }
    soon(writing).await.unwrap();
    let bound = 10.0 * start.elapsed().as_secs_f64() + 3.0;
    assert!(f64::from(deltas) <= bound, "{deltas} deltas where {bound} are the most");
    assert_eq!(resources, 400, "each is sent once");
    let list = admin.clone().list_gateways(v1::ListGatewaysRequest {}).await.unwrap().into_inner().gateways;
    assert_eq!((list[0].id.as_str(), list[0].sync()), ("stuck", v1::SyncState::Pending));
    assert!(list[0].unanswered_since.is_some());
    plane.stop().await;
}

#[tokio::test]
async fn a_restart_with_nothing_changed_sends_no_bodies_to_anybody() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let plane = Plane::start(store.clone(), cluster(5)).await;
    let mut gateways: Vec<Simulated> =
        (0..20).map(|i| Simulated { id: format!("g{i}"), ..Simulated::default() }).collect();
    for gateway in &mut gateways {
        gateway.connect(&plane).await;
        while gateway.revision == 0 {
            gateway.read().await;
            gateway.answer(None).await;
        }
    }
    plane.stop().await;
    let plane = Plane::start(store, vec![]).await;
    for gateway in &mut gateways {
        gateway.connect(&plane).await;
    }
    let mut admin = plane.admin().await;
    let wait = v1::WaitAppliedRequest { revision: 1, timeout: None };
    soon(async {
        while admin.wait_applied(wait).await.unwrap().into_inner().applied < 20 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for gateway in &mut gateways {
        assert!(!gateway.read().await && gateway.unanswered.is_none(), "not even an empty delta");
    }
    plane.stop().await;
}
