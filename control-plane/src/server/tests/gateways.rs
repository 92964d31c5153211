use super::*;
use v1::ResourceKind;

fn held(delta: &v1::Delta, id: &str) -> v1::Hello {
    let held = delta.upserts.iter().map(|u| v1::ResourceVersion {
        kind: u.kind,
        name: u.name.clone(),
        version: u.version.clone(),
    });
    v1::Hello {
        store_epoch: delta.store_epoch.clone(),
        store_revision: delta.store_revision,
        resource_versions: held.collect(),
        ..hello(id)
    }
}

#[tokio::test]
async fn a_gateway_gets_all_at_first_and_then_what_changed() {
    let plane = Plane::memory(cluster(1)).await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    assert_eq!(names(&first), ["p", "b0", "m"]);
    assert_eq!(first.store_revision, 1);
    gateway.ack(&first).await;

    let mut admin = plane.admin().await;
    admin.create_resource(create(tenant("t"))).await.unwrap();
    let second = gateway.delta().await;
    assert_eq!((names(&second), second.store_revision), (vec!["t"], 2));
    let wait = v1::WaitAppliedRequest {
        revision: 2,
        timeout: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }),
    };
    let early = admin.wait_applied(wait).await.unwrap().into_inner();
    assert_eq!((early.applied, early.connected, early.pending), (0, 1, vec!["g".to_owned()]));
    let wait = tokio::spawn(async move {
        let wait = v1::WaitAppliedRequest { revision: 2, timeout: None };
        admin.wait_applied(wait).await.unwrap().into_inner()
    });
    gateway.ack(&second).await;
    let waited = soon(wait).await.unwrap();
    assert_eq!((waited.applied, waited.connected, waited.pending.len()), (1, 1, 0));
    plane.stop().await;
    assert_eq!(gateway.end().await, Code::Unavailable);
}

#[tokio::test]
async fn nothing_is_sent_again_to_who_holds_it_even_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let plane = Plane::start(store.clone(), cluster(3)).await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    gateway.ack(&first).await;
    drop(gateway);
    plane.stop().await;

    let plane = Plane::start(store, vec![]).await;
    let mut gateway = plane.gateway(held(&first, "g")).await;
    plane.admin().await.create_resource(create(tenant("t"))).await.unwrap();
    let next = gateway.delta().await;
    assert_eq!((names(&next), next.removals.len()), (vec!["t"], 0));
    assert_eq!(next.store_epoch, first.store_epoch);
    let mut ahead = plane.gateway(v1::Hello { store_revision: 99, ..held(&first, "h") }).await;
    assert_eq!(ahead.end().await, Code::FailedPrecondition, "a store that is behind serves nobody");
    plane.stop().await;
}

#[tokio::test]
async fn changes_are_merged_while_an_answer_is_due() {
    let plane = Plane::memory(cluster(1)).await;
    let mut admin = plane.admin().await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    for i in 0..20 {
        admin.create_resource(create(tenant(&format!("t{i}")))).await.unwrap();
    }
    // Another gateway that has seen the last change proves that it is published.
    let mut witness = plane.gateway(hello("w")).await;
    let mut seen = witness.delta().await;
    while seen.store_revision < 21 {
        witness.ack(&seen).await;
        seen = witness.delta().await;
    }
    gateway.ack(&first).await;
    let merged = gateway.delta().await;
    assert_eq!((merged.nonce, merged.upserts.len(), merged.store_revision), (first.nonce + 1, 20, 21));
    plane.stop().await;
}

