use super::*;
use crate::store;
use v1::resource::Spec;
use v1::{ChangeAction, ResourceKind};

fn weight(weight: u32) -> v1::UpdateResourceRequest {
    let mut resource = backend("b0", "p", "m", "http://127.0.0.1:1");
    if let Some(Spec::Backend(spec)) = &mut resource.spec {
        spec.weight = Some(weight);
    }
    let update_mask = Some(prost_types::FieldMask { paths: vec!["weight".into()] });
    v1::UpdateResourceRequest { resource: Some(resource), update_mask, ..Default::default() }
}

async fn weight_now(admin: &mut AdminServiceClient<Client>) -> Option<u32> {
    let get = v1::GetResourceRequest { r#ref: reference(ResourceKind::Backend, "b0") };
    match admin.get_resource(get).await.unwrap().into_inner().resource.unwrap().spec {
        Some(Spec::Backend(spec)) => spec.weight,
        _ => None,
    }
}

#[tokio::test]
async fn every_change_is_in_the_log_with_who_and_what_and_the_chain_holds_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let plane = Plane::start(store.clone(), cluster(2)).await;
    let mut admin = plane.admin().await;
    for n in 1..=3 {
        admin.update_resource(weight(n)).await.unwrap();
    }
    // Neither a refusal nor a check is a change.
    admin.create_resource(create(pool("p"))).await.unwrap_err();
    admin.update_resource(v1::UpdateResourceRequest { validate_only: true, ..weight(9) }).await.unwrap();
    drop(admin);
    plane.stop().await;

    let plane = Plane::start(store, vec![]).await;
    let mut admin = plane.admin().await;
    let all = admin.history(v1::HistoryRequest::default()).await.unwrap().into_inner().entries;
    let sequences: Vec<_> = all.iter().map(|e| (e.sequence, e.revision)).collect();
    assert_eq!(sequences, [(4, 4), (3, 3), (2, 2), (1, 1)]);
    assert_eq!((all[0].actor.as_str(), all[0].method.as_str()), ("admin", "UpdateResource"));
    assert_eq!(all[3].actor, "bootstrap");
    let change = &all[0].changes[0];
    let field = v1::FieldChange { path: "weight".into(), before: "2".into(), after: "3".into() };
    assert_eq!((change.action(), &change.fields), (ChangeAction::Update, &vec![field]));
    assert!(all.windows(2).all(|pair| pair[0].previous_hash == pair[1].hash));

    // Of one resource only, in pages.
    let mut of = v1::HistoryRequest {
        r#ref: reference(ResourceKind::Backend, "b1"),
        page_size: 1,
        ..Default::default()
    };
    let page = admin.history(of.clone()).await.unwrap().into_inner();
    assert_eq!(page.entries.iter().map(|e| e.revision).collect::<Vec<_>>(), [1]);
    of.page_token = hex_of("3/other");
    assert_eq!(admin.history(of).await.unwrap_err().code(), Code::InvalidArgument);

    let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap().into_inner();
    assert_eq!((verified.verified, verified.last_sequence, verified.problem.as_str()), (4, 4, ""));
    assert_eq!(verified.last_hash, all[0].hash);
    let rewritten = v1::VerifyAuditRequest { known_sequence: 2, known_hash: vec![1; 32] };
    let found = admin.verify_audit(rewritten).await.unwrap().into_inner();
    assert!(found.problem.contains("entry 2 does not have the hash"), "{}", found.problem);
    plane.stop().await;
}

fn hex_of(text: &str) -> String {
    crate::encoding::hex(text.as_bytes())
}

/// A store of five pools, made one after the other.
async fn five_changes(path: &std::path::Path) {
    let plane = Plane::start(StoreConfig::File(path.to_owned()), vec![pool("p0")]).await;
    let mut admin = plane.admin().await;
    for i in 1..5 {
        admin.create_resource(create(pool(&format!("p{i}")))).await.unwrap();
    }
    drop(admin);
    plane.stop().await;
}

