//! Who asks: the key of a request, and what is remembered of requests without a valid one, by address.
//!
//! Keys have 256 bits, so nobody guesses one; what wrong keys cost is the work of refusing them, and lines in the log that
//! nobody reads. From an address that fails too often each further failure closes its connection, which makes it pay
//! for a new one, and is counted instead of logged. What is never touched is a good key: behind an edge or a NAT everybody
//! has one address, so the answer to a wrong key stays 401 at once (a delay would hold our memory, 429 is for limits that
//! an operator has set), and a good one is not even looked up here.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use weir_runtime::edge::framing::Violation;
use weir_runtime::edge::household;

use crate::metrics::{AuthenticationLabels, Metrics};
use crate::routing::entries::KeyEntry;
use crate::routing::snapshot::Snapshot;

/// Longest header with a key that is looked at, bytes.
const KEY_MAX_BYTES: usize = 512;
/// Headers that hold a key and nothing else: Anthropic's and Azure's.
static KEY_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// What is counted together, and the time between two lines about one address.
const WINDOW: Duration = Duration::from_secs(60);
/// Failures of one address in a window before it is too many: more than a deployment with an old key in a few retry loops.
const FAILURES_MAX: u64 = 100;
/// Addresses that are told apart; those beyond share one count.
const ADDRESSES_MAX: usize = 4096;
/// Between two searches for entries that are over, in a full table.
const SWEEP: Duration = Duration::from_secs(1);
/// Lines in a window, of all addresses.
const LINES_MAX: u32 = 20;

/// Why a request has no valid key. Clients are told nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No key, or a header that holds none.
    Missing,
    /// A key that there is not, or no more.
    Unknown,
    /// A key whose time is over.
    Expired,
}

impl Failure {
    /// Every reason.
    pub const ALL: [Self; 3] = [Self::Missing, Self::Unknown, Self::Expired];

    /// The label of the metric.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
        }
    }
}

/// The key that a request shows: as `Authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`. `None` when it shows
/// none, or something that is no key.
///
/// # Errors
/// When two of these headers hold different things: the request would have two callers.
pub(super) fn key(headers: &HeaderMap) -> Result<Option<&str>, Violation> {
    let others =
        KEY_HEADERS.iter().filter_map(|name| headers.get(name)).map(|value| text(value).map(str::trim));
    let mut shown = headers.get(header::AUTHORIZATION).map(bearer).into_iter().chain(others);
    // An empty one is what a client without a key sends; beside another header it says nothing.
    let mut shown = shown.by_ref().filter(|key| *key != Some(""));
    let Some(first) = shown.next() else { return Ok(None) };
    if shown.any(|other| other.is_none() || other != first) {
        return Err(Violation {
            status: StatusCode::BAD_REQUEST,
            what: "two different credentials are given",
        });
    }
    Ok(first)
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok().filter(|text| text.len() <= KEY_MAX_BYTES)
}

fn bearer(value: &HeaderValue) -> Option<&str> {
    let text = text(value)?;
    let (scheme, token) = text.split_once(' ').unwrap_or((text, ""));
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Whose key it is, if it is valid now.
pub(super) fn identify(snapshot: &Snapshot, key: Option<&str>) -> Result<Arc<KeyEntry>, Failure> {
    let token = key.ok_or(Failure::Missing)?;
    // The map is keyed by digest, so a comparison tells nothing about how much of a secret was right.
    let digest: [u8; 32] = Sha256::digest(token.as_bytes()).into();
    let key = snapshot.keys.get(&digest).ok_or(Failure::Unknown)?;
    match key.expires {
        Some(expires) if expires <= weir_runtime::wall_clock() => Err(Failure::Expired),
        _ => Ok(key.clone()),
    }
}

/// Failures by address. Its memory is bounded.
#[derive(Debug, Default)]
pub struct Failures(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// By address; `None` are those that are not told apart.
    by_address: HashMap<Option<IpAddr>, Count>,
    swept: Option<Instant>,
    lines: Count,
}

/// Of one window.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    since: Option<Instant>,
    now: u64,
    before: u64,
}

impl Count {
    fn is_over(&self, now: Instant) -> bool {
        self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW)
    }

    /// One more, in a new window if the last one is over.
    fn add(&mut self, now: Instant) -> u64 {
        if self.is_over(now) {
            *self = Self { since: Some(now), now: 0, before: self.now };
        }
        self.now = self.now.saturating_add(1);
        self.now
    }
}

impl Failures {
    /// None so far; every reason has its series in the metrics from now on, at zero.
    pub fn new(metrics: &Metrics) -> Self {
        for reason in Failure::ALL.map(Failure::label) {
            drop(metrics.authentication_failures.get_or_create(&AuthenticationLabels { reason }));
        }
        Self::default()
    }

