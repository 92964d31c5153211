use std::os::unix::fs::symlink;
use std::sync::LazyLock;

use proptest::prelude::*;
use prost::Message as _;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use weir_discovery::{Apply as _, ConfigState, with_update_between};
use weir_proto::resource::{Resource, Spec};
use weir_proto::v1::{self, ResourceKind};

use super::file::FILE_BYTES_MAX;
use super::*;
use crate::control::live_config::LiveConfig;
use crate::control::subscription::Publisher;

/// What no backend may be sent.
const OUTSIDE: &str = "secret-of-the-machine";

/// An allowed directory `in` and one beside it that is not.
fn tree() -> TempDir {
    let tree = tempfile::tempdir().expect("a directory");
    for directory in ["in", "in/dir", "in/@api.example", "out"] {
        std::fs::create_dir(tree.path().join(directory)).expect("made");
    }
    std::fs::write(tree.path().join("out/secret"), OUTSIDE).expect("written");
    std::fs::write(tree.path().join("in/key"), " sk-in \n").expect("written");
    std::fs::write(tree.path().join("in/dir/key"), "sk-dir").expect("written");
    std::fs::write(tree.path().join("in/@api.example/key"), "sk-api").expect("written");
    tree
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a FIFO");
}

fn dirs(allowed: &Path) -> AllowedDirs {
    AllowedDirs { allowed: vec![allowed.to_owned()], never: Vec::new() }
}

fn read(tree: &TempDir, name: &str) -> Result<String, FileError> {
    file::read(&dirs(&tree.path().join("in")), 0, Path::new(name)).map(|found| found.secret)
}

#[test]
fn regular_files_are_read_directly_and_through_links_that_stay_inside() {
    let tree = tree();
    let inside = tree.path().join("in");
    symlink("dir/key", inside.join("relative")).expect("made");
    symlink("../dir/../key", inside.join("dir/up")).expect("made");
    symlink(inside.join("dir/key"), inside.join("absolute")).expect("made");
    symlink(inside.join("dir"), inside.join("folder")).expect("made");
    for (name, secret) in [
        ("key", "sk-in"),
        ("dir/key", "sk-dir"),
        ("relative", "sk-dir"),
        ("dir/up", "sk-in"),
        ("absolute", "sk-dir"),
        ("folder/key", "sk-dir"),
    ] {
        assert_eq!(read(&tree, name).as_deref(), Ok(secret), "{name}");
    }
}

#[test]
fn a_mounted_kubernetes_secret_is_read_and_so_is_the_one_that_takes_its_place() {
    let tree = tree();
    let inside = tree.path().join("in");
    for (version, secret) in [("..2026_11_29_14_00_00.1", "sk-old"), ("..2026_11_29_15_00_00.2", "sk-new")] {
        std::fs::create_dir(inside.join(version)).expect("made");
        std::fs::write(inside.join(version).join("token"), secret).expect("written");
        // As the kubelet does: a new link is made beside the old one and renamed over it.
        symlink(version, inside.join("..data_tmp")).expect("made");
        std::fs::rename(inside.join("..data_tmp"), inside.join("..data")).expect("renamed");
        if !inside.join("token").exists() {
            symlink("..data/token", inside.join("token")).expect("made");
        }
        assert_eq!(read(&tree, "token").as_deref(), Ok(secret));
    }
}

#[test]
fn an_allowed_directory_may_be_a_link_itself() {
    let tree = tree();
    symlink(tree.path().join("in"), tree.path().join("linked")).expect("made");
    symlink(tree.path().join("in/dir/key"), tree.path().join("in/by-real-name")).expect("made");
    let dirs = dirs(&tree.path().join("linked"));
    for (name, secret) in [("key", "sk-in"), ("by-real-name", "sk-dir")] {
        assert_eq!(file::read(&dirs, 0, Path::new(name)).map(|f| f.secret).as_deref(), Ok(secret), "{name}");
    }
}

