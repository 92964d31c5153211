//! Envoy's rate limit service: what each field of a request and of an answer means.

use std::time::Duration;

use tokio::task::JoinSet;
use tonic::{Code as Grpc, Request};
use weir_proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use weir_proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::{Entry, RateLimitOverride};
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::rate_limit::Unit;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::{Code, DescriptorStatus};
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_client::RateLimitServiceClient;
use weir_proto::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use weir_proto::status::field_violations;
use weir_proto::v1;
use weir_ratelimit_service::Config;

use crate::harness::{Redis, Service, config};

/// Rules of every kind. Nothing of them drains within a test.
const RULES: &str = "
kind: tenant
name: acme
spec: {limits: {requests_per_minute: 1, tokens_per_minute: 1, burst_multiplier: 5}}
---
kind: limit
name: everything
spec: {rates: {requests_per_minute: 1, burst_multiplier: 1000}}
---
kind: descriptor_rule
name: tenant
spec: {domain: edge, entries: [{key: tenant}], consumes: [{}, {tenant: '{tenant}'}]}
---
kind: descriptor_rule
name: tokens
spec: {domain: edge, entries: [{key: tenant}, {key: tokens}], consumes: [{tenant: '{tenant}'}], counts: tokens, mode: meter}
---
kind: descriptor_rule
name: address
spec: {domain: edge, entries: [{key: address}], limit: {requests_per_unit: 3, unit: hour}}
---
kind: descriptor_rule
name: office
spec: {domain: edge, entries: [{key: address, value: 10.*}], unlimited: true}
---
kind: descriptor_rule
name: reported
spec: {domain: edge, entries: [{key: reported}], limit: {requests_per_unit: 2, unit: day}, mode: report}
---
kind: descriptor_rule
name: shadowed
spec: {domain: edge, entries: [{key: shadowed}], limit: {requests_per_unit: 2, unit: day}, mode: shadow}
---
kind: descriptor_rule
name: quota
spec: {domain: edge, entries: [{key: quota}], limit: {requests_per_unit: 2, unit: year}}
---
kind: descriptor_rule
name: weekly
spec: {domain: edge, entries: [{key: weekly}], limit: {requests_per_unit: 7, unit: week}}
";

struct Edge {
    service: Service,
    _redis: Option<Redis>,
    _rules: tempfile::NamedTempFile,
}

async fn edge(redis: Option<Redis>, change: impl FnOnce(&mut Config)) -> Edge {
    let rules = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(rules.path(), RULES).expect("written");
    let mut config = config(redis.as_ref());
    config.config = Some(rules.path().to_owned());
    change(&mut config);
    Edge { service: Service::ready(config).await, _redis: redis, _rules: rules }
}

fn descriptor(entries: &[(&str, &str)]) -> RateLimitDescriptor {
    let entries =
        entries.iter().map(|(key, value)| Entry { key: (*key).into(), value: (*value).into() }).collect();
    RateLimitDescriptor { entries, ..RateLimitDescriptor::default() }
}

fn hits(entries: &[(&str, &str)], hits: u64) -> RateLimitDescriptor {
    RateLimitDescriptor { hits_addend: Some(hits), ..descriptor(entries) }
}

fn limited(entries: &[(&str, &str)], requests_per_unit: u32, unit: i32) -> RateLimitDescriptor {
    RateLimitDescriptor { limit: Some(RateLimitOverride { requests_per_unit, unit }), ..descriptor(entries) }
}

fn request(descriptors: Vec<RateLimitDescriptor>) -> RateLimitRequest {
    RateLimitRequest { domain: "edge".into(), descriptors, hits_addend: 0 }
}

impl Edge {
    async fn ask(&self, descriptors: Vec<RateLimitDescriptor>) -> RateLimitResponse {
        self.send(request(descriptors)).await
    }

    async fn send(&self, request: RateLimitRequest) -> RateLimitResponse {
        let mut client = RateLimitServiceClient::new(self.service.channel.clone());
        client.should_rate_limit(request).await.expect("an answer").into_inner()
    }

