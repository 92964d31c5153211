//! Durations as OpenAI writes them, in headers and messages.

use std::fmt::Write as _;
use std::time::Duration;

/// Bytes of a usual one.
const LENGTH_USUAL: usize = 16;

/// A duration as OpenAI writes it: `120ms`, `1.5s`, `6m0s`, `1h0m0s`; rounded up to a millisecond.
pub fn duration(duration: Duration) -> String {
    let ms = millis(duration);
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    let mut text = String::with_capacity(LENGTH_USUAL);
    // Writing to a string does not fail.
    let _ = match (hours, minutes) {
        (0, 0) if ms > 0 && ms < 1000 => {
            let _ = write!(text, "{ms}ms");
            return text;
        }
        (0, 0) => Ok(()),
        (0, _) => write!(text, "{minutes}m"),
        _ => write!(text, "{hours}h{minutes}m"),
    };
    let _ = match rest % 1000 {
        0 => write!(text, "{}", rest / 1000),
        part => write!(text, "{}.{part:03}", rest / 1000),
    };
    if rest % 1000 != 0 {
        text.truncate(text.trim_end_matches('0').len());
    }
    text.push('s');
    text
}

/// Whole milliseconds, rounded up: one that comes back too early is refused again.
pub fn millis(duration: Duration) -> u64 {
    let part = u64::from(duration.subsec_nanos()).div_ceil(1_000_000);
    duration.as_secs().saturating_mul(1000).saturating_add(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0s"),
            (120, "120ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (10_000, "10s"),
            (10_020, "10.02s"),
            (360_000, "6m0s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}
