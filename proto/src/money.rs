//! Amounts of money as people read them.

/// Micro-dollars as dollars, with as many digits as they need and two at least.
pub fn dollars(micro: u64) -> String {
    let (whole, part) = (micro / 1_000_000, format!("{:06}", micro % 1_000_000));
    let cents = part.trim_end_matches('0');
    format!("${whole}.{cents:0<2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dollars_have_two_digits_and_more_where_they_matter() {
        let texts = [0, 5, 72, 1_500_000, 10_000_000, 123_456_789].map(dollars);
        assert_eq!(texts, ["$0.00", "$0.000005", "$0.000072", "$1.50", "$10.00", "$123.456789"]);
    }
}