#[test]
fn links_that_leave_are_refused_alike_whether_their_target_exists_or_not() {
    let tree = tree();
    let inside = tree.path().join("in");
    let out = tree.path().join("out");
    for (name, target) in [
        ("there", out.join("secret")),
        ("not-there", out.join("nothing")),
        ("relative", "../out/secret".into()),
        ("relative-not-there", "../out/nothing".into()),
        ("directory", out.clone()),
        ("machine", "/etc/shadow".into()),
        ("device", "/dev/zero".into()),
        ("environment", "/proc/self/environ".into()),
        ("descriptor", "/proc/self/fd/0".into()),
        ("up-and-back", "../in/key".into()),
    ] {
        symlink(target, inside.join(name)).expect("made");
    }
    for name in ["there", "not-there", "relative", "relative-not-there", "directory", "machine", "device"] {
        assert_eq!(read(&tree, name), Err(FileError::Outside), "{name}");
    }
    for name in ["environment", "descriptor", "directory/secret", "directory/nothing", "up-and-back"] {
        assert_eq!(read(&tree, name), Err(FileError::Outside), "{name}");
    }
}

#[test]
fn only_regular_files_are_read_and_no_other_kind_keeps_the_reader() {
    let tree = tree();
    let inside = tree.path().join("in");
    fifo(&inside.join("fifo"));
    symlink("fifo", inside.join("to-fifo")).expect("made");
    let _socket = std::os::unix::net::UnixListener::bind(inside.join("socket")).expect("bound");
    symlink("loop-b", inside.join("loop-a")).expect("made");
    symlink("loop-a", inside.join("loop-b")).expect("made");
    for (name, error) in [
        ("fifo", FileError::Kind("a FIFO")),
        ("to-fifo", FileError::Kind("a FIFO")),
        ("socket", FileError::Kind("a socket")),
        ("dir", FileError::Kind("a directory")),
        ("loop-a", FileError::Links),
        ("nothing", FileError::Missing),
        ("nothing/below", FileError::Missing),
        ("key/below", FileError::Missing),
    ] {
        assert_eq!(read(&tree, name), Err(error), "{name}");
    }
    // Should somebody mount these where credentials are.
    for (root, name, error) in [
        ("/dev", "zero", FileError::Kind("a device")),
        ("/dev", "tty", FileError::Kind("a device")),
        ("/proc", "self/environ", FileError::Kind("a file of the kernel")),
        ("/proc", "version", FileError::Kind("a file of the kernel")),
    ] {
        let read = file::read(&dirs(Path::new(root)), 0, Path::new(name)).map(|found| found.secret);
        assert_eq!(read, Err(error), "{root}/{name}");
    }
}

#[test]
fn what_cannot_be_a_header_is_refused_and_its_text_not_repeated() {
    let tree = tree();
    let large = vec![b'x'; FILE_BYTES_MAX as usize + 1];
    for (bytes, error) in [
        (&b""[..], FileError::Empty),
        (b" \n\t ", FileError::Empty),
        (b"canary\ncanary", FileError::Lines),
        (b"canary\r\nX-Other: canary", FileError::Lines),
        (b"canary\0", FileError::Characters),
        (b"canary\x1b[31m", FileError::Characters),
        (b"canary\tcanary", FileError::Characters),
        ("canary\u{fc}".as_bytes(), FileError::Characters),
        (b"canary\xff", FileError::Characters),
        (&large, FileError::TooLarge),
    ] {
        std::fs::write(tree.path().join("in/odd"), bytes).expect("written");
        let found = read(&tree, "odd").expect_err("refused");
        assert!(!found.to_string().contains("canary"));
        assert_eq!(found, error);
    }
    std::fs::write(tree.path().join("in/odd"), &large[1..]).expect("written");
    assert_eq!(read(&tree, "odd").map(|secret| secret.len() as u64), Ok(FILE_BYTES_MAX));
    // Without a byte on disk: only what is read counts, and that is bounded.
    std::fs::File::create(tree.path().join("in/sparse")).and_then(|f| f.set_len(1 << 40)).expect("made");
    assert_eq!(read(&tree, "sparse"), Err(FileError::TooLarge));
}

#[test]
fn a_file_that_the_gateway_may_not_read_says_so() {
    use std::os::unix::fs::PermissionsExt as _;
    let tree = tree();
    let path = tree.path().join("in/key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).expect("set");
    // Root may read it.
    let may = std::fs::read(&path).is_ok();
    assert_eq!(read(&tree, "key"), if may { Ok("sk-in".into()) } else { Err(FileError::Denied) });
}

#[test]
fn files_of_weir_itself_are_refused_by_whatever_name() {
    let tree = tree();
    let inside = tree.path().join("in");
    std::fs::hard_link(inside.join("key"), inside.join("same")).expect("made");
    symlink("key", inside.join("link")).expect("made");
    let never = vec![inside.join("key"), inside.join("dir"), inside.join("not-there")];
    let dirs = AllowedDirs { never, ..dirs(&inside) };
    for name in ["key", "same", "link", "dir/key"] {
        let read = file::read(&dirs, 0, Path::new(name)).map(|found| found.secret);
        assert_eq!(read, Err(FileError::Outside), "{name}");
    }
}

/// Parts of which paths are made, those that a tree knows among them.
fn part() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(vec![
        "..",
        ".",
        "",
        "in",
        "out",
        "dir",
        "key",
        "secret",
        "leave",
        "leave-dir",
        "stay",
        "loop",
        "fifo",
        "up",
        "@api.example",
    ])
}

