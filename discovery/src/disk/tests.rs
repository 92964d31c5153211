use super::*;
use crate::config_state::tests::held;

fn disk() -> (tempfile::TempDir, Disk) {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = Disk::new(directory.path()).expect("made");
    (directory, disk)
}

/// What another process would read.
fn read(disk: &Disk) -> Option<ConfigState> {
    Disk::new(&disk.directory).expect("there").load()
}

fn the_log(disk: &Disk) -> PathBuf {
    disk.log(&base_digest(&disk.newest()).expect("a base"))
}

#[test]
fn a_log_cut_or_flipped_at_any_byte_gives_the_configuration_before_the_change() {
    let (_directory, disk) = disk();
    disk.save(&held(&["a"], 1)).expect("saved");
    disk.save(&held(&["a", "b"], 2)).expect("saved");
    assert_eq!(read(&disk).expect("whole").bodies(), held(&["a", "b"], 2).bodies());
    let (path, whole) = (the_log(&disk), std::fs::read(the_log(&disk)).expect("read"));
    for at in 0..whole.len() {
        std::fs::write(&path, &whole[..at]).expect("cut");
        assert_eq!(read(&disk).expect("before").revision, 1, "cut at {at}");
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        std::fs::write(&path, &flipped).expect("flipped");
        assert_eq!(read(&disk).expect("before").revision, 1, "flipped at {at}");
    }
}

#[test]
fn a_change_after_a_crash_cuts_off_what_the_crash_left() {
    let (_directory, disk) = disk();
    disk.save(&held(&["a"], 1)).expect("saved");
    disk.save(&held(&["a", "b"], 2)).expect("saved");
    disk.save(&held(&["a", "b", "c"], 3)).expect("saved");
    let whole = std::fs::read(the_log(&disk)).expect("read");
    for at in 0..whole.len() {
        std::fs::write(the_log(&disk), &whole[..at]).expect("cut");
        let after = Disk::new(&disk.directory).expect("there");
        let revision = after.load().expect("a copy").revision;
        assert!((1..3).contains(&revision), "cut at {at}");
        after.save(&held(&["d"], 4)).expect("saved");
        let now = read(&disk).expect("whole");
        assert_eq!((now.revision, now.bodies()), (4, held(&["d"], 4).bodies()), "cut at {at}");
    }
}

#[test]
fn a_base_cut_or_flipped_at_any_byte_gives_the_older_generation_with_its_log() {
    let (_directory, disk) = disk();
    disk.save(&held(&["a"], 1)).expect("saved");
    disk.save(&held(&["a", "b"], 2)).expect("saved");
    // Another process that has read nothing writes a new base.
    let other = Disk::new(&disk.directory).expect("there");
    other.save(&held(&["a", "b", "c"], 3)).expect("saved");
    assert_eq!(read(&disk).expect("whole").revision, 3);
    let whole = std::fs::read(disk.newest()).expect("read");
    for at in 0..whole.len() {
        std::fs::write(disk.newest(), &whole[..at]).expect("cut");
        assert_eq!(read(&disk).expect("previous").revision, 2, "cut at {at}");
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        std::fs::write(disk.newest(), &flipped).expect("flipped");
        assert_eq!(read(&disk).expect("previous").revision, 2, "flipped at {at}");
    }
}

#[test]
fn a_log_that_outgrows_its_base_becomes_part_of_a_new_one() {
    let (directory, disk) = disk();
    let mut config = held(&["a"], 1);
    let body = vec![7; 100 << 10];
    for revision in 1..60 {
        config.revision = revision;
        config.insert(1, &format!("n{}", revision % 3), &revision.to_string(), &body);
        disk.save(&config).expect("saved");
        if revision % 7 == 0 {
            let found = read(&disk).expect("whole");
            assert_eq!((found.revision, found.bodies()), (revision, config.bodies()));
        }
    }
    let files = std::fs::read_dir(directory.path()).expect("read").flatten();
    let sizes: Vec<u64> = files.map(|file| file.metadata().expect("there").len()).collect();
    assert!(sizes.len() <= 4, "two bases and their logs: {sizes:?}");
    assert!(sizes.iter().all(|size| *size < 2 * LOG_MIN_BYTES), "{sizes:?}");
}

/// The copies of an older version are bases without a log.
#[test]
fn a_copy_of_an_older_version_is_read_and_goes_on() {
    let (_directory, disk) = disk();
    std::fs::write(disk.newest(), held(&["a", "b"], 5).encode()).expect("written");
    assert_eq!(disk.load().expect("whole").revision, 5);
    disk.save(&held(&["b"], 6)).expect("saved");
    assert_eq!(read(&disk).expect("whole").bodies(), held(&["b"], 6).bodies());
    assert!(the_log(&disk).exists(), "only the change was written");
}

#[test]
fn the_copy_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let (_directory, disk) = disk();
    disk.save(&held(&["a"], 1)).expect("saved");
    disk.save(&held(&["a"], 2)).expect("saved");
    for path in [disk.newest(), the_log(&disk)] {
        let mode = std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