#[tokio::test]
async fn a_refusal_is_shown_and_ends_with_the_next_good_revision() {
    let plane = Plane::memory(cluster(1)).await;
    let mut admin = plane.admin().await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    let resource = reference(ResourceKind::Backend, "b0");
    let error = v1::ResourceError { resource: resource.clone(), message: "no such credential".into() };
    gateway.nack(&first, vec![error]).await;
    let shown = loop {
        let list = admin.list_gateways(v1::ListGatewaysRequest {}).await.unwrap().into_inner();
        if !list.gateways[0].errors.is_empty() {
            break list.gateways[0].clone();
        }
    };
    assert_eq!((shown.connected, shown.applied_revision), (true, 0));
    assert_eq!((&shown.errors[0].r#ref, shown.errors[0].message.as_str()), (&resource, "no such credential"));

    admin.create_resource(create(tenant("t"))).await.unwrap();
    let second = gateway.delta().await;
    assert_eq!(names(&second), ["b0", "t"], "what was refused comes again, what was taken does not");
    gateway.ack(&second).await;
    let wait = v1::WaitAppliedRequest { revision: 2, timeout: None };
    assert_eq!(admin.wait_applied(wait).await.unwrap().into_inner().applied, 1);
    let list = admin.list_gateways(v1::ListGatewaysRequest {}).await.unwrap().into_inner();
    assert!(list.gateways[0].errors.is_empty());
    plane.stop().await;
}

#[tokio::test]
async fn a_mass_removal_says_that_it_is_meant_and_an_empty_new_store_does_not() {
    let plane = Plane::memory(cluster(3)).await;
    let mut gateway = plane.gateway(hello("g")).await;
    let first = gateway.delta().await;
    assert!(!first.allow_mass_removal);
    gateway.ack(&first).await;
    let mut admin = plane.admin().await;
    let fewer = v1::ApplyRequest {
        apply_set: "bootstrap".into(),
        prune: true,
        allow_mass_removal: true,
        ..apply(cluster(1))
    };
    admin.apply(fewer).await.unwrap();
    let second = gateway.delta().await;
    assert_eq!((second.removals.len(), second.allow_mass_removal), (2, true));
    plane.stop().await;

    let empty = Plane::memory(vec![]).await;
    let mut gateway = empty.gateway(held(&first, "g")).await;
    let third = gateway.delta().await;
    assert_ne!(third.store_epoch, first.store_epoch);
    assert_eq!((third.removals.len(), third.allow_mass_removal), (5, false));
    empty.stop().await;
}

#[tokio::test]
async fn a_stream_begins_with_hello_and_no_other_process_takes_its_place() {
    let plane = Plane::memory(cluster(1)).await;
    let mut rude = plane.gateway(v1::Hello::default()).await;
    assert_eq!(rude.end().await, Code::InvalidArgument);
    let mut old = plane.gateway(hello("g")).await;
    old.delta().await;
    let mut new = plane.gateway(v1::Hello { incarnation: "2".into(), ..hello("g") }).await;
    assert_eq!(
        new.end().await,
        Code::Aborted,
        "another process of the same name, and no proof that it is the same"
    );
    let mut again = plane.gateway(hello("g")).await;
    again.delta().await;
    assert_eq!(old.end().await, Code::Aborted, "the newest stream of a process wins");
    drop(again);
    let mut admin = plane.admin().await;
    while admin.list_gateways(v1::ListGatewaysRequest {}).await.unwrap().into_inner().gateways[0].connected {
        tokio::task::yield_now().await;
    }
    let mut new = plane.gateway(v1::Hello { incarnation: "2".into(), ..hello("g") }).await;
    new.delta().await;
    let list = plane.admin().await.list_gateways(v1::ListGatewaysRequest {}).await.unwrap().into_inner();
    assert_eq!((list.gateways.len(), list.gateways[0].incarnation.as_str()), (1, "2"));
    plane.stop().await;
}

#[tokio::test]
async fn loads_of_all_gateways_are_added_and_go_with_their_gateway() {
    let plane = Plane::memory(vec![]).await;
    let channel = plane.channel().await;
    let report = |id: &str, in_flight| v1::StreamReportsRequest {
        gateway_id: id.into(),
        incarnation: "1".into(),
        sequence: 1,
        backends: vec![v1::BackendReport { backend: "b".into(), in_flight, ..Default::default() }],
        ..Default::default()
    };
    let open = async |first: v1::StreamReportsRequest| {
        let (said, requests) = mpsc::channel(4);
        said.send(first).await.unwrap();
        let mut client = ReportServiceClient::with_interceptor(channel.clone(), Bearer(GATEWAY));
        let heard = client.stream_reports(ReceiverStream::new(requests)).await.unwrap().into_inner();
        (said, heard)
    };
    let (_said, mut heard) = open(report("g", 3)).await;
    let mut hear = async |expected: (u32, u32)| {
        let mut last = (0, 0);
        while last != expected {
            let message = soon(heard.message()).await.unwrap().unwrap();
            last = (message.load.last().map_or(last.0, |load| load.in_flight), message.live_gateways);
        }
    };
    hear((3, 1)).await;
    let (other, _heard) = open(report("h", 4)).await;
    hear((7, 2)).await;
    drop(other);
    hear((3, 1)).await;
    plane.stop().await;
}
