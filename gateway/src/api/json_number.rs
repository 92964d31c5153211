//! Whole numbers of JSON, which some writers give as floats.

/// A whole number however it is written: `1900`, `1900.0`, `1.9e3`. `None` for what is negative or has a fraction; a number
/// beyond all bounds is the largest there is. `written` is a number of JSON.
pub fn whole(written: &[u8]) -> Option<u64> {
    // So many digits fit whatever they are; nearly all counts are written like this.
    if written.len() <= 19 && written.iter().all(u8::is_ascii_digit) && !written.is_empty() {
        return Some(written.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')));
    }
    let exponent_at = written.iter().position(|b| matches!(b, b'e' | b'E')).unwrap_or(written.len());
    let (digits, exponent) = written.split_at(exponent_at);
    let exponent = match std::str::from_utf8(exponent.get(1..).unwrap_or_default()).ok()? {
        "" => 0,
        text => text.parse::<i64>().unwrap_or(if text.starts_with('-') { i64::MIN } else { i64::MAX }),
    };
    let point = digits.iter().position(|b| *b == b'.').unwrap_or(digits.len());
    let fraction = digits.get(point + 1..).unwrap_or_default();
    let mut number: Option<u64> = Some(0);
    let mut zero = true;
    // Places behind the point that are left to use, of the digits and the exponent.
    let mut places = (fraction.len() as i64).saturating_neg().saturating_add(exponent);
    let trailing = digits.iter().rev().filter(|b| **b != b'.').take_while(|b| **b == b'0').count() as i64;
    let dropped = if places < 0 { places.saturating_neg().min(trailing) } else { 0 };
    places += dropped;
    let kept = digits.iter().filter(|b| b.is_ascii_digit()).count() - dropped as usize;
    for digit in digits.iter().filter(|b| b.is_ascii_digit()).take(kept) {
        let digit = u64::from(digit - b'0');
        zero &= digit == 0;
        number = number.and_then(|number| number.checked_mul(10)?.checked_add(digit));
    }
    match zero {
        true => return Some(0),
        false if digits.first() == Some(&b'-') || places < 0 => return None,
        false => {}
    }
    let power = u32::try_from(places).ok().and_then(|places| 10u64.checked_pow(places));
    Some(number.zip(power).and_then(|(number, power)| number.checked_mul(power)).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_numbers_are_read_however_they_are_written() {
        for (written, number) in [
            ("0", Some(0)),
            ("-0", Some(0)),
            ("0.0", Some(0)),
            ("0e9", Some(0)),
            ("7", Some(7)),
            ("1900.0", Some(1900)),
            ("1.9e3", Some(1900)),
            ("19E+2", Some(1900)),
            ("190000e-2", Some(1900)),
            ("1.90e1", Some(19)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", Some(u64::MAX)),
            ("1e308", Some(u64::MAX)),
            ("1e99999999999999999999", Some(u64::MAX)),
            ("-1", None),
            ("1.5", None),
            ("1e-1", None),
            ("-1e3", None),
            ("1e-99999999999999999999", None),
            ("15e-1", None),
            ("100e-3", None),
        ] {
            assert_eq!(whole(written.as_bytes()), number, "{written}");
        }
    }

    proptest! {
        #[test]
        fn a_number_is_the_same_as_an_integer_a_float_and_with_an_exponent(number in 0u64..1 << 50, zeros in 0usize..5) {
            let zeros_text = "0".repeat(zeros);
            for written in [format!("{number}"), format!("{number}.{zeros_text}0"), format!("{number}{zeros_text}e-{zeros}")] {
                prop_assert_eq!(whole(written.as_bytes()), Some(number), "{}", written);
            }
            prop_assert_eq!(whole(format!("{number}e3").as_bytes()), number.checked_mul(1000));
        }
    }
}