static TREE: LazyLock<TempDir> = LazyLock::new(|| {
    let tree = tree();
    let inside = tree.path().join("in");
    symlink("../out/secret", inside.join("leave")).expect("made");
    symlink(tree.path().join("out"), inside.join("leave-dir")).expect("made");
    symlink("dir", inside.join("stay")).expect("made");
    symlink("loop", inside.join("loop")).expect("made");
    symlink("..", inside.join("dir/up")).expect("made");
    symlink("../..", inside.join("up")).expect("made");
    fifo(&inside.join("fifo"));
    tree
});

proptest! {
    #[test]
    fn whatever_path_is_named_only_files_inside_are_read(parts in proptest::collection::vec(part(), 0..7), inside in any::<bool>()) {
        let start = TREE.path().join(if inside { "in" } else { "" });
        let path = PathBuf::from(format!("{}/{}", start.display(), parts.join("/")));
        let allowed = TREE.path().join("in");
        let dirs = dirs(&allowed);
        let read = dirs.locate(&path).map(|(root, below)| file::read(&dirs, root, below));
        if let Some(Ok(found)) = read {
            // A `.` behind a file is left out when a path is taken apart; the system calls the file no directory.
            let plain: PathBuf = path.components().collect();
            let real = std::fs::canonicalize(plain).expect("it was read");
            prop_assert!(real.starts_with(std::fs::canonicalize(&allowed).expect("there")), "{path:?} is {real:?}");
            let text = std::fs::read_to_string(&real).expect("readable");
            prop_assert_eq!(found.secret.as_str(), text.trim());
            prop_assert!(found.secret != OUTSIDE);
        }
    }

    #[test]
    fn no_text_of_a_reference_is_read_outside_or_panics(text in "(env:|file:/|file:/etc/weir/credentials/)?\\PC{0,40}") {
        let wire = resource("b", &text);
        if let Ok(checked) = Resource::try_from(&wire)
            && let Spec::Backend(backend) = &checked.spec
            && let Some(CredentialRef::File(path)) = &backend.credential
        {
            let dirs = dirs(Path::new("/etc/weir/credentials"));
            let path = normal(Path::new(path));
            prop_assert!(dirs.locate(&path).is_none_or(|_| path.starts_with("/etc/weir/credentials")));
        }
    }

    #[test]
    fn no_pattern_makes_a_setting_of_weir_readable(pattern in "[A-Z_*]{0,8}", name in "(?i)WEIR_[A-Z_]{0,20}") {
        let sources = CredentialSources { credential_env: vec![pattern], ..CredentialSources::default() };
        if let Ok(policy) = Policy::new(&sources, Vec::new()) {
            prop_assert!(policy.variable(&name, |_| Some(OUTSIDE.into())).is_err());
        }
    }
}

fn resource(name: &str, credential: &str) -> v1::Resource {
    let spec = v1::BackendSpec {
        pool: "p".into(),
        url: "https://api.example".into(),
        models: [("m".to_owned(), String::new())].into(),
        credential: credential.into(),
        ..Default::default()
    };
    v1::Resource { name: name.into(), spec: Some(v1::resource::Spec::Backend(spec)), ..Default::default() }
}

fn backend(credential: &str) -> Backend {
    let checked = Resource::try_from(&resource("b", credential)).expect("valid");
    let Spec::Backend(backend) = checked.spec else { unreachable!("a backend") };
    backend
}

fn sources(tree: &TempDir) -> CredentialSources {
    CredentialSources { credential_dir: vec![tree.path().join("in")], ..CredentialSources::default() }
}

fn header(of: Result<Option<HeaderValue>, String>) -> Result<String, String> {
    of.map(|value| value.map_or_else(String::new, |value| value.to_str().expect("ASCII").to_owned()))
}

