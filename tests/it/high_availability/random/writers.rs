//! Independent writers with random calls, which keep the answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Response, Status};
use weir_proto::status::reason;
use weir_proto::v1::{self, ResourceKind, resource::Spec};
use weir_tests::plane::{Admin, admin_at};
use weir_tests::random::Random;

use super::history::{Ask, Call, SET, Told};

/// The timeout of one call: above a control plane's wait for its store.
const CALL: Duration = Duration::from_secs(20);
/// The pause between two calls of one writer: their order matters, and not their number.
const PAUSE: Duration = Duration::from_millis(5);
/// The tenants that all of them write.
const NAMES: usize = 8;
/// The largest distance of a rollback.
const BACK: u64 = 40;

/// The state that writers share.
#[derive(Debug)]
pub(super) struct Writers {
    pub(super) planes: Vec<String>,
    pub(super) end: AtomicBool,
    /// Calls answered so far.
    pub(super) answered: AtomicU64,
    /// The revision at which they began.
    pub(super) first: u64,
    /// The highest revision of any answer.
    pub(super) newest: AtomicU64,
    /// The ids of followers that refuse words with their mark.
    pub(super) refusing: Vec<String>,
}

/// The part of a word that makes a follower refuse it.
pub(super) fn mark(follower: &str) -> String {
    format!("!{follower}")
}

/// A tenant with a word.
pub(super) fn tenant(name: &str, word: &str) -> v1::Resource {
    let spec = v1::TenantSpec { display_name: word.into(), ..Default::default() };
    v1::Resource { name: name.into(), spec: Some(Spec::Tenant(spec)), ..Default::default() }
}

/// The word of a tenant.
pub(super) fn word(resource: Option<&v1::Resource>) -> &str {
    match resource.and_then(|resource| resource.spec.as_ref()) {
        Some(Spec::Tenant(spec)) => &spec.display_name,
        _ => panic!("a tenant"),
    }
}

fn reference(name: &str) -> Option<v1::ResourceRef> {
    Some(v1::ResourceRef { kind: ResourceKind::Tenant.into(), name: name.into() })
}

fn uuid() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// How a call ended.
struct Answered<A> {
    plane: usize,
    answer: Result<A, Status>,
    unsure: bool,
}

impl Writers {
    /// Repeats a call until there is an answer, at one control plane after the other.
    async fn call<A, F>(&self, from: usize, call: impl Fn(Admin) -> F) -> Answered<A>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut unsure = false;
        for at in from.. {
            let plane = at % self.planes.len();
            match tokio::time::timeout(CALL, call(admin_at(&self.planes[plane]))).await {
                Ok(Ok(answer)) => return Answered { plane, answer: Ok(answer.into_inner()), unsure },
                // A call with an unknown outcome is repeated; its request id makes sure that it is done once.
                Err(_) => {}
                Ok(Err(status)) => match status.code() {
                    Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal => {}
                    _ => return Answered { plane, answer: Err(status), unsure },
                },
            }
            unsure = true;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("it asks for ever")
    }

    /// Makes random calls until the end. Returns all answers.
    pub(super) async fn write(&self, writer: usize, mut dice: Random) -> Vec<Call> {
        let (mut calls, mut known) = (Vec::new(), BTreeMap::new());
        for n in 0_u64.. {
            if self.end.load(Ordering::Relaxed) {
                break;
            }
            let ask = self.choose(&mut dice, &format!("{writer}-{n}"), &known);
            let call = self.ask(dice.index(3), ask, &known).await;
            match (&call.ask, &call.told) {
                (Ask::Read { name }, Told::Found(word)) => drop(known.insert(name.clone(), word.clone())),
                (Ask::Read { name }, _) => drop(known.remove(name)),
                _ => {}
            }
            if let Told::Done(Some(revision)) = call.told {
                self.newest.fetch_max(revision, Ordering::Relaxed);
            }
            calls.push(call);
            self.answered.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(PAUSE).await;
        }
        calls
    }

    fn choose(&self, dice: &mut Random, unique: &str, known: &BTreeMap<String, String>) -> Ask {
        let name = |dice: &mut Random| format!("t{}", dice.index(NAMES));
        // Few different words, so that some changes change nothing; some are refused by a follower.
        let word = |dice: &mut Random| match dice.index(10) {
            0..=2 => format!("same-{}", dice.index(2)),
            3..=4 => format!("{unique}{}", mark(&self.refusing[dice.index(self.refusing.len())])),
            _ => unique.to_owned(),
        };
        let expected = |name: &String| known.get(name).cloned();
        match dice.index(100) {
            0..=14 => Ask::Create { name: name(dice), word: word(dice) },
            15..=24 => Ask::Update { name: name(dice), word: word(dice), expected: None },
            25..=39 => {
                let name = name(dice);
                Ask::Update { expected: expected(&name), name, word: word(dice) }
            }
            40..=44 => Ask::Delete { name: name(dice), expected: None },
            45..=52 => {
                let name = name(dice);
                Ask::Delete { expected: expected(&name), name }
            }
            53..=66 => {
                let words = (0..=dice.index(3)).map(|_| (name(dice), word(dice))).collect();
                Ask::Apply { words, prune: dice.index(5) == 0 }
            }
            67..=72 => {
                let newest = self.newest.load(Ordering::Relaxed);
                let revision = newest.saturating_sub(dice.below(BACK)).max(self.first);
                let names: BTreeSet<String> = (0..=dice.index(2)).map(|_| name(dice)).collect();
                Ask::Rollback { revision, names }
            }
            73..=77 => {
                let weight = 1 + dice.index(9) as u32;
                Ask::Weight { backend: format!("b{}", dice.index(3)), weight }
            }
            _ => Ask::Read { name: name(dice) },
        }
    }

