//! Figures over several rounds.

/// The median, which a disturbed round does not change much.
pub(crate) fn median(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match figures.len() % 2 {
        1 => figures.get(middle).copied(),
        _ => Some((figures.get(middle)? + figures.get(middle.checked_sub(1)?)?) / 2.0),
    }
}

/// The spread of the rounds: a difference must exceed it to mean anything.
pub(crate) fn spread(figures: &[f64]) -> Option<f64> {
    let least = figures.iter().copied().min_by(f64::total_cmp)?;
    let most = figures.iter().copied().max_by(f64::total_cmp)?;
    Some(most - least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_between_the_middle_two() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(2.0));
    }
}
