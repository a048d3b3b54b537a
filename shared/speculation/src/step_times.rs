//! How long a step takes by its number of rows: a shape, and medians of recent steps beside it. It reads no clock.

use std::collections::VecDeque;

/// Row counts that are told apart beyond the first 32; steps dispatch differently at some counts, so times need not rise
/// evenly.
const LARGE_KNOTS: [usize; 10] = [40, 48, 64, 96, 128, 192, 256, 512, 1_024, 4_096];
const N_SMALL_KNOTS: usize = 32;
const N_KNOTS: usize = N_SMALL_KNOTS + LARGE_KNOTS.len();
/// What an unseen step takes: 1 + this for each further row.
const ASSUMED_SLOPE: f64 = 0.1;
/// Recent steps whose median moves the common level, and how fast.
const N_DRIFTS: usize = 5;
const LEVEL_RATE: f64 = 0.2;
/// Steps that a knot's ratio remembers.
const RATIO_MEMORY: f64 = 16.0;

/// Predicts the time of a step.
pub trait StepCost {
    /// Milliseconds of a step with this many rows.
    fn step_ms(&self, n_rows: usize) -> f64;
}

impl<F: Fn(usize) -> f64> StepCost for F {
    fn step_ms(&self, n_rows: usize) -> f64 {
        self(n_rows)
    }
}

/// Measured times. Steps get slower as contexts grow: a common level follows that quickly, and how each row count stands
/// to it is learned slowly, so that row counts which are seldom seen are not thought faster than they have become.
#[derive(Clone, Debug)]
pub struct StepTimes {
    /// Milliseconds of one row, about; 0 before the first step.
    level_ms: f64,
    /// Observed over predicted time of recent steps.
    drifts: VecDeque<f64>,
    knots: [Knot; N_KNOTS],
}

/// How a row count stands to level and shape.
#[derive(Clone, Copy, Debug, Default)]
struct Knot {
    n_seen: f64,
    ratio: f64,
}

impl Default for StepTimes {
    fn default() -> Self {
        Self { level_ms: 0.0, drifts: VecDeque::new(), knots: [Knot::default(); N_KNOTS] }
    }
}

impl StepTimes {
    /// Nothing measured: predictions are of a made-up unit and right in proportion only.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether anything was measured.
    pub fn is_measured(&self) -> bool {
        self.level_ms > 0.0
    }

    /// Takes in a step.
    pub fn observe(&mut self, n_rows: usize, step_ms: f64) {
        if n_rows == 0 || !step_ms.is_finite() || step_ms <= 0.0 {
            return;
        }
        if !self.is_measured() {
            self.level_ms = step_ms / shape(n_rows);
        }
        // A row count that was never seen says nothing of the level.
        if self.knots[knot(n_rows)].n_seen > 0.0 {
            self.drifts.truncate(N_DRIFTS - 1);
            self.drifts.push_front(step_ms / self.step_ms(n_rows));
            self.level_ms *= 1.0 + LEVEL_RATE * (median(&self.drifts).clamp(0.5, 2.0) - 1.0);
        }
        self.knots[knot(n_rows)].observe(step_ms / (self.level_ms * shape(n_rows)));
    }

    /// Milliseconds at a knot that was seen.
    fn knot_ms(&self, knot: usize) -> f64 {
        self.level_ms * shape(rows_of(knot)) * self.knots[knot].ratio
    }
}

impl Knot {
    fn observe(&mut self, ratio: f64) {
        self.n_seen = (self.n_seen + 1.0).min(RATIO_MEMORY);
        // One step that was held up is not to be believed, once there are others.
        let believed =
            if self.n_seen > 2.0 { ratio.clamp(0.5 * self.ratio, 2.0 * self.ratio) } else { ratio };
        self.ratio += (believed - self.ratio) / self.n_seen;
    }
}

