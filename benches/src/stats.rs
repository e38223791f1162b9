//! Order statistics of small samples.

/// Minimum, median and 90th percentile of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Smallest value.
    pub min: f64,
    /// Median (upper of the two middle values for an even count).
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
}

/// Summarises `sample`; None when it is empty.
#[must_use]
pub fn summary(sample: &[f64]) -> Option<Summary> {
    let mut sorted = sample.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |percent: usize| sorted.get(sorted.len() * percent / 100).copied();
    Some(Summary {
        min: *sorted.first()?,
        median: at(50)?,
        p90: at(90)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_before_it_counts() {
        let s = summary(&[3.0, 1.0, 2.0, 10.0, 4.0]).unwrap();
        assert_eq!((s.min, s.median, s.p90), (1.0, 3.0, 10.0));
        assert_eq!(summary(&[]), None);
    }
}
