//! Medians, and how far apart the runs were.

use std::fmt;

/// Several values of one thing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// `None` without any value.
    pub(crate) fn of(values: &[f64]) -> Option<Self> {
        Some(Self {
            least: percentile(values, 0.0)?,
            median: median(values)?,
            most: percentile(values, 1.0)?,
        })
    }

    /// With so many digits after the point; the ends of the spread only where there is one.
    pub(crate) fn text(&self, digits: usize) -> String {
        let [median, least, most] =
            [self.median, self.least, self.most].map(|value| format!("{value:.digits$}"));
        if least == most { median } else { format!("{median} ({least}–{most})") }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text(2))
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// The value that this share of the others is below; `share` is from 0 to 1.
pub(crate) fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let sorted = sorted(values);
    let last = sorted.len().checked_sub(1)?;
    sorted.get((share * last as f64).round() as usize).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_however_many_there_are() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[5.0, 1.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn percentiles_reach_from_the_least_to_the_most() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.0), Some(0.0));
        assert_eq!(percentile(&values, 0.99), Some(99.0));
        assert_eq!(percentile(&values, 1.0), Some(100.0));
    }

    #[test]
    fn a_spread_is_shown_where_there_is_one() {
        assert_eq!(Spread::of(&[2.0, 1.0, 4.0]).unwrap().text(1), "2.0 (1.0–4.0)");
        assert_eq!(Spread::of(&[2.0]).unwrap().text(0), "2");
    }
}
