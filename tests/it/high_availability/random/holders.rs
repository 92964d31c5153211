//! The resources that every gateway and client holds, compared with the store byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use weir_discovery::{ConfigState, Disk};
use weir_tests::stack::CREDENTIAL;

use super::history::{SET, State};
use super::writers::{mark, word};
use super::*;

type Key = (i32, String);
/// Kind and name, and for each the version and the encoded body.
type Bodies = BTreeMap<Key, (String, Bytes)>;

const TENANT: i32 = ResourceKind::Tenant as i32;
/// A backend whose credential only the gateway that is a process can read.
const PICKY: &str = "picky";

fn loaded(directory: &Path) -> ConfigState {
    Disk::new(directory).expect("there").load().expect("a copy")
}

fn shown(key: &Key) -> String {
    format!("{:?} {}", ResourceKind::try_from(key.0).unwrap_or_default(), key.1)
}

pub(super) async fn the_store_holds_what_the_model_says(stage: &Stage, model: &State) {
    let mut found = State::default();
    for entry in stage.store().await.entries {
        let resource = v1::Resource::decode(entry.value).expect("a resource");
        match &resource.spec {
            Some(Spec::Tenant(tenant)) if resource.name != "acme" => {
                let row = (tenant.display_name.clone(), resource.apply_set == SET);
                found.tenants.insert(resource.name, row);
            }
            Some(Spec::Backend(backend)) => {
                found.weights.extend(backend.weight.map(|weight| (resource.name.clone(), weight)));
            }
            _ => {}
        }
    }
    assert_eq!(found, *model, "the store holds what the history comes to");
}

/// The resources of a client that starts empty and follows one control plane: as encoded there.
async fn read_at(stage: &Stage, plane: usize, revision: u64) -> Bodies {
    let directory = stage.world.data.path().join(format!("reader-{plane}-{revision}"));
    let planes = &stage.world.addresses[plane..=plane];
    let mut reader = Follower::start(&format!("reader-{plane}"), planes, &directory, &stage.end).await;
    eventually(&format!("control plane {plane} sends everything up to {revision}"), || {
        let held = Disk::new(&directory).expect("there").load();
        async move { held.is_some_and(|held| held.revision >= revision) }
    })
    .await;
    reader.stop().await;
    loaded(&directory).bodies()
}

/// The resources that all must hold: the store's, as every control plane encodes them.
async fn desired(stage: &Stage, revision: u64) -> Bodies {
    let mut of_all: Option<Bodies> = None;
    for plane in 0..3 {
        let bodies = read_at(stage, plane, revision).await;
        if let Some(others) = &of_all {
            assert_eq!(*others, bodies, "control plane {plane} encodes as the others do");
        }
        of_all = Some(bodies);
    }
    let bodies = of_all.expect("three of them");
    let range = stage.store().await;
    assert_eq!(range.revision, revision, "nobody writes any more");
    let mut stored = BTreeMap::new();
    for entry in range.entries {
        let resource = v1::Resource::decode(entry.value).expect("a resource");
        let bare = v1::Resource { name: resource.name, spec: resource.spec, ..Default::default() };
        stored.insert((weir_proto::resource::kind_of(&bare) as i32, bare.name.clone()), bare);
    }
    assert_eq!(bodies.keys().collect::<Vec<_>>(), stored.keys().collect::<Vec<_>>());
    for (key, (version, body)) in &bodies {
        let decoded = v1::Resource::decode(body.clone()).expect("whole");
        assert_eq!(decoded, stored[key], "{}", shown(key));
        let hash: String = Sha256::digest(body).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(*version, hash, "{}: the version is that of the content", shown(key));
    }
    bodies
}

/// All holders, with the directories of their copies.
fn holders(stage: &Stage) -> Vec<(String, PathBuf)> {
    let data = stage.world.data.path();
    let gateways = (0..GATEWAYS).map(|k| (format!("g{k}"), data.join(format!("gateway-{k}"))));
    let process = [("process".to_owned(), data.join("gateway-process"))];
    let followers = stage.followers.iter().map(|f| (f.id.clone(), f.directory.clone()));
    gateways.chain(process).chain(followers).collect()
}

/// The part of these that a holder refuses.
fn refuses(id: &str, bodies: &Bodies) -> BTreeSet<Key> {
    let marked = |body: &Bytes| {
        let resource = v1::Resource::decode(body.clone()).expect("whole");
        word(Some(&resource)).ends_with(&mark(id))
    };
    let tenants = bodies.iter().filter(|(key, (_, body))| key.0 == TENANT && marked(body));
    let mut refused: BTreeSet<Key> = tenants.map(|(key, _)| key.clone()).collect();
    if id.starts_with('g') {
        let picky = (ResourceKind::Backend as i32, PICKY.to_owned());
        refused.extend(Some(picky).filter(|picky| bodies.contains_key(picky)));
    }
    refused
}

/// Every holder has the desired resources, byte for byte, except for those it refuses; every control plane shows
/// that.
async fn everybody_holds(stage: &Stage, revision: u64, deleted: &BTreeSet<String>) -> usize {
    stage.rest(revision).await;
    let bodies = desired(stage, revision).await;
    let mut all_refused = 0;
    for (id, directory) in holders(stage) {
        let held = loaded(&directory);
        let refused = refuses(&id, &bodies);
        all_refused += refused.len();
        let of_holder = held.bodies();
        for key in of_holder.keys().chain(bodies.keys()).filter(|key| !refused.contains(*key)) {
            assert_eq!(of_holder.get(key), bodies.get(key), "{id} holds {}", shown(key));
        }
        if refused.is_empty() {
            assert_eq!(held.revision, revision, "{id}");
        }
        if let Some(follower) = stage.followers.iter().find(|follower| follower.id == id) {
            keeps_what_it_had(follower, &held, &refused, deleted);
        }
        for plane in 0..3 {
            is_shown(stage, plane, &id, &held, &refused).await;
        }
    }
    all_refused
}

