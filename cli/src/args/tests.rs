use clap::CommandFactory;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn defaults_are_those_documented() {
    let cli = parse("weir apply -f weir.yaml").expect("valid");
    assert_eq!(cli.timeout, Duration::from_secs(10));
    assert_eq!(cli.output, OutputFormat::Table);
    let Command::Apply(args) = cli.command else { panic!("apply") };
    assert_eq!((args.wait.wait, args.wait.no_wait), (Duration::from_secs(10), false));
    assert_eq!(args.files.set, "default");
    let Command::Key(KeyCommand::Rotate { grace, .. }) = parse("weir key rotate k").expect("valid").command
    else {
        panic!("rotate")
    };
    assert_eq!(grace, Duration::from_secs(86_400));
}

#[test]
fn kinds_have_singular_plural_and_short_forms() {
    use v1::ResourceKind as K;
    for (text, kind) in [
        ("backend", K::Backend),
        ("backends", K::Backend),
        ("be", K::Backend),
        ("api-keys", K::ApiKey),
        ("key", K::ApiKey),
        ("Pools", K::Pool),
        ("li", K::Limit),
    ] {
        assert_eq!(text.parse(), Ok(Kind(kind)), "{text}");
    }
    assert!("pod".parse::<Kind>().is_err());
}

#[test]
fn global_flags_may_follow_the_command() {
    let cli = parse("weir get be sgp-1 -o yaml --server h:7070,https://i:1 --timeout 250ms").expect("valid");
    assert_eq!(cli.server.all(), ["http://h:7070", "https://i:1"]);
    assert_eq!((cli.output, cli.timeout), (OutputFormat::Yaml, Duration::from_millis(250)));
}

#[test]
fn the_key_that_is_explained_is_no_certificates() {
    let cli = parse("weir limits explain --key k --model m --cert c.pem --cert-key c.key").expect("valid");
    assert_eq!(cli.key.as_deref(), Some(std::path::Path::new("c.key")));
    let Command::Limits(LimitsCommand::Explain { key, .. }) = cli.command else { panic!("explain") };
    assert_eq!(key.as_str(), "k");
}

#[test]
fn what_makes_no_sense_is_wrong_usage() {
    for line in [
        "weir",
        "weir get",
        "weir get pods",
        "weir apply",
        "weir apply -f x --wait 10",
        "weir apply -f x --wait 61s",
        "weir apply -f x --wait 5s --no-wait",
        "weir weight sgp-1 10001",
        "weir weight sgp-1 -1",
        "weir key create k",
        "weir gateways --server ftp://h",
        "weir gateways --server http://user:pass@h",
        "weir gateways --token abc",
        "weir gateways --server 127.0.0.1:99999",
        "weir gateways --server h:0",
        "weir health http://[::1]:70000",
        "weir gateways --timeout 0s",
    ] {
        let code = parse(line).expect_err(line).exit_code();
        assert_eq!(code, 2, "{line}");
    }
}

#[test]
fn a_port_that_does_not_exist_is_named() {
    let error = parse("weir whoami --server 127.0.0.1:99999").expect_err("no port").to_string();
    assert!(error.contains("127.0.0.1:99999") && error.contains("1 to 65535"), "{error}");
    for line in
        ["weir whoami --server [::1]", "weir whoami --server http://h", "weir health http://[::1]:9100/livez"]
    {
        parse(line).expect(line);
    }
}

#[test]
fn version_names_the_commit() {
    let text = parse("weir --version").expect_err("prints").to_string();
    assert!(text.starts_with(concat!("weir ", env!("CARGO_PKG_VERSION"), " (")), "{text}");
}