    /// Whether one descriptor passes.
    async fn passes(&self, descriptor: RateLimitDescriptor) -> bool {
        self.ask(vec![descriptor]).await.overall_code() == Code::Ok
    }
}

fn header<'a>(answer: &'a RateLimitResponse, key: &str) -> Option<&'a str> {
    answer.response_headers_to_add.iter().find(|h| h.key == key).map(|h| h.value.as_str())
}

fn name(status: &DescriptorStatus) -> &str {
    status.current_limit.as_ref().map_or("", |limit| limit.name.as_str())
}

macro_rules! over_both {
    ($($case:ident),+ $(,)?) => {
        mod memory {
            $(#[tokio::test] async fn $case() {
                super::$case(super::edge(None, |_| {}).await).await;
            })+
        }
        mod redis {
            $(#[tokio::test] async fn $case() {
                let redis = crate::harness::Redis::start().await;
                super::$case(super::edge(Some(redis), |_| {}).await).await;
            })+
        }
    };
}

over_both! {
    statuses_are_one_to_one_and_filled, over_the_limit_is_told_with_headers_and_charges_nothing,
    hits_come_from_the_request_or_the_descriptor, no_hits_only_ask, negative_hits_are_given_back,
    an_override_limits_in_every_unit, an_override_takes_the_rules_bucket_and_does_not_lift_what_it_consumes,
    a_meter_charges_what_is_known_afterwards, report_and_shadow_never_refuse, what_matches_nothing_passes,
    the_buckets_are_those_of_the_native_service, requests_that_say_nothing_are_refused,
    a_long_value_lifts_no_limit, many_descriptors_are_one_decision,
}

