use super::*;
use crate::v1::resource::Spec;

fn error(text: &str) -> String {
    parse(text, "weir.yaml").expect_err("is wrong").to_string()
}

fn duration(seconds: i64, nanos: i32) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos })
}

fn rates() -> Option<v1::Rates> {
    Some(v1::Rates {
        requests_per_minute: Some(500),
        tokens_per_minute: Some(150_000),
        input_tokens_per_minute: Some(0),
        output_tokens_per_minute: Some(900_000_000),
        concurrency: Some(50),
        burst_multiplier: Some(2.5),
        max_wait: duration(10, 500_000_000),
        without_store: v1::WithoutStore::Closed.into(),
        shadow: true,
        budget: Some(v1::Budget { micro_dollars: 5_000_000, period: v1::BudgetPeriod::Week.into() }),
        prefetch_percent: Some(10),
    })
}

fn timeouts() -> Option<v1::Timeouts> {
    Some(v1::Timeouts {
        connect: duration(0, 250_000_000),
        first_byte: duration(5400, 0),
        idle: duration(0, 1_500),
        total: duration(86_400, 0),
        keep_alive: duration(15, 0),
    })
}

/// One of each kind with every field set, and one of each with as little as the judge takes.
fn every_kind() -> Vec<v1::Resource> {
    let names = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    let full = [
        Spec::Pool(v1::PoolSpec {
            balancing_policy: v1::BalancingPolicy::RoundRobin.into(),
            regions: names(&["sgp", "no", "1e3", "# x: y"]),
            timeouts: timeouts(),
            ejection: Some(v1::Ejection {
                consecutive_failures: 4,
                base_duration: duration(6, 0),
                max_duration: duration(600, 0),
                max_ejected_percent: 60,
                failure_percent: 70,
                failure_min_requests: 20,
            }),
            retry_budget: Some(v1::RetryBudget { percent: 20, min_per_second: 5, max_attempts: 2 }),
            health: Some(v1::HealthProfile {
                liveness_interval: duration(3, 0),
                timeout: duration(1, 0),
                unhealthy_threshold: 5,
                healthy_threshold: 4,
                readiness_interval: duration(20, 0),
                deep_interval: duration(600, 0),
                slow_start: duration(90, 0),
                loading_timeout: duration(900, 0),
                panic_percent: Some(0),
                paid_probes_per_hour: Some(12),
            }),
            affinity: Some(v1::Affinity { prefix_bytes: 64, load_percent: 150 }),
            hedging: Some(v1::Hedging { disabled: true, floor: duration(0, 100_000_000), unary: true }),
            queue: Some(v1::Queue { max_waiting: 7, max_wait: duration(3, 0) }),
        }),
        Spec::Backend(v1::BackendSpec {
            pool: "123".into(),
            url: "https://h:8443/prefix".into(),
            region: "null".into(),
            weight: Some(0),
            max_concurrency: Some(7),
            models: [("gpt-4.1", ""), ("4.10", "0x1F"), ("true", "a: b 'c' \"d\"")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
            credential: "env:PROVIDER_KEY".into(),
            admin_state: v1::AdminState::Draining.into(),
            connection: Some(v1::ConnectionSettings {
                max_idle: 8,
                idle_timeout: duration(30, 0),
                health_path: "/ready".into(),
            }),
            priority: 2,
            account: "openai".into(),
            api_base_path: "/v1beta/openai".into(),
            dialect: v1::Dialect::LlamaCpp.into(),
        }),
        Spec::Model(v1::ModelSpec {
            pool: "p".into(),
            client_name: "openai/gpt-4.1 ü".into(),
            fallbacks: names(&["a", "b"]),
            input_price_micro_dollars: 2_000_000,
            output_price_micro_dollars: 1 << 40,
            cached_input_price_micro_dollars: Some(0),
            cache_write_price_micro_dollars: Some(2_500_000),
            timeouts: timeouts(),
            health_timeout: duration(7, 0),
            limits: rates(),
        }),
        Spec::Tenant(v1::TenantSpec {
            display_name: "~".into(),
            allowed_models: names(&["gpt-4.1"]),
            limits: rates(),
            priority: v1::Priority::High.into(),
        }),
        Spec::ApiKey(v1::ApiKeySpec {
            tenant: "t".into(),
            digests: vec![
                v1::KeyDigest {
                    sha256: vec![0x12; 32],
                    prefix: "wk-1".into(),
                    expire_time: Some(prost_types::Timestamp { seconds: 1_800_000_000, nanos: 5_000_000 }),
                },
                v1::KeyDigest { sha256: vec![0xab; 32], prefix: String::new(), expire_time: None },
            ],
            revoked: true,
            allowed_models: names(&["m"]),
            limits: rates(),
        }),
        Spec::Limit(v1::LimitSpec {
            selector: Some(v1::LimitSelector { tenant: "t".into(), model: "m".into(), ..Default::default() }),
            rates: rates(),
        }),
    ];
    let small = [
        Spec::Pool(v1::PoolSpec { timeouts: Some(v1::Timeouts::default()), ..Default::default() }),
        Spec::Backend(v1::BackendSpec {
            pool: "p".into(),
            url: "http://h".into(),
            models: [("m".to_owned(), String::new())].into(),
            ..Default::default()
        }),
        Spec::Model(v1::ModelSpec { pool: "p".into(), ..Default::default() }),
        Spec::Tenant(v1::TenantSpec::default()),
        Spec::ApiKey(v1::ApiKeySpec { tenant: "t".into(), ..Default::default() }),
        Spec::Limit(v1::LimitSpec {
            selector: Some(v1::LimitSelector { account: "a".into(), ..Default::default() }),
            rates: Some(v1::Rates::default()),
        }),
    ];
    full.into_iter()
        .zip(["1", "true", "4.1", "null", "0x1f", "1e5"])
        .chain(small.into_iter().zip(["a"; 6]))
        .map(|(spec, name)| v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() })
        .collect()
}

