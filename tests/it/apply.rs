//! `weir apply -f` against a control plane and three gateways, all of them processes: its output when all gateways
//! accept a change, when the control plane refuses it, and when one gateway does.

use std::path::{Path, PathBuf};

use serde_json::Value;
use weir_tests::plane::{ADMIN_TOKEN, Plane, start};
use weir_tests::process::{Process, command};
use weir_tests::stack::CREDENTIAL;

/// A control plane and gateways that follow it.
struct Stand {
    plane: Plane,
    gateways: Vec<Process>,
    data: tempfile::TempDir,
}

impl Stand {
    /// Three gateways, of which the last one lacks the credential.
    async fn start() -> Self {
        let data = tempfile::tempdir().expect("a directory");
        let plane = start("127.0.0.1:0", &data.path().join("plane"), None).await;
        let token = data.path().join("token");
        std::fs::write(&token, ADMIN_TOKEN).expect("written");
        let mut stand = Self { plane, gateways: Vec::new(), data };
        // A gateway reports its start when it has a configuration.
        let first = stand.file("first", "kind: tenant\nname: first\nspec: {}\n");
        let (code, _, err) = stand.apply(&first).await;
        assert_eq!(code, 0, "{err}");
        for k in 0..3 {
            let (id, copy) = (format!("gateway-{k}"), stand.data.path().join(format!("gateway-{k}")));
            let args = [
                "--id",
                &id,
                "--listen=127.0.0.1:0",
                "--ops-listen=127.0.0.1:0",
                "--control-plane",
                &stand.plane.url,
                "--gateway-token-file",
                token.to_str().expect("UTF-8"),
                "--data-dir",
                copy.to_str().expect("UTF-8"),
            ];
            let env = [(CREDENTIAL, "secret")];
            let env = if k == 2 { &[][..] } else { &env };
            stand.gateways.push(Process::start_with("weir-gateway", &args, env, "serving").await);
        }
        stand
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.data.path().join(format!("{name}.yaml"));
        std::fs::write(&path, text).expect("written");
        path
    }

