//! How long a step takes, learnt from the steps that were measured. Pure: numbers in, a number out.
//!
//! The time of a pass is nearly flat in the number of rows while weights are read from memory and grows in proportion
//! once the multiply units are busy; where it bends depends on model and machine. So time is kept for classes of row
//! counts, two to an octave, without a formula; what lies between is interpolated. Attention adds a time for each key
//! that a row looks at, one number for all classes.

/// Two to an octave, up to 65,535 rows.
const N_CLASSES: usize = 32;
/// A class remembers about this many steps.
const MEMORY: f64 = 16.0;
/// A measurement counts as at most this many times the mean, and at least its inverse: something else used the machine.
const MOST_DEVIATION: f64 = 2.0;
/// From so many measurements on a deviation can be told.
const N_SETTLED: f64 = 4.0;
/// What rows take of a step at least, however many keys they look at; a wrong cost of keys does no more harm than that.
const LEAST_SHARE_OF_ROWS: f64 = 0.25;
/// What an older step still weighs for the cost of attention.
const FORGETTING: f64 = 0.99;

/// What a step has to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Token rows.
    pub n_rows: usize,
    /// Keys that all rows look at together.
    pub n_keys: usize,
}

impl Load {
    /// Rows of one sequence from a position on.
    pub fn rows(start_pos: usize, n_rows: usize) -> Self {
        Self { n_rows, n_keys: n_rows * start_pos + n_rows * (n_rows + 1) / 2 }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self { n_rows: self.n_rows + other.n_rows, n_keys: self.n_keys + other.n_keys }
    }
}

/// Means of one class.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    n_seen: f64,
    n_rows: f64,
    n_keys: f64,
    ms: f64,
}

/// The model of one group's steps.
#[derive(Debug, Default)]
pub struct StepTimes {
    classes: [Class; N_CLASSES],
    /// Sums over deviations from the means of a class: keys times milliseconds, and keys squared.
    keys_ms: f64,
    keys_keys: f64,
}

fn class_of(n_rows: usize) -> usize {
    let n_rows = n_rows.clamp(1, 65_535);
    let octave = n_rows.ilog2() as usize;
    let is_upper_half = octave > 0 && (n_rows >> (octave - 1)) & 1 == 1;
    (2 * octave + usize::from(is_upper_half)).saturating_sub(1)
}

impl StepTimes {
    /// Takes a measurement.
    pub fn observe(&mut self, load: Load, ms: f64) {
        if load.n_rows == 0 {
            return;
        }
        let class = &mut self.classes[class_of(load.n_rows)];
        let ms = if class.n_seen >= N_SETTLED {
            ms.clamp(class.ms / MOST_DEVIATION, class.ms * MOST_DEVIATION)
        } else {
            ms
        };
        let (more_keys, more_ms) = (load.n_keys as f64 - class.n_keys, ms - class.ms);
        if class.n_seen > 0.0 {
            self.keys_ms = self.keys_ms * FORGETTING + more_keys * more_ms;
            self.keys_keys = self.keys_keys * FORGETTING + more_keys * more_keys;
        }
        class.n_seen = (class.n_seen + 1.0).min(MEMORY);
        class.n_rows += (load.n_rows as f64 - class.n_rows) / class.n_seen;
        class.n_keys += more_keys / class.n_seen;
        class.ms += more_ms / class.n_seen;
    }

    /// Whether a step of about so many rows was measured.
    pub fn knows(&self, n_rows: usize) -> bool {
        self.classes[class_of(n_rows)].n_seen > 0.0
    }

    /// Milliseconds a step will take; `None` before the first measurement. Never less for more rows or keys.
    pub fn predict(&self, load: Load) -> Option<f64> {
        let ms_per_key = self.ms_per_key();
        let n_rows = load.n_rows as f64;
        let (mut below, mut rows_ms) = (None, None);
        for (class, ms) in
            self.classes.iter().zip(self.without_keys(ms_per_key)).filter(|(class, _)| class.n_seen > 0.0)
        {
            let here = (class.n_rows, ms);
            if class.n_rows >= n_rows {
                rows_ms = Some(below.map_or(ms, |below| between(below, here, n_rows)));
                break;
            }
            below = Some(here);
        }
        // Beyond what was measured every row costs as much as the mean of those that were.
        let rows_ms = rows_ms.or_else(|| below.map(|(rows, ms)| ms * n_rows / rows))?;
        Some(rows_ms + ms_per_key * load.n_keys as f64)
    }

