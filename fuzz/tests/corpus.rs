//! Runs every target over its corpus: the fuzzer's finds, and what once went wrong, hold in every build.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use weir_fuzz::TARGETS;

/// What one corpus may take in the repository.
const FILES_MAX: usize = 100;
const BYTES_MAX: usize = 256 << 10;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

#[test]
fn every_target_holds_for_its_corpus() {
    for target in TARGETS {
        let directory = corpora().join(target.name);
        let listed = fs::read_dir(&directory)
            .unwrap_or_else(|error| panic!("{}: {error}; each target has a corpus", directory.display()));
        let (mut files, mut bytes) = (0, 0);
        for entry in listed {
            let path = entry.expect("a directory that can be read").path();
            let input = fs::read(&path).expect("a file that can be read");
            (files, bytes) = (files + 1, bytes + input.len());
            let held = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(held.is_ok(), "{} does not hold: see above", path.display());
        }
        assert!(files > 0, "{}: empty", target.name);
        assert!(files <= FILES_MAX, "{}: {files} files; run fuzz/run keep {}", target.name, target.name);
        assert!(bytes <= BYTES_MAX, "{}: {bytes} bytes; run fuzz/run keep {}", target.name, target.name);
    }
}

#[test]
fn every_target_holds_for_no_bytes_and_for_all_of_one_kind() {
    for target in TARGETS {
        (target.run)(&[]);
        for byte in [0, b' ', b'[', b'{', b'"', b'\n', 0x80, 0xff] {
            (target.run)(&[byte]);
            (target.run)(&[byte; 4096]);
        }
    }
}

#[test]
fn every_corpus_is_of_a_target() {
    let known: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let found = fs::read_dir(corpora()).expect("the corpora");
    let found: BTreeSet<String> =
        found.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(known, found);
}
