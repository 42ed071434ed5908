//! What is counted while a broker works: how long things take, and how many happen in each tenth of a second. Pure.

use anyhow::Result;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The step of a [`Series`].
pub(crate) const STEP_MS: u64 = 100;

/// How long things took.
pub(crate) struct Latencies(Histogram<u64>);

/// The part of [`Latencies`] that is kept: what is named, and enough points for a plot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Distribution {
    pub(crate) count: u64,
    pub(crate) p50_us: u64,
    pub(crate) p90_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) p999_us: u64,
    pub(crate) max_us: u64,
    /// The part of all, from 0 to 1, and within how many microseconds it was.
    pub(crate) quantiles: Vec<(f64, u64)>,
}

impl Latencies {
    pub(crate) fn new() -> Result<Self> {
        // It grows with what it is given.
        Ok(Self(Histogram::new(3)?))
    }

    pub(crate) fn record(&mut self, us: u64) {
        // A growing one takes any number that a run can have.
        self.0.record(us).unwrap_or(());
    }

    pub(crate) fn distribution(&self) -> Distribution {
        let at = |quantile: f64| self.0.value_at_quantile(quantile);
        // Ever closer to 1, each nine in four steps, as far as there are values.
        let (mut quantiles, mut rest) = (vec![(0.0, at(0.0))], 1.0);
        while rest * self.0.len() as f64 >= 1.0 && rest > 1e-7 {
            for part in [1.0, 0.75, 0.5, 0.25] {
                let quantile = 1.0 - rest * part;
                if quantile > 0.0 {
                    quantiles.push((quantile, at(quantile)));
                }
            }
            rest /= 10.0;
        }
        quantiles.push((1.0, self.0.max()));
        quantiles.dedup();
        quantiles.sort_by(|one, other| one.0.total_cmp(&other.0));
        Distribution {
            count: self.0.len(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: self.0.max(),
            quantiles,
        }
    }
}

/// How many happened in each step since the beginning.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub(crate) step_ms: u64,
    pub(crate) counts: Vec<u64>,
}

impl Series {
    pub(crate) fn new() -> Self {
        Self { step_ms: STEP_MS, counts: Vec::new() }
    }

    /// Counts one that happened so long after the beginning.
    pub(crate) fn add(&mut self, at_us: u64) {
        let Ok(step) = usize::try_from(at_us / (self.step_ms * 1_000)) else { return };
        if step >= self.counts.len() {
            self.counts.resize(step + 1, 0);
        }
        self.counts[step] += 1;
    }

    /// How many a second, step by step.
    pub(crate) fn per_s(&self) -> impl Iterator<Item = f64> {
        let steps_per_s = 1e3 / self.step_ms.max(1) as f64;
        self.counts.iter().map(move |count| *count as f64 * steps_per_s)
    }
}

/// The value in the middle of them; of an even number the lower one. `None` of none.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut latencies = Latencies::new().unwrap();
        (1..=1_000).for_each(|us| latencies.record(us));
        let distribution = latencies.distribution();
        let Distribution { count, p50_us, p90_us, p99_us, p999_us, max_us, quantiles } = distribution;
        assert_eq!((count, p50_us, p90_us, p99_us, p999_us, max_us), (1_000, 500, 900, 990, 999, 1_000));
        assert!(quantiles.is_sorted_by(|one, other| one.0 < other.0 && one.1 <= other.1), "{quantiles:?}");
        assert_eq!(quantiles.first(), Some(&(0.0, 1)));
        assert_eq!(quantiles.last(), Some(&(1.0, 1_000)));
        assert_eq!(Latencies::new().unwrap().distribution().count, 0);
    }

    #[test]
    fn what_happens_is_counted_in_its_step() {
        let mut series = Series::new();
        for at_us in [0, 99_999, 100_000, 350_000] {
            series.add(at_us);
        }
        assert_eq!(series.counts, [2, 1, 0, 1]);
        assert_eq!(series.per_s().collect::<Vec<_>>(), [20.0, 10.0, 0.0, 10.0]);
    }

    #[test]
    fn the_median_is_one_of_the_values() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![3.0, 1.0, 2.0, 4.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
    }
}
