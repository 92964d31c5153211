//! Complaints of users of other gateways, each as a scenario that must not happen here. `docs/pains.md` says where
//! each complaint was made, and which other tests answer some of them.

mod health;
mod limits;
mod slots;
mod store;
mod tokens;

use mock_llm::Config;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::{Answer, Client};
use weir_tests::cluster::{Gateway, Mock, Resources, gateway, mock};
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
const ENDLESS: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], slots: 4096, ..Config::default() }
}

/// So slow that a stream of it still runs when a test checks.
fn endless() -> Config {
    Config { decode_tokens_per_s: 50.0, output_tokens: 1_000_000, ..config() }
}

/// Gateways over one Redis, in front of one backend with slots for all.
struct World {
    redis: Redis,
    gateways: Vec<Gateway>,
    mock: Mock,
}

impl World {
    /// Under these limits of the tenant.
    async fn of(gateways: usize, backend: Config, limits: v1::Rates) -> Self {
        Self::with(gateways, backend, |resources| limit(resources, limits)).await
    }

    /// Under these resources.
    async fn with(gateways: usize, backend: Config, change: impl FnOnce(&mut Resources)) -> Self {
        let [mock] = [mock(backend, &CancellationToken::new()).await];
        let mocks = [mock];
        let mut resources = Resources::in_front_of(&mocks);
        resources.put("b0", Spec::Backend(slots(&mocks[0], 10_000)));
        change(&mut resources);
        let redis = Redis::start().await;
        let mut started = Vec::new();
        for _ in 0..gateways {
            started.push(gateway(&resources, Some(redis.url())).await);
        }
        let [mock] = mocks;
        Self { redis, gateways: started, mock }
    }

    fn client(&self, k: usize) -> &Client {
        &self.gateways[k % self.gateways.len()].client
    }
}

fn limit(resources: &mut Resources, limits: v1::Rates) {
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
}

/// The backend of [`Resources::in_front_of`] with this number of slots.
fn slots(mock: &Mock, most: u32) -> v1::BackendSpec {
    v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mock.address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        max_concurrency: Some(most),
        ..Default::default()
    }
}

/// A number in a header.
fn header(answer: &Answer, name: &str) -> u64 {
    let value = answer.headers.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", answer.headers));
    value.to_str().expect("text").parse().expect("a number")
}
