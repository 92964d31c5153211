//! One suite for every store.

use std::sync::Arc;

use super::*;

fn put(key: &str, value: &str) -> Write {
    Write::Put(key.into(), Bytes::copy_from_slice(value.as_bytes()))
}

fn transaction(compares: &[(&str, u64)], writes: Vec<Write>) -> Transaction {
    let compares =
        compares.iter().map(|(key, revision)| Compare { key: (*key).into(), revision: *revision }).collect();
    Transaction { compares, writes }
}

async fn conforms(store: Arc<dyn Store>) {
    compare_and_set(&*store).await;
    range_is_by_prefix_with_revisions(&*store).await;
    watch_is_in_order_and_once(&*store).await;
    writers_are_linearizable(store.clone()).await;
    compacted_when_too_old(&*store).await;
    let (a, b) = (lease(&*store).await, lease(&*store).await);
    assert!(b > a, "fencing numbers rise");
}

async fn lease(store: &dyn Store) -> u64 {
    store.lease("aggregator", "me", Duration::from_secs(10)).await.unwrap().fencing
}

async fn compare_and_set(store: &dyn Store) {
    let first = store.transact(transaction(&[("a/1", 0)], vec![put("a/1", "x")])).await.unwrap();
    let again = store.transact(transaction(&[("a/1", 0)], vec![put("a/1", "y"), put("a/2", "y")])).await;
    assert!(matches!(again, Err(Error::Conflict(key)) if key == "a/1"));
    assert_eq!(store.range("a/").await.unwrap().entries.len(), 1, "a refused transaction writes nothing");
    let second = store.transact(transaction(&[("a/1", first)], vec![put("a/1", "y")])).await.unwrap();
    assert_eq!(second, first + 1);
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

/// 32 writers add one to a counter by compare-and-set: no addition is lost.
async fn writers_are_linearizable(store: Arc<dyn Store>) {
    let tasks: Vec<_> = (0..32)
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
    assert_eq!(store.range("counter").await.unwrap().entries[0].value, "32");
}

async fn compacted_when_too_old(store: &dyn Store) {
    let from = store.range("").await.unwrap().revision;
    let mut watch = store.watch(from).unwrap();
    // Only the memory store is fast enough to be flooded; a file has the same log.
    if format!("{store:?}").starts_with("MemoryStore") {
        for _ in 0..5000 {
            store.transact(transaction(&[], vec![put("flood", "x")])).await.unwrap();
        }
        assert!(matches!(watch.next().await, Err(Error::Compacted { .. })));
        assert!(matches!(store.watch(from), Err(Error::Compacted { .. })));
    }
}

#[tokio::test]
async fn memory_conforms() {
    conforms(Arc::new(MemoryStore::default())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn file_conforms_and_keeps_everything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/for/it/store.redb");
    let store = Arc::new(FileStore::open(&path).unwrap());
    conforms(store.clone()).await;
    assert!(matches!(FileStore::open(&path), Err(Error::Locked(_))), "a second holder is told so");
    let before = store.range("").await.unwrap();
    let fencing = lease(&*store).await;
    drop(store);

    let store = FileStore::open(&path).unwrap();
    let after = store.range("").await.unwrap();
    assert_eq!((after.revision, &after.epoch), (before.revision, &before.epoch));
    assert_eq!(after.entries, before.entries);
    assert!(lease(&store).await > fencing);
    assert!(matches!(store.watch(0), Err(Error::Compacted { .. })));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }
}