#[test]
fn variables_are_read_by_the_allow_list_and_never_those_of_weir() {
    let policy = Policy::new(&CredentialSources::default(), Vec::new()).expect("good");
    let set = |name: &str| (name != "NOT_SET_API_KEY").then(|| "sk".into());
    for allowed in ["OPENAI_API_KEY", "TEST_CREDENTIAL", "CREDENTIAL_EAST", "_API_KEY"] {
        assert_eq!(policy.variable(allowed, set).as_deref(), Ok("sk"), "{allowed}");
    }
    let unset = policy.variable("NOT_SET_API_KEY", set).expect_err("refused");
    assert_eq!(unset, "credential: environment variable NOT_SET_API_KEY is not set");
    for refused in
        ["AWS_SECRET_ACCESS_KEY", "HOME", "PATH", "openai_api_key", "OPENAI_API_KEY_2", "CREDENTIAL"]
    {
        // The same whether it is set or not.
        let texts = [set, |_: &str| None].map(|read| policy.variable(refused, read).expect_err("refused"));
        assert_eq!(texts[0], texts[1]);
        assert!(texts[0].contains("--credential-env"), "{}", texts[0]);
    }
    for weir in ["WEIR_GATEWAY_TOKEN", "WEIR_API_KEY", "weir_x_API_KEY", "WEIR_", "Weir_CREDENTIAL"] {
        let text = policy.variable(weir, set).expect_err("refused");
        assert!(text.contains("WEIR_") && text.contains("another name"), "{text}");
    }
}

#[test]
fn settings_that_would_allow_too_much_or_nothing_meant_are_refused_by_name() {
    let refuse = |directory: &str, variable: &str, said: &str| {
        let sources = CredentialSources {
            credential_dir: vec![directory.into()],
            credential_env: vec![variable.into()],
            never: Vec::new(),
        };
        let text = Policy::new(&sources, Vec::new()).expect_err("refused");
        assert!(text.contains(said), "{text}");
    };
    for directory in ["/", "/proc", "/proc/self", "/sys/kernel", "/dev/shm/x", "/etc/weir/../x"] {
        refuse(directory, "A", "--credential-dir");
    }
    for variable in ["WEIR_*", "WEIR_CRED_*", "weir_X", "A*B", "**", "A-B", "A B"] {
        refuse("/etc/weir/credentials", variable, "--credential-env");
    }
    let none = CredentialSources {
        credential_dir: vec!["".into()],
        credential_env: vec![String::new()],
        never: Vec::new(),
    };
    let policy = Policy::new(&none, Vec::new()).expect("good");
    assert!(policy.variable("OPENAI_API_KEY", |_| Some("sk".into())).is_err());
    assert!(policy.dirs.allowed.is_empty());
}

#[tokio::test]
async fn one_text_is_said_of_every_file_outside_and_it_names_the_flag() {
    let tree = tree();
    symlink(tree.path().join("out/secret"), tree.path().join("in/leave")).expect("made");
    let credentials = Credentials::new(&sources(&tree), Vec::new()).expect("good");
    let mut said = BTreeSet::new();
    let inside = tree.path().join("in");
    for path in [
        "/etc/hostname".to_owned(),
        "/etc/shadow".into(),
        "/nope/x".into(),
        "/dev/zero".into(),
        "/proc/self/environ".into(),
        inside.display().to_string(),
        format!("{}-beside/key", inside.display()),
        format!("{}/leave", inside.display()),
    ] {
        let named = backend(&format!("file:{path}"));
        let _ = credentials.of(&named);
        credentials.settle().await;
        said.insert(credentials.of(&named).expect_err("refused"));
    }
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said.iter().all(|text| text.contains("--credential-dir") && text.contains("in a directory")));
}

#[tokio::test]
async fn a_file_in_a_directory_of_a_host_is_for_that_host_alone() {
    let tree = tree();
    symlink("@api.example/key", tree.path().join("in/by-link")).expect("made");
    let credentials = Credentials::new(&sources(&tree), Vec::new()).expect("good");
    for name in ["@api.example/key", "by-link"] {
        let mut named = backend(&format!("file:{}/in/{name}", tree.path().display()));
        let _ = credentials.of(&named);
        credentials.settle().await;
        assert_eq!(header(credentials.of(&named)).as_deref(), Ok("Bearer sk-api"));
        for url in ["http://thief.example", "https://api.example.thief.example", "http://127.0.0.1:1"] {
            named.url = url.parse().expect("a URL");
            let text = credentials.of(&named).expect_err("refused");
            assert!(text.contains("a directory for api.example") && !text.contains("sk-"), "{text}");
        }
    }
    let url = |text: &str| text.parse::<Uri>().expect("a URL");
    assert!(is_for(&["h:8000".into()], &url("http://H:8000/v1")));
    assert!(is_for(&["h:443".into()], &url("https://h")));
    assert!(!is_for(&["h:8000".into()], &url("http://h:8001")));
    assert!(!is_for(&["h".into(), "other".into()], &url("http://h")));
}

