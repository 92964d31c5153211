//! The arithmetic under any clock, one that runs backwards included: the scripts' own text and its twin in Rust give the
//! same bits. A real server's clock cannot be turned, so the functions of `leaky_bucket.lua` are called with times of the
//! test's own.

use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use weir_ratelimit::leaky_bucket::{BucketState, Fit, Terms, capacity_max};
use weir_ratelimit::{Bucket, Kind};

use crate::harness::*;

const LEAKY_BUCKET: &str = include_str!("../../src/store/redis/scripts/leaky_bucket.lua");
/// KEYS none; ARGV kind 1-5, capacity, num, den, level, moment, now, cost, delta; birth.
const ASK: &str = "
local a = {}
for i = 1, 9 do a[i] = tonumber(ARGV[i]) end
local now, cost, delta = a[7], a[8], a[9]
local record = '\\2' .. put('<dd', a[5], a[6]):rep(5) .. put('<d', 0)
local m = meter(record, a[1], a[2], a[3], a[4], now)
local verdict, wait = judge(m, cost, now)
local left, empty = standing(m, now)
apply(m, delta, now)
return { int(verdict), int(wait), int(left), int(empty), int(m.level), int(m.ts) }";

#[derive(Debug, Clone)]
struct Ask {
    kind: Kind,
    bucket: Bucket,
    bucket_state: BucketState,
    now: f64,
    cost: f64,
    delta: f64,
}

fn an_ask() -> impl Strategy<Value = Ask> {
    let units = || prop_oneof![0u64..200, 0..=Bucket::MAX_UNITS];
    let bucket = (units(), units(), prop_oneof![1_000u64..3_000_000, 1_000u64..1 << 44]);
    let moments = (0u64..1 << 51, -10_000_000i64..10_000_000, prop::bool::weighted(0.9));
    (0usize..Kind::COUNT, bucket, 0.0f64..=2.0, moments, 0.0f64..=1.2, -1.0f64..=1.0).prop_map(
        |(kind, (capacity, rate, us), level, (ts, step, near), cost, delta)| {
            let kind = Kind::ALL[kind];
            let capacity = capacity.min(capacity_max(kind));
            let bucket = Bucket { capacity, rate, period: Duration::from_micros(us) };
            let terms = Terms::of(kind, &bucket);
            let part = |of: f64| (terms.cap * of).floor();
            // Mostly some seconds before or after; sometimes as far apart as can be.
            let now = if near { ts.saturating_add_signed(step) } else { (1 << 51) - ts };
            let bucket_state = BucketState { level: part(level).min(terms.ceiling()), ts: ts as f64 };
            Ask { kind, bucket, bucket_state, now: now as f64, cost: part(cost), delta: part(delta) }
        },
    )
}

fn in_rust(ask: &Ask) -> [String; 6] {
    let Ask { kind, bucket, bucket_state, now, cost, delta } = ask;
    let terms = Terms::of(*kind, bucket);
    let (verdict, wait) = match bucket_state.judge(&terms, *cost, *now) {
        Fit::Now => (0.0, 0.0),
        Fit::After(wait) => (1.0, wait),
        Fit::Never => (2.0, 0.0),
    };
    let (left, empty) =
        (bucket_state.remaining(&terms, *now) as f64, bucket_state.reset(&terms, *now).unwrap_or(-1.0));
    let after = bucket_state.apply(&terms, *delta, *now);
    [verdict, wait, left, empty, after.level, after.ts].map(|figure| format!("{figure:.0}"))
}

#[test]
fn scripts_and_rust_agree_to_the_bit_under_any_clock() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("runtime");
    let server = runtime.block_on(Server::start());
    let raw = runtime.block_on(server.raw());
    let text = format!("{LEAKY_BUCKET}{ASK}");
    let config = Config { cases: 3000, failure_persistence: None, ..Config::default() };
    let agrees = |ask: Ask| {
        let terms = Terms::of(ask.kind, &ask.bucket);
        let mut eval = ::redis::cmd("EVAL");
        eval.arg(&text).arg(0).arg(ask.kind as usize + 1);
        let figures = [
            terms.cap,
            terms.num,
            terms.den,
            ask.bucket_state.level,
            ask.bucket_state.ts,
            ask.now,
            ask.cost,
            ask.delta,
            0.0,
        ];
        figures.iter().for_each(|figure| {
            eval.arg(format!("{figure:.0}"));
        });
        let mut raw = raw.clone();
        let said: Vec<String> = runtime.block_on(eval.query_async(&mut raw)).expect("an answer");
        prop_assert_eq!(said, in_rust(&ask));
        Ok::<(), TestCaseError>(())
    };
    TestRunner::new(config).run(&an_ask(), agrees).unwrap_or_else(|failure| panic!("{failure}"));
}
