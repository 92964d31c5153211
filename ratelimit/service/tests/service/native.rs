//! `weir.v1.LimitService`.

use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;
use weir_proto::status::field_violations;
use weir_proto::v1;

use crate::harness::{Redis, Service, config};

fn rates(change: impl FnOnce(&mut v1::Rates)) -> v1::Rates {
    let mut rates = v1::Rates { burst_multiplier: Some(1.0), ..Default::default() };
    change(&mut rates);
    rates
}

fn tenant(name: &str, rates: v1::Rates) -> v1::ScopedRates {
    let scope = v1::LimitSelector { tenant: name.into(), ..Default::default() };
    v1::ScopedRates { scope: Some(scope), rates: Some(rates) }
}

fn acquire(scopes: Vec<v1::ScopedRates>, input_tokens: u64) -> v1::AcquireRequest {
    v1::AcquireRequest {
        reservation_id: Uuid::now_v7().to_string(),
        cost: Some(v1::Cost { requests: 1, input_tokens, output_tokens: 0 }),
        scopes,
        ..Default::default()
    }
}

/// Runs a case over memory and over a Redis of its own.
macro_rules! over_both {
    ($($case:ident),+ $(,)?) => {
        mod memory {
            $(#[tokio::test] async fn $case() {
                super::$case(crate::harness::Service::ready(crate::harness::config(None)).await).await;
            })+
        }
        mod redis {
            $(#[tokio::test] async fn $case() {
                let redis = crate::harness::Redis::start().await;
                super::$case(crate::harness::Service::ready(crate::harness::config(Some(&redis))).await).await;
            })+
        }
    };
}

over_both! {
    what_was_reserved_is_settled_and_shown, a_refusal_says_which_limit_and_when, a_repeated_id_pays_once,
    who_may_wait_is_served_in_turn, leases_are_renewed_released_and_lost, every_mistake_is_told_with_its_field,
}

async fn what_was_reserved_is_settled_and_shown(service: Service) {
    let mut client = service.native();
    let scopes = vec![tenant("acme", rates(|r| r.tokens_per_minute = Some(1000)))];
    let reserve = acquire(scopes.clone(), 600);
    let answer = client.acquire(reserve.clone()).await.expect("decided").into_inner();
    assert!(answer.granted && answer.wait.is_none());
    assert_eq!((answer.limits[0].kind.as_str(), answer.limits[0].limit), ("tokens", 1000));
    assert!((400..=410).contains(&answer.limits[0].remaining), "{answer:?}");
    let settle = v1::SettleRequest {
        reservation_id: reserve.reservation_id,
        actual: Some(v1::Cost { requests: 1, input_tokens: 50, output_tokens: 50 }),
        scopes: scopes.clone(),
    };
    assert!(client.settle(settle.clone()).await.expect("settled").into_inner().applied);
    assert!(!client.settle(settle).await.expect("settled").into_inner().applied, "once");
    let shown = client.peek(v1::PeekRequest { scopes }).await.expect("shown").into_inner();
    assert!(shown.limits[0].remaining >= 900 && !shown.limits[0].exceeded, "{shown:?}");
}

async fn a_refusal_says_which_limit_and_when(service: Service) {
    let mut client = service.native();
    let roomy = v1::ScopedRates { rates: Some(rates(|r| r.requests_per_minute = Some(100))), scope: None };
    let tight = tenant("acme", rates(|r| r.tokens_per_minute = Some(60)));
    let answer = client.acquire(acquire(vec![roomy.clone(), tight.clone()], 60)).await.expect("decided");
    assert!(answer.into_inner().granted);
    let answer = client.acquire(acquire(vec![roomy.clone(), tight.clone()], 30)).await.expect("decided");
    let answer = answer.into_inner();
    assert!(!answer.granted);
    assert!((28..=30).contains(&answer.wait.expect("a wait").seconds), "{answer:?}");
    assert_eq!(answer.limits.iter().map(|l| l.exceeded).collect::<Vec<_>>(), [false, true]);
    assert_eq!((answer.limits[1].scope, answer.limits[0].remaining), (1, 99), "nothing of it was written");
    let never = client.acquire(acquire(vec![roomy, tight], 61)).await.expect("decided").into_inner();
    assert!(!never.granted && never.wait.is_none());
}

async fn who_may_wait_is_served_in_turn(service: Service) {
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let scopes = vec![tenant("acme", rates(|r| r.concurrency = Some(1)))];
    let holds = acquire(scopes.clone(), 0);
    assert!(service.native().acquire(holds.clone()).await.expect("decided").into_inner().granted);
    let refused = service.native().acquire(acquire(scopes.clone(), 0)).await.expect("decided").into_inner();
    assert!(!refused.granted, "who may not wait is told at once");
    let waits = v1::AcquireRequest { max_wait: seconds(60), ..acquire(scopes.clone(), 0) };
    let mut client = service.native();
    let waiting = tokio::spawn(async move { client.acquire(waits).await.expect("decided").into_inner() });
    let mut hasty =
        tonic::Request::new(v1::AcquireRequest { max_wait: seconds(60), ..acquire(scopes.clone(), 0) });
    hasty.set_timeout(std::time::Duration::from_millis(300));
    let hasty = service.native().acquire(hasty).await;
    assert!(hasty.is_err() || !hasty.expect("decided").into_inner().granted, "its own deadline is kept");
    assert!(!waiting.is_finished());
    let end =
        v1::SettleRequest { reservation_id: holds.reservation_id, actual: None, scopes: scopes.clone() };
    let end = v1::SettleRequest { actual: Some(v1::Cost { requests: 1, ..Default::default() }), ..end };
    service.native().settle(end).await.expect("settled");
    assert!(waiting.await.expect("answered").granted, "the slot that came free is taken");
    // What cannot fit in time is refused at once, with the time it would take.
    let slow = vec![tenant("slow", rates(|r| r.requests_per_minute = Some(1)))];
    assert!(service.native().acquire(acquire(slow.clone(), 0)).await.expect("decided").into_inner().granted);
    let hopeless = v1::AcquireRequest { max_wait: seconds(5), ..acquire(slow, 0) };
    let answer = service.native().acquire(hopeless).await.expect("decided").into_inner();
    assert!(!answer.granted && answer.wait.expect("a wait").seconds > 30, "{answer:?}");
    let wrong = v1::AcquireRequest { max_wait: seconds(61), ..acquire(scopes, 0) };
    assert_eq!(service.native().acquire(wrong).await.expect_err("too long").code(), Code::InvalidArgument);
}

