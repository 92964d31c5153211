use super::*;
use v1::resource::Spec;
use v1::{ChangeAction, ResourceKind};

fn with_weight(weight: u32) -> v1::Resource {
    let mut resource = backend("b0", "p", "m", "http://127.0.0.1:1");
    if let Some(Spec::Backend(spec)) = &mut resource.spec {
        spec.weight = Some(weight);
    }
    resource
}

#[tokio::test]
async fn a_resource_is_made_read_changed_and_deleted() {
    let plane = Plane::memory(vec![]).await;
    let mut admin = plane.admin().await;
    let made = admin.create_resource(create(pool("p"))).await.unwrap().into_inner().resource.unwrap();
    assert_eq!((made.revision, made.etag.len()), (1, 16));
    assert!(made.create_time.is_some() && made.apply_set.is_empty());
    let again = admin.create_resource(create(pool("p"))).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let bad = admin.create_resource(create(backend("b", "nowhere", "m", "ftp://x"))).await.unwrap_err();
    assert_eq!(bad.code(), Code::InvalidArgument);
    assert!(bad.message().contains("backend.url: must start with http://"), "{bad}");

    let get = v1::GetResourceRequest { r#ref: reference(ResourceKind::Pool, "p") };
    assert_eq!(admin.get_resource(get).await.unwrap().into_inner().resource, Some(made.clone()));
    let missing = v1::GetResourceRequest { r#ref: reference(ResourceKind::Pool, "q") };
    assert_eq!(admin.get_resource(missing).await.unwrap_err().code(), Code::NotFound);

    let dry = v1::CreateResourceRequest { validate_only: true, ..create(pool("dry")) };
    admin.create_resource(dry).await.unwrap();
    let missing = v1::GetResourceRequest { r#ref: reference(ResourceKind::Pool, "dry") };
    assert_eq!(admin.get_resource(missing).await.unwrap_err().code(), Code::NotFound);

    admin.create_resource(create(model("m", "p"))).await.unwrap();
    let delete =
        v1::DeleteResourceRequest { r#ref: reference(ResourceKind::Pool, "p"), ..Default::default() };
    let referred = admin.delete_resource(delete.clone()).await.unwrap_err();
    assert_eq!(referred.code(), Code::FailedPrecondition);
    assert!(referred.message().contains("model m"));
    let model =
        v1::DeleteResourceRequest { r#ref: reference(ResourceKind::Model, "m"), ..Default::default() };
    admin.delete_resource(model).await.unwrap();
    let stale = v1::DeleteResourceRequest { etag: "other".into(), ..delete.clone() };
    assert_eq!(admin.delete_resource(stale).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(admin.delete_resource(delete).await.unwrap().into_inner().revision, 4);
    plane.stop().await;
}

#[tokio::test]
async fn an_update_needs_the_right_etag_and_mask() {
    let plane = Plane::memory(cluster(1)).await;
    let mut admin = plane.admin().await;
    let mask = |path: &str| Some(prost_types::FieldMask { paths: vec![path.into()] });
    let update = |resource, update_mask| v1::UpdateResourceRequest {
        resource: Some(resource),
        update_mask,
        ..Default::default()
    };
    let changed = admin.update_resource(update(with_weight(7), mask("weight"))).await.unwrap();
    let changed = changed.into_inner().resource.unwrap();
    assert!(matches!(&changed.spec, Some(Spec::Backend(spec)) if spec.weight == Some(7)));
    assert_eq!((changed.revision, changed.apply_set.as_str()), (2, "bootstrap"));
    let stale = v1::Resource { etag: "0123456789abcdef".into(), ..with_weight(8) };
    let refused = admin.update_resource(update(stale, mask("weight"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    let unknown = admin.update_resource(update(with_weight(8), mask("wait"))).await.unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    assert!(unknown.message().contains("max_concurrency"), "it names the valid ones: {unknown}");
    let same = admin.update_resource(update(with_weight(7), mask("weight"))).await.unwrap().into_inner();
    assert_eq!(same.resource.unwrap().revision, 2, "nothing changed, nothing written");
    // Without a mask what is set is changed; "*" replaces the whole.
    let regional = |region: &str, weight| {
        let mut resource = with_weight(3);
        if let Some(Spec::Backend(spec)) = &mut resource.spec {
            (spec.region, spec.weight) = (region.into(), weight);
        }
        resource
    };
    for (resource, update_mask, region, weight) in [
        (regional("eu", None), None, "eu", Some(7)),
        (regional("", Some(9)), None, "eu", Some(9)),
        (regional("us", None), mask("*"), "us", None),
    ] {
        let now = admin.update_resource(update(resource, update_mask)).await.unwrap().into_inner().resource;
        let Some(Spec::Backend(spec)) = now.unwrap().spec else { panic!("a backend") };
        assert_eq!((spec.region.as_str(), spec.weight), (region, weight));
    }
    plane.stop().await;
}

#[tokio::test]
async fn a_request_id_gives_the_same_answer_even_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let plane = Plane::start(store.clone(), vec![]).await;
    let request_id = uuid::Uuid::now_v7().to_string();
    let request = v1::CreateResourceRequest { request_id: request_id.clone(), ..create(pool("p")) };
    let mut admin = plane.admin().await;
    let first = admin.create_resource(request.clone()).await.unwrap().into_inner();
    assert_eq!(admin.create_resource(request.clone()).await.unwrap().into_inner(), first);
    drop(admin);
    plane.stop().await;

    let plane = Plane::start(store, vec![pool("not-needed")]).await;
    let mut admin = plane.admin().await;
    assert_eq!(admin.create_resource(request).await.unwrap().into_inner(), first);
    let other = v1::CreateResourceRequest { request_id, ..create(pool("q")) };
    assert_eq!(admin.create_resource(other).await.unwrap_err().code(), Code::InvalidArgument);
    let odd = v1::CreateResourceRequest { request_id: "x".into(), ..create(pool("q")) };
    assert_eq!(admin.create_resource(odd).await.unwrap_err().code(), Code::InvalidArgument);
    let list = v1::ListResourcesRequest { kind: ResourceKind::Pool.into(), ..Default::default() };
    let pools = admin.list_resources(list).await.unwrap().into_inner().resources;
    assert_eq!(pools.len(), 1, "a store that has held something is not bootstrapped");
    plane.stop().await;
}

#[tokio::test]
async fn an_apply_with_ten_thousand_faults_is_refused_with_the_first_fifty_and_the_number_of_the_others() {
    let plane = Plane::memory(vec![]).await;
    let mut admin = plane.admin().await;
    let backends = (0..10_000).map(|i| backend(&format!("b{i}"), "nowhere", "nothing", "http://127.0.0.1:1"));
    let refused = admin.apply(apply(backends.collect())).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    let listed = weir_proto::status::field_violations(&refused);
    assert_eq!(listed.len(), 51);
    assert_eq!(listed[0].field, "resources[0].backend.pool");
    // Each names a pool and a model that do not exist.
    assert_eq!(listed[50].description, "and 19950 more");
}

#[tokio::test]
async fn an_apply_is_all_or_nothing_and_says_what_it_does() {
    let plane = Plane::memory(vec![]).await;
    let mut admin = plane.admin().await;
    let mut broken = cluster(2);
    broken.push(backend("b9", "p", "nothing", "http://127.0.0.1:1"));
    let refused = admin.apply(apply(broken)).await.unwrap_err();
    assert!(
        refused.message().contains("resources[4].backend.models[nothing]: there is no model"),
        "{refused}"
    );
    let dry = v1::ApplyRequest { validate_only: true, ..apply(cluster(4)) };
    let dry = admin.apply(dry).await.unwrap().into_inner();
    assert_eq!((dry.changes.len(), dry.revision), (6, 0));
    let done = admin.apply(apply(cluster(4))).await.unwrap().into_inner();
    assert_eq!((done.changes, done.revision), (dry.changes, 1));
    let again = admin.apply(apply(cluster(4))).await.unwrap().into_inner();
    assert!(again.changes.iter().all(|change| change.action() == ChangeAction::Unchanged));
    assert_eq!(again.revision, 1);

    let mut fewer = cluster(3);
    fewer[2] = with_weight(9);
    let request = v1::ApplyRequest { prune: true, ..apply(fewer) };
    let pruned = admin.apply(request).await.unwrap().into_inner();
    let change = |name: &str| {
        pruned.changes.iter().find(|c| c.r#ref.as_ref().is_some_and(|r| r.name == name)).unwrap().clone()
    };
    assert_eq!(change("b3").action(), ChangeAction::Delete);
    let weight = v1::FieldChange { path: "weight".into(), before: String::new(), after: "9".into() };
    assert_eq!(change("b0").fields, [weight]);

    let request = v1::ApplyRequest { prune: true, ..apply(cluster(1)) };
    let refused = admin.apply(request.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("2 of 3 backends of pool p would be removed (backend b1, backend b2)"),
        "{refused}"
    );
    admin.apply(v1::ApplyRequest { allow_mass_removal: true, ..request }).await.unwrap();
    plane.stop().await;
}

#[tokio::test]
async fn a_list_comes_in_pages() {
    let plane = Plane::memory((0..5).map(|i| pool(&format!("p{i}"))).collect()).await;
    let mut admin = plane.admin().await;
    let mut request =
        v1::ListResourcesRequest { kind: ResourceKind::Pool.into(), page_size: 2, ..Default::default() };
    let mut seen = Vec::new();
    loop {
        let page = admin.list_resources(request.clone()).await.unwrap().into_inner();
        seen.extend(page.resources.into_iter().map(|resource| resource.name));
        if page.next_page_token.is_empty() {
            break;
        }
        // Changes in between do not show: every page is of the revision of the first.
        let name = format!("p{}x", seen.len());
        admin.create_resource(create(pool(&name))).await.unwrap();
        let gone =
            v1::DeleteResourceRequest { r#ref: reference(ResourceKind::Pool, "p4"), ..Default::default() };
        let _ = admin.delete_resource(gone).await;
        request.page_token = page.next_page_token;
    }
    assert_eq!(seen, ["p0", "p1", "p2", "p3", "p4"]);
    let other = v1::ListResourcesRequest { kind: ResourceKind::Model.into(), ..request.clone() };
    assert_eq!(admin.list_resources(other).await.unwrap_err().code(), Code::InvalidArgument);
    let negative = v1::ListResourcesRequest { page_size: -1, page_token: String::new(), ..request };
    assert_eq!(admin.list_resources(negative).await.unwrap_err().code(), Code::InvalidArgument);
    plane.stop().await;
}

#[tokio::test]
async fn a_key_is_shown_once_and_rotated() {
    let plane = Plane::memory(vec![tenant("t")]).await;
    let mut admin = plane.admin().await;
    let issue = v1::IssueApiKeyRequest { name: "k".into(), tenant: "t".into(), ..Default::default() };
    let issued = admin.issue_api_key(issue.clone()).await.unwrap().into_inner();
    let digests = |resource: Option<v1::Resource>| match resource.unwrap().spec.unwrap() {
        Spec::ApiKey(spec) => spec.digests,
        _ => panic!("an API key"),
    };
    let old = digests(issued.resource);
    assert_eq!(old[0].sha256, crate::encoding::sha256(issued.secret.as_bytes()));
    assert_eq!(admin.issue_api_key(issue).await.unwrap_err().code(), Code::AlreadyExists);
    for _ in 0..2 {
        let rotate = v1::RotateApiKeyRequest { name: "k".into(), ..Default::default() };
        let rotated = admin.rotate_api_key(rotate).await.unwrap().into_inner();
        let new = digests(rotated.resource);
        assert_eq!((new.len(), new[0].expire_time, new[1].expire_time.is_some()), (2, None, true));
        assert_eq!(new[0].sha256, crate::encoding::sha256(rotated.secret.as_bytes()));
    }
    let stranger = v1::IssueApiKeyRequest { name: "x".into(), tenant: "u".into(), ..Default::default() };
    assert!(admin.issue_api_key(stranger).await.unwrap_err().message().contains("api_key.tenant"));
    plane.stop().await;
}

/// The requests that can be only checked, as the contract has them.
fn checkable() -> std::collections::BTreeSet<String> {
    use prost::Message as _;
    let all = prost_types::FileDescriptorSet::decode(weir_proto::FILE_DESCRIPTOR_SET).unwrap();
    let messages = all.file.into_iter().flat_map(|file| file.message_type);
    let has =
        |message: &prost_types::DescriptorProto| message.field.iter().any(|f| f.name() == "validate_only");
    messages.filter(has).map(|message| message.name().trim_end_matches("Request").to_owned()).collect()
}

#[tokio::test]
async fn a_check_changes_nothing_whatever_is_called() {
    let plane = Plane::memory([cluster(2), vec![tenant("t")]].concat()).await;
    let mut admin = plane.admin().await;
    let issue = v1::IssueApiKeyRequest { name: "k".into(), tenant: "t".into(), ..Default::default() };
    admin.issue_api_key(issue.clone()).await.unwrap();
    let token =
        v1::IssueTokenRequest { name: "ci".into(), role: v1::Role::Viewer.into(), ..Default::default() };
    admin.issue_token(token.clone()).await.unwrap();
    let newest = async |admin: &mut AdminServiceClient<Client>| {
        let page = admin.history(v1::HistoryRequest { page_size: 1, ..Default::default() }).await.unwrap();
        let revision = admin.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner().revision;
        (page.into_inner().entries, revision)
    };
    let before = newest(&mut admin).await;
    let tokens = admin.list_tokens(v1::ListTokensRequest {}).await.unwrap().into_inner();

    let mut left = checkable();
    let mut checked = |method: &str, secret: String| {
        assert!(left.remove(method), "{method}");
        assert_eq!(secret, "", "{method} shows no secret");
    };
    let request = v1::CreateResourceRequest { validate_only: true, ..create(pool("new")) };
    admin.create_resource(request).await.unwrap();
    checked("CreateResource", String::new());
    let request = v1::UpdateResourceRequest {
        resource: Some(with_weight(5)),
        validate_only: true,
        ..Default::default()
    };
    let would = admin.update_resource(request).await.unwrap().into_inner().resource.unwrap();
    assert!(
        matches!(would.spec, Some(Spec::Backend(spec)) if spec.weight == Some(5)),
        "it says what would be"
    );
    checked("UpdateResource", String::new());
    let r#ref = reference(ResourceKind::Backend, "b0");
    let request = v1::DeleteResourceRequest { r#ref, validate_only: true, ..Default::default() };
    admin.delete_resource(request).await.unwrap();
    checked("DeleteResource", String::new());
    let request = v1::ApplyRequest { validate_only: true, ..apply(vec![pool("new")]) };
    assert_eq!(admin.apply(request).await.unwrap().into_inner().changes.len(), 1);
    checked("Apply", String::new());
    let issue = v1::IssueApiKeyRequest { name: "l".into(), validate_only: true, ..issue };
    checked("IssueApiKey", admin.issue_api_key(issue).await.unwrap().into_inner().secret);
    let rotate = v1::RotateApiKeyRequest { name: "k".into(), validate_only: true, ..Default::default() };
    checked("RotateApiKey", admin.rotate_api_key(rotate).await.unwrap().into_inner().secret);
    let drain = v1::DrainRequest { backend: "b0".into(), validate_only: true, ..Default::default() };
    admin.drain(drain).await.unwrap();
    checked("Drain", String::new());
    let back = v1::RollbackRequest { revision: 1, validate_only: true, ..Default::default() };
    admin.rollback(back).await.unwrap();
    checked("Rollback", String::new());
    let token = v1::IssueTokenRequest { name: "cd".into(), validate_only: true, ..token };
    checked("IssueToken", admin.issue_token(token).await.unwrap().into_inner().secret);
    let rotate = v1::RotateTokenRequest { name: "ci".into(), validate_only: true, ..Default::default() };
    checked("RotateToken", admin.rotate_token(rotate).await.unwrap().into_inner().secret);
    let revoke = v1::RevokeTokenRequest { name: "ci".into(), validate_only: true };
    admin.revoke_token(revoke).await.unwrap();
    checked("RevokeToken", String::new());
    assert!(left.is_empty(), "not called: {left:?}");

    assert_eq!(newest(&mut admin).await, before);
    assert_eq!(admin.list_tokens(v1::ListTokensRequest {}).await.unwrap().into_inner(), tokens);
    plane.stop().await;
}
