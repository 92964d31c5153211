//! A map and its versions against a `BTreeMap`.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Insert(u16, u8),
    Remove(u16),
    /// Keys in a row, which fill chunks.
    Row(u16, u16),
    /// Removes keys in a row, which empties chunks.
    Clear(u16, u16),
    /// Keeps this version to compare with later.
    Keep,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..2000_u16, any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
        2 => (0..2000_u16).prop_map(Step::Remove),
        1 => (0..2000_u16, 0..900_u16).prop_map(|(from, count)| Step::Row(from, count)),
        1 => (0..2000_u16, 0..900_u16).prop_map(|(from, count)| Step::Clear(from, count)),
        1 => Just(Step::Keep),
    ];
    prop::collection::vec(step, 0..40)
}

fn apply(step: &Step, map: &mut PersistentMap<u16, u8>, model: &mut BTreeMap<u16, u8>) {
    match *step {
        Step::Insert(key, value) => assert_eq!(map.insert(key, value), model.insert(key, value)),
        Step::Remove(key) => assert_eq!(map.remove(&key), model.remove(&key)),
        Step::Row(from, count) => {
            for key in from..from + count {
                assert_eq!(map.insert(key, 1), model.insert(key, 1));
            }
        }
        Step::Clear(from, count) => {
            for key in from..from + count {
                assert_eq!(map.remove(&key), model.remove(&key));
            }
        }
        Step::Keep => {}
    }
}

proptest! {
    #[test]
    fn it_is_the_map_of_the_standard_library_and_old_versions_stay(steps in steps(), from in 0..3000_u16) {
        let (mut map, mut model) = (PersistentMap::default(), BTreeMap::new());
        let mut kept = Vec::new();
        for step in &steps {
            if matches!(step, Step::Keep) {
                kept.push((map.clone(), model.clone()));
            }
            apply(step, &mut map, &mut model);
            prop_assert_eq!(map.len(), model.len());
        }
        prop_assert!(map.iter().eq(model.iter()));
        prop_assert!(map.iter().rev().eq(model.iter().rev()));
        prop_assert!(map.from(&from).eq(model.range(from..)));
        prop_assert!(map.from_where(|key| *key < from).eq(model.range(from..)));
        prop_assert!(map.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK_MAX));
        for key in 0..3000 {
            prop_assert_eq!(map.get(&key), model.get(&key));
        }
        for (old, was) in &kept {
            prop_assert!(old.iter().eq(was.iter()));
            let differ = old.changes(&map).filter(|(_, old, new)| old != new);
            let mut keys: Vec<u16> = was.keys().chain(model.keys()).copied().collect();
            keys.sort_unstable();
            keys.dedup();
            let expected = keys.iter().filter(|key| was.get(key) != model.get(key));
            let expected = expected.map(|key| (key, was.get(key), model.get(key)));
            prop_assert!(differ.eq(expected));
            prop_assert_eq!(*old == map, *was == model);
        }
    }
}

#[test]
fn a_change_of_a_large_map_touches_little_of_it() {
    let map: PersistentMap<u32, u32> = (0..100_000).map(|n| (n, n)).collect();
    assert_eq!(map.chunks.len(), 100_000_usize.div_ceil(CHUNK_MAX), "keys in order fill their chunks");
    let mut next = map.clone();
    assert!(map.is_same(&next));
    next.insert(50_000, 1);
    next.insert(100_001, 1);
    next.remove(&70_000);
    let seen = map.changes(&next).count();
    assert!(seen < 4 * CHUNK_MAX, "{seen} entries were compared");
    let differ: Vec<u32> = map.changes(&next).filter(|(_, a, b)| a != b).map(|(key, _, _)| *key).collect();
    assert_eq!(differ, [50_000, 70_000, 100_001]);
}

#[test]
fn a_map_that_shrinks_gives_chunks_back() {
    let mut map: PersistentMap<u32, ()> = (0..10_000).map(|n| (n, ())).collect();
    (0..10_000).filter(|n| n % 50 != 0).for_each(|n| {
        map.remove(&n);
    });
    assert_eq!(map.len(), 200);
    assert!(map.chunks.len() <= 8, "{} chunks", map.chunks.len());
}