/// Of a resource that a follower refuses, the last accepted version is held and in force.
fn keeps_what_it_had(
    follower: &Follower,
    held: &ConfigState,
    refused: &BTreeSet<Key>,
    deleted: &BTreeSet<String>,
) {
    let seen = follower.seen.lock().expect("not poisoned");
    for key in refused {
        let kept = held.get(key.0, &key.1).map(|held| v1::Resource::decode(held.body()).expect("whole"));
        let kept = kept.as_ref().map(|resource| word(Some(resource)));
        let in_force = seen.in_force.get(&key.1).map(String::as_str);
        assert_eq!(kept, in_force, "{}: {}", follower.id, key.1);
        if kept.is_none() {
            let never = !seen.ever.contains(&key.1) || deleted.contains(&key.1);
            assert!(never, "{}: {} was in force and nobody deleted it", follower.id, key.1);
        }
    }
}

/// A control plane shows each refusal with a reason, and no other difference.
async fn is_shown(stage: &Stage, plane: usize, id: &str, held: &ConfigState, refused: &BTreeSet<Key>) {
    let mut admin = stage.world.admin(plane).await;
    let list = admin.list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner();
    let listed = list.gateways.iter().find(|gateway| gateway.id == id).expect("listed");
    let sync = if refused.is_empty() { v1::SyncState::Synced } else { v1::SyncState::Error };
    assert_eq!(listed.sync(), sync, "control plane {plane}, {id}: {:?}", listed.errors);
    let key = |r: &Option<v1::ResourceRef>| r.as_ref().map(|r| (r.kind, r.name.clone())).expect("named");
    let errors: BTreeSet<Key> = listed.errors.iter().map(|error| key(&error.r#ref)).collect();
    assert_eq!(errors, *refused, "control plane {plane}, {id}");
    let request = v1::GetGatewayConfigRequest { gateway_id: id.into() };
    let ask = async || {
        let answer = stage.world.admin(plane).await.get_gateway_config(request.clone()).await;
        answer.expect("answers").into_inner()
    };
    // A control plane may learn of a revision a moment before it has published it itself.
    eventually(&format!("control plane {plane} shows what {id} holds at its newest revision"), async || {
        ask().await.differences.len() == refused.len()
    })
    .await;
    let config = ask().await;
    let differ: BTreeSet<Key> = config.differences.iter().map(|difference| key(&difference.r#ref)).collect();
    assert_eq!(differ, *refused, "control plane {plane}, {id}: {:?}", config.differences);
    for difference in &config.differences {
        let key = key(&difference.r#ref);
        let version = held.get(key.0, &key.1).map_or("", |held| held.version());
        assert_eq!(difference.applied_version, version, "control plane {plane}, {id}: {difference:?}");
        assert!(!difference.refusal.is_empty(), "control plane {plane}, {id}: {difference:?}");
    }
    let told: Bodies = config
        .resource_versions
        .iter()
        .map(|h| ((h.kind, h.name.clone()), (h.version.clone(), Bytes::new())))
        .collect();
    let holds = held.bodies().into_iter().map(|(key, (version, _))| (key, (version, Bytes::new())));
    assert_eq!(told, holds.collect(), "control plane {plane} knows what {id} holds");
}

async fn apply(stage: &Stage, resources: Vec<v1::Resource>, set: &str) -> u64 {
    let request = v1::ApplyRequest { resources, apply_set: set.into(), ..Default::default() };
    stage.world.admin(0).await.apply(request).await.expect("applied").into_inner().revision
}

/// First as the writers left it, then with a resource that all refuse that can, then with all of it corrected.
pub(super) async fn check(stage: &mut Stage, deleted: &BTreeSet<String>) {
    let left = stage.revision().await;
    everybody_holds(stage, left, deleted).await;

    let marked = stage.followers.iter().enumerate();
    let mut resources: Vec<_> = marked
        .map(|(k, follower)| tenant(&format!("t{k}"), &format!("refused{}", mark(&follower.id))))
        .collect();
    resources.push(tenant("beside", "it"));
    apply(stage, resources, SET).await;
    let spec = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", stage.world.gates[0].address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        credential: format!("env:{CREDENTIAL}"),
        ..Default::default()
    };
    let picky = v1::Resource { name: PICKY.into(), spec: Some(Spec::Backend(spec)), ..Default::default() };
    let revision = apply(stage, vec![picky], PICKY).await;
    let refused = everybody_holds(stage, revision, deleted).await;
    assert!(refused >= FOLLOWERS + GATEWAYS, "{refused} refusals");

    let right = (0..8).map(|k| tenant(&format!("t{k}"), "right")).collect();
    apply(stage, right, SET).await;
    let gone = v1::DeleteResourceRequest {
        r#ref: Some(v1::ResourceRef { kind: ResourceKind::Backend.into(), name: PICKY.into() }),
        ..Default::default()
    };
    let gone = stage.world.admin(1).await.delete_resource(gone).await.expect("deleted").into_inner();
    let refused = everybody_holds(stage, gone.revision, deleted).await;
    assert_eq!(refused, 0, "everything is put right");
}
