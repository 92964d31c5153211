//! One suite for every store.

use std::sync::Arc;

use super::*;

const WRITERS: u32 = 64;

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
    watches_see_every_revision_once_across_reconnects(store.clone()).await;
    compacted_when_too_old(&*store).await;
    leases_are_fenced(&*store).await;
}

async fn lease(store: &dyn Store, holder: &str, ttl: Duration) -> Result<u64, Error> {
    store.lease("aggregator", holder, ttl).await.map(|lease| lease.fencing)
}

/// One holder at a time; who holds it keeps its number; who comes after the end gets a higher one.
async fn leases_are_fenced(store: &dyn Store) {
    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);
    let first = lease(store, "a", LONG).await.unwrap();
    assert_eq!(lease(store, "a", LONG).await.unwrap(), first, "renewed, not granted anew");
    assert!(matches!(lease(store, "b", LONG).await, Err(Error::Held(holder)) if holder == "a"));
    assert_eq!(lease(store, "a", SHORT).await.unwrap(), first);
    let second = loop {
        match lease(store, "b", LONG).await {
            Ok(fencing) => break fencing,
            Err(Error::Held(_)) => tokio::time::sleep(SHORT).await,
            Err(e) => panic!("{e}"),
        }
    };
    assert!(second > first, "the old holder is fenced off");
    assert!(matches!(lease(store, "a", SHORT).await, Err(Error::Held(_))), "and has lost it");
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

/// 64 writers add one to a counter by compare-and-set: no addition is lost.
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
    let fencing = lease(&*store, "b", Duration::from_secs(60)).await.unwrap();
    drop(store);

    let store = FileStore::open(&path).unwrap();
    let after = store.range("").await.unwrap();
    assert_eq!((after.revision, &after.epoch), (before.revision, &before.epoch));
    assert_eq!(after.entries, before.entries);
    // The file has one process at a time, so leases end with theirs; their numbers go on.
    assert!(lease(&store, "c", Duration::from_secs(60)).await.unwrap() > fencing);
    assert!(matches!(store.watch(0), Err(Error::Compacted { .. })));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }
}

/// A file that ends too early, at any length, is opened with all that was acknowledged, or refused with its path.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_loses_nothing_acknowledged_or_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = FileStore::open(&path).unwrap();
    for i in 0..50 {
        store.transact(transaction(&[], vec![put(&format!("k{i}"), "v")])).await.unwrap();
    }
    // A copy taken while the store is open is what a power cut leaves.
    let whole = std::fs::read(&path).unwrap();
    drop(store);
    let (mut opened, mut refused) = (0, 0);
    for part in 0..=32 {
        let torn = directory.path().join(format!("torn-{part}.redb"));
        let length = whole.len() * part / 32;
        std::fs::write(&torn, &whole[..length]).unwrap();
        // An empty file is a new store: nothing was ever acknowledged by it.
        if length == 0 {
            continue;
        }
        match FileStore::open(&torn) {
            Ok(store) => match store.range("k").await {
                Ok(range) => {
                    assert_eq!((range.entries.len(), range.revision), (50, 50), "at {length} bytes");
                    opened += 1;
                }
                Err(_) => refused += 1,
            },
            Err(e) => {
                assert!(e.to_string().contains("torn-"), "{e}");
                refused += 1;
            }
        }
    }
    assert!(opened >= 1 && refused >= 1, "{opened} opened, {refused} refused");
}
