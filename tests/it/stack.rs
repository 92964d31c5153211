//! Redis, a control plane and gateways as processes: the promises when one of them dies.

use std::net::SocketAddr;

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use mock_llm::Config;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::{Mock, mock};
use weir_tests::eventually;
use weir_tests::stack::Stack;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
const ENDLESS: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"messages":[{"role":"user","content":"hi"}]}"#;

async fn backend(decode_tokens_per_s: f64) -> Mock {
    let config = Config {
        models: vec!["gpt-4.1".into()],
        slots: 4096,
        output_tokens: 1_000_000,
        decode_tokens_per_s,
        ..Config::default()
    };
    mock(config, &CancellationToken::new()).await
}

/// A pool with this backend and a model in front of it. No probe asks for tokens, because requests are counted there.
fn manifest(mock: &Mock, max_concurrency: u32, model: &str, tenant: &str) -> String {
    format!(
        "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
         ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{}\", \
         max_concurrency: {max_concurrency}, models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat{model} }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ {tenant} }}\n",
        mock.address
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn three_gateways_admit_exactly_a_hundred_of_two_thousand() {
    let mock = backend(0.0).await;
    let hundred = ", limits: { requests_per_minute: 1, burst_multiplier: 100 }";
    let stack = Stack::start(3, &manifest(&mock, 10_000, hundred, "")).await;
    let clients = [stack.client(0), stack.client(1), stack.client(2)];
    let mut requests = JoinSet::new();
    for i in 0..2000 {
        let client = clients[i % 3].clone();
        requests.spawn(async move { client.chat(CHAT).await });
    }
    let (mut admitted, mut refused) = (0, 0);
    while let Some(answer) = requests.join_next().await {
        let answer = answer.expect("no panic");
        match answer.status {
            StatusCode::OK => admitted += 1,
            StatusCode::TOO_MANY_REQUESTS => refused += 1,
            other => panic!("{other}: {}", answer.text()),
        }
    }
    assert_eq!((admitted, refused), (100, 1900));
    assert_eq!(mock.handle.counters().requests, 100, "what was refused reached no backend");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_frees_its_leases_and_nobody_elses() {
    let mock = backend(50.0).await;
    let mut stack = Stack::start(2, &manifest(&mock, 3, "", "limits: { concurrency: 3 }")).await;
    let (doomed, other) = (stack.client(0), stack.client(1));
    let _theirs = [doomed.open_stream(ENDLESS).await, doomed.open_stream(ENDLESS).await];
    let mut ours = other.open_stream(ENDLESS).await;
    assert_eq!(stack.redis.standing("acme").await.leases, 3);
    assert_eq!(other.chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS, "every lease is taken");
    stack.gateways[0].kill().await;
    let (killed, before) = (stack.redis.now().await, stack.redis.leases("acme").await);
    eventually("the dead gateway's leases are free", || async {
        stack.redis.standing("acme").await.leases == 1
    })
    .await;
    let (freed, left) = (stack.redis.now().await, stack.redis.leases("acme").await);
    eprintln!("leases of a killed gateway were free after {} ms", (freed - killed) / 1000);
    for (id, runs_out) in before.iter().filter(|(id, _)| !left.contains_key(*id)) {
        assert!(*runs_out > freed, "{id} was freed and did not run out");
    }
    assert_eq!(other.chat(CHAT).await.status, StatusCode::OK);
    ours.frame().await.expect("the other gateway's stream runs on").expect("whole");
}

/// A connection to the control plane that can be cut.
struct Way {
    address: SocketAddr,
    open: JoinHandle<()>,
}

impl Way {
    async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let open = tokio::spawn(async move {
            let mut ways = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                ways.spawn(async move {
                    let mut to = TcpStream::connect(target).await?;
                    tokio::io::copy_bidirectional(&mut from, &mut to).await
                });
            }
        });
        Self { address, open }
    }

    fn cut(&self) {
        self.open.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_only_lost_its_control_plane_keeps_its_leases() {
    let mock = backend(50.0).await;
    let mut stack = Stack::start(1, &manifest(&mock, 3, "", "limits: { concurrency: 3 }")).await;
    let way = Way::to(stack.control_plane.text("grpc").parse().expect("an address")).await;
    let alone = stack.gateway_by(1, &way.address.to_string()).await;
    let client = stack.client_of(&alone);
    let (_first, mut second) = (client.open_stream(ENDLESS).await, client.open_stream(ENDLESS).await);
    let held = stack.redis.leases("acme").await;
    assert_eq!(held.len(), 2);
    way.cut();
    let ops = Client::new(stack.gateways[0].text("ops").parse().expect("an address"), "");
    eventually("the other gateway was told and found out that it lives", || async {
        let page = ops.ask(Method::GET, "/metrics", "").await;
        page.text().contains(r#"weir_gateways_gone_total{outcome="lives"} 1"#)
    })
    .await;
    let now = stack.redis.leases("acme").await;
    assert!(held.keys().eq(now.keys()), "{held:?} were held and {now:?} are");
    let own = Client::new(alone.text("ops").parse().expect("an address"), "");
    let page = own.ask(Method::GET, "/metrics", "").await;
    assert!(page.text().contains("weir_stale_leases_total 0"), "{}", page.text());
    second.frame().await.expect("its streams run on").expect("whole");
    // Once it is dead, nothing protects its leases.
    let mut alone = alone;
    alone.kill().await;
    stack.gateways[0].kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_cut_by_its_client_frees_its_lease_and_settles_what_it_got() {
    let mock = backend(200.0).await;
    let limits = "limits: { concurrency: 10, tokens_per_minute: 1000, burst_multiplier: 1000 }";
    let stack = Stack::start(1, &manifest(&mock, 10, "", limits)).await;
    let stream = stack.client(0).open_stream(ENDLESS).await;
    let during = stack.redis.standing("acme").await;
    assert_eq!(during.leases, 1);
    drop(stream);
    eventually("the call upstream is cancelled", || async { mock.handle.counters().cancelled == 1 }).await;
    eventually("the lease is free", || async { stack.redis.standing("acme").await.leases == 0 }).await;
    let after = stack.redis.standing("acme").await.tokens;
    assert!((1..during.tokens).contains(&after), "{during:?} was reserved, {after} tokens stand");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_control_plane_killed_a_killed_gateway_comes_back_from_its_disk() {
    let mock = backend(0.0).await;
    let mut stack = Stack::start(2, &manifest(&mock, 10, "", "")).await;
    stack.control_plane.kill().await;
    stack.gateways[0].kill().await;
    let began = tokio::time::Instant::now();
    let back = stack.gateway(0).await;
    let serves = began.elapsed();
    assert!(serves < std::time::Duration::from_secs(2), "it serves after {serves:?}");
    for client in [stack.client_of(&back), stack.client(1)] {
        let answer = client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
}