    /// Exit code, standard output and standard error.
    async fn weir(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = command("weir");
        command.args(args).env("WEIR_SERVER", &self.plane.url).env("WEIR_TOKEN", ADMIN_TOKEN);
        let done = command.output().await.expect("runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
    }

    async fn apply(&self, file: &Path) -> (i32, String, String) {
        self.weir(&["apply", "-f", file.to_str().expect("UTF-8")]).await
    }

    async fn json(&self, args: &[&str]) -> Value {
        let (code, out, err) = self.weir(&[args, &["-o", "json"]].concat()).await;
        serde_json::from_str(&out).unwrap_or_else(|e| panic!("{args:?} ended with {code}, {e}: {out}{err}"))
    }

    /// The version of a resource that a gateway holds.
    async fn version(&self, gateway: &str, name: &str) -> Option<String> {
        let config = self.json(&["gateway", "config", gateway]).await;
        let versions = config["resource_versions"].as_array().expect("a list");
        let applied = versions.iter().find(|applied| applied["name"] == name);
        applied.map(|applied| applied["version"].as_str().expect("a text").to_owned())
    }

    async fn revision(&self) -> u64 {
        self.json(&["whoami"]).await["revision"].as_u64().expect("a number")
    }
}

/// The text without its time.
fn timeless(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    for at in 1..words.len() {
        if words[at].trim_end().trim_end_matches(';') == "ms" || words[at].starts_with("ms\n") {
            words[at - 1].parse::<u64>().expect("a number of milliseconds");
            words[at - 1] = "N";
        }
    }
    words.join(" ")
}

const POOL: &str = "kind: pool\nname: chat\nspec: {}\n---\n\
                    kind: model\nname: gpt-4.1\nspec: { pool: chat }\n---\n\
                    kind: tenant\nname: acme\nspec: { display_name: Acme }\n---\n";

fn backend(name: &str, pool: &str, credential: &str) -> String {
    format!(
        "kind: backend\nname: {name}\nspec: {{ pool: {pool}, url: \"http://127.0.0.1:1\", models: {{ gpt-4.1: \"\" }}{credential} }}\n---\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_apply_says_on_how_many_gateways_it_is_what_stopped_it_and_who_refuses_what() {
    let stand = Stand::start().await;
    let good = [POOL.into(), backend("b0", "chat", ""), backend("b1", "chat", "")].concat();
    let (code, out, err) = stand.apply(&stand.file("good", &good)).await;
    let made = "created pool chat\ncreated backend b0\ncreated backend b1\ncreated model gpt-4.1\n\
                created tenant acme\n5 created, 0 updated, 0 deleted, 0 unchanged\n";
    let revision = stand.revision().await;
    let applied = format!("applied on 3 of 3 gateways at revision {revision} in N ms\n");
    assert_eq!((code, out.as_str(), timeless(&err)), (0, made, applied));

    // A change that the control plane refuses stops the whole apply: the change beside it is not made.
    let wrong = [good.replace("Acme", "Other"), backend("lost", "nowhere", "")].concat();
    let file = stand.file("wrong", &wrong);
    let stopped = format!(
        "weir: the control plane refused this and changed nothing:\n  \
         {}: backend lost: spec.pool: there is no pool nowhere\n",
        file.display()
    );
    assert_eq!(stand.apply(&file).await, (64, String::new(), stopped));
    assert_eq!(stand.revision().await, revision);
    assert_eq!(stand.json(&["get", "tenant", "acme"]).await[0]["spec"]["display_name"], "Acme");

    // Of ten thousand faults the first are named and the others counted.
    let faults: String = (0..10_000).map(|i| backend(&format!("lost-{i}"), "nowhere", "")).collect();
    let file = stand.file("faults", &faults);
    // A debug build on a busy machine takes longer than people wait.
    let args = ["--timeout", "2m", "apply", "-f", file.to_str().expect("UTF-8")];
    let (code, out, err) = stand.weir(&args).await;
    assert_eq!((code, out.as_str(), err.lines().count()), (64, "", 52), "{err}");
    assert!(err.contains("backend lost-49: spec.pool: there is no pool nowhere\n"), "{err}");
    assert!(err.ends_with("\n  and 9950 more\n"), "{err}");

    // A change that one gateway refuses is shown for that gateway, and the rest is applied there too.
    let picky = backend("picky", "chat", &format!(", credential: \"env:{CREDENTIAL}\""));
    let partly = [good.replace("Acme", "New"), picky].concat();
    let (code, out, err) = stand.apply(&stand.file("partly", &partly)).await;
    assert_eq!(
        (code, out.as_str()),
        (1, "created backend picky\nupdated tenant acme\n1 created, 1 updated, 0 deleted, 4 unchanged\n")
    );
    let reason = format!("credential: environment variable {CREDENTIAL} is not set");
    assert_eq!(
        timeless(&err),
        format!(
            "applied on 2 of 3 gateways at revision {} in N ms\ngateway-2 refuses backend picky: {reason}\n\
             weir: the change is stored, but gateways refuse a part of it; the rest is in force\n",
            revision + 1
        )
    );
    let differs = format!("+ backend picky\n    refused: {reason}\n");
    assert_eq!(stand.weir(&["gateway", "diff", "gateway-2"]).await, (1, differs, String::new()));
    assert_eq!(stand.version("gateway-2", "acme").await, stand.version("gateway-0", "acme").await);
    assert!(stand.version("gateway-0", "picky").await.is_some());
    assert_eq!(stand.version("gateway-2", "picky").await, None);

    // A removal meanwhile reaches that gateway too, and the refusal stays shown until it is corrected.
    let (code, _, err) = stand.weir(&["delete", "tenant", "first"]).await;
    assert!(code == 1 && err.contains(&format!("gateway-2 refuses backend picky: {reason}\n")), "{err}");
    assert_eq!(stand.version("gateway-2", "first").await, None);
    let (code, _, err) = stand.weir(&["delete", "backend", "picky"]).await;
    let applied = format!("applied on 3 of 3 gateways at revision {} in N ms\n", stand.revision().await);
    assert_eq!((code, timeless(&err)), (0, applied));
}