/// Waits for what a file's thread does.
async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "not within a minute: {what}");
}

#[tokio::test]
async fn an_exchanged_secret_is_used_and_the_last_one_stays_while_the_new_one_is_unreadable() {
    let tree = tree();
    let path = tree.path().join("in/key");
    let credentials = Credentials::new(&sources(&tree), Vec::new()).expect("good");
    let named = backend(&format!("file:{}", path.display()));
    assert!(credentials.of(&named).is_err(), "it is not waited for");
    assert!(credentials.settle().await);
    assert!(!credentials.settle().await, "there is nothing more to wait for");
    let now = || header(credentials.of(&named));
    assert_eq!(now().as_deref(), Ok("Bearer sk-in"));
    let changes = credentials.changes();
    until("what was read first is told", || *changes.borrow() == 1).await;
    let before = *changes.borrow();
    std::fs::remove_file(&path).expect("removed");
    fifo(&path);
    credentials.read_due();
    until("it is found unreadable", || credentials.unreadable() == 1).await;
    assert_eq!(now().as_deref(), Ok("Bearer sk-in"));
    assert_eq!(*changes.borrow(), before, "backends are sent the same");
    std::fs::remove_file(&path).expect("removed");
    std::fs::write(&path, "sk-new").expect("written");
    credentials.read_due();
    until("the new one is used", || now().as_deref() == Ok("Bearer sk-new")).await;
    until("one change is told", || *changes.borrow() == before + 1).await;
    assert_eq!(credentials.unreadable(), 0);
    credentials.retain(&BTreeSet::new());
    assert!(credentials.state().files.is_empty());
}

/// Hangs for files called hang..., until there is a file `answer` beside them.
fn hanging(dirs: &AllowedDirs, root: usize, below: &Path) -> Result<Found, FileError> {
    let answers = dirs.allowed[root].join("answer");
    while below.to_str().is_some_and(|name| name.starts_with("hang")) && !answers.exists() {
        std::thread::park_timeout(Duration::from_millis(10));
    }
    file::read(dirs, root, below)
}

#[tokio::test]
async fn reads_that_hang_are_few_are_given_up_and_keep_no_other_file_waiting() {
    let tree = tree();
    let credentials = Credentials::reading(&sources(&tree), Vec::new(), hanging).expect("good");
    let named = |name: &str| backend(&format!("file:{}/in/{name}", tree.path().display()));
    let hangs: Vec<_> = (0..3 * HANGING_MAX).map(|k| named(&format!("hang{k}"))).collect();
    let begun = Instant::now();
    for hang in &hangs {
        assert!(credentials.of(hang).expect_err("not read").contains("not read yet"));
    }
    // Others may wait for a thread of their own, and the answer to a change does not wait for long, and once.
    credentials.settle().await;
    assert!(!credentials.settle().await);
    assert!(begun.elapsed() < READ_TIMEOUT, "{:?}", begun.elapsed());
    let _ = credentials.of(&named("key"));
    let readers = |credentials: &Credentials| {
        let state = credentials.state();
        (state.directories[0].readers, state.directories[0].hanging)
    };
    assert_eq!(readers(&credentials), (READERS, 0));
    // Time passes.
    let later = |times: u32| Instant::now() + READ_TIMEOUT * times;
    credentials.time_out_reads(later(1));
    until("others begin", || readers(&credentials) == (READERS, READERS)).await;
    assert!(credentials.of(&hangs[0]).expect_err("hangs").contains("not read within 2s"));
    // The running ones must have taken their files before they are late.
    until("they run", || {
        let state = credentials.state();
        state.files.values().filter(|e| matches!(e.read, Read::Running(_))).count() == READERS
    })
    .await;
    credentials.time_out_reads(later(2));
    assert_eq!(readers(&credentials), (0, HANGING_MAX), "no more threads than that are lost");
    let last = credentials.of(&hangs[3 * HANGING_MAX - 1]).expect_err("refused");
    assert!(last.contains("hang"), "{last}");
    // Named again and again, a file that hangs takes no other thread.
    for _ in 0..3 {
        credentials.retain(&BTreeSet::new());
        let _ = credentials.of(&hangs[0]);
        credentials.read_due();
    }
    assert_eq!(readers(&credentials), (0, HANGING_MAX));
    assert!(credentials.state().files.len() <= HANGING_MAX);
}