#[tokio::test]
async fn an_altered_and_a_missing_entry_break_the_chain() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    five_changes(&path).await;
    for (write, problem) in [
        // Entry 3 with one byte changed, then no entry 3 at all.
        (None, "entry 3 is not what was hashed"),
        (Some(store::Write::Delete(crate::model::audit::path(3))), "entry 3 is missing"),
    ] {
        let store = crate::store::FileStore::open(&path).unwrap();
        let entry = store.range(&crate::model::audit::path(3)).await.unwrap().entries.remove(0);
        let mut altered = entry.value.to_vec();
        altered[8] ^= 1;
        let write = write.unwrap_or_else(|| store::Write::Put(entry.key, altered.into()));
        store.transact(store::Transaction { compares: vec![], writes: vec![write] }).await.unwrap();
        drop(store);
        let plane = Plane::start(StoreConfig::File(path.clone()), vec![]).await;
        let mut admin = plane.admin().await;
        let found = admin.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap().into_inner();
        assert_eq!(found.problem, problem);
        drop(admin);
        plane.stop().await;
    }
}

#[tokio::test]
async fn a_rollback_brings_back_what_was_but_no_revoked_key() {
    let plane = Plane::memory(cluster(2)).await;
    let mut admin = plane.admin().await;
    admin.create_resource(create(tenant("t"))).await.unwrap();
    let issue = v1::IssueApiKeyRequest { name: "k".into(), tenant: "t".into(), ..Default::default() };
    let then = admin.issue_api_key(issue).await.unwrap().into_inner().resource.unwrap().revision;
    let spec = Some(Spec::ApiKey(v1::ApiKeySpec { revoked: true, ..Default::default() }));
    let revoke = v1::UpdateResourceRequest {
        resource: Some(v1::Resource { name: "k".into(), spec, ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["revoked".into()] }),
        ..Default::default()
    };
    admin.update_resource(revoke).await.unwrap();
    admin.update_resource(weight(7)).await.unwrap();
    admin.create_resource(create(pool("later"))).await.unwrap();
    let gone =
        v1::DeleteResourceRequest { r#ref: reference(ResourceKind::Backend, "b1"), ..Default::default() };
    admin.delete_resource(gone).await.unwrap();

    let back = v1::RollbackRequest { revision: then, validate_only: true, ..Default::default() };
    let dry = admin.rollback(back.clone()).await.unwrap().into_inner();
    let done =
        admin.rollback(v1::RollbackRequest { validate_only: false, ..back }).await.unwrap().into_inner();
    assert_eq!(dry.changes, done.changes);
    let of = |action| {
        let changes = done.changes.iter().filter(move |c| c.action() == action);
        changes.map(|c| c.r#ref.clone().unwrap().name).collect::<Vec<_>>()
    };
    assert_eq!(of(ChangeAction::Create), ["b1"]);
    assert_eq!(of(ChangeAction::Update), ["b0"]);
    assert_eq!(of(ChangeAction::Delete), ["later"]);
    assert_eq!(weight_now(&mut admin).await, None);
    let key = v1::GetResourceRequest { r#ref: reference(ResourceKind::ApiKey, "k") };
    let key = admin.get_resource(key).await.unwrap().into_inner().resource.unwrap();
    assert!(matches!(key.spec, Some(Spec::ApiKey(spec)) if spec.revoked), "a revoked key stays revoked");

    // A rollback is a change like any other: it can be rolled back.
    let undo = v1::RollbackRequest { revision: done.revision - 1, ..Default::default() };
    admin.rollback(undo).await.unwrap();
    assert_eq!(weight_now(&mut admin).await, Some(7));
    let ahead = v1::RollbackRequest { revision: 999, ..Default::default() };
    assert_eq!(admin.rollback(ahead).await.unwrap_err().code(), Code::OutOfRange);
    plane.stop().await;
}

/// Events until the next bookmark.
async fn events(stream: &mut Streaming<v1::WatchResponse>) -> (Vec<v1::WatchEvent>, u64) {
    let mut events = Vec::new();
    loop {
        match soon(stream.message()).await.unwrap().unwrap().message.unwrap() {
            v1::watch_response::Message::Event(event) => events.push(event),
            v1::watch_response::Message::Bookmark(bookmark) => return (events, bookmark.revision),
        }
    }
}

async fn event(stream: &mut Streaming<v1::WatchResponse>) -> v1::WatchEvent {
    match soon(stream.message()).await.unwrap().unwrap().message.unwrap() {
        v1::watch_response::Message::Event(event) => event,
        v1::watch_response::Message::Bookmark(_) => panic!("a bookmark too early"),
    }
}

#[tokio::test]
async fn a_watch_begins_with_what_is_there_and_resumes_after_a_restart_without_gaps() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let plane = Plane::start(store.clone(), cluster(1)).await;
    let mut admin = plane.admin().await;
    let all = v1::WatchRequest::default();
    let mut watch = admin.watch(all).await.unwrap().into_inner();
    let (there, revision) = events(&mut watch).await;
    assert_eq!((there.len(), revision), (3, 1));
    let pools = v1::WatchRequest { from_revision: 1, kinds: vec![ResourceKind::Pool.into()] };
    let mut pools = admin.watch(pools).await.unwrap().into_inner();
    admin.update_resource(weight(5)).await.unwrap();
    admin.create_resource(create(pool("q"))).await.unwrap();
    let changed = event(&mut watch).await;
    assert_eq!(
        (changed.revision, changed.action(), changed.actor.as_str()),
        (2, ChangeAction::Update, "admin")
    );
    assert_eq!(changed.fields[0].path, "weight");
    let get = v1::GetResourceRequest { r#ref: reference(ResourceKind::Backend, "b0") };
    let read = admin.get_resource(get).await.unwrap().into_inner().resource;
    assert_eq!(changed.resource, read, "an event carries the resource as it is read");
    assert_eq!(event(&mut watch).await.revision, 3);
    assert_eq!(event(&mut pools).await.resource.unwrap().name, "q");
    drop((watch, pools, admin));
    plane.stop().await;

    let plane = Plane::start(store, vec![]).await;
    let mut admin = plane.admin().await;
    let gone = v1::DeleteResourceRequest { r#ref: reference(ResourceKind::Pool, "q"), ..Default::default() };
    admin.delete_resource(gone).await.unwrap();
    let mut watch =
        admin.watch(v1::WatchRequest { from_revision: 2, kinds: vec![] }).await.unwrap().into_inner();
    assert_eq!(event(&mut watch).await.action(), ChangeAction::Create);
    let deleted = event(&mut watch).await;
    assert_eq!((deleted.action(), deleted.resource.unwrap().name), (ChangeAction::Delete, "q".to_owned()));
    let ahead = admin.watch(v1::WatchRequest { from_revision: 99, kinds: vec![] }).await;
    assert_eq!(ahead.unwrap_err().code(), Code::OutOfRange);
    plane.stop().await;
}

/// The log keeps a limited number of entries. A caller that asks for earlier ones is told to start again.
#[tokio::test]
async fn what_is_forgotten_is_out_of_range_and_says_what_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    five_changes(&path).await;
    let store = crate::store::FileStore::open(&path).unwrap();
    let writes = [1, 2].map(|n| store::Write::Delete(crate::model::audit::path(n))).to_vec();
    store.transact(store::Transaction { compares: vec![], writes }).await.unwrap();
    drop(store);
    let plane = Plane::start(StoreConfig::File(path), vec![]).await;
    let mut admin = plane.admin().await;
    let watch = |from_revision| v1::WatchRequest { from_revision, kinds: vec![] };
    let back = |revision| v1::RollbackRequest { revision, validate_only: true, ..Default::default() };
    let refused = admin.watch(watch(1)).await.unwrap_err();
    assert_eq!(
        (refused.code(), weir_proto::status::reason(&refused).as_str()),
        (Code::OutOfRange, "FORGOTTEN")
    );
    assert!(refused.message().contains("the oldest revision known is 2"), "{refused}");
    assert_eq!(admin.rollback(back(1)).await.unwrap_err().code(), Code::OutOfRange);
    let mut known = admin.watch(watch(2)).await.unwrap().into_inner();
    assert_eq!(event(&mut known).await.resource.unwrap().name, "p2");
    let changes = admin.rollback(back(2)).await.unwrap().into_inner().changes;
    assert_eq!(changes.iter().filter(|change| change.action() == ChangeAction::Delete).count(), 3);
    plane.stop().await;
}

#[tokio::test]
async fn a_drain_reports_what_is_left_and_is_done_when_every_gateway_has_said_so() {
    let plane = Plane::memory(cluster(2)).await;
    let mut admin = plane.admin().await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    gateway.ack(&first).await;
    let (said, requests) = mpsc::channel(4);
    let report = |sequence, in_flight| v1::StreamReportsRequest {
        gateway_id: "g".into(),
        incarnation: "1".into(),
        sequence,
        backends: vec![v1::BackendReport { backend: "b0".into(), in_flight, ..Default::default() }],
        ..Default::default()
    };
    said.send(report(1, 3)).await.unwrap();
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let _heard = reports.stream_reports(ReceiverStream::new(requests)).await.unwrap();

    let drain = v1::DrainRequest { backend: "b0".into(), ..Default::default() };
    let operation = admin.drain(drain).await.unwrap().into_inner().operation.unwrap();
    assert_eq!((operation.name.as_str(), operation.done), ("drain/b0", false));
    assert_eq!(operation.drain.unwrap().waiting_for, ["g"], "it does not hold the revision yet");
    let second = gateway.delta().await;
    gateway.ack(&second).await;
    let wait = |last_seen| v1::WaitOperationRequest { name: "drain/b0".into(), timeout: None, last_seen };
    let mut sequence = 1;
    let mut progress = async |in_flight: u32, done: bool| {
        sequence += 1;
        said.send(report(sequence, in_flight)).await.unwrap();
        let mut seen = v1::DrainProgress::default();
        loop {
            let waited = admin.wait_operation(wait(Some(seen))).await.unwrap().into_inner();
            let operation = waited.operation.unwrap();
            seen = operation.drain.unwrap();
            if seen.in_flight == in_flight && operation.done == done && seen.waiting_for.is_empty() {
                return;
            }
        }
    };
    soon(progress(2, false)).await;
    soon(progress(0, true)).await;
    let active = v1::GetOperationRequest { name: "drain/b1".into() };
    assert_eq!(admin.get_operation(active).await.unwrap_err().code(), Code::NotFound);
    plane.stop().await;
}

#[tokio::test]
async fn a_backup_is_restored_under_a_new_epoch_and_only_into_an_empty_store() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let plane = Plane::start(StoreConfig::File(path("old.redb")), cluster(3)).await;
    let mut admin = plane.admin().await;
    admin.update_resource(weight(5)).await.unwrap();
    let who = admin.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner();
    let mut chunks = admin.backup(v1::BackupRequest {}).await.unwrap().into_inner();
    let mut file = Vec::new();
    while let Some(chunk) = soon(chunks.message()).await.unwrap() {
        file.extend(chunk.chunk);
    }
    std::fs::write(path("backup"), &file).unwrap();
    drop(admin);
    plane.stop().await;
    std::fs::write(path("cut"), &file[..file.len() - 1]).unwrap();
    let refused = crate::store::FileStore::restore(&path("new.redb"), &path("cut")).unwrap_err();
    assert!(refused.to_string().contains("cut short or damaged"), "{refused}");
    assert_eq!(crate::store::FileStore::restore(&path("new.redb"), &path("backup")).unwrap(), 2);
    let again = crate::store::FileStore::restore(&path("new.redb"), &path("backup")).unwrap_err();
    assert!(again.to_string().contains("holds something already"), "{again}");

    let plane = Plane::start(StoreConfig::File(path("new.redb")), vec![]).await;
    let mut admin = plane.admin().await;
    assert_eq!(weight_now(&mut admin).await, Some(5));
    let now = admin.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner();
    assert_eq!(now.revision, who.revision);
    assert_ne!(now.store_epoch, who.store_epoch);
    let verified = admin.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap().into_inner();
    assert_eq!((verified.verified, verified.problem.as_str()), (2, ""));
    plane.stop().await;
}
