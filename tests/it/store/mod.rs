//! All stores under one suite, and the faults that each of them must survive.
#![expect(clippy::unwrap_used, reason = "the suite's helpers are tests too: they fail where they stand")]

mod etcd;
mod suite;

use std::sync::Arc;
use std::time::Duration;

use weir_control_plane::store::{Error, FileStore, MemoryStore, Store};

use self::suite::{conforms, lease, put, transaction};

#[tokio::test]
async fn memory_conforms() {
    let store = Arc::new(MemoryStore::default());
    conforms(store.clone()).await;
    // Only this store is fast enough to be flooded; the file store has the same log.
    let from = store.range("").await.unwrap().revision;
    let mut watch = store.watch(from).unwrap();
    for _ in 0..5000 {
        store.transact(transaction(&[], vec![put("flood", "x")])).await.unwrap();
    }
    assert!(matches!(watch.next().await, Err(Error::Compacted { .. })));
    assert!(matches!(store.watch(from), Err(Error::Compacted { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn file_conforms_and_keeps_everything() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/for/it/store.redb");
    let store = Arc::new(FileStore::open(&path).unwrap());
    conforms(store.clone()).await;
    assert!(matches!(FileStore::open(&path), Err(Error::Locked(_))), "a second holder is told so");
    let before = store.range("").await.unwrap();
    let fencing_token = lease(&*store, "b", Duration::from_secs(60)).await.unwrap();
    drop(store);

    let store = FileStore::open(&path).unwrap();
    let after = store.range("").await.unwrap();
    assert_eq!((after.revision, &after.epoch), (before.revision, &before.epoch));
    assert_eq!(after.entries, before.entries);
    // The file is used by one process at a time, so leases end with the process; their numbers continue.
    assert!(lease(&store, "c", Duration::from_secs(60)).await.unwrap() > fencing_token);
    assert!(matches!(store.watch(0), Err(Error::Compacted { .. })));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }
}

/// A truncated file, at any length, is opened with everything that was acknowledged, or refused with its path.
#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_loses_nothing_acknowledged_or_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store.redb");
    let store = FileStore::open(&path).unwrap();
    for i in 0..50 {
        store.transact(transaction(&[], vec![put(&format!("k{i}"), "v")])).await.unwrap();
    }
    // A copy that is made while the store is open is what a power cut leaves.
    let whole = std::fs::read(&path).unwrap();
    drop(store);
    let (mut opened, mut refused) = (0, 0);
    for part in 0..=32 {
        let torn = directory.path().join(format!("torn-{part}.redb"));
        let length = whole.len() * part / 32;
        std::fs::write(&torn, &whole[..length]).unwrap();
        // An empty file is a new store: it never acknowledged anything.
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
