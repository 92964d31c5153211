use super::*;

fn backend() -> v1::BackendSpec {
    v1::BackendSpec {
        pool: "chat".into(),
        url: "http://127.0.0.1:8000/".into(),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        ..Default::default()
    }
}

fn resource(name: &str, spec: v1::resource::Spec) -> v1::Resource {
    v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() }
}

fn paths(wire: &v1::Resource) -> Vec<String> {
    Resource::try_from(wire).expect_err("is invalid").0.into_iter().map(|v| v.path).collect()
}

#[test]
fn names_are_dns_labels_with_dots() {
    for good in ["a", "gpt-4.1", "0", "a.b-c"] {
        assert!(Name::parse(good).is_ok(), "{good}");
    }
    for bad in ["", "A", "a b", "-a", "a.", "a/b", "{a}", "a\n", &"a".repeat(64)] {
        assert!(Name::parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn an_empty_backend_takes_the_documented_defaults() {
    let r = Resource::try_from(&resource("b", v1::resource::Spec::Backend(backend()))).expect("valid");
    let Spec::Backend(b) = r.spec else { panic!("a backend") };
    assert_eq!((b.weight, b.max_concurrency, b.health_path.as_str()), (100, 50, "/health"));
    assert_eq!(b.url.host(), Some("127.0.0.1"));
    assert_eq!(b.admin_state, AdminState::Active);
}

#[test]
fn every_violation_is_reported_with_its_path() {
    let wire = resource(
        "Bad Name",
        v1::resource::Spec::Backend(v1::BackendSpec {
            pool: "p".into(),
            url: "http://u:secret@host".into(),
            weight: Some(10_001),
            credential: "sk-something".into(),
            ..backend()
        }),
    );
    let found = Resource::try_from(&wire).expect_err("is invalid");
    assert_eq!(found.0[0].path, "name");
    assert_eq!(found.0[1].path, "backend.url");
    assert!(!found.to_string().contains("secret@"), "never repeats a secret");
}

#[test]
fn a_secret_in_the_credential_field_is_refused_and_not_repeated() {
    let wire = resource(
        "b",
        v1::resource::Spec::Backend(v1::BackendSpec { credential: "sk-canary".into(), ..backend() }),
    );
    let found = Resource::try_from(&wire).expect_err("is invalid");
    assert_eq!(found.0[0].path, "backend.credential");
    assert!(!found.to_string().contains("canary"));
}

#[test]
fn urls_other_than_http_are_refused() {
    for url in [
        "",
        "host:80",
        "file:///etc/passwd",
        "ftp://h",
        "http://h?x=1",
        "http://h#f",
        "http://h/v1#f",
        "http://",
    ] {
        let wire =
            resource("b", v1::resource::Spec::Backend(v1::BackendSpec { url: url.into(), ..backend() }));
        assert_eq!(paths(&wire), ["backend.url"], "{url}");
    }
}

#[test]
fn a_model_is_called_by_its_resource_name_unless_it_says_otherwise() {
    let spec = v1::ModelSpec { pool: "chat".into(), ..Default::default() };
    let r = Resource::try_from(&resource("gpt-4.1", v1::resource::Spec::Model(spec))).expect("valid");
    let Spec::Model(m) = &r.spec else { panic!("a model") };
    assert_eq!(m.client_name, "gpt-4.1");
    assert_eq!(r.references()[0].path, "model.pool");
}

#[test]
fn rates_out_of_a_doubles_range_are_refused() {
    let rates = v1::Rates { tokens_per_minute: Some(2_000_000_000), ..Default::default() };
    let spec = v1::LimitSpec { selector: None, rates: Some(rates) };
    assert_eq!(paths(&resource("all", v1::resource::Spec::Limit(spec))), ["limit.rates.tokens_per_minute"]);
}

#[test]
fn an_accounts_limit_goes_alone_or_with_a_model() {
    let selector = |tenant: &str, model: &str, api_key: &str| v1::LimitSelector {
        tenant: tenant.into(),
        model: model.into(),
        api_key: api_key.into(),
        account: "openai".into(),
        ..Default::default()
    };
    let limit = |selector, rates| {
        let spec = v1::LimitSpec { selector: Some(selector), rates: Some(rates) };
        resource("l", v1::resource::Spec::Limit(spec))
    };
    let rates = v1::Rates { requests_per_minute: Some(1), ..Default::default() };
    for (tenant, model) in [("", ""), ("", "m")] {
        Resource::try_from(&limit(selector(tenant, model, ""), rates)).expect("valid");
    }
    let whose = [selector("t", "", ""), selector("", "m", "k"), selector("t", "m", "k")];
    let fields = ["limit.selector.tenant", "limit.selector.api_key", "limit.selector.tenant"];
    for (selector, field) in whose.into_iter().zip(fields) {
        let wrong = limit(selector, rates);
        assert_eq!(paths(&wrong), [field]);
        let found = Resource::try_from(&wrong).expect_err("is invalid").to_string();
        assert!(found.contains("whoever asks"), "{found}");
    }
    let budget = v1::Budget { micro_dollars: 1, period: 0 };
    let spent = limit(selector("", "", ""), v1::Rates { budget: Some(budget), ..rates });
    assert_eq!(paths(&spent), ["limit.rates.budget"]);
    let odd = v1::BackendSpec { account: "Open AI".into(), ..backend() };
    assert_eq!(paths(&resource("b", v1::resource::Spec::Backend(odd))), ["backend.account"]);
}

#[test]
fn a_limit_selects_what_gateways_count() {
    let limit = |tenant: &str, model: &str, api_key: &str, limit: &str| {
        let selector = v1::LimitSelector {
            tenant: tenant.into(),
            model: model.into(),
            api_key: api_key.into(),
            limit: limit.into(),
            ..Default::default()
        };
        let rates = v1::Rates { requests_per_minute: Some(1), ..Default::default() };
        let spec = v1::LimitSpec { selector: Some(selector), rates: Some(rates) };
        resource("l", v1::resource::Spec::Limit(spec))
    };
    for (tenant, model, api_key) in
        [("", "", ""), ("t", "", ""), ("", "m", ""), ("", "", "k"), ("t", "m", "")]
    {
        Resource::try_from(&limit(tenant, model, api_key, "")).expect("valid");
    }
    for (tenant, model) in [("t", ""), ("", "m"), ("t", "m")] {
        assert_eq!(paths(&limit(tenant, model, "k", "")), ["limit.selector.api_key"]);
    }
    assert_eq!(paths(&limit("", "", "", "l")), ["limit.selector.limit"]);
}

#[test]
fn zero_and_negative_durations_are_refused() {
    for d in [prost_types::Duration::default(), prost_types::Duration { seconds: -1, nanos: 0 }] {
        let spec = v1::PoolSpec {
            timeouts: Some(v1::Timeouts { total: Some(d), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(paths(&resource("p", v1::resource::Spec::Pool(spec))), ["pool.timeouts.total"]);
    }
}

#[test]
fn clocks_that_are_not_set_leave_room_for_generation_and_a_models_own_come_first() {
    let spec_of = |timeouts: Option<v1::Timeouts>| {
        let spec = v1::PoolSpec { timeouts, ..Default::default() };
        match Resource::try_from(&resource("p", v1::resource::Spec::Pool(spec))).expect("valid").spec {
            Spec::Pool(pool) => pool,
            other => panic!("{other:?}"),
        }
    };
    let minutes = |n: u64| std::time::Duration::from_secs(60 * n);
    let clocks = spec_of(None).timeouts;
    assert_eq!((clocks.first_byte, clocks.idle, clocks.total), (minutes(5), minutes(5), minutes(60)));
    assert_eq!((clocks.connect.as_secs(), clocks.keep_alive), (10, None));
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    let wire = v1::Timeouts { keep_alive: seconds(15), total: seconds(90), ..Default::default() };
    let clocks = spec_of(Some(wire)).timeouts;
    assert_eq!((clocks.keep_alive.map(|time| time.as_secs()), clocks.total.as_secs()), (Some(15), 90));
    let own = TimeoutOverrides { keep_alive: Some(minutes(1)), ..Default::default() };
    assert_eq!((own.over(&clocks).keep_alive, own.over(&clocks).total.as_secs()), (Some(minutes(1)), 90));
}

#[test]
fn comments_in_quick_succession_are_refused() {
    let keep_alive = Some(prost_types::Duration { seconds: 0, nanos: 999_000_000 });
    let timeouts = Some(v1::Timeouts { keep_alive, ..Default::default() });
    let spec = v1::PoolSpec { timeouts, ..Default::default() };
    let wrong = resource("p", v1::resource::Spec::Pool(spec));
    assert_eq!(paths(&wrong), ["pool.timeouts.keep_alive"]);
    let found = Resource::try_from(&wrong).expect_err("is invalid").to_string();
    assert!(found.contains("must be at least 1s"), "{found}");
}
