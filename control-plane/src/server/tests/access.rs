use super::*;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;
use v1::Role;

/// A client with any token.
async fn client(plane: &Plane, token: &str) -> AdminServiceClient<Client> {
    let token: &'static str = Box::leak(token.to_owned().into_boxed_str());
    AdminServiceClient::with_interceptor(plane.channel().await, Bearer(token))
}

async fn issue(admin: &mut AdminServiceClient<Client>, name: &str, role: Role, gateway_id: &str) -> String {
    let request = v1::IssueTokenRequest {
        name: name.into(),
        role: role.into(),
        gateway_id: gateway_id.into(),
        ..Default::default()
    };
    admin.issue_token(request).await.unwrap().into_inner().secret
}

/// Calls a method with an empty message; what matters is who is let through.
async fn call(channel: Channel, path: &str, token: &str) -> Code {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::empty::<()>());
    let value: MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
    request.metadata_mut().insert("authorization", value);
    let codec = ProstCodec::<(), ()>::default();
    match soon(grpc.streaming(request, path.parse().unwrap(), codec)).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn each_role_can_call_what_it_is_for_and_nothing_else() {
    let plane = Plane::memory(vec![]).await;
    let mut admin = plane.admin().await;
    let roles = [Role::Viewer, Role::Operator, Role::Editor, Role::Admin, Role::Gateway];
    let channel = plane.channel().await;
    let methods = crate::auth::tests::methods();
    for role in roles {
        let token = issue(&mut admin, &format!("t-{}", crate::auth::role_name(role)), role, "").await;
        for method in &methods {
            let needed = crate::auth::needs(method).unwrap();
            let code = call(channel.clone(), method, &token).await;
            let refused = code == Code::PermissionDenied;
            assert_eq!(refused, !crate::auth::opens(role, needed), "{role:?} at {method}: {code:?}");
        }
    }
    for method in &methods {
        assert_eq!(call(channel.clone(), method, "nobody-has-this-one").await, Code::Unauthenticated);
    }
    plane.stop().await;
}

#[tokio::test]
async fn an_operator_shifts_weight_and_cannot_move_a_backend() {
    let plane = Plane::memory(cluster(1)).await;
    let token = issue(&mut plane.admin().await, "ops", Role::Operator, "").await;
    let mut operator = client(&plane, &token).await;
    let update = |paths: &[&str]| v1::UpdateResourceRequest {
        resource: Some(backend("b0", "p", "m", "http://evil:1")),
        update_mask: Some(prost_types::FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() }),
        ..Default::default()
    };
    operator.update_resource(update(&["weight", "admin_state"])).await.unwrap();
    for paths in [&["url"][..], &["weight", "url"], &["*"], &[]] {
        let refused = operator.update_resource(update(paths)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{paths:?}");
    }
    let drain = v1::DrainRequest { backend: "b0".into(), ..Default::default() };
    operator.drain(drain).await.unwrap();
    let who = operator.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner();
    assert_eq!((who.name.as_str(), who.role()), ("ops", Role::Operator));
    plane.stop().await;
}

#[tokio::test]
async fn tokens_expire_are_rotated_and_revoked_and_never_shown() {
    let plane = Plane::memory(vec![]).await;
    let mut admin = plane.admin().await;
    let old = issue(&mut admin, "ci", Role::Viewer, "").await;
    let works = async |token: &str| {
        let mut client = client(&plane, token).await;
        client.who_am_i(v1::WhoAmIRequest {}).await.map_or_else(|s| s.code(), |_| Code::Ok)
    };
    assert_eq!(works(&old).await, Code::Ok);
    let rotate = v1::RotateTokenRequest { name: "ci".into(), ..Default::default() };
    let new = admin.rotate_token(rotate.clone()).await.unwrap().into_inner().secret;
    assert_eq!((works(&old).await, works(&new).await), (Code::Ok, Code::Ok), "both during the grace");
    let grace = Some(prost_types::Duration::default());
    let newest = v1::RotateTokenRequest { grace, ..rotate };
    let newest = admin.rotate_token(newest).await.unwrap().into_inner().secret;
    assert_eq!((works(&new).await, works(&newest).await), (Code::Unauthenticated, Code::Ok));

    let list = admin.list_tokens(v1::ListTokensRequest {}).await.unwrap().into_inner().tokens;
    assert_eq!(list[0].secrets[0].sha256, Vec::<u8>::new());
    assert!(newest.starts_with(&list[0].secrets[0].prefix));
    let history = admin.history(v1::HistoryRequest::default()).await.unwrap().into_inner();
    let digest = crate::encoding::hex(&crate::encoding::sha256(newest.as_bytes()));
    let text = format!("{history:?}");
    assert!(!text.contains(&digest) && !text.contains(&newest), "no secret and no digest in the log");
    assert_eq!(history.entries[0].changes[0].token, "ci");

    admin.revoke_token(v1::RevokeTokenRequest { name: "ci".into(), ..Default::default() }).await.unwrap();
    assert_eq!(works(&newest).await, Code::Unauthenticated);
    let past = v1::IssueTokenRequest {
        name: "late".into(),
        role: Role::Viewer.into(),
        expire_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
        ..Default::default()
    };
    let refused = admin.issue_token(past).await.unwrap_err();
    assert_eq!(weir_proto::status::field_violations(&refused)[0].field, "expire_time");
    plane.stop().await;
}

#[tokio::test]
async fn one_gateway_cannot_speak_for_another() {
    let plane = Plane::memory(cluster(1)).await;
    let mut admin = plane.admin().await;
    let mine = issue(&mut admin, "gw-a", Role::Gateway, "a").await;
    let open = async |token: &str, id: &str| {
        let (said, requests) = mpsc::channel(4);
        let token: &'static str = Box::leak(token.to_owned().into_boxed_str());
        let mut client = DiscoveryServiceClient::with_interceptor(plane.channel().await, Bearer(token));
        let heard = client.stream_config(ReceiverStream::new(requests)).await.unwrap().into_inner();
        let gateway = Gateway { said, heard };
        gateway.say(v1::stream_config_request::Message::Hello(hello(id))).await;
        gateway
    };
    let mut own = open(&mine, "a").await;
    own.delta().await;
    assert_eq!(open(&mine, "b").await.end().await, Code::PermissionDenied, "its token is for a only");
    let shared = open(GATEWAY, "a").await.end().await;
    assert_eq!(shared, Code::PermissionDenied, "and a is for its token only");
    open(GATEWAY, "b").await.delta().await;

    let (said, requests) = mpsc::channel(4);
    let lie = v1::StreamReportsRequest { gateway_id: "a".into(), sequence: 1, ..Default::default() };
    said.send(lie).await.unwrap();
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let mut heard = reports.stream_reports(ReceiverStream::new(requests)).await.unwrap().into_inner();
    assert_eq!(soon(heard.message()).await.unwrap_err().code(), Code::PermissionDenied);
    plane.stop().await;
}