    /// A request from there had no valid key. Whether its address has had too many.
    pub fn note(&self, peer: Option<IpAddr>) -> bool {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let address = table.place(peer.map(household), now);
        let count = table.by_address.entry(address).or_default();
        let failures = count.add(now);
        let before = count.before;
        if failures == FAILURES_MAX + 1 && table.lines.add(now) <= u64::from(LINES_MAX) {
            drop(table);
            let address = address.map_or_else(|| "several".to_owned(), |address| address.to_string());
            tracing::warn!(
                address,
                failures,
                failures_before = before,
                window_s = WINDOW.as_secs(),
                "requests without a valid api key from one address; further ones of this minute are counted, not logged"
            );
        }
        failures > FAILURES_MAX
    }
}

impl Table {
    /// Where an address is counted.
    fn place(&mut self, address: Option<IpAddr>, now: Instant) -> Option<IpAddr> {
        if self.by_address.len() < ADDRESSES_MAX || self.by_address.contains_key(&address) {
            return address;
        }
        if self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            self.swept = Some(now);
            self.by_address.retain(|_, count| !count.is_over(now));
        }
        if self.by_address.len() < ADDRESSES_MAX { address } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().expect("an address"))
    }

    fn shown(pairs: &[(&'static str, &'static str)]) -> Result<Option<String>, &'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        key(&headers).map(|key| key.map(str::to_owned)).map_err(|violation| violation.what)
    }

    #[test]
    fn a_key_is_taken_from_each_header_that_clients_send_it_in() {
        for pair in [
            ("authorization", "Bearer k1"),
            ("authorization", "bearer  k1 "),
            ("x-api-key", "k1"),
            ("api-key", " k1 "),
        ] {
            assert_eq!(shown(&[pair]), Ok(Some("k1".to_owned())), "{pair:?}");
        }
        for pairs in [
            &[][..],
            &[("authorization", "Basic k1")],
            &[("authorization", "k1")],
            &[("authorization", "Bearer")],
            &[("authorization", "Bearer "), ("api-key", "")],
            &[("x-api-key", "")],
            &[("proxy-authorization", "Bearer k1")],
        ] {
            assert_eq!(shown(pairs), Ok(None), "{pairs:?}");
        }
        let long: &'static str = "k".repeat(KEY_MAX_BYTES + 1).leak();
        assert_eq!(shown(&[("x-api-key", long)]), Ok(None));
    }

    #[test]
    fn two_headers_may_hold_one_key_and_never_two() {
        let one = Ok(Some("k1".to_owned()));
        assert_eq!(shown(&[("authorization", "Bearer k1"), ("api-key", "k1"), ("x-api-key", "k1")]), one);
        assert_eq!(
            shown(&[("authorization", "Bearer "), ("api-key", "k1")]),
            one,
            "a client without a key of its own"
        );
        for pairs in [
            [("authorization", "Bearer k1"), ("api-key", "k2")],
            [("authorization", "Bearer k1"), ("x-api-key", "K1")],
            [("x-api-key", "k1"), ("api-key", "k2")],
            [("authorization", "Basic dTpw"), ("api-key", "k1")],
            [("authorization", "Basic dTpw"), ("x-api-key", "k1")],
        ] {
            assert_eq!(shown(&pairs), Err("two different credentials are given"), "{pairs:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_is_over_after_its_hundred_and_forgiven_in_the_next_minute() {
        let failures = Failures::default();
        assert!((0..FAILURES_MAX).all(|_| !failures.note(ip("10.0.0.1"))));
        assert!(failures.note(ip("10.0.0.1")));
        assert!(failures.note(ip("::ffff:10.0.0.1")), "the same address");
        assert!(!failures.note(ip("10.0.0.2")), "others are not concerned");
        tokio::time::advance(WINDOW).await;
        assert!(!failures.note(ip("10.0.0.1")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_ipv6_is_one_address() {
        let failures = Failures::default();
        let over = (0..=FAILURES_MAX).map(|n| failures.note(ip(&format!("2001:db8::{n:x}")))).last();
        assert_eq!(over, Some(true));
        assert!(!failures.note(ip("2001:db8:0:1::1")));
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_whoever_comes_and_takes_new_addresses_when_old_ones_are_over() {
        let failures = Failures::default();
        for n in 0..3 * ADDRESSES_MAX as u32 {
            failures.note(Some(IpAddr::V4((0x0A00_0000 + n).into())));
        }
        let held = |failures: &Failures| failures.0.lock().expect("sound").by_address.len();
        assert!(held(&failures) <= ADDRESSES_MAX + 1);
        assert!(failures.note(ip("172.16.0.1")), "those beyond share one count");
        tokio::time::advance(WINDOW).await;
        assert!(!failures.note(ip("172.16.0.1")));
        assert!(held(&failures) <= 2);
    }
}