async fn a_repeated_id_pays_once(service: Service) {
    let mut client = service.native();
    let scopes = vec![tenant("acme", rates(|r| r.requests_per_minute = Some(10)))];
    let call = acquire(scopes, 0);
    for _ in 0..3 {
        let answer = client.acquire(call.clone()).await.expect("decided").into_inner();
        assert!(answer.granted);
        assert_eq!(answer.limits[0].remaining, 9);
    }
}

async fn leases_are_renewed_released_and_lost(service: Service) {
    let mut client = service.native();
    let scopes = vec![tenant("acme", rates(|r| r.concurrency = Some(1)))];
    let selectors = vec![scopes[0].scope.clone().expect("a scope")];
    let first = acquire(scopes.clone(), 0);
    assert!(client.acquire(first.clone()).await.expect("decided").into_inner().granted);
    assert!(!client.acquire(acquire(scopes.clone(), 0)).await.expect("decided").into_inner().granted);
    let stranger = Uuid::now_v7().to_string();
    let renew = v1::RenewRequest {
        reservation_ids: vec![first.reservation_id.clone(), stranger.clone()],
        scopes: selectors.clone(),
        ..Default::default()
    };
    assert_eq!(client.renew(renew).await.expect("renewed").into_inner().lost, [stranger]);
    let release = v1::ReleaseRequest { reservation_id: first.reservation_id, scopes: selectors };
    client.release(release).await.expect("released");
    assert!(client.acquire(acquire(scopes, 0)).await.expect("decided").into_inner().granted);
}

async fn every_mistake_is_told_with_its_field(service: Service) {
    let mut client = service.native();
    let selector = |tenant: &str, model: &str, api_key: &str| {
        Some(v1::LimitSelector {
            tenant: tenant.into(),
            model: model.into(),
            api_key: api_key.into(),
            ..Default::default()
        })
    };
    let account = |tenant: &str, model: &str| {
        selector(tenant, model, "").map(|s| v1::LimitSelector { account: "openai".into(), ..s })
    };
    let fine = rates(|r| r.requests_per_minute = Some(1));
    let scoped = |scope, rates| v1::ScopedRates { scope, rates };
    let request = v1::AcquireRequest {
        reservation_id: "seven".into(),
        cost: None,
        estimated: false,
        scopes: vec![
            scoped(selector("Acme", "", ""), Some(fine)),
            scoped(selector("", "", "k1"), Some(fine)),
            scoped(selector("a", "m", "k"), Some(fine)),
            scoped(None, None),
            scoped(selector("a", "", ""), Some(rates(|r| r.burst_multiplier = Some(0.5)))),
            scoped(selector("b", "", ""), Some(fine)),
            scoped(selector("b", "", ""), Some(fine)),
            scoped(account("b", ""), Some(fine)),
            scoped(account("", "m"), Some(fine)),
        ],
        lease_ttl: Some(prost_types::Duration { seconds: 7200, nanos: 0 }),
        max_wait: None,
    };
    let status = client.acquire(request).await.expect_err("refused");
    assert_eq!(status.code(), Code::InvalidArgument);
    let fields: Vec<String> = field_violations(&status).into_iter().map(|v| v.field).collect();
    let expected = [
        "reservation_id",
        "cost",
        "scopes[0].scope.tenant",
        "scopes[1].scope.tenant",
        "scopes[2].scope",
        "scopes[3].rates",
        "scopes[4].rates.burst_multiplier",
        "scopes[6].scope",
        "scopes[7].scope",
        "lease_ttl",
    ];
    assert_eq!(fields, expected, "{}", status.message());
    let none = client.peek(v1::PeekRequest::default()).await.expect_err("refused");
    assert!(none.message().contains("scopes: must be 1 to 64"), "{}", none.message());
    let nobody = client.renew(v1::RenewRequest::default()).await.expect_err("refused");
    assert!(nobody.message().contains("reservation_ids: must be 1 to 1000"), "{}", nobody.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_a_hundred_of_a_thousand_over_two_replicas() {
    let redis = Redis::start().await;
    let replicas = [Service::ready(config(Some(&redis))).await, Service::ready(config(Some(&redis))).await];
    let hundred = rates(|r| {
        r.requests_per_minute = Some(1);
        r.burst_multiplier = Some(100.0);
    });
    let mut calls = JoinSet::new();
    for i in 0..1000 {
        let mut client = replicas[i % 2].native();
        let call = acquire(vec![tenant("acme", hundred)], 0);
        calls.spawn(async move { client.acquire(call).await.expect("decided").into_inner().granted });
    }
    let answers = calls.join_all().await;
    assert_eq!(answers.into_iter().filter(|granted| *granted).count(), 100);
}
