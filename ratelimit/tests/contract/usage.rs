//! The account of who used what.

use uuid::Uuid;
use weir_ratelimit::usage::{OTHER_MODELS, USAGE_LIFE, USAGE_MODELS_MAX, USAGE_RECORDS_MAX};
use weir_ratelimit::*;

use crate::harness::*;

const DAY: &str = "2026-11-23";

fn tally(requests: i64, input_tokens: i64, output_tokens: i64, spend_micro_dollars: i64) -> Tally {
    Tally { requests, input_tokens, output_tokens, spend_micro_dollars }
}

fn used(tenant: &str, model: &str, tally: Tally) -> Option<Usage> {
    Some(Usage { record: Key::usage(tenant, DAY), model: model.into(), tally })
}

fn end(of: &Acquire, usage: Option<Usage>) -> Settle {
    Settle {
        id: of.id,
        actual: Cost::of_request(1, 0, 0),
        scopes: of.scopes.clone(),
        slot: of.candidates.first().map(|c| c.leases.clone()),
        usage,
    }
}

/// A note without a reservation.
fn note(usage: Option<Usage>) -> Settle {
    Settle { id: Uuid::now_v7(), actual: Cost::default(), scopes: [].into(), slot: None, usage }
}

async fn lines(world: &World, tenant: &str) -> UsageLines {
    let mut lines = world.limiter.usage(&[Key::usage(tenant, DAY)]).await.expect("usage").remove(0);
    lines.sort_by(|a, b| a.0.cmp(&b.0));
    lines
}

/// The reservation is in the model's slot, the account in the tenant's: also on a Cluster one settlement counts once.
pub(crate) async fn usage_is_counted_once_with_its_settlement(world: World) {
    for tenant_is_limited in [true, false] {
        let tenant = if tenant_is_limited { "acme" } else { "free" };
        let mut model = limited("m", Kind::Tokens, bucket(1000, 0, LEASE));
        (model.record, model.leases) = scope_keys(Scope::Model("m"));
        let of_tenant = tenant_is_limited.then(|| limited(tenant, Kind::Tokens, bucket(1000, 0, LEASE)));
        let scopes: Scopes = of_tenant.into_iter().chain([model]).collect();
        let call = Acquire { candidates: vec![candidate("b", 5)], ..tokens(scopes, 10) };
        assert!(granted(&world.acquire(&call).await));
        let settle = end(&call, used(tenant, "m", tally(1, 20, 30, 400)));
        for applied in [true, false, false] {
            assert_eq!(world.limiter.settle(&settle).await.expect("settle").applied, applied);
            assert_eq!(lines(&world, tenant).await, [("m".to_owned(), tally(1, 20, 30, 400))]);
        }
    }
}

pub(crate) async fn usage_without_limits_is_counted_once(world: World) {
    let call = Acquire { candidates: vec![candidate("b", 5)], ..call(Scopes::new()) };
    assert!(granted(&world.acquire(&call).await));
    let settle = end(&call, used("acme", "m", tally(1, 2, 3, 4)));
    for _ in 0..3 {
        world.limiter.settle(&settle).await.expect("settle");
        assert_eq!(lines(&world, "acme").await, [("m".to_owned(), tally(1, 2, 3, 4))]);
    }
}

/// What a stream notes in steps is made right at its end, also downwards.
pub(crate) async fn steps_and_their_correction_add_up(world: World) {
    for tally in [tally(1, 50, 256, 1000), tally(0, 0, 256, 1000), tally(0, -3, -12, -40)] {
        let step = note(used("acme", "m", tally));
        world.limiter.settle(&step).await.expect("settle");
        world.limiter.settle(&step).await.expect("settle");
    }
    assert_eq!(lines(&world, "acme").await, [("m".to_owned(), tally(1, 47, 500, 1960))]);
}

pub(crate) async fn tenants_models_and_days_have_lines_of_their_own(world: World) {
    for (tenant, model) in [("acme", "a"), ("acme", "b"), ("acme", "a"), ("zenith", "a")] {
        world.limiter.settle(&note(used(tenant, model, tally(1, 1, 1, 1)))).await.expect("settle");
    }
    let other_day = Usage {
        record: Key::usage("acme", "2026-11-24"),
        ..used("acme", "a", tally(7, 0, 0, 0)).expect("some")
    };
    world.limiter.settle(&note(Some(other_day))).await.expect("settle");
    let records = ["2026-11-22", DAY, "2026-11-24"].map(|day| Key::usage("acme", day));
    let mut read = world.limiter.usage(&records).await.expect("usage");
    read[1].sort_by(|a, b| a.0.cmp(&b.0));
    let line = |model: &str, n| (model.to_owned(), tally(n, n, n, n));
    assert_eq!(read, [vec![], vec![line("a", 2), line("b", 1)], vec![("a".to_owned(), tally(7, 0, 0, 0))]]);
    let mixed =
        world.limiter.usage(&[Key::usage("zenith", DAY), Key::usage("acme", DAY)]).await.expect("usage");
    assert_eq!((mixed[0].len(), mixed[1].len()), (1, 2));
    let many = vec![Key::usage("acme", DAY); USAGE_RECORDS_MAX + 1];
    assert!(matches!(world.limiter.usage(&many).await, Err(Error::Invalid(_))));
}

pub(crate) async fn too_many_models_are_added_up_together(world: World) {
    let notes = (0..USAGE_MODELS_MAX + 2).map(|n| note(used("acme", &format!("m{n}"), tally(1, 2, 3, 4))));
    for note in notes {
        world.limiter.settle(&note).await.expect("settle");
    }
    world.limiter.settle(&note(used("acme", "m0", tally(1, 2, 3, 4)))).await.expect("settle");
    let lines = lines(&world, "acme").await;
    assert_eq!(lines.len(), USAGE_MODELS_MAX + 1);
    let of = |model: &str| lines.iter().find(|(name, _)| name == model).expect("a line").1;
    assert_eq!((of("m0"), of(OTHER_MODELS)), (tally(2, 4, 6, 8), tally(2, 4, 6, 8)));
}

pub(crate) async fn a_day_is_forgotten_after_its_time(world: World) {
    world.limiter.settle(&note(used("acme", "m", tally(1, 1, 1, 1)))).await.expect("settle");
    if world.has_server() {
        let mut raw = world.server().raw().await;
        let record = Key::usage("acme", DAY);
        let left =
            ::redis::cmd("PTTL").arg(record.as_str()).query_async::<i64>(&mut raw).await.expect("a key");
        let whole = USAGE_LIFE.as_millis() as i64;
        assert!(left > whole - 60_000 && left <= whole, "{left}");
    } else if world.is_memory() {
        tokio::time::advance(USAGE_LIFE).await;
        assert!(lines(&world, "acme").await.is_empty());
        world.limiter.settle(&note(used("acme", "m", tally(2, 0, 0, 0)))).await.expect("settle");
        assert_eq!(lines(&world, "acme").await, [("m".to_owned(), tally(2, 0, 0, 0))]);
    }
}
