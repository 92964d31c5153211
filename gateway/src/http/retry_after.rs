//! How long an answer asks to be left alone, in all the forms that providers use.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, header};

use crate::api::upstream_error::{go_duration, seconds};

/// Longest wait of a backend that is believed.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// A reset beyond this is a date in Unix seconds and not a number of seconds; 30 days, as others have it.
const SECONDS_MAX: f64 = 30.0 * 86_400.0;

/// The wait that the headers of a refusal ask for, bounded by [`RETRY_AFTER_MAX`]: `retry-after-ms` first, as the SDKs read
/// it, then `Retry-After` as seconds (fractions allowed) or as a date, then the time at which a limit that is used up is
/// full again. `now` is the wall clock's.
pub fn of(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis =
        || text("retry-after-ms")?.parse().ok().and_then(|ms: f64| seconds(&(ms / 1000.0).to_string()));
    let after = || {
        let value = text(header::RETRY_AFTER.as_str())?;
        // A date that has passed asks for no wait.
        let date = || Some(httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default());
        seconds(value).or_else(date).or_else(|| go_duration(value))
    };
    let reset = |kind: &str| {
        let used_up = text(&format!("x-ratelimit-remaining-{kind}"))?.parse::<f64>().ok()? <= 0.0;
        let value = text(&format!("x-ratelimit-reset-{kind}"))?;
        used_up.then(|| go_duration(value).or_else(|| seconds(value)))?
    };
    let plain = || {
        let number: f64 = text("x-ratelimit-reset")?.parse().ok()?;
        if number <= SECONDS_MAX {
            return seconds(&number.to_string());
        }
        // Unix time, in seconds or in milliseconds.
        let number = if number > 1e11 { number / 1000.0 } else { number };
        let at = SystemTime::UNIX_EPOCH.checked_add(seconds(&number.to_string())?)?;
        Some(at.duration_since(now).unwrap_or_default())
    };
    let wait = millis().or_else(after).or_else(|| reset("requests").max(reset("tokens"))).or_else(plain)?;
    Some(wait.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    /// 1994-11-06 08:49:37, the date of RFC 9110.
    const NOW: u64 = 784_111_777;

    fn wait(pairs: &[(&'static str, &str)]) -> Option<f64> {
        let header = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).expect("a value"))
        };
        let headers: HeaderMap = pairs.iter().map(header).collect();
        of(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)).map(|wait| wait.as_secs_f64())
    }

    #[test]
    fn a_wait_is_given_in_seconds_or_by_a_date_and_is_bounded() {
        for (value, expected) in [
            ("7", Some(7.0)),
            ("0", Some(0.0)),
            ("7.5", Some(7.5)),
            ("86400", Some(60.0)),
            ("12s", Some(12.0)),
            ("Sun, 06 Nov 1994 08:49:50 GMT", Some(13.0)),
            ("Sunday, 06-Nov-94 08:49:50 GMT", Some(13.0)),
            ("Sun Nov  6 08:49:50 1994", Some(13.0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(0.0)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0.0)),
            ("Mon, 07 Nov 1994 08:49:37 GMT", Some(60.0)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", Some(60.0)),
            ("99999999999999999999", None),
            ("Sun, 06 Nov 1994 08:49:99 GMT", None),
            ("1994-11-06T08:49:50Z", None),
            ("-1", None),
            ("soon", None),
            ("NaN", None),
            ("inf", None),
            ("", None),
        ] {
            assert_eq!(wait(&[("retry-after", value)]), expected, "{value:?}");
        }
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn milliseconds_come_first_and_resets_last() {
        assert_eq!(wait(&[("retry-after-ms", "1500"), ("retry-after", "30")]), Some(1.5));
        assert_eq!(wait(&[("retry-after-ms", "soon"), ("retry-after", "3")]), Some(3.0));
        let tokens = [("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6.5s")];
        assert_eq!(wait(&tokens), Some(6.5));
        let both = [
            ("x-ratelimit-remaining-tokens", "0"),
            ("x-ratelimit-reset-tokens", "6s"),
            ("x-ratelimit-remaining-requests", "0"),
            ("x-ratelimit-reset-requests", "20ms"),
        ];
        assert_eq!(wait(&both), Some(6.0), "both limits must be free");
        let left = [("x-ratelimit-remaining-tokens", "5"), ("x-ratelimit-reset-tokens", "6s")];
        assert_eq!(wait(&left), None, "that limit did not refuse");
        assert_eq!(wait(&[("x-ratelimit-reset", "9")]), Some(9.0));
        assert_eq!(wait(&[("x-ratelimit-reset", &(NOW + 11).to_string())]), Some(11.0));
        assert_eq!(wait(&[("x-ratelimit-reset", &format!("{}000", NOW + 12))]), Some(12.0));
    }
}