    /// Milliseconds of each class without attention. A disturbance only ever makes a step slower, so no class takes
    /// longer than one of more rows.
    fn without_keys(&self, ms_per_key: f64) -> [f64; N_CLASSES] {
        let mut least = f64::INFINITY;
        let mut all = [f64::INFINITY; N_CLASSES];
        for (class, ms) in self.classes.iter().zip(&mut all).rev().filter(|(class, _)| class.n_seen > 0.0) {
            let without_keys = (class.ms - ms_per_key * class.n_keys).max(class.ms * LEAST_SHARE_OF_ROWS);
            least = least.min(without_keys);
            *ms = least;
        }
        all
    }

    fn ms_per_key(&self) -> f64 {
        if self.keys_keys > 0.0 { (self.keys_ms / self.keys_keys).max(0.0) } else { 0.0 }
    }
}

fn between((x0, y0): (f64, f64), (x1, y1): (f64, f64), x: f64) -> f64 {
    y0 + (y1 - y0) * ((x - x0) / (x1 - x0).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(n_rows: usize, n_keys: usize) -> Load {
        Load { n_rows, n_keys }
    }

    /// A machine: flat up to 8 rows, then half a millisecond a row; a microsecond for 10 keys.
    fn true_ms(load: Load) -> f64 {
        (load.n_rows as f64 * 0.5).max(4.0) + load.n_keys as f64 * 1e-4
    }

    #[test]
    fn classes_are_two_to_an_octave() {
        let classes: Vec<usize> = [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 100_000].map(class_of).into();
        assert_eq!(classes, [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 30]);
    }

    #[test]
    fn rows_of_a_chunk_look_at_all_keys_up_to_their_own() {
        assert_eq!(Load::rows(0, 3), load(3, 6));
        assert_eq!(Load::rows(10, 2).and(Load::rows(4, 1)), load(3, 28));
    }

    #[test]
    fn it_learns_the_bend_and_the_cost_of_keys() {
        let mut times = StepTimes::default();
        assert_eq!(times.predict(load(1, 1)), None);
        for i in 0..400 {
            let n_rows = [1, 2, 4, 8, 16, 64, 256][i % 7];
            let seen = load(n_rows, n_rows * (i * 37 % 900));
            times.observe(seen, true_ms(seen));
        }
        for asked in
            [load(1, 50), load(3, 900), load(6, 5_000), load(12, 4_000), load(40, 9_000), load(200, 90_000)]
        {
            let (found, expected) = (times.predict(asked).unwrap(), true_ms(asked));
            assert!((found / expected - 1.0).abs() < 0.15, "{asked:?}: {found} ms instead of {expected}");
        }
    }

    #[test]
    fn one_disturbed_step_hardly_counts_and_a_lasting_change_does() {
        let mut times = StepTimes::default();
        (0..50).for_each(|_| times.observe(load(1, 10), 4.0));
        times.observe(load(1, 10), 400.0);
        assert!(times.predict(load(1, 10)).unwrap() < 4.5);
        (0..200).for_each(|_| times.observe(load(1, 10), 40.0));
        assert!(times.predict(load(1, 10)).unwrap() > 39.0);
    }

    #[test]
    fn beyond_what_was_measured_every_row_counts_in_full() {
        let mut times = StepTimes::default();
        times.observe(load(10, 0), 5.0);
        assert_eq!(times.predict(load(5, 0)), Some(5.0));
        assert_eq!(times.predict(load(40, 0)), Some(20.0));
    }

    proptest! {
        #[test]
        fn more_work_never_takes_less_time(
            seen in prop::collection::vec((1usize..600, 0usize..100_000, 0.0f64..500.0), 1..60),
            (n_rows, n_keys, more) in (1usize..700, 0usize..100_000, 0usize..100),
        ) {
            let mut times = StepTimes::default();
            seen.into_iter().for_each(|(n_rows, n_keys, ms)| times.observe(load(n_rows, n_keys), ms));
            let base = times.predict(load(n_rows, n_keys)).unwrap();
            prop_assert!(base.is_finite());
            prop_assert!(times.predict(load(n_rows + more, n_keys)).unwrap() >= base - 1e-9 * base.abs());
            prop_assert!(times.predict(load(n_rows, n_keys + more)).unwrap() >= base);
        }
    }
}
