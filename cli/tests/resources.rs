//! The reference of resources, as `weir explain` prints it and as it stands in the documentation.
#![allow(missing_docs, reason = "a test")]

use clap::Parser;
use weir_proto::resource::{KINDS, kind_name};

/// The output and the errors of a command, and its exit code.
async fn weir(args: &[&str]) -> (u8, String, String) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let cli = weir::Cli::try_parse_from([&["weir"], args].concat()).expect("valid arguments");
    let code = weir::execute(cli, &mut out, &mut err).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (code, text(out), text(err))
}

async fn explained(args: &[&str]) -> String {
    let (code, out, err) = weir(&[&["explain"], args].concat()).await;
    assert_eq!(code, 0, "{args:?}: {err}");
    out
}

/// How the page is written again.
const REMEDY: &str = "cargo run -p weir -- explain --markdown > docs/resources.md";

#[tokio::test]
async fn the_page_of_resources_is_what_the_contract_says() {
    let page = include_str!("../../docs/resources.md");
    let generated = explained(&["--markdown"]).await;
    let different = generated.lines().zip(page.lines()).find(|(now, written)| now != written);
    assert!(
        generated == page,
        "docs/resources.md is not what it would be now; run: {REMEDY}\n{different:#?}"
    );
    assert!(page.contains(REMEDY), "the page says how it is written");
    let example = include_str!("../../deploy/examples/complete.yaml");
    assert!(page.contains(example.trim_end()), "the complete configuration is at its end");
}

#[tokio::test]
async fn without_argument_the_kinds_are_listed_as_yaml_takes_them() {
    let listed = explained(&[]).await;
    for kind in KINDS.map(kind_name) {
        let line = listed.lines().find(|line| line.trim_start().starts_with(&format!("{kind} ")));
        assert!(line.is_some_and(|line| line.ends_with('.')), "{kind}: {listed}");
        assert!(explained(&[kind]).await.contains(&format!("Example:\n  kind: {kind}\n")));
    }
    assert!(listed.contains("weir explain KIND.FIELD"), "{listed}");
}

#[tokio::test]
async fn a_field_of_words_lists_them_with_their_meaning() {
    for (field, word, meaning) in [
        ("pool.balancing_policy", "least_request", "The less loaded of two random backends"),
        ("backend.admin_state", "draining", "No new requests"),
        ("tenant.priority", "high", "Served before all others"),
        ("limit.rates.without_store", "closed", "Requests are refused with 503"),
        ("limit.rates.budget.period", "week", "From Monday"),
        ("descriptor_rule.limit.unit", "year", "365 days"),
    ] {
        let text = explained(&[field]).await;
        let after = text.split_once(&format!("\n  {word}\n      ")).map(|(_, after)| after);
        assert!(after.is_some_and(|after| after.starts_with(meaning)), "{field}: {text}");
        assert!(!text.contains("UNSPECIFIED") && !text.contains("unspecified"), "{text}");
    }
    assert!(explained(&["pool.timeouts.idle"]).await.contains("At most 24h. Default 5m."));
}

#[tokio::test]
async fn what_does_not_exist_is_told_with_what_does() {
    for (what, says) in [
        ("pools.colour", "'colour' is not a field of pool; there are balancing_policy, regions, "),
        ("backend.weight.unit", "backend.weight has no fields"),
        ("pod", "there are pool, backend, model, tenant, api_key, limit, descriptor_rule"),
    ] {
        let (code, _, err) = weir(&["explain", what]).await;
        assert!(code == 2 && err.contains(says), "{what}: {err}");
    }
}