#[test]
fn what_is_written_reads_back_the_same() {
    let resources = every_kind();
    for text in [to_yaml(&resources), to_json(&resources), to_yaml_with_status(&resources)] {
        assert_eq!(parse(&text, "t").map_err(|e| panic!("{e}\n{text}")), Ok(resources.clone()));
    }
}

#[test]
fn yaml_is_short_and_the_status_is_printed_only_on_request() {
    let mut resource =
        parse("kind: tenant\nname: a\nspec: {limits: {max_wait: 90s}}\n", "t").expect("valid").remove(0);
    resource.etag = "e1".into();
    resource.revision = 7;
    resource.update_time = Some(prost_types::Timestamp { seconds: 0, nanos: 0 });
    let plain = "kind: tenant\nname: a\nspec:\n  limits:\n    max_wait: 1m30s\n";
    assert_eq!(to_yaml(std::slice::from_ref(&resource)), plain);
    let status = "status:\n  etag: e1\n  revision: 7\n  update_time: \"1970-01-01T00:00:00Z\"\n";
    assert_eq!(to_yaml_with_status(&[resource]), format!("{plain}{status}"));
}

#[test]
fn mistakes_name_file_line_and_key() {
    let pool = |rest: &str| format!("kind: pool\nname: p\nspec:\n{rest}");
    let backend = |rest: &str| {
        format!(
            "# comment\nkind: backend\nname: b\nspec:\n  pool: p\n  url: http://h\n  models: {{m: }}\n{rest}"
        )
    };
    for (text, expected) in [
        (backend("  weight: heavy\n"), "weir.yaml:8: spec.weight: must be a whole number, zero or above"),
        (backend("  wieght: 3\n"), "weir.yaml:8: spec.wieght: is not a known key; there are pool, "),
        (backend("  weight: 10001\n"), "weir.yaml:8: spec.weight: must be 0 to 10000, is 10001"),
        (
            pool("  timeouts:\n    total: 5\n"),
            "weir.yaml:5: spec.timeouts.total: must be whole numbers, each",
        ),
        (pool("  timeouts:\n    total: 0s\n"), "weir.yaml:5: spec.timeouts.total: must be above 0s"),
        (
            pool("  balancing_policy: RANDOM"),
            "weir.yaml:4: spec.balancing_policy: must be one of weighted_round",
        ),
        (pool("  regions: [a, {b: c}]\n"), "weir.yaml:4: spec.regions[1]: "),
        (
            pool("  regions: [a, \"b\\n\"]\n"),
            "weir.yaml:4: spec.regions[1]: must not hold control characters",
        ),
        (
            pool("  regions: []\nfoo: 1\n"),
            "weir.yaml:5: foo: is not a known key; there are kind, name, spec, status",
        ),
        (pool("  regions: [\n"), "weir.yaml:"),
        ("spec:\n  a: b\nkind: pool\nname: p\n".into(), "weir.yaml:2: kind must come before spec"),
        ("kind: pool\nname: p\n".into(), "weir.yaml:2: spec is missing"),
        ("kind: pods\nname: p\nspec: {}\n".into(), "weir.yaml:1: kind: must be one of pool, "),
        ("kind: pool\nname: p\nname: q\nspec: {}\n".into(), "weir.yaml:3: name is there twice"),
        ("hello\n".into(), "weir.yaml: invalid type: string \"hello\", expected a document with kind"),
        (
            "[{kind: pool, name: p, spec: {}},\n {kind: limit, name: l,\n  spec: {rates: {max_wait: 4x}}}]"
                .into(),
            "weir.yaml:3: spec.rates.max_wait: must be whole numbers",
        ),
        (
            "kind: api_key\nname: k\nspec:\n  tenant: t\n  digests:\n  - prefix: a\n  - sha256: \"12\"\n"
                .into(),
            "weir.yaml:7: spec.digests[1].sha256: must be 64 hexadecimal digits",
        ),
    ] {
        let found = error(&text);
        assert!(found.starts_with(expected), "{text}\nsays {found}\nnot  {expected}");
        assert!(!found.contains(" at line "), "{found}");
    }
}

