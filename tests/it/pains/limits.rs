//! Limits over several replicas.

use http::StatusCode;
use tokio::task::JoinSet;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::eventually;
use weir_tests::stack::Stack;

use super::{CHAT, World, config, endless, header};

/// A capacity of this number of tokens that drains one per minute.
fn tokens(capacity: u32) -> v1::Rates {
    v1::Rates {
        tokens_per_minute: Some(1),
        burst_multiplier: Some(f64::from(capacity)),
        ..Default::default()
    }
}

fn requests(capacity: u32) -> v1::Rates {
    v1::Rates {
        requests_per_minute: Some(1),
        burst_multiplier: Some(f64::from(capacity)),
        ..Default::default()
    }
}

/// Three replicas with counters in their own memory admitted three times the tokens.
#[tokio::test(flavor = "multi_thread")]
async fn p01_a_token_limit_does_not_multiply_by_replicas() {
    let world = World::of(3, config(), tokens(1000)).await;
    let mut requests = JoinSet::new();
    for i in 0..300 {
        let client = world.client(i).clone();
        requests.spawn(async move { client.chat(&CHAT.replace(":1,", ":40,")).await.status });
    }
    let mut answered = 0;
    while let Some(status) = requests.join_next().await {
        answered += u64::from(status.expect("no panic") == StatusCode::OK);
    }
    eventually("everything is settled", || async {
        let billed = world.mock.handle.counters();
        world.redis.standing("acme").await.tokens == billed.prompt_tokens + billed.generation_tokens
    })
    .await;
    let billed = world.mock.handle.counters();
    let used = billed.prompt_tokens + billed.generation_tokens;
    assert!(answered > 0 && used <= 1000, "{answered} answers used {used} of 1000 tokens");
}

/// Counts of other replicas arrived seconds later, or only with a second setting that nobody knows.
#[tokio::test]
async fn p03_a_limit_holds_at_every_replica_from_the_first_request() {
    let world = World::of(3, config(), requests(6)).await;
    for n in 0..6 {
        assert_eq!(world.client(n).chat(CHAT).await.status, StatusCode::OK, "request {n}");
    }
    for n in 0..6 {
        assert_eq!(
            world.client(n).chat(CHAT).await.status,
            StatusCode::TOO_MANY_REQUESTS,
            "at once, everywhere"
        );
    }
}

/// The remaining amount differed between replicas.
#[tokio::test]
async fn p06_what_remains_falls_by_one_from_replica_to_replica() {
    let world = World::of(3, config(), requests(20)).await;
    for n in 0..20 {
        let answer = world.client(n as usize).chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(header(&answer, "x-ratelimit-remaining-requests"), 19 - n);
    }
}

/// An edited limit kept the old counter, and callers stayed blocked until it expired.
#[tokio::test(flavor = "multi_thread")]
async fn p12b_a_raised_limit_frees_its_callers_and_keeps_what_they_used() {
    let mock = weir_tests::cluster::mock(config(), &tokio_util::sync::CancellationToken::new()).await;
    let manifest = |burst: u32| {
        format!(
            "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
             ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{}\", models: {{ gpt-4.1: \"\" }} }}\n\
             ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
             ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 1, burst_multiplier: {burst} }} }}\n",
            mock.address
        )
    };
    let stack = Stack::start(2, &manifest(3)).await;
    let clients = [stack.client(0), stack.client(1)];
    for n in 0..3 {
        assert_eq!(clients[n % 2].chat(CHAT).await.status, StatusCode::OK);
    }
    assert_eq!(clients[0].chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("raised.yaml");
    std::fs::write(&file, manifest(10)).expect("written");
    stack.weir(&["apply", "-f", file.to_str().expect("UTF-8")]).await;
    let mut admitted = 0;
    eventually("the raised limit is in force", || async {
        clients[0].chat(CHAT).await.status == StatusCode::OK
    })
    .await;
    for n in 0..20 {
        admitted += u32::from(clients[n % 2].chat(CHAT).await.status == StatusCode::OK);
    }
    assert_eq!(admitted, 6, "of ten, three were used before and one to see that it is in force");
}

/// One batch user takes every slot of a model, because keys have no limit of concurrency.
#[tokio::test]
async fn p18_a_keys_own_concurrency_leaves_slots_for_others() {
    const OTHER: &str = "weir_test_key_of_somebody_else";
    let world = World::with(2, endless(), |resources| {
        let limits = v1::Rates { concurrency: Some(2), ..Default::default() };
        let own = |key: &str| v1::KeyDigest {
            sha256: weir_tests::cluster::digest(key),
            prefix: "weir_test".into(),
            expire_time: None,
        };
        let key = |of: &str, limits| v1::ApiKeySpec {
            tenant: "acme".into(),
            digests: vec![own(of)],
            limits,
            ..Default::default()
        };
        resources.put("acme-key", Spec::ApiKey(key(weir_tests::cluster::KEY, Some(limits))));
        resources.put("other-key", Spec::ApiKey(key(OTHER, None)));
    })
    .await;
    let _batch = [
        world.client(0).open_stream(super::ENDLESS).await,
        world.client(1).open_stream(super::ENDLESS).await,
    ];
    for n in 0..4 {
        let refused = world.client(n).chat(CHAT).await;
        assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(refused.json()["error"]["kind"], "concurrency", "{}", refused.text());
    }
    for n in 0..4 {
        assert_eq!(world.client(n).with_key(OTHER).chat(CHAT).await.status, StatusCode::OK);
    }
}
