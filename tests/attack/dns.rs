//! DNS that fails, lies or flaps for a backend with a host name.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::StatusCode;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_gateway::routing::upstream::Resolver;
use weir_proto::v1::{ConnectionSettings, ModelSpec, resource::Spec};
use weir_tests::cluster::{Gateway, Mock, Resources, gateway_resolving, mock};
use weir_tests::eventually;

use crate::fleet::{CHAT, plenty, roomy};

/// The port of the backends, and a port without a listener.
const GOOD: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const DEAD: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 99));

/// The answers of the resolver.
#[derive(Debug, Clone)]
enum Says {
    These(Vec<IpAddr>),
    NoSuchName,
    Nothing,
    /// These answers, one after the other.
    Turns(Vec<Vec<IpAddr>>),
}

/// A resolver whose answers a test decides, by name.
#[derive(Clone)]
struct Dns {
    says: Arc<Mutex<Vec<(&'static str, Says)>>>,
    asked: Arc<AtomicUsize>,
    in_flight: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
}

impl Dns {
    fn new() -> (Self, Resolver) {
        let dns = Self {
            says: Arc::default(),
            asked: Arc::default(),
            in_flight: Arc::default(),
            most: Arc::default(),
        };
        let own = dns.clone();
        (dns, Resolver::new(Arc::new(move |host| Box::pin(own.clone().answer(host.to_owned())))))
    }

    fn say(&self, host: &'static str, says: Says) {
        let mut all = self.says.lock().expect("whole");
        all.retain(|(known, _)| *known != host);
        all.push((host, says));
    }

    async fn answer(self, host: String) -> io::Result<Vec<IpAddr>> {
        let turn = self.asked.fetch_add(1, Ordering::SeqCst);
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let says = self.says.lock().expect("whole").iter().find(|(known, _)| *known == host).cloned();
        let answer = match says {
            Some((_, Says::These(addresses))) => Ok(addresses),
            Some((_, Says::Turns(turns))) => Ok(turns[turn % turns.len()].clone()),
            Some((_, Says::Nothing)) => std::future::pending().await,
            Some((_, Says::NoSuchName)) | None => Err(io::Error::other("no such name")),
        };
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        answer
    }
}

/// A gateway in front of these backends by name. Each request to them opens a connection.
async fn named(mocks: &[Mock], hosts: &[&str], resolver: Resolver) -> Gateway {
    gateway_resolving(&with_hosts(mocks, hosts, |_| {}), resolver).await
}

fn with_hosts(mocks: &[Mock], hosts: &[&str], change: impl FnOnce(&mut Resources)) -> Resources {
    let mut resources = Resources::limited(mocks, 10_000, plenty());
    for (i, host) in hosts.iter().enumerate() {
        let port = mocks[i].address.port();
        resources.rebuild(&format!("b{i}"), |spec| {
            let Spec::Backend(spec) = spec else { panic!("a backend") };
            spec.url = format!("http://{host}:{port}");
            let idle = prost_types::Duration { seconds: 0, nanos: 1_000_000 };
            let connection =
                ConnectionSettings { max_idle: 1, idle_timeout: Some(idle), ..Default::default() };
            spec.connection = Some(connection);
        });
    }
    change(&mut resources);
    resources
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_go_on_while_dns_fails_answers_nothing_or_hangs() {
    let mocks = [mock(roomy(), &CancellationToken::new()).await];
    let (dns, resolver) = Dns::new();
    dns.say("only.test", Says::These(vec![GOOD]));
    let gw = named(&mocks, &["only.test"], resolver).await;
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    for wrong in [Says::NoSuchName, Says::These(Vec::new()), Says::Nothing] {
        let (connections, asked) = (mocks[0].handle.counters().connections, dns.asked.load(Ordering::SeqCst));
        dns.say("only.test", wrong.clone());
        // Until the resolver is asked again, and a while after.
        let mut after = 0;
        while after < 50 {
            let sent = Instant::now();
            let answer = gw.client.chat(CHAT).await;
            assert_eq!(answer.status, StatusCode::OK, "{wrong:?}: {}", answer.text());
            assert!(sent.elapsed() < Duration::from_secs(5), "{wrong:?}: {:?}", sent.elapsed());
            after += usize::from(dns.asked.load(Ordering::SeqCst) > asked);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(mocks[0].handle.counters().connections > connections, "connections were made meanwhile");
        if !matches!(wrong, Says::Nothing) {
            dns.say("only.test", Says::These(vec![GOOD]));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolver_that_hangs_has_one_lookup_for_each_host_and_holds_up_no_other_backend() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await, mock(roomy(), &end).await];
    let (dns, resolver) = Dns::new();
    dns.say("hangs.test", Says::Nothing);
    dns.say("well.test", Says::These(vec![GOOD]));
    let resources = with_hosts(&mocks, &["hangs.test", "well.test"], |resources| {
        // Each backend has a model of its own.
        resources.put("other", Spec::Model(ModelSpec { pool: "chat".into(), ..Default::default() }));
        resources.rebuild("b0", |spec| {
            let Spec::Backend(spec) = spec else { panic!("a backend") };
            spec.models = [("other".to_owned(), String::new())].into();
        });
    });
    let gw = gateway_resolving(&resources, resolver).await;
    let other = CHAT.replace("gpt-4.1", "other");
    let mut hanging = JoinSet::new();
    for _ in 0..300 {
        let (client, other) = (gw.client.clone(), other.clone());
        hanging.spawn(async move { client.try_chat(&other).await });
    }
    eventually("they wait", || async { dns.asked.load(Ordering::SeqCst) > 0 }).await;
    let mut all = JoinSet::new();
    for _ in 0..200 {
        let client = gw.client.clone();
        all.spawn(async move { client.chat(CHAT).await });
    }
    while let Some(answer) = all.join_next().await {
        let answer = answer.expect("no panic");
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    assert!(!hanging.is_empty(), "the others wait still");
    assert!(dns.most.load(Ordering::SeqCst) <= 2, "one for each host");
    while let Some(answer) = hanging.join_next().await {
        let answer = answer.expect("no panic").expect("an answer");
        assert!(answer.status.is_server_error(), "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_addresses_among_good_ones_and_answers_that_flap_fail_no_request() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await, mock(roomy(), &end).await];
    let (dns, resolver) = Dns::new();
    dns.say("mixed.test", Says::These(vec![DEAD, GOOD]));
    dns.say("flaps.test", Says::Turns(vec![vec![GOOD], vec![DEAD], Vec::new()]));
    let gw = named(&mocks, &["mixed.test", "flaps.test"], resolver).await;
    let began = Instant::now();
    let mut sent = 0;
    // Longer than the life of an answer, so that each answer is used.
    while began.elapsed() < Duration::from_secs(8) {
        let answer = gw.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "request {sent}: {}", answer.text());
        sent += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(mocks[0].handle.counters().requests > 0, "of two addresses the good one is found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_moved_is_found_at_its_new_address() {
    let end = CancellationToken::new();
    let mocks = [mock(roomy(), &end).await];
    let (dns, resolver) = Dns::new();
    dns.say("moves.test", Says::These(vec![DEAD]));
    let gw = named(&mocks, &["moves.test"], resolver).await;
    let answer = gw.client.chat(CHAT).await;
    assert!(answer.status.is_server_error(), "nobody is there: {}", answer.text());
    assert!(!answer.text().contains("moves.test"), "clients are not told names of backends");
    dns.say("moves.test", Says::These(vec![GOOD]));
    eventually("the new address is used", || async { gw.client.chat(CHAT).await.status == StatusCode::OK })
        .await;
}
