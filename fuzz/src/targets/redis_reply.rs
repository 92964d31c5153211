use weir_proto::resource::{Budget, Period, Rates};
use weir_ratelimit::redis::fuzzing::{listed, packed, replies};
use weir_ratelimit::{Bucket, Charge, ChargeRule, Decision, Key, Kind, Scope, scope_limits};

use crate::input::Input;

/// A reply in either form gives the same numbers, and numbers are an answer or are called malformed: none is made up.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let len = usize::from(input.byte());
    let bytes = input.rest();
    let Some(numbers) = packed(bytes) else { return };
    assert_eq!(numbers.len(), bytes.len() / 8);
    assert_eq!(listed(&numbers).as_ref(), Some(&numbers));
    let rates = Rates {
        requests_per_minute: Some(10),
        tokens_per_minute: Some(10),
        concurrency: Some(3),
        budget: Some(Budget { micro_dollars: 1_000_000, period: Period::Day }),
        ..Rates::default()
    };
    let scopes = [scope_limits(Scope::Global, None, &rates)];
    let charge = Charge {
        record: Key::global(),
        kind: Kind::Requests,
        bucket: Bucket::per(5, std::time::Duration::from_secs(1), 1.0),
        needed: 1,
        added: 1,
        rule: ChargeRule::AllOrNothing,
    };
    let replies = replies(&numbers, &scopes, std::slice::from_ref(&charge), len);
    let told = |decision: &Decision| decision.limits.len() * 4 <= numbers.len();
    assert!(replies.decision.is_err() || replies.decision.as_ref().is_ok_and(told));
    assert!(replies.charged.is_err() || replies.charged.as_ref().is_ok_and(told));
    if let Ok(settled) = &replies.settled {
        assert!(settled.limits.len() * 4 <= numbers.len());
    }
    if let Ok(peeked) = &replies.peeked {
        assert!(peeked.len() * 4 <= numbers.len());
    }
    if let Ok(usage) = &replies.usage {
        assert_eq!(usage.len(), len);
        assert!(usage.iter().map(Vec::len).sum::<usize>() <= numbers.len());
    }
    if let Ok(Some(index)) = replies.index {
        assert!(index < len);
    }
}