async fn statuses_are_one_to_one_and_filled(edge: Edge) {
    let answer = edge
        .ask(vec![
            descriptor(&[("address", "192.0.2.1")]),
            descriptor(&[("nobody", "knows")]),
            descriptor(&[("address", "10.1.2.3")]),
            descriptor(&[("tenant", "acme")]),
            descriptor(&[("weekly", "x")]),
        ])
        .await;
    assert_eq!(answer.overall_code(), Code::Ok);
    assert_eq!(answer.statuses.iter().map(DescriptorStatus::code).collect::<Vec<_>>(), [Code::Ok; 5]);
    let [address, unmatched, unlimited, tenant, weekly] = &answer.statuses[..] else { panic!("{answer:?}") };
    assert_eq!(name(address), "address");
    let limit = address.current_limit.as_ref().expect("a limit");
    assert_eq!((limit.requests_per_unit, limit.unit()), (3, Unit::Hour));
    assert_eq!(address.limit_remaining, 2);
    let reset = address.duration_until_reset.expect("a reset").seconds;
    assert!((1199..=1200).contains(&reset), "a third of an hour: {reset}");
    assert_eq!((unmatched.current_limit.as_ref(), unmatched.duration_until_reset), (None, None));
    assert_eq!((unlimited.current_limit.as_ref(), unlimited.limit_remaining), (None, u32::MAX));
    assert_eq!((name(tenant), tenant.limit_remaining), ("tenant acme", 4), "the tightest of two");
    assert_eq!(tenant.current_limit.as_ref().map(|l| l.unit()), Some(Unit::Minute));
    assert_eq!(weekly.current_limit.as_ref().map(|l| l.unit()), Some(Unit::Week));
    assert_eq!(header(&answer, "x-ratelimit-limit"), Some(r#"3, 3;w=3600;name="address""#), "{answer:?}");
    assert_eq!(header(&answer, "x-ratelimit-remaining"), Some("2"));
    assert!(header(&answer, "x-ratelimit-reset").is_some() && header(&answer, "retry-after").is_none());
    assert!(answer.raw_body.is_empty());
}

async fn over_the_limit_is_told_with_headers_and_charges_nothing(edge: Edge) {
    for _ in 0..3 {
        assert!(edge.passes(descriptor(&[("address", "192.0.2.1")])).await);
    }
    let both = vec![descriptor(&[("quota", "q")]), descriptor(&[("address", "192.0.2.1")])];
    let answer = edge.ask(both).await;
    assert_eq!(answer.overall_code(), Code::OverLimit);
    assert_eq!(
        answer.statuses.iter().map(DescriptorStatus::code).collect::<Vec<_>>(),
        [Code::Ok, Code::OverLimit]
    );
    assert_eq!((answer.statuses[0].limit_remaining, answer.statuses[1].limit_remaining), (2, 0));
    let retry: u64 = header(&answer, "retry-after").expect("when to retry").parse().expect("seconds");
    assert!((1199..=1200).contains(&retry), "{retry}");
    assert!(header(&answer, "retry-after-ms").is_some());
    assert_eq!(header(&answer, "content-type"), Some("application/json"));
    let body: serde_json::Value = serde_json::from_slice(&answer.raw_body).expect("JSON");
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert!(
        body["error"]["message"].as_str().expect("text").contains("requests of address: 3 per hour"),
        "{body}"
    );
    assert!(edge.passes(descriptor(&[("address", "192.0.2.2")])).await, "another value, another bucket");
}

async fn hits_come_from_the_request_or_the_descriptor(edge: Edge) {
    let of_request = RateLimitRequest { hits_addend: 2, ..request(vec![descriptor(&[("weekly", "a")])]) };
    assert_eq!(edge.send(of_request.clone()).await.statuses[0].limit_remaining, 5);
    let own = RateLimitRequest { descriptors: vec![hits(&[("weekly", "a")], 4)], ..of_request.clone() };
    assert_eq!(edge.send(own).await.statuses[0].limit_remaining, 1, "the descriptor's own hits count");
    assert_eq!(edge.send(of_request).await.overall_code(), Code::OverLimit);
    assert!(edge.passes(descriptor(&[("weekly", "a")])).await, "absent is one");
    let never = edge.ask(vec![hits(&[("weekly", "b")], 8)]).await;
    assert_eq!((never.overall_code(), header(&never, "retry-after")), (Code::OverLimit, None));
}

/// The reference server's scenario: a check with no hits before, one hit after each admitted request.
async fn no_hits_only_ask(edge: Edge) {
    let mut admitted = 0;
    for _ in 0..4 {
        if edge.passes(hits(&[("quota", "q")], 0)).await {
            admitted += 1;
            let _ = edge.passes(hits(&[("quota", "q")], 1)).await;
        }
    }
    assert_eq!(admitted, 4, "what does not fit is not charged in this mode, so the limit is never exceeded");
    let answer = edge.ask(vec![hits(&[("quota", "q")], 0)]).await;
    assert_eq!(answer.statuses[0].limit_remaining, 0);
}

#[tokio::test]
async fn strict_checks_need_room_for_a_hit() {
    let edge = edge(None, |config| config.strict_zero_hits = true).await;
    for _ in 0..2 {
        assert!(edge.passes(hits(&[("quota", "q")], 0)).await);
        assert!(edge.passes(hits(&[("quota", "q")], 1)).await);
    }
    assert!(!edge.passes(hits(&[("quota", "q")], 0)).await);
}

async fn negative_hits_are_given_back(edge: Edge) {
    assert!(edge.passes(hits(&[("weekly", "a")], 7)).await);
    assert!(!edge.passes(descriptor(&[("weekly", "a")])).await);
    let back = RateLimitDescriptor { is_negative_hits: true, ..hits(&[("weekly", "a")], 3) };
    let answer = edge.ask(vec![back.clone()]).await;
    assert_eq!((answer.overall_code(), answer.statuses[0].limit_remaining), (Code::Ok, 3));
    for _ in 0..3 {
        let _ = edge.ask(vec![back.clone()]).await;
    }
    assert_eq!(
        edge.ask(vec![hits(&[("weekly", "a")], 0)]).await.statuses[0].limit_remaining,
        7,
        "never above full"
    );
}

async fn an_override_limits_in_every_unit(edge: Edge) {
    let units = [Unit::Second, Unit::Minute, Unit::Hour, Unit::Day, Unit::Month, Unit::Year];
    let seconds = [1, 60, 3600, 86_400, 30 * 86_400, 365 * 86_400];
    for (unit, seconds) in units.into_iter().zip(seconds) {
        // Zero lets nothing pass, in any unit; so a busy machine cannot drain a second away.
        let descriptor = limited(&[("any", unit.as_str_name())], 0, unit as i32);
        let answer = edge.ask(vec![descriptor]).await;
        assert_eq!(answer.overall_code(), Code::OverLimit, "{unit:?}");
        let limit = answer.statuses[0].current_limit.clone().expect("a limit");
        assert_eq!((limit.name.as_str(), limit.requests_per_unit, limit.unit()), ("override", 0, unit));
        let answer = edge.ask(vec![limited(&[("any", unit.as_str_name())], 5, unit as i32)]).await;
        assert_eq!(answer.statuses[0].limit_remaining, 4, "{unit:?}");
        let reset = answer.statuses[0].duration_until_reset.expect("a reset");
        let reset = Duration::try_from(reset).expect("positive");
        assert!(reset <= Duration::from_secs(seconds).div_f64(5.0), "{unit:?}: {reset:?}");
        let least = Duration::from_secs(seconds).div_f64(5.0).saturating_sub(Duration::from_secs(1));
        assert!(reset > least, "{unit:?}: {reset:?}");
    }
}

async fn an_override_takes_the_rules_bucket_and_does_not_lift_what_it_consumes(edge: Edge) {
    let hour = Unit::Hour as i32;
    for _ in 0..3 {
        assert!(edge.passes(descriptor(&[("address", "192.0.2.1")])).await);
    }
    assert!(edge.passes(limited(&[("address", "192.0.2.1")], 5, hour)).await, "three of five were used");
    assert!(!edge.passes(limited(&[("address", "192.0.2.1")], 4, hour)).await);
    for _ in 0..5 {
        assert!(edge.passes(limited(&[("tenant", "acme")], 1000, hour)).await);
    }
    let answer = edge.ask(vec![limited(&[("tenant", "acme")], 1000, hour)]).await;
    assert_eq!((answer.overall_code(), name(&answer.statuses[0])), (Code::OverLimit, "tenant acme"));
}

async fn a_meter_charges_what_is_known_afterwards(edge: Edge) {
    let tokens = [("tenant", "acme"), ("tokens", "all")];
    assert!(edge.passes(hits(&tokens, 0)).await, "something is left");
    assert!(edge.passes(hits(&tokens, 7)).await, "above capacity, and charged");
    assert!(!edge.passes(hits(&tokens, 0)).await, "in debt");
    let late = edge.ask(vec![hits(&tokens, 2)]).await;
    assert_eq!((late.overall_code(), late.statuses[0].limit_remaining), (Code::OverLimit, 0));
    let back = RateLimitDescriptor { is_negative_hits: true, ..hits(&tokens, 4) };
    let _ = edge.ask(vec![back]).await;
    assert!(
        !edge.passes(hits(&tokens, 0)).await,
        "9 - 4 is what there is: nothing is left, the late 2 were charged"
    );
}

async fn report_and_shadow_never_refuse(edge: Edge) {
    for key in ["reported", "shadowed"] {
        for _ in 0..4 {
            assert!(edge.passes(descriptor(&[(key, "x")])).await);
        }
        let answer = edge.ask(vec![descriptor(&[(key, "x")])]).await;
        assert_eq!((answer.overall_code(), answer.statuses[0].limit_remaining), (Code::Ok, 0));
    }
    let metrics = edge.service.page("/metrics").await;
    for (rule, outcome, count) in [("shadowed", "noted", 3), ("shadowed", "ok", 2), ("reported", "ok", 5)] {
        let line =
            format!("weir_ratelimit_descriptors_total{{rule=\"{rule}\",outcome=\"{outcome}\"}} {count}");
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
}

async fn what_matches_nothing_passes(edge: Edge) {
    let other =
        RateLimitRequest { domain: "other".into(), ..request(vec![descriptor(&[("address", "192.0.2.1")])]) };
    let answer = edge.send(other).await;
    assert_eq!((answer.overall_code(), answer.statuses.len()), (Code::Ok, 1));
    assert!(answer.response_headers_to_add.is_empty());
    let stranger = edge.ask(vec![descriptor(&[("tenant", "stranger")])]).await;
    assert_eq!(
        name(&stranger.statuses[0]),
        "limit everything",
        "of a tenant nobody knows only the rest counts"
    );
}

async fn the_buckets_are_those_of_the_native_service(edge: Edge) {
    for _ in 0..4 {
        assert!(edge.passes(descriptor(&[("tenant", "acme")])).await);
    }
    let scope = v1::LimitSelector { tenant: "acme".into(), ..Default::default() };
    let rates = v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(5.0), ..Default::default() };
    let call = || v1::AcquireRequest {
        reservation_id: uuid::Uuid::now_v7().to_string(),
        cost: Some(v1::Cost { requests: 1, ..Default::default() }),
        scopes: vec![v1::ScopedRates { scope: Some(scope.clone()), rates: Some(rates) }],
        ..Default::default()
    };
    let mut native = edge.service.native();
    assert!(native.acquire(call()).await.expect("decided").into_inner().granted, "the fifth of five");
    assert!(!native.acquire(call()).await.expect("decided").into_inner().granted);
    assert!(!edge.passes(descriptor(&[("tenant", "acme")])).await);
}

async fn requests_that_say_nothing_are_refused(edge: Edge) {
    let bad = RateLimitRequest {
        domain: String::new(),
        descriptors: vec![descriptor(&[]), limited(&[("a", "b")], 1, 0)],
        hits_addend: 0,
    };
    let mut client = RateLimitServiceClient::new(edge.service.channel.clone());
    let status = client.should_rate_limit(bad).await.expect_err("refused");
    assert_eq!(status.code(), Grpc::InvalidArgument);
    let fields: Vec<String> = field_violations(&status).into_iter().map(|v| v.field).collect();
    assert_eq!(fields, ["domain", "descriptors[0].entries", "descriptors[1].limit.unit"]);
    let none = client.should_rate_limit(request(vec![])).await.expect_err("refused");
    assert!(none.message().contains("descriptors: must be 1 to"), "{}", none.message());
}

/// A proxy admits when it gets an error, so what a stranger writes into a request must never make one.
async fn a_long_value_lifts_no_limit(edge: Edge) {
    let used_up = descriptor(&[("address", "192.0.2.9")]);
    for _ in 0..3 {
        assert!(edge.passes(used_up.clone()).await);
    }
    for length in [1_000, 1_025, 70_000, 1 << 20, 3 << 20] {
        let long = "/x?".to_owned() + &"q".repeat(length);
        for odd in
            [descriptor(&[("path", &long)]), descriptor(&[(&long, "v")]), descriptor(&[("address", &long)])]
        {
            let answer = edge.ask(vec![odd, used_up.clone()]).await;
            assert_eq!(answer.overall_code(), Code::OverLimit, "{length}");
            assert_eq!(answer.statuses[1].code(), Code::OverLimit, "{length}");
        }
    }
    // Two values of the same beginning and length have a bucket each, and each is a bucket as any other.
    let long = "a".repeat(70_000);
    for last in ["b", "c"] {
        let of = |hits| RateLimitDescriptor {
            hits_addend: Some(hits),
            ..descriptor(&[("address", &format!("{long}{last}"))])
        };
        assert!(edge.passes(of(2)).await && edge.passes(of(1)).await, "{last}");
        assert!(!edge.passes(of(1)).await, "{last}");
    }
    let pairs: Vec<(String, String)> = (0..200).map(|n| (format!("k{n}"), long.clone())).take(40).collect();
    let pairs: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let answer = edge.ask(vec![descriptor(&pairs), used_up]).await;
    assert_eq!((answer.overall_code(), answer.statuses[0].code()), (Code::OverLimit, Code::Ok));
}

async fn many_descriptors_are_one_decision(edge: Edge) {
    let many = |last: RateLimitDescriptor| {
        let each = (0..200).map(|n| descriptor(&[("quota", &format!("q{n}"))]));
        each.chain([last]).collect::<Vec<_>>()
    };
    let blocked = hits(&[("quota", "full")], 3);
    for _ in 0..3 {
        let answer = edge.ask(many(blocked.clone())).await;
        assert_eq!((answer.overall_code(), answer.statuses.len()), (Code::OverLimit, 201));
        assert_eq!(answer.statuses[200].code(), Code::OverLimit);
    }
    let answer = edge.ask(many(descriptor(&[("quota", "last")]))).await;
    assert_eq!(answer.overall_code(), Code::Ok);
    assert!(answer.statuses.iter().all(|status| status.limit_remaining == 1), "a refusal charged nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_a_hundred_of_two_thousand_over_two_replicas() {
    let redis = Redis::start().await;
    let rules = tempfile::NamedTempFile::new().expect("a file");
    let text = "kind: descriptor_rule\nname: hundred\nspec: {domain: edge, entries: [{key: a}], limit: \
                {requests_per_unit: 100, unit: year}}\n";
    std::fs::write(rules.path(), text).expect("written");
    let mut config = config(Some(&redis));
    config.config = Some(rules.path().to_owned());
    let replicas = [Service::ready(config.clone()).await, Service::ready(config).await];
    let mut calls = JoinSet::new();
    for i in 0..2000 {
        let mut client = RateLimitServiceClient::new(replicas[i % 2].channel.clone());
        calls.spawn(async move {
            let answer = client.should_rate_limit(request(vec![descriptor(&[("a", "b")])])).await;
            let answer = answer.expect("an answer").into_inner();
            assert_eq!(name(&answer.statuses[0]), "hundred");
            if answer.overall_code() == Code::OverLimit {
                assert!(header(&answer, "retry-after").is_some() && answer.statuses[0].limit_remaining == 0);
            }
            answer.overall_code() == Code::Ok
        });
    }
    assert_eq!(calls.join_all().await.into_iter().filter(|ok| *ok).count(), 100);
}

#[tokio::test]
async fn a_deadline_is_kept_while_the_store_is_silent() {
    let edge = edge(Some(Redis::start().await), |_| {}).await;
    let redis = edge._redis.as_ref().expect("a server");
    redis.signal("-STOP");
    let mut client = RateLimitServiceClient::new(edge.service.channel.clone());
    let mut call = Request::new(request(vec![descriptor(&[("address", "192.0.2.1")])]));
    call.set_timeout(Duration::from_millis(100));
    let answer = tokio::time::timeout(Duration::from_secs(5), client.should_rate_limit(call)).await;
    let status = answer.expect("long before the store counts as silent").expect_err("nothing was decided");
    assert!(matches!(status.code(), Grpc::DeadlineExceeded | Grpc::Cancelled), "{status:?}");
    redis.signal("-CONT");
    assert!(edge.passes(descriptor(&[("address", "192.0.2.1")])).await);
}

#[tokio::test]
async fn without_the_store_nothing_is_decided_and_the_proxys_policy_holds() {
    let edge = edge(Some(Redis::start().await), |_| {}).await;
    edge._redis.as_ref().expect("a server").signal("-STOP");
    let mut client = RateLimitServiceClient::new(edge.service.channel.clone());
    let call = client.should_rate_limit(request(vec![descriptor(&[("address", "192.0.2.1")])]));
    assert_eq!(call.await.expect_err("nothing was decided").code(), Grpc::Unavailable);
    edge._redis.as_ref().expect("a server").signal("-CONT");
}
