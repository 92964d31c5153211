//! The contract of every store.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weir_control_plane::store::{Compare, Entry, Error, Store, Transaction, Write};

const WRITERS: u32 = 64;

pub(super) fn put(key: &str, value: &str) -> Write {
    Write::Put(key.into(), Bytes::copy_from_slice(value.as_bytes()))
}

pub(super) fn transaction(compares: &[(&str, u64)], writes: Vec<Write>) -> Transaction {
    let compares =
        compares.iter().map(|(key, revision)| Compare { key: (*key).into(), revision: *revision }).collect();
    Transaction { compares, writes }
}

pub(super) async fn conforms(store: Arc<dyn Store>) {
    compare_and_set(&*store).await;
    the_last_write_of_a_key_counts(&*store).await;
    range_is_by_prefix_with_revisions(&*store).await;
    watch_is_in_order_and_once(&*store).await;
    writers_are_linearizable(store.clone()).await;
    watches_see_every_revision_once_across_reconnects(store.clone()).await;
    leases_are_fenced(&*store).await;
}

pub(super) async fn lease(store: &dyn Store, holder: &str, ttl: Duration) -> Result<u64, Error> {
    store.lease("aggregator", holder, ttl).await.map(|lease| lease.fencing_token)
}

/// One holder at a time. A holder keeps its number; the next holder gets a higher one.
async fn leases_are_fenced(store: &dyn Store) {
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);
    let first = lease(store, "a", LONG).await.unwrap();
    assert_eq!(lease(store, "a", LONG).await.unwrap(), first, "renewed, not granted anew");
    assert!(matches!(lease(store, "b", LONG).await, Err(Error::Held(holder)) if holder == "a"));
    assert_eq!(lease(store, "a", SHORT).await.unwrap(), first);
    let second = loop {
        match lease(store, "b", LONG).await {
            Ok(fencing_token) => break fencing_token,
            Err(Error::Held(_)) => tokio::time::sleep(SHORT).await,
            Err(e) => panic!("{e}"),
        }
    };
    assert!(second > first, "the old holder is fenced off");
    assert!(matches!(lease(store, "a", SHORT).await, Err(Error::Held(_))), "and has lost it");
    store.release("aggregator", "a").await.unwrap();
    assert!(
        matches!(lease(store, "a", SHORT).await, Err(Error::Held(_))),
        "nobody gives back another's lease"
    );
    store.release("aggregator", "b").await.unwrap();
    let third = lease(store, "a", LONG).await.unwrap();
    assert!(third > second, "what is given back is free at once, under a new number");
    store.release("aggregator", "a").await.unwrap();
}

async fn compare_and_set(store: &dyn Store) {
    let first = store.transact(transaction(&[("a/1", 0)], vec![put("a/1", "x")])).await.unwrap();
    let again = store.transact(transaction(&[("a/1", 0)], vec![put("a/1", "y"), put("a/2", "y")])).await;
    assert!(matches!(again, Err(Error::Conflict(key)) if key == "a/1"));
    assert_eq!(store.range("a/").await.unwrap().entries.len(), 1, "a refused transaction writes nothing");
    let second = store.transact(transaction(&[("a/1", first)], vec![put("a/1", "y")])).await.unwrap();
    assert_eq!(second, first + 1);
}

async fn the_last_write_of_a_key_counts(store: &dyn Store) {
    let writes = vec![Write::Delete("twice".into()), put("twice", "1"), put("twice", "2")];
    store.transact(transaction(&[], writes)).await.unwrap();
    assert_eq!(store.range("twice").await.unwrap().entries[0].value, "2");
    let writes = vec![put("twice", "3"), Write::Delete("twice".into())];
    store.transact(transaction(&[], writes)).await.unwrap();
    assert!(store.range("twice").await.unwrap().entries.is_empty());
}

async fn range_is_by_prefix_with_revisions(store: &dyn Store) {
    let revision = store.transact(transaction(&[], vec![put("b/1", "x"), put("c/1", "z")])).await.unwrap();
    let range = store.range("b/").await.unwrap();
    assert_eq!(range.revision, revision);
    assert_eq!(range.entries.len(), 1);
    assert_eq!(range.entries[0], Entry { key: "b/1".into(), value: Bytes::from_static(b"x"), revision });
    store.transact(transaction(&[], vec![Write::Delete("b/1".into())])).await.unwrap();
    assert!(store.range("b/").await.unwrap().entries.is_empty());
}

async fn watch_is_in_order_and_once(store: &dyn Store) {
    let from = store.range("").await.unwrap().revision;
    let mut watch = store.watch(from).unwrap();
    for i in 0..20 {
        store.transact(transaction(&[], vec![put("w", &i.to_string())])).await.unwrap();
    }
    for i in 0..20 {
        let batch = watch.next().await.unwrap();
        assert_eq!(batch.revision, from + 1 + i);
        assert_eq!(batch.writes, [put("w", &i.to_string())]);
    }
    let mut later = store.watch(from + 19).unwrap();
    assert_eq!(later.next().await.unwrap().revision, from + 20, "a watch resumes after its revision");
}

/// A watch that is dropped and opened again while 8 writers write sees every revision once and in order.
async fn watches_see_every_revision_once_across_reconnects(store: Arc<dyn Store>) {
    const WRITES: u64 = 8 * 10;
    let from = store.range("").await.unwrap().revision;
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for i in 0..10 {
                    let key = format!("many/{writer}");
                    store.transact(transaction(&[], vec![put(&key, &i.to_string())])).await.unwrap();
                }
            })
        })
        .collect();
    let (mut cursor, mut last) = (from, std::collections::BTreeMap::new());
    while cursor < from + WRITES {
        let mut watch = store.watch(cursor).unwrap();
        for _ in 0..7.min(from + WRITES - cursor) {
            let batch = watch.next().await.unwrap();
            assert_eq!(batch.revision, cursor + 1, "each once, in order");
            cursor = batch.revision;
            for write in &batch.writes {
                if let Write::Put(key, value) = write {
                    last.insert(key.clone(), value.clone());
                }
            }
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let range = store.range("many/").await.unwrap();
    let held: std::collections::BTreeMap<_, _> =
        range.entries.into_iter().map(|entry| (entry.key, entry.value)).collect();
    assert_eq!(held, last, "what was watched is what is there");
}

/// 64 writers increment a counter by compare-and-set: no increment is lost.
async fn writers_are_linearizable(store: Arc<dyn Store>) {
    let tasks: Vec<_> = (0..WRITERS)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                loop {
                    let range = store.range("counter").await.unwrap();
                    let (revision, value) = range.entries.first().map_or((0, 0), |entry| {
                        (entry.revision, std::str::from_utf8(&entry.value).unwrap().parse().unwrap())
                    });
                    let next: u32 = value + 1;
                    let tx = transaction(&[("counter", revision)], vec![put("counter", &next.to_string())]);
                    match store.transact(tx).await {
                        Ok(_) => return,
                        Err(Error::Conflict(_)) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(store.range("counter").await.unwrap().entries[0].value, WRITERS.to_string());
}
