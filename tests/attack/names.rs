//! Names: none of them is the Redis key of another one, and Redis is open to nobody else.

use std::collections::{BTreeMap, BTreeSet};

use tonic::Code;
use weir_proto::v1::{self, CreateResourceRequest, resource::Spec};
use weir_ratelimit::{Key, Scope, scope_keys};
use weir_tests::plane;

/// Names that somebody may choose to pass for another name, or for a part of a key.
const HOSTILE: [&str; 24] = [
    "../x",
    "a:b",
    "acme}:s",
    "{g}",
    "{t:acme}",
    "acme:s:k:own",
    "acme}:s:m:m{",
    "a\nb",
    "a\r\nFLUSHALL\r\n",
    "a\0b",
    "a b",
    "<img src=x>",
    "*",
    "?",
    "[a-z]*",
    "Acme",
    "\u{e4}cme",
    "acme\u{200b}",
    "\u{202e}emca",
    "-acme",
    "acme-",
    ".",
    "",
    "0123456789012345678901234567890123456789012345678901234567890123456789",
];

/// The key without its only hash tag, and the tag.
fn parts(key: &str) -> (String, &str) {
    let (before, rest) = key.split_once('{').expect("a tag");
    let (tag, after) = rest.split_once('}').expect("that ends");
    assert!(!after.contains(['{', '}']) && !tag.contains('{'), "one tag: {key:?}");
    (format!("{before}{after}"), tag)
}

#[test]
fn no_name_is_anothers_key_or_another_slot_of_a_cluster() {
    let mut keys = BTreeMap::new();
    let names = || HOSTILE.into_iter().chain(["acme", "own", "m", "g"]);
    let mut note = |of: String, key: &Key| {
        let text = key.as_str().to_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "{}:.-".contains(c);
        assert!(text.chars().all(plain), "{of} makes {text:?}");
        let (_, tag) = parts(&text);
        assert!(tag.len() < 80, "{of} makes {text:?}");
        if let Some(other) = keys.insert(text.clone(), of.clone()) {
            assert_eq!(other, of, "both have {text}");
        }
    };
    for one in names() {
        for (kind, scope) in
            [("model", Scope::Model(one)), ("tenant", Scope::Tenant(one)), ("account", Scope::Account(one))]
        {
            let (record, leases) = scope_keys(scope);
            note(format!("record of {kind} {one:?}"), &record);
            note(format!("leases of {kind} {one:?}"), &leases);
        }
        note(format!("slots of {one:?}"), &Key::backend_slots(one));
        for other in names() {
            let scope = Scope::ApiKey { tenant: one, key: other };
            note(format!("record of {scope:?}"), &scope_keys(scope).0);
            let scope = Scope::TenantModel { tenant: one, model: other };
            note(format!("record of {scope:?}"), &scope_keys(scope).0);
            note(format!("descriptor {one:?} {other:?}"), &Key::descriptor("rule", [one, other]));
        }
    }
    // A name that looks like the digest of another one is hashed too.
    let digest = Key::tenant("Acme").as_str().to_owned();
    let (_, tag) = parts(&digest);
    let forged = tag.strip_prefix("t:").expect("a tenant's").to_owned();
    assert_ne!(Key::tenant(&forged).as_str(), digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn resources_with_names_beyond_the_rule_are_refused() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let mut admin = plane.admin().await;
    for name in HOSTILE {
        let spec = Some(Spec::Tenant(v1::TenantSpec::default()));
        let resource = Some(v1::Resource { name: name.into(), spec, ..Default::default() });
        let request = CreateResourceRequest { resource, ..Default::default() };
        let refused = admin.create_resource(request).await.expect_err(name);
        assert_eq!(refused.code(), Code::InvalidArgument, "{name:?}: {refused}");
        let plain = refused.message().chars().all(|c| !c.is_control() && c != '\u{202e}');
        assert!(plain, "what was sent is escaped: {:?}", refused.message());
    }
}

/// The lines of a service in a file of compose.
fn service<'a>(compose: &'a str, name: &str) -> Vec<&'a str> {
    let own = |line: &&str| line.starts_with("    ") || line.is_empty() || line.trim_start().starts_with('#');
    let lines = compose.lines().skip_while(|line| *line != format!("  {name}:")).skip(1);
    lines.take_while(own).filter(|line| !line.trim_start().starts_with('#')).collect()
}

#[test]
fn redis_has_no_port_and_no_neighbour_that_is_not_meant_to_use_it() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).expect("a file of the project");
    let compose = read("docker-compose.yml");
    let redis = service(&compose, "redis");
    assert!(redis.contains(&"    networks: [state]"), "{redis:#?}");
    assert!(!redis.iter().any(|line| line.trim_start().starts_with("ports:")), "{redis:#?}");
    let network: Vec<&str> = compose.lines().skip_while(|line| *line != "  state:").take(2).collect();
    assert_eq!(network, ["  state:", "    internal: true"]);
    let neighbours: BTreeSet<&str> = compose
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   ") && line.ends_with(':'))
        .map(|line| line.trim().trim_end_matches(':'))
        .filter(|name| service(&compose, name).iter().any(|l| l.contains("networks:") && l.contains("state")))
        .collect();
    assert_eq!(neighbours, BTreeSet::from(["ratelimit", "redis"]), "who is on Redis's network by itself");
    // Gateways are on it through their common settings, and no other service is.
    let common: Vec<&str> =
        compose.lines().skip_while(|line| *line != "x-gateway: &gateway").skip(1).collect();
    let common = common.iter().take_while(|line| line.starts_with(' ')).collect::<Vec<_>>();
    assert!(common.contains(&&"    state:"), "{common:#?}");
    let gateways: Vec<&str> = compose
        .lines()
        .filter(|line| line.starts_with("  ") && !line.starts_with("   ") && line.ends_with(':'))
        .map(|line| line.trim().trim_end_matches(':'))
        .filter(|name| service(&compose, name).contains(&"    <<: *gateway"))
        .collect();
    // Each is also the name of a volume further down.
    assert_eq!(BTreeSet::from_iter(gateways), BTreeSet::from(["gateway-1", "gateway-2", "gateway-3"]));
    let kubernetes = read("deploy/kubernetes/weir.yaml");
    let policy = kubernetes.split("\n---").find(|part| {
        part.contains("kind: NetworkPolicy")
            && part.contains("podSelector: { matchLabels: { app: weir-redis } }")
    });
    assert!(policy.expect("a policy").contains("values: [weir-gateway, weir-ratelimit]"));
}