impl StepCost for StepTimes {
    /// On the line between the nearest row counts that were seen, or along the shape from the only one.
    fn step_ms(&self, n_rows: usize) -> f64 {
        let at = knot(n_rows);
        let is_seen = |knot: &usize| self.knots[*knot].n_seen > 0.0;
        let below = (0..=at).rev().find(is_seen);
        let above = (at + usize::from(rows_of(at) < n_rows)..N_KNOTS).find(is_seen);
        match (below, above) {
            (Some(below), Some(above)) if below < above => {
                let (first, last) = (rows_of(below) as f64, rows_of(above) as f64);
                let share = (n_rows as f64 - first) / (last - first);
                self.knot_ms(below) * (1.0 - share) + self.knot_ms(above) * share
            }
            (Some(one), _) | (None, Some(one)) => self.level_ms * shape(n_rows) * self.knots[one].ratio,
            (None, None) => shape(n_rows),
        }
    }
}

fn shape(n_rows: usize) -> f64 {
    1.0 + ASSUMED_SLOPE * n_rows.saturating_sub(1) as f64
}

/// The largest knot that is not above.
fn knot(n_rows: usize) -> usize {
    if n_rows <= N_SMALL_KNOTS {
        return n_rows.saturating_sub(1);
    }
    N_SMALL_KNOTS - 1 + LARGE_KNOTS.iter().filter(|knot| **knot <= n_rows).count()
}

fn rows_of(knot: usize) -> usize {
    if knot < N_SMALL_KNOTS { knot + 1 } else { LARGE_KNOTS[knot - N_SMALL_KNOTS] }
}

fn median(values: &VecDeque<f64>) -> f64 {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Predicted over true time, after these steps.
    fn off_by(times: &StepTimes, n_rows: usize, truth: impl Fn(usize) -> f64) -> f64 {
        times.step_ms(n_rows) / truth(n_rows)
    }

    #[test]
    fn predictions_come_to_what_is_measured_even_with_a_cliff() {
        let truth = |n_rows: usize| if n_rows <= 8 { 68.0 } else { 106.0 };
        let mut times = StepTimes::new();
        (0..300).for_each(|i| times.observe(1 + i % 24, truth(1 + i % 24)));
        for n_rows in [1, 4, 8, 10, 16, 23] {
            let off = off_by(&times, n_rows, truth);
            assert!((0.93..1.07).contains(&off), "{n_rows} rows: {off}");
        }
    }

    #[test]
    fn few_steps_give_the_level_of_all() {
        let mut times = StepTimes::new();
        assert!(!times.is_measured());
        (0..3).for_each(|_| times.observe(1, 40.0));
        assert!(times.is_measured());
        assert!((39.0..41.0).contains(&times.step_ms(1)));
        assert!((50.0..60.0).contains(&times.step_ms(5)), "{}", times.step_ms(5));
    }

    #[test]
    fn a_step_that_was_held_up_is_ignored_and_a_slower_world_is_not() {
        let mut times = StepTimes::new();
        (0..50).for_each(|_| times.observe(2, 20.0));
        (0..50).for_each(|_| times.observe(4, 24.0));
        times.observe(2, 9_000.0);
        assert!((18.0..23.0).contains(&times.step_ms(2)), "{}", times.step_ms(2));
        // Contexts grow; only steps of 2 rows are seen.
        (0..400).for_each(|_| times.observe(2, 40.0));
        assert!((38.0..42.0).contains(&times.step_ms(2)));
        assert!(times.step_ms(4) > 40.0, "{}", times.step_ms(4));
    }

    #[test]
    fn nonsense_is_not_taken_in() {
        let mut times = StepTimes::new();
        for ms in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            times.observe(1, ms);
        }
        times.observe(0, 5.0);
        assert!(!times.is_measured());
        assert_eq!((|n_rows: usize| n_rows as f64 * 2.0).step_ms(3), 6.0);
    }

    #[test]
    fn every_row_count_has_a_knot() {
        for n_rows in 1..10_000 {
            let knot = knot(n_rows);
            assert!(
                rows_of(knot) <= n_rows && (knot + 1 == N_KNOTS || rows_of(knot + 1) > n_rows),
                "{n_rows}"
            );
        }
    }
}
