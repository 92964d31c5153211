//! gRPC ports: one token, and bounds for callers without one.

use tonic::transport::Endpoint;
use tonic::{Code, Request};
use weir_proto::v1::WhoAmIRequest;
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_tests::plane::{self, ADMIN_TOKEN};

#[tokio::test(flavor = "multi_thread")]
async fn two_tokens_in_one_call_are_no_token() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let channel = Endpoint::from_shared(plane.url.clone()).expect("a URL").connect().await.expect("there");
    let mut admin = AdminServiceClient::new(channel);
    let good = format!("Bearer {ADMIN_TOKEN}");
    for (case, tokens, code) in [
        ("none", vec![], Some(Code::Unauthenticated)),
        ("the right one", vec![good.as_str()], None),
        ("a wrong one", vec!["Bearer wrong-token-of-the-tests"], Some(Code::Unauthenticated)),
        ("right, then wrong", vec![&good, "Bearer wrong-token-of-the-tests"], Some(Code::Unauthenticated)),
        ("wrong, then right", vec!["Bearer wrong-token-of-the-tests", &good], Some(Code::Unauthenticated)),
        ("the right one twice", vec![&good, &good], Some(Code::Unauthenticated)),
        ("two in one value", vec!["Bearer wrong, Bearer right"], Some(Code::Unauthenticated)),
    ] {
        let mut request = Request::new(WhoAmIRequest {});
        for token in tokens {
            request.metadata_mut().append("authorization", token.parse().expect("a header"));
        }
        let answer = admin.who_am_i(request).await;
        assert_eq!(answer.as_ref().err().map(tonic::Status::code), code, "{case}: {answer:?}");
    }
}