    async fn ask(&self, from: usize, ask: Ask, known: &BTreeMap<String, String>) -> Call {
        let (request_id, began) = (uuid(), Instant::now());
        let etag = |name: &String, expected: &Option<String>| {
            // The etag is that of the content, so it is known with the word.
            let word = expected.as_ref().map(|_| &known[name]);
            word.map(|word| etag(word)).unwrap_or_default()
        };
        let id = request_id.clone();
        let (plane, told, unsure) = match &ask {
            Ask::Create { name, word } => {
                let request = v1::CreateResourceRequest {
                    resource: Some(tenant(name, word)),
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.create_resource(request).await }
                };
                told(self.call(from, call).await, |answer| answer.resource.map(|r| r.revision))
            }
            Ask::Update { name, word, expected } => {
                let resource = v1::Resource { etag: etag(name, expected), ..tenant(name, word) };
                let request = v1::UpdateResourceRequest {
                    resource: Some(resource),
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.update_resource(request).await }
                };
                // The revision of a call without a change is that of an earlier one.
                told(self.call(from, call).await, |_| None)
            }
            Ask::Delete { name, expected } => {
                let request = v1::DeleteResourceRequest {
                    r#ref: reference(name),
                    etag: etag(name, expected),
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.delete_resource(request).await }
                };
                told(self.call(from, call).await, |answer| Some(answer.revision))
            }
            Ask::Apply { words, prune } => {
                let request = v1::ApplyRequest {
                    resources: words.iter().map(|(name, word)| tenant(name, word)).collect(),
                    apply_set: SET.into(),
                    prune: *prune,
                    allow_mass_removal: true,
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.apply(request).await }
                };
                told(self.call(from, call).await, |answer| {
                    changed(&answer.changes).then_some(answer.revision)
                })
            }
            Ask::Rollback { revision, names } => {
                let request = v1::RollbackRequest {
                    revision: *revision,
                    refs: names.iter().filter_map(|name| reference(name)).collect(),
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.rollback(request).await }
                };
                told(self.call(from, call).await, |answer| {
                    changed(&answer.changes).then_some(answer.revision)
                })
            }
            Ask::Weight { backend, weight } => {
                let spec = v1::BackendSpec { weight: Some(*weight), ..Default::default() };
                let resource = v1::Resource {
                    name: backend.clone(),
                    spec: Some(Spec::Backend(spec)),
                    ..Default::default()
                };
                let request = v1::UpdateResourceRequest {
                    resource: Some(resource),
                    update_mask: Some(prost_types::FieldMask { paths: vec!["weight".into()] }),
                    request_id: id,
                    ..Default::default()
                };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.update_resource(request).await }
                };
                told(self.call(from, call).await, |_| None)
            }
            Ask::Read { name } => {
                let request = v1::GetResourceRequest { r#ref: reference(name) };
                let call = |mut admin: Admin| {
                    let request = request.clone();
                    async move { admin.get_resource(request).await }
                };
                let found = self.call(from, call).await;
                let plane = found.plane;
                let told = match found.answer {
                    Ok(answer) => Told::Found(word(answer.resource.as_ref()).to_owned()),
                    Err(status) => refused(&status),
                };
                (plane, told, false)
            }
        };
        let unsure = unsure && matches!(told, Told::Refused(_) | Told::Contended);
        Call { ask, request_id, plane, began, ended: Instant::now(), told, unsure }
    }
}

/// As the control plane computes it: a hash of the spec.
fn etag(word: &str) -> String {
    use prost::Message as _;
    use sha2::{Digest as _, Sha256};
    let bytes = Sha256::digest(tenant("", word).encode_to_vec());
    bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn changed(changes: &[v1::Change]) -> bool {
    changes.iter().any(|change| change.action() != v1::ChangeAction::Unchanged)
}

fn refused(status: &Status) -> Told {
    match reason(status).as_str() {
        "CONTENDED" | "CONFLICT" => Told::Contended,
        "" => panic!("without a reason: {status}"),
        reason => Told::Refused(reason.to_owned()),
    }
}

fn told<A>(answered: Answered<A>, revision: impl Fn(A) -> Option<u64>) -> (usize, Told, bool) {
    let told = match answered.answer {
        Ok(answer) => Told::Done(revision(answer)),
        Err(status) => refused(&status),
    };
    (answered.plane, told, answered.unsure)
}

/// Starts the writers, each with its own generator.
pub(super) fn start(
    writers: &Arc<Writers>,
    seed: u64,
    count: usize,
) -> Vec<tokio::task::JoinHandle<Vec<Call>>> {
    let one = |writer: usize| {
        let (writers, dice) = (Arc::clone(writers), Random::new(seed.wrapping_add(1 + writer as u64)));
        tokio::spawn(async move { writers.write(writer, dice).await })
    };
    (0..count).map(one).collect()
}
