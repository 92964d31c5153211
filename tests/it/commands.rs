//! The commands of `weir` for one operator's day, each as a process against a running stack: output, its form, and
//! exit code.

use std::path::PathBuf;

use serde_json::Value;
use weir_tests::process::{Up, command, up};

/// `weir up`, and a directory for files and contexts.
struct Desk {
    up: Up,
    data: tempfile::TempDir,
}

impl Desk {
    async fn start() -> Self {
        Self { up: up(&["--gateways", "2"]).await, data: tempfile::tempdir().expect("a directory") }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.data.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn contexts(&self) -> PathBuf {
        self.data.path().join("contexts.json")
    }

    /// Runs a command with only these variables. Returns exit code, output and errors.
    async fn run(&self, args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
        let mut command = command("weir");
        command.args(args).envs(env.iter().copied()).env("WEIR_CONFIG", self.contexts());
        let done = command.output().await.expect("runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
    }

    /// Runs a command as the administrator. Returns its output, before its errors.
    async fn weir(&self, args: &[&str], wanted: i32) -> String {
        self.weir_with(args, &[], wanted).await
    }

    async fn weir_with(&self, args: &[&str], env: &[(&str, &str)], wanted: i32) -> String {
        let own = [("WEIR_SERVER", self.up.text("admin")), ("WEIR_TOKEN", self.up.text("admin_token"))];
        let (code, out, err) = self.run(args, &[&own[..], env].concat()).await;
        assert_eq!(code, wanted, "{args:?}: {out}{err}");
        out + &err
    }
}

#[tokio::test]
async fn resources_are_shown_in_every_form_and_changed_in_an_editor() {
    let desk = Desk::start().await;
    let table = desk.weir(&["list", "backends"], 0).await;
    assert!(table.starts_with("NAME") && table.contains("sgp"), "{table}");
    let wide = desk.weir(&["list", "backends", "-o", "wide"], 0).await;
    assert!(wide.lines().next().is_some_and(|head| head.contains("ETAG")), "{wide}");
    let yaml = desk.weir(&["get", "backend", "sgp", "-o", "yaml"], 0).await;
    assert!(yaml.starts_with("kind: backend\nname: sgp\nspec:\n"), "{yaml}");
    let json: Value =
        serde_json::from_str(&desk.weir(&["get", "backend", "sgp", "-o", "json"], 0).await).expect("JSON");
    assert_eq!(json[0]["name"], "sgp");
    let all = desk.weir(&["describe", "backend", "sgp"], 0).await;
    assert!(all.contains("revision:") && all.contains("HEALTH"), "in full, and what the cluster says: {all}");

    // The output can be applied again without a change.
    let file = desk.file("sgp.yaml", &yaml);
    assert_eq!(
        desk.weir(&["diff", "-f", &file, "--take-over"], 1).await,
        "~ backend sgp\n    apply_set: \"bootstrap\" -> \"default\"\n"
    );
    desk.weir(&["apply", "-f", &file], 0).await;
    assert_eq!(desk.weir(&["diff", "-f", &file], 0).await, "no differences\n");
    let edit = [("EDITOR", "sed -i 's/weight: .*/weight: 33/'")];
    let said = desk.weir_with(&["edit", "backend", "sgp"], &edit, 0).await;
    assert!(said.contains("updated backend sgp\napplied on 2 of 2 gateways at revision"), "{said}");
    assert_eq!(
        desk.weir_with(&["edit", "backend", "sgp"], &[("EDITOR", "true")], 0).await,
        "nothing was changed\n"
    );
    let other = [("EDITOR", "sed -i s/sgp/fra/")];
    assert!(desk.weir_with(&["edit", "backend", "sgp"], &other, 2).await.contains("and nothing else"));
    let shown = desk.weir(&["diff", "-f", &file], 1).await;
    assert!(shown.contains("~ backend sgp\n    weight: 33 -> "), "{shown}");

    // An error is never taken for a difference.
    let odd = desk.file(
        "odd.yaml",
        "kind: backend\nname: odd\nspec: { pool: nowhere, url: \"http://h\", models: { gpt-4.1: \"\" } }\n",
    );
    assert!(desk.weir(&["diff", "-f", &odd], 64).await.contains("backend odd: spec.pool"));
    let viewer = desk.weir(&["token", "create", "looker", "--role", "viewer"], 0).await;
    let viewer = viewer.lines().next().expect("the token").to_owned();
    let refused = desk.weir_with(&["diff", "-f", &file], &[("WEIR_TOKEN", &viewer)], 2).await;
    assert!(refused.contains("viewer"), "{refused}");
    desk.weir(&["delete", "backend", "sgp"], 0).await;
    assert!(desk.weir(&["get", "backend", "sgp"], 1).await.contains("not found"));
}

#[tokio::test]
async fn backends_are_probed_disabled_and_enabled_and_events_and_history_tell() {
    let desk = Desk::start().await;
    let probed = desk.weir(&["probe", "fra"], 0).await;
    assert!(probed.contains("pass") && probed.contains("backend fra is "), "{probed}");
    assert!(desk.weir(&["disable", "fra"], 0).await.contains("applied on 2 of 2 gateways"));
    assert!(desk.weir(&["probe", "fra"], 1).await.contains("disabled"));
    let backends: Value =
        serde_json::from_str(&desk.weir(&["backends", "-o", "json"], 0).await).expect("JSON");
    let fra = backends.as_array().expect("a list").iter().find(|b| b["backend"] == "fra").expect("listed");
    assert_eq!(fra["effective_weight"], 0.0, "{fra}");
    desk.weir(&["enable", "fra"], 0).await;
    let history = desk.weir(&["history", "backend", "fra"], 0).await;
    assert!(history.contains("admin_state") && history.contains("\"disabled\""), "as YAML has it: {history}");
    assert!(!history.contains("ADMIN_STATE"), "{history}");
    desk.weir(&["events"], 0).await;
    desk.weir(&["events", "fra"], 0).await;
    let unknown = desk.weir(&["events", "nope"], 1).await;
    assert!(unknown.contains("no backend, pool or gateway is called nope"), "{unknown}");
    let audit = desk.weir(&["audit"], 0).await;
    assert!(audit.contains("UpdateResource") || audit.contains("admin"), "{audit}");
}

#[tokio::test]
async fn contexts_completions_and_an_import_work_without_asking_anybody() {
    let desk = Desk::start().await;
    for (shell, part) in
        [("bash", "complete -F _weir"), ("zsh", "#compdef weir"), ("fish", "complete -c weir")]
    {
        let (code, script, _) = desk.run(&["completion", shell], &[]).await;
        assert!(code == 0 && script.contains(part), "{shell}");
    }
    let token = desk.file("token", desk.up.text("admin_token"));
    let server = desk.up.text("admin");
    let (code, _, err) =
        desk.run(&["context", "set", "here", "--server", server, "--token-file", &token], &[]).await;
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = desk
        .run(&["context", "set", "there", "--server", server, "--token-file", "/nowhere/token"], &[])
        .await;
    assert!(code == 64 && err.contains("/nowhere/token"), "{code}: {err}");
    let (code, out, err) = desk.run(&["whoami"], &[]).await;
    assert!(code == 0 && out.contains("admin"), "with nothing but the context: {out}{err}");
    let kept = std::fs::read_to_string(desk.contexts()).expect("written");
    assert!(!kept.contains(desk.up.text("admin_token")), "a context names where the token is");

    let config = "model_list:\n  - model_name: gpt-4o\n    litellm_params:\n      model: openai/gpt-4o\n      \
                  api_key: os.environ/OPENAI_API_KEY\n      rpm: 60\n  - model_name: gpt-4o\n    litellm_params:\n      \
                  model: openai/gpt-4o\n      api_base: https://eu.example/v1\n      api_key: sk-literal-secret\n\
                  litellm_settings:\n  callbacks: [langfuse]\n";
    let file = desk.file("config.yaml", config);
    let (code, yaml, notes) = desk.run(&["import", "litellm", &file], &[]).await;
    assert_eq!(code, 0, "{notes}");
    assert!(notes.contains("callbacks"), "what could not be carried over is listed: {notes}");
    assert!(!yaml.contains("sk-literal-secret") && !notes.contains("sk-literal-secret"));
    let imported = desk.file("imported.yaml", &yaml);
    let dry = desk.weir(&["apply", "-f", &imported, "--set", "imported", "--dry-run"], 0).await;
    assert!(dry.contains("created model gpt-4o") && dry.contains("nothing was changed"), "{dry}");
}
