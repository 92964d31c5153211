use std::sync::LazyLock;

use prost::Message as _;
use tonic::Code;
use weir_proto::envoy::service::ratelimit::v3::RateLimitRequest;
use weir_proto::manifest;
use weir_proto::resource::Resource;
use weir_ratelimit_service::fuzzing::Services;

const RULES: &str = "
kind: tenant
name: acme
spec: {limits: {requests_per_minute: 10, tokens_per_minute: 1000}}
---
kind: descriptor_rule
name: own
spec: {domain: d, entries: [{key: k, value: v}, {key: w}], limit: {requests_per_unit: 3, unit: second}}
---
kind: descriptor_rule
name: begins
spec: {domain: d, entries: [{key: k, value: 'v*'}], limit: {requests_per_unit: 4000000000, unit: year}}
---
kind: descriptor_rule
name: consumes
spec: {domain: d, entries: [{key: tenant}], consumes: [{tenant: '{tenant}'}], counts: tokens}
---
kind: descriptor_rule
name: free
spec: {domain: d, entries: [{key: free}], unlimited: true}
";

static RESOURCES: LazyLock<Vec<Resource>> = LazyLock::new(|| {
    let wire = manifest::parse(RULES, "rules").unwrap_or_else(|error| panic!("{error}"));
    wire.iter().map(|wire| Resource::try_from(wire).expect("it was parsed")).collect()
});

/// Every request has an answer with a status for each of its descriptors, or is called wrong; the next one has, too.
pub(crate) fn run(data: &[u8]) {
    let Ok(request) = RateLimitRequest::decode(data) else { return };
    super::limit_calls::block_on(async {
        let services = Services::new(&RESOURCES);
        for _ in 0..2 {
            match services.should_rate_limit(request.clone()).await {
                Ok(answer) => assert_eq!(answer.statuses.len(), request.descriptors.len()),
                Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status}"),
            }
        }
    });
}
