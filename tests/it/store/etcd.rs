//! etcd as a store: real members that are killed, compacted, full, or protected by a password.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::json;
use weir_control_plane::store::{Entry, Error, EtcdConfig, EtcdStore, Store};
use weir_runtime::Secret;
use weir_tests::etcd::Etcd;

use super::suite::{conforms, lease, put, transaction};

fn config(url: &str) -> EtcdConfig {
    EtcdConfig::parse(url).unwrap()
}

async fn open(url: &str) -> Arc<EtcdStore> {
    Arc::new(EtcdStore::open(config(url)).await.unwrap())
}

async fn entries(store: &EtcdStore, prefix: &str) -> Vec<Entry> {
    store.range(prefix).await.unwrap().entries
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_conforms_and_keeps_everything() {
    let mut etcd = Etcd::start(1).await;
    let store = open(&etcd.url("one")).await;
    conforms(store.clone()).await;
    let before = store.range("").await.unwrap();
    let fencing_token = lease(&*store, "b", Duration::from_secs(60)).await.unwrap();
    drop(store);
    etcd.kill(0).await;
    etcd.restart(0).await;
    let store = open(&etcd.url("one")).await;
    let after = store.range("").await.unwrap();
    assert_eq!((after.revision, &after.epoch), (before.revision, &before.epoch));
    assert_eq!(after.entries, before.entries);
    assert!(matches!(lease(&*store, "c", Duration::from_secs(60)).await, Err(Error::Held(by)) if by == "b"));
    assert!(fencing_token > 0, "a lease outlives the process that has it, until its end");
    let other = open(&etcd.url("two")).await;
    assert!(entries(&other, "").await.is_empty(), "prefixes are apart");
    assert_ne!(other.range("").await.unwrap().epoch, after.epoch);
}

/// Two control planes write at once: both see all writes in the same order, and nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_several_processes_are_linearizable_and_all_see_one_order() {
    let etcd = Etcd::start(1).await;
    let stores = [open(&etcd.url("one")).await, open(&etcd.url("one")).await];
    let mut watches: Vec<_> = stores.iter().map(|store| store.watch(0).unwrap()).collect();
    let writers: Vec<_> = (0..16)
        .map(|writer| {
            let store = stores[writer % 2].clone();
            tokio::spawn(async move {
                for _ in 0..4 {
                    loop {
                        let entries = entries(&store, "counter").await;
                        let (revision, value) = entries.first().map_or((0, 0), |entry| {
                            (
                                entry.revision,
                                std::str::from_utf8(&entry.value).unwrap().parse::<u32>().unwrap(),
                            )
                        });
                        let next = vec![put("counter", &(value + 1).to_string())];
                        match store.transact(transaction(&[("counter", revision)], next)).await {
                            Ok(_) => break,
                            Err(Error::Conflict(_)) => {}
                            Err(e) => panic!("{e}"),
                        }
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(entries(&stores[0], "counter").await[0].value, "64");
    for watch in &mut watches {
        for n in 1..=64_u64 {
            let batch = watch.next().await.unwrap();
            assert_eq!((batch.revision, &batch.writes), (n, &vec![put("counter", &n.to_string())]));
        }
    }
}

/// One transaction has more keys than etcd takes operations. More bytes than etcd takes are refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_thousands_of_keys_is_one_transaction_and_one_that_is_too_large_is_refused_whole() {
    let etcd = Etcd::start(1).await;
    let store = open(&etcd.url("one")).await;
    let mut watch = store.watch(0).unwrap();
    let many: Vec<_> = (0..5000).map(|i| put(&format!("k{i:05}"), "value")).collect();
    assert_eq!(store.transact(transaction(&[], many.clone())).await.unwrap(), 1);
    let range = store.range("k").await.unwrap();
    assert_eq!((range.entries.len(), range.revision), (5000, 1), "read in pages of one revision");
    assert!(range.entries.iter().all(|entry| entry.revision == 1));
    let mut writes = watch.next().await.unwrap().writes.clone();
    writes.sort_by(|a, b| a.key().cmp(b.key()));
    assert_eq!(writes, many, "and watched as one");
    let large = vec![put("small", "x"), put("large", &"x".repeat(2 << 20))];
    let refused = store.transact(transaction(&[], large)).await.unwrap_err();
    assert!(matches!(refused, Error::TooLarge), "{refused}");
    assert!(refused.to_string().contains("--max-request-bytes"), "{refused}");
    assert!(entries(&store, "small").await.is_empty(), "nothing of it is written");
    assert_eq!(store.transact(transaction(&[("k00001", 1)], vec![put("k00001", "y")])).await.unwrap(), 2);
}

/// Members die, the leader first, while writers continue: acknowledged writes are there, and no write happened twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_killed_among_writes_lose_nothing_acknowledged_and_repeat_nothing() {
    const WRITERS: usize = 8;
    let mut etcd = Etcd::start(3).await;
    let stores = [open(&etcd.url("one")).await, open(&etcd.url_of(&[2, 1, 0], "one")).await];
    let mut watch = stores[0].watch(0).unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (store, end) = (stores[writer % 2].clone(), end.clone());
            tokio::spawn(async move {
                let key = format!("w{writer}");
                let (mut told, mut unknown, mut revision) = (0_u64, 0_u64, 0);
                while !end.load(Ordering::Relaxed) {
                    let next = vec![put(&key, &(told + 1).to_string())];
                    match store.transact(transaction(&[(&key, revision)], next)).await {
                        Ok(made) => (told, revision) = (told + 1, made),
                        // The outcome is unknown; reading tells it.
                        Err(Error::Away { .. } | Error::Failed(_)) => {
                            unknown += 1;
                            let Ok(range) = store.range(&key).await else { continue };
                            let Some(entry) = range.entries.first() else { continue };
                            let found = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                            assert!(found == told || found == told + 1, "told {told}, found {found}");
                            (told, revision) = (found, entry.revision);
                        }
                        Err(e) => panic!("{e}: its own compare cannot fail"),
                    }
                }
                (key, told, unknown)
            })
        })
        .collect();
    let written = async |from: u64, more: u64| {
        while stores[1].range("").await.map_or(0, |range| range.revision) < from + more {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    for _ in 0..3 {
        let from = stores[1].range("").await.unwrap().revision;
        written(from, 50).await;
        let leader = etcd.leader().await;
        etcd.kill(leader).await;
        // Two of three continue.
        let from = stores[1].range("").await.unwrap().revision;
        written(from, 50).await;
        etcd.restart(leader).await;
    }
    end.store(true, Ordering::Relaxed);
    let mut told = BTreeMap::new();
    for writer in writers {
        let (key, count, unknown) = writer.await.unwrap();
        println!("{key}: {count} acknowledged, {unknown} of unknown outcome");
        told.insert(key, count);
    }
    let range = stores[0].range("").await.unwrap();
    let found = range
        .entries
        .iter()
        .map(|entry| (entry.key.clone(), std::str::from_utf8(&entry.value).unwrap().parse::<u64>().unwrap()));
    assert_eq!(found.collect::<BTreeMap<_, _>>(), told, "what is there is what was told");
    assert_eq!(range.revision, told.values().sum::<u64>(), "each once");
    for revision in 1..=range.revision {
        assert_eq!(
            watch.next().await.unwrap().revision,
            revision,
            "watched across all of it, each once, in order"
        );
    }
}

/// A watcher that was away during a compaction is told to read again, and then continues.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_comes_back_after_compaction_says_so_and_goes_on_afterwards() {
    let mut etcd = Etcd::start(3).await;
    // One control plane knows a single member, the other one the rest.
    let cut = open(&etcd.url_of(&[0], "one")).await;
    let other = open(&etcd.url_of(&[1, 2], "one")).await;
    let mut watch = cut.watch(0).unwrap();
    other.transact(transaction(&[], vec![put("a", "1")])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision, 1);
    etcd.kill(0).await;
    for i in 0..20 {
        other.transact(transaction(&[], vec![put("a", &i.to_string())])).await.unwrap();
    }
    etcd.compact().await;
    etcd.restart(0).await;
    let told = tokio::time::timeout(Duration::from_secs(60), watch.next()).await.expect("told");
    assert!(matches!(told, Err(Error::Compacted { .. })), "{told:?}");
    let range = cut.range("").await.unwrap();
    assert_eq!((range.revision, &range.entries[0].value[..]), (21, &b"19"[..]));
    let mut watch = cut.watch(range.revision).unwrap();
    other.transact(transaction(&[], vec![put("a", "on")])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().writes, [put("a", "on")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_it_says_which_members_and_what_to_do() {
    let mut etcd = Etcd::start(3).await;
    let store = open(&etcd.url("one")).await;
    store.transact(transaction(&[], vec![put("a", "1")])).await.unwrap();
    etcd.kill(0).await;
    etcd.kill(1).await;
    let (write, read) = tokio::join!(store.transact(transaction(&[], vec![put("a", "2")])), store.range("a"));
    for refused in [write.map(|_| ()).unwrap_err(), read.map(|_| ()).unwrap_err()] {
        let text = refused.to_string();
        assert!(matches!(refused, Error::Away { .. }), "{text}");
        assert!(text.contains("http://127.0.0.1:") && text.contains("majority of its members"), "{text}");
    }
    etcd.restart(1).await;
    let found = entries(&store, "a").await;
    assert!(found[0].value == "1" || found[0].value == "2", "made or not made, as it said it did not know");
    store.transact(transaction(&[], vec![put("a", "3")])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_etcd_refuses_changes_says_so_and_can_be_read() {
    let etcd = Etcd::with(1, &["--quota-backend-bytes", "2000000"]).await;
    let store = open(&etcd.url("one")).await;
    let big = "x".repeat(200_000);
    let mut made = 0;
    let refused = loop {
        match store.transact(transaction(&[], vec![put("big", &big)])).await {
            Ok(_) => made += 1,
            Err(refused) => break refused,
        }
        assert!(made < 200, "the quota has to be met");
    };
    assert!(matches!(refused, Error::Full(_)), "{refused}");
    assert!(refused.to_string().contains("etcdctl alarm disarm"), "{refused}");
    assert_eq!(store.range("big").await.unwrap().revision, made, "what was acknowledged is there");
    etcd.compact().await;
    etcd.post("/v3/maintenance/defragment", &json!({})).await;
    let alarms = etcd.post("/v3/maintenance/alarm", &json!({"action": "GET"})).await;
    let member = &alarms["alarms"][0]["memberID"];
    let disarm = json!({"action": "DEACTIVATE", "memberID": member, "alarm": "NOSPACE"});
    etcd.post("/v3/maintenance/alarm", &disarm).await;
    store.transact(transaction(&[], vec![put("big", "small")])).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_a_password_works_and_a_wrong_one_is_said() {
    let etcd = Etcd::start(1).await;
    let base64 = |text: &str| {
        // Only what the two ends of the range need.
        match text {
            "/one/" => "L29uZS8=",
            "/one0" => "L29uZTA=",
            other => panic!("{other}"),
        }
    };
    for (path, body) in [
        ("/v3/auth/user/add", json!({"name": "root", "password": "root"})),
        ("/v3/auth/role/add", json!({"name": "root"})),
        ("/v3/auth/user/grant", json!({"user": "root", "role": "root"})),
        ("/v3/auth/user/add", json!({"name": "weir", "password": "pass"})),
        ("/v3/auth/role/add", json!({"name": "weir"})),
        ("/v3/auth/user/grant", json!({"user": "weir", "role": "weir"})),
        (
            "/v3/auth/role/grant",
            json!({"name": "weir", "perm": {"permType": "READWRITE", "key": base64("/one/"), "range_end": base64("/one0")}}),
        ),
        ("/v3/auth/enable", json!({})),
    ] {
        let answer = etcd.post(path, &body).await;
        assert!(answer["error"].is_null(), "{path}: {answer}");
    }
    let with = |prefix: &str, user: Option<&str>, password: &str| EtcdConfig {
        user: user.map(str::to_owned),
        password: Some(Secret::new(password.into())),
        ..config(&etcd.url(prefix))
    };
    let store = EtcdStore::open(with("one", Some("weir"), "pass")).await.unwrap();
    let mut watch = store.watch(0).unwrap();
    store.transact(transaction(&[], vec![put("a", "1")])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision, 1);
    assert!(lease(&store, "a", Duration::from_secs(60)).await.is_ok());
    let wrong = EtcdStore::open(with("one", Some("weir"), "canary")).await.unwrap_err().to_string();
    assert!(wrong.contains("--store-password-file") && !wrong.contains("canary"), "{wrong}");
    let nobody = EtcdStore::open(with("one", None, "")).await.unwrap_err().to_string();
    assert!(nobody.contains("etcd://USER@"), "{nobody}");
    let elsewhere = EtcdStore::open(with("two", Some("weir"), "pass")).await.unwrap_err().to_string();
    assert!(elsewhere.contains("below the prefix"), "{elsewhere}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_both_sides_know_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let (params, key) =
        (CertificateParams::new(["127.0.0.1".to_owned()]).unwrap(), KeyPair::generate().unwrap());
    std::fs::write(file("ca.pem"), ca.pem()).unwrap();
    std::fs::write(file("cert.pem"), params.signed_by(&key, &ca).unwrap().pem()).unwrap();
    std::fs::write(file("key.pem"), key.serialize_pem()).unwrap();
    let etcd = Etcd::secured(directory.path()).await;
    let trusting = EtcdConfig { ca: Some(file("ca.pem")), ..config(&etcd.url("one")) };
    let known = EtcdConfig { own: Some((file("cert.pem"), file("key.pem"))), ..trusting.clone() };
    let store = EtcdStore::open(known).await.unwrap();
    let mut watch = store.watch(0).unwrap();
    store.transact(transaction(&[], vec![put("a", "1")])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision, 1);
    for stranger in [trusting, config(&etcd.url("one"))] {
        let refused = EtcdStore::open(stranger).await.unwrap_err().to_string();
        assert!(refused.contains("https://127.0.0.1:"), "{refused}");
    }
    let missing = EtcdConfig { ca: Some(file("none.pem")), ..config(&etcd.url("one")) };
    let refused = EtcdStore::open(missing).await.unwrap_err().to_string();
    assert!(refused.contains("none.pem"), "{refused}");
}
