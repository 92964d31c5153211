//! The same limits with every part as a process of its own.

use weir_ratelimit::redis::RedisLimiter;
use weir_tests::stack::Stack;

use super::*;

const ONE: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn an_accounts_limit_is_exact_over_two_backends_and_two_gateways() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let backends: String = mocks
        .iter()
        .enumerate()
        .map(|(i, mock)| {
            format!(
                "---\nkind: backend\nname: b{i}\nspec: {{ pool: chat, url: \"http://{}\", account: openai, \
                 max_concurrency: 10000, models: {{ gpt-4.1: \"\" }} }}\n",
                mock.address
            )
        })
        .collect();
    let manifest = format!(
        "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n{backends}\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{}}\n\
         ---\nkind: limit\nname: requests\nspec:\n  selector: {{ account: openai }}\n  rates: {{ requests_per_minute: 1, \
         burst_multiplier: 30, max_wait: 0s }}\n\
         ---\nkind: limit\nname: tokens\nspec:\n  selector: {{ account: openai, model: gpt-4.1 }}\n  rates: {{ \
         tokens_per_minute: 1, burst_multiplier: 1000 }}\n"
    );
    let stack = Stack::start(2, &manifest).await;
    let mut asking = JoinSet::new();
    for i in 0..200 {
        let client = stack.client(i % 2);
        asking.spawn(async move { client.chat(ONE).await });
    }
    let (mut granted, mut refused) = (0, 0);
    while let Some(answer) = asking.join_next().await {
        let answer = answer.expect("no panic");
        match answer.status {
            StatusCode::OK => granted += 1,
            _ => {
                assert_refused_by(&answer, "openai");
                refused += 1;
            }
        }
    }
    assert_eq!((granted, refused), (30, 170));
    let counters = mocks.each_ref().map(|mock| mock.handle.counters());
    assert_eq!(counters[0].requests + counters[1].requests, 30, "what was refused reached no backend");
    let billed: u64 = counters.iter().map(|c| c.prompt_tokens + c.generation_tokens).sum();
    let limiter = RedisLimiter::connect(&stack.redis.url(), Default::default()).await.expect("there");
    eventually("the account used what its backends served", || async {
        let scope = Scope::AccountModel { account: "openai", model: "gpt-4.1" };
        standing_of_limit(&limiter, scope, "tokens").await.tokens == billed
    })
    .await;
    let gateway = format!("http://{}", stack.gateways[0].text("ops"));
    let explained = stack
        .weir(&["limits", "explain", "--key", "acme-key", "--model", "gpt-4.1", "--gateway", &gateway])
        .await;
    assert!(explained.contains("account openai"), "{explained}");
    assert!(explained.contains("a request would be refused by requests of account openai"), "{explained}");
    let listed = stack.weir(&["list", "backend"]).await;
    assert!(listed.contains("ACCOUNT") && listed.contains("openai"), "{listed}");
}