#[tokio::test]
async fn a_slow_file_keeps_a_quick_one_waiting_for_no_longer_than_a_thread_takes_to_start() {
    let tree = tree();
    let credentials = Credentials::reading(&sources(&tree), Vec::new(), hanging).expect("good");
    let named = |name: &str| backend(&format!("file:{}/in/{name}", tree.path().display()));
    let _ = credentials.of(&named("hang"));
    let quick = named("key");
    let _ = credentials.of(&quick);
    until("the quick one is read", || credentials.of(&quick).is_ok()).await;
    assert_eq!(credentials.state().directories[0].hanging, 0, "nothing had to be given up for that");
}

#[tokio::test]
async fn a_revocation_is_in_force_while_a_credential_hangs_and_its_backend_joins_when_it_answers() {
    let tree = tree();
    let credentials = Credentials::reading(&sources(&tree), Vec::new(), hanging).expect("good");
    let live = Arc::new(LiveConfig::default());
    let mut publisher = Publisher::new(live.clone(), credentials.clone());
    let file = |name: &str| format!("file:{}/in/{name}", tree.path().display());
    let of = |name: &str, spec| v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
    let digest = v1::KeyDigest { sha256: vec![7; 32], prefix: "p".into(), expire_time: None };
    let key = v1::ApiKeySpec { tenant: "t".into(), digests: vec![digest], ..Default::default() };
    let mut resources = vec![
        of("p", v1::resource::Spec::Pool(v1::PoolSpec::default())),
        of("t", v1::resource::Spec::Tenant(v1::TenantSpec::default())),
        resource("good", &file("key")),
        of("k", v1::resource::Spec::ApiKey(key)),
    ];
    let config = |revision: u64, resources: &[v1::Resource]| {
        let mut config = ConfigState::new("e", revision);
        for wire in resources {
            let kind = weir_proto::resource::kind_of(wire);
            config.insert(kind.into(), &wire.name, "1", &wire.encode_to_vec());
        }
        config
    };
    let (empty, first) = (ConfigState::default(), config(1, &resources));
    let names = || live.snapshot().backends.keys().map(ToString::to_string).collect::<Vec<_>>();
    with_update_between(&empty, &first, |update| publisher.check(update));
    assert!(publisher.settle().await);
    assert_eq!(with_update_between(&empty, &first, |update| publisher.apply(update)), []);
    assert_eq!((names(), live.snapshot().keys.len()), (vec!["good".to_owned()], 1));

    // A backend whose credential hangs comes with the revocation of the key.
    let begun = Instant::now();
    resources.retain(|resource| resource.name != "k");
    let kept = config(2, &resources);
    resources.push(resource("late", &file("hang")));
    let offered = config(2, &resources);
    let refused = with_update_between(&first, &offered, |update| publisher.check(update));
    assert_eq!((refused.len(), refused[0].name.as_str()), (1, "late"));
    assert_eq!(with_update_between(&first, &kept, |update| publisher.apply(update)), []);
    assert_eq!((names(), live.snapshot().keys.len()), (vec!["good".to_owned()], 0));
    println!("revoked {:?} after the change came", begun.elapsed());
    // Only the answer to it waits, and that for a moment.
    assert!(publisher.settle().await);
    assert_eq!(with_update_between(&kept, &offered, |update| publisher.check(update)).len(), 1);
    let refusing = [((ResourceKind::Backend as i32, "late".to_owned()), String::new())].into();
    publisher.refusing(&refusing);
    assert!(begun.elapsed() < READ_TIMEOUT, "{:?}", begun.elapsed());
    assert!(!credentials.is_unsettled(), "no later change waits for it");

    std::fs::write(tree.path().join("in/hang"), "sk-late").expect("written");
    std::fs::write(tree.path().join("in/answer"), "").expect("written");
    let changed = tokio::time::timeout(Duration::from_secs(60), publisher.changed());
    assert!(changed.await.is_ok(), "it says that it may be offered again");
    assert_eq!(with_update_between(&kept, &offered, |update| publisher.check(update)), []);
    assert_eq!(with_update_between(&kept, &offered, |update| publisher.apply(update)), []);
    assert_eq!(names(), ["good", "late"]);
}