#[test]
fn every_violation_and_every_duplicate_is_reported() {
    let text = "kind: pool\nname: p\nspec: {}\n---\nkind: backend\nname: B\nspec:\n  url: ftp://h\n---\n---\nkind: pool\nname: p\nspec: {}\n";
    let problems = parse(text, "w").expect_err("is wrong").0;
    let found: Vec<_> = problems.iter().map(|p| (p.line, p.path.as_str())).collect();
    assert_eq!(
        found,
        [
            (Some(6), "name"),
            (Some(7), "spec.pool"),
            (Some(8), "spec.url"),
            (Some(7), "spec.models"),
            (Some(11), "name"),
        ]
    );
    assert_eq!(problems[4].message, "pool p is there already, at line 1");
}

#[test]
fn the_example_with_two_backends_is_valid_and_the_readme_shows_it() {
    let example = include_str!("../../../deploy/examples/two-backends.yaml");
    let resources = parse(example, "two-backends.yaml").unwrap_or_else(|error| panic!("{error}"));
    let kinds: Vec<_> = resources.iter().map(|resource| kind_name(kind_of(resource))).collect();
    assert_eq!(kinds, ["pool", "backend", "backend", "model", "tenant", "limit"]);
    let block = format!("```yaml\n{example}```\n");
    assert!(
        include_str!("../../../README.md").contains(&block),
        "README.md must contain deploy/examples/two-backends.yaml as it is"
    );
}

#[test]
fn a_secret_in_a_file_is_not_repeated() {
    let text = "kind: backend\nname: b\nspec:\n  pool: p\n  url: http://h\n  models: {m: }\n  credential: sk-canary\n";
    let found = error(text);
    assert!(found.starts_with("weir.yaml:7: spec.credential: "), "{found}");
    assert!(!found.contains("canary"));
}

#[test]
fn input_is_bounded() {
    let document = "kind: tenant\nname: t1\nspec: {}\n---\n";
    let many = |n: usize| (0..n).map(|i| document.replace("t1", &format!("t{i}"))).collect::<String>();
    assert_eq!(parse(&many(MAX_DOCUMENTS), "t").map(|r| r.len()), Ok(MAX_DOCUMENTS));
    assert!(error(&many(MAX_DOCUMENTS + 1)).contains("more than 10000 documents"));
    assert_eq!(error(&" ".repeat(MAX_BYTES + 1)), "weir.yaml: is larger than 8 MiB");
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
                d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
    assert!(
        parse(&format!("kind: pool\nname: p\nstatus:\n{}spec: {{}}\n", bomb.replace('\n', "\n ")), "t")
            .is_err()
    );
}

#[test]
fn durations_read_and_write() {
    use std::time::Duration;
    for (text, duration) in [
        ("0s", Duration::ZERO),
        ("250ms", Duration::from_millis(250)),
        ("1h30m", Duration::from_secs(5400)),
        ("24h", Duration::from_secs(86_400)),
        ("1s500ms", Duration::from_millis(1500)),
        ("3us7ns", Duration::from_nanos(3007)),
    ] {
        assert_eq!(parse_duration(text), Ok(duration), "{text}");
        assert_eq!(format_duration(duration), text);
    }
    assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(30 * 86_400)));
    assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
    for (text, error) in [
        ("", DurationError::Empty),
        ("5", DurationError::Unit),
        ("s", DurationError::Unit),
        ("5 s", DurationError::Unit),
        ("1.5s", DurationError::Unit),
        ("-5s", DurationError::Unit),
        ("5S", DurationError::Unit),
        ("5s1h", DurationError::Order),
        ("5s5s", DurationError::Order),
        ("99999999999999999999s", DurationError::TooLong),
        ("18446744073709551615d", DurationError::TooLong),
    ] {
        assert_eq!(parse_duration(text), Err(error), "{text}");
    }
}
