//! What a key costs that a row looks at, and one that is read, by least squares over steps of all sizes. Pure.

/// How much costs of looking at keys and of reading them are drawn to each other; where all chunks are one row nothing tells
/// one from the other.
const RIDGE: f64 = 0.01;
/// What an older step still weighs for the cost of attention.
const FORGETTING: f64 = 0.99;

/// What attention adds to a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyCosts {
    ms_per_key: f64,
    ms_per_read: f64,
}

impl KeyCosts {
    /// Milliseconds for so many of each.
    pub fn ms(self, n_keys: f64, n_reads: f64) -> f64 {
        self.ms_per_key * n_keys + self.ms_per_read * n_reads
    }
}

/// Sums over deviations from the means of a class, each as a part of the step's time, so that short steps count as much
/// as long ones: of keys, reads and milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deviations {
    keys_keys: f64,
    keys_reads: f64,
    reads_reads: f64,
    keys_ms: f64,
    reads_ms: f64,
}

impl Deviations {
    /// Takes a deviation in, each number as a part of the step's time.
    pub fn add(&mut self, keys: f64, reads: f64, ms: f64) {
        let sums = [
            (&mut self.keys_keys, keys * keys),
            (&mut self.keys_reads, keys * reads),
            (&mut self.reads_reads, reads * reads),
            (&mut self.keys_ms, keys * ms),
            (&mut self.reads_ms, reads * ms),
        ];
        sums.into_iter().for_each(|(sum, more)| *sum = *sum * FORGETTING + more);
    }

    /// Least squares, neither cost below zero.
    pub fn costs(&self) -> KeyCosts {
        let alone = |with_ms: f64, square: f64| if square > 0.0 { (with_ms / square).max(0.0) } else { 0.0 };
        let (keys, reads) = ((1.0 + RIDGE) * self.keys_keys, (1.0 + RIDGE) * self.reads_reads);
        let determinant = keys * reads - self.keys_reads * self.keys_reads;
        let of = |ms_per_key, ms_per_read| KeyCosts { ms_per_key, ms_per_read };
        if determinant <= 0.0 {
            return of(alone(self.keys_ms, self.keys_keys), 0.0);
        }
        let ms_per_key = (self.keys_ms * reads - self.reads_ms * self.keys_reads) / determinant;
        let ms_per_read = (self.reads_ms * keys - self.keys_ms * self.keys_reads) / determinant;
        match (ms_per_key >= 0.0, ms_per_read >= 0.0) {
            (true, true) => of(ms_per_key, ms_per_read),
            (true, false) => of(alone(self.keys_ms, self.keys_keys), 0.0),
            _ => of(0.0, alone(self.reads_ms, self.reads_reads)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(steps: &[(f64, f64)], true_ms: impl Fn(f64, f64) -> f64) -> KeyCosts {
        let mut deviations = Deviations::default();
        steps.iter().for_each(|(keys, reads)| deviations.add(*keys, *reads, true_ms(*keys, *reads)));
        deviations.costs()
    }

    #[test]
    fn costs_are_told_apart_where_they_can_be() {
        let steps: Vec<_> =
            (0..200).map(|i| (f64::from(i * 7 % 13) - 6.0, f64::from(i * 5 % 11) - 5.0)).collect();
        let costs = found(&steps, |keys, reads| 0.3 * keys + 0.6 * reads);
        assert!(
            (costs.ms(1.0, 0.0) - 0.3).abs() < 0.02 && (costs.ms(0.0, 1.0) - 0.6).abs() < 0.02,
            "{costs:?}"
        );
        let costs = found(&steps, |keys, reads| 0.3 * keys - 0.1 * reads);
        assert!(costs.ms(0.0, 1.0) == 0.0 && costs.ms(1.0, 0.0) > 0.2, "none is below zero: {costs:?}");
    }

    #[test]
    fn rows_that_read_for_themselves_share_the_cost() {
        let steps: Vec<_> = (0..200).map(|i| (f64::from(i % 13) - 6.0, f64::from(i % 13) - 6.0)).collect();
        let costs = found(&steps, |keys, _| 0.8 * keys);
        assert!((costs.ms(1.0, 1.0) - 0.8).abs() < 0.02 && costs.ms(1.0, 0.0) > 0.2, "{costs:?}");
        assert_eq!(found(&[], |_, _| 1.0).ms(9.0, 9.0), 0.0);
    }
}
