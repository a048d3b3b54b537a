//! How long a step takes, learnt from the steps that were measured. Pure: numbers in, a number out.
//!
//! The time of a pass is nearly flat in the number of rows while weights are read from memory and grows in proportion
//! once the multiply units are busy; where it bends depends on model and machine. So time is kept for classes of row
//! counts, without a formula; what lies between is interpolated. Attention adds a time for each key that a row looks at,
//! one number for all classes. A draft service at work on the same machine makes all steps slower by one factor.

use paceline_domain::StepPlan;

/// Row counts that are classes of their own: a few rows more may be nearly free, or meet a cliff.
const N_SINGLE: usize = 16;
/// Those, then two to an octave, up to 65,535 rows.
const N_CLASSES: usize = N_SINGLE + 24;
/// A class remembers about this many steps.
const MEMORY: f64 = 16.0;
/// How much of what a step of few rows takes longer or less long than expected is thought to be the pace of all of them, from
/// so many measurements of its class on: memory, which binds them, changes its pace for minutes, and what was measured at
/// one pace says nothing at another. The class itself moves by a little more: that is how classes are told apart.
const PACE: (f64, f64) = (1.0 / 8.0, 32.0);
const OWN_PACE: f64 = 1.0 / 64.0;
/// A measurement counts as at most this many times the mean, and at least its inverse: something else used the machine.
const MOST_DEVIATION: f64 = 1.5;
/// From so many measurements on a deviation can be told.
const N_SETTLED: f64 = 4.0;
/// What rows take of a step at least, however many keys they look at; a wrong cost of keys does no more harm than that.
const LEAST_SHARE_OF_ROWS: f64 = 0.25;
/// What an older step still weighs for the cost of attention.
const FORGETTING: f64 = 0.99;
/// What a further row is thought to cost of a step before so many rows were measured: little, so that it is tried; and how
/// many rows further, so that a try costs little if it is not so.
const ASSUMED_SLOPE: f64 = 0.05;
const ASSUMED_ROWS: usize = 3;
/// From so many rows on a further one costs at least this part of what those of the last doubling cost each: what is bound by
/// arithmetic does not become cheaper, though classes that were measured at different paces may look like it.
const STEEP: (usize, f64) = (8, 0.9);
/// How fast the slowness beside a draft service is learnt at least, and its bounds.
const SLOWNESS_RATE: f64 = 0.1;
const SLOWNESS: (f64, f64) = (1.0, 4.0);
/// Steps beside a draft service, and the slowness of them, that show that it computes on the same cores: two who want all of
/// them take at least twice as long.
const SHARED: (u32, f64) = (6, 1.7);

/// Whether the draft service is at work during a step, perhaps on the same machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Drafting {
    /// It is.
    Busy,
    /// Nobody drafts.
    #[default]
    Quiet,
}

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

    /// What a plan has to do.
    pub fn of(plan: &StepPlan) -> Self {
        let chunks = plan.chunks.iter();
        let loads = chunks.map(|chunk| Self::rows(chunk.start_pos as usize, chunk.tokens.len()));
        loads.fold(Self::default(), Self::and)
    }

    /// With so many rows more that look at as many keys as the others.
    pub fn and_rows(self, n_more: usize) -> Self {
        let n_keys = self.n_keys + self.n_keys * n_more / self.n_rows.max(1);
        Self { n_rows: self.n_rows + n_more, n_keys }
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
#[derive(Clone, Debug)]
pub struct StepTimes {
    classes: [Class; N_CLASSES],
    /// What predictions are read off: rows and milliseconds without attention of each class that was seen, and what a key
    /// adds. It follows from the rest, and changes with each measurement only.
    curve: Vec<(f64, f64)>,
    ms_per_key: f64,
    /// Sums over deviations from the means of a class: keys times milliseconds, and keys squared.
    keys_ms: f64,
    keys_keys: f64,
    /// What steps take while somebody drafts, beside what they take else.
    slowness: f64,
    n_busy: u32,
}

impl Default for StepTimes {
    fn default() -> Self {
        Self {
            classes: [Class::default(); N_CLASSES],
            curve: Vec::with_capacity(N_CLASSES),
            ms_per_key: 0.0,
            keys_ms: 0.0,
            keys_keys: 0.0,
            slowness: 1.0,
            n_busy: 0,
        }
    }
}

fn class_of(n_rows: usize) -> usize {
    let n_rows = n_rows.clamp(1, 65_535);
    if n_rows <= N_SINGLE {
        return n_rows - 1;
    }
    let octave = n_rows.ilog2() as usize;
    let is_upper_half = (n_rows >> (octave - 1)) & 1 == 1;
    N_SINGLE + 2 * (octave - N_SINGLE.ilog2() as usize) + usize::from(is_upper_half)
}

impl StepTimes {
    /// Takes a measurement. While somebody drafts it tells how much slower that makes steps, where their times are known.
    pub fn observe(&mut self, load: Load, ms: f64, drafting: Drafting) {
        if load.n_rows == 0 || !ms.is_finite() || ms <= 0.0 {
            return;
        }
        match self.predict(load).filter(|_| self.knows(load.n_rows)) {
            Some(quiet_ms) if drafting == Drafting::Busy => {
                let seen = (ms / quiet_ms).clamp(1.0 / SLOWNESS.1, SLOWNESS.1);
                // The first ones count more: until it is known, what drafting costs is not.
                let rate = SLOWNESS_RATE.max(1.0 / f64::from(self.n_busy + 2));
                let slowness = self.slowness + rate * (seen - self.slowness);
                self.n_busy = self.n_busy.saturating_add(1);
                self.slowness = slowness.clamp(SLOWNESS.0, SLOWNESS.1);
            }
            None if drafting == Drafting::Busy => self.observe_quiet(load, ms / self.slowness),
            _ => self.observe_quiet(load, ms),
        }
    }

    fn observe_quiet(&mut self, load: Load, ms: f64) {
        let idx = class_of(load.n_rows);
        let class = &mut self.classes[idx];
        let more_keys = load.n_keys as f64 - class.n_keys;
        let usual_ms = (class.ms + self.ms_per_key * more_keys).max(class.ms * LEAST_SHARE_OF_ROWS);
        let ms = match class.n_seen >= N_SETTLED {
            true => ms.clamp(usual_ms / MOST_DEVIATION, usual_ms * MOST_DEVIATION),
            false => ms,
        };
        let more_ms = ms - class.ms;
        if class.n_seen > 0.0 {
            self.keys_ms = self.keys_ms * FORGETTING + more_keys * more_ms;
            self.keys_keys = self.keys_keys * FORGETTING + more_keys * more_keys;
        }
        class.n_seen = (class.n_seen + 1.0).min(PACE.1);
        let is_pace = idx < N_SINGLE && class.n_seen >= PACE.1;
        let rate = match is_pace {
            true => PACE.0 + OWN_PACE,
            false if idx < N_SINGLE => 1.0 / class.n_seen,
            false => 1.0 / class.n_seen.min(MEMORY),
        };
        class.n_rows += rate * (load.n_rows as f64 - class.n_rows);
        class.n_keys += rate * more_keys;
        class.ms += rate * more_ms;
        if is_pace {
            let pace = 1.0 + PACE.0 * (ms / usual_ms - 1.0);
            let few = self.classes[..N_SINGLE].iter_mut().enumerate();
            few.filter(|(other, _)| *other != idx).for_each(|(_, class)| class.ms *= pace);
        }
        self.draw();
    }

    /// Whether a step of about so many rows was measured.
    pub fn knows(&self, n_rows: usize) -> bool {
        self.classes[class_of(n_rows)].n_seen > 0.0
    }

    /// What steps take while somebody drafts, beside what they take else; at least 1.
    pub fn slowness(&self, drafting: Drafting) -> f64 {
        if drafting == Drafting::Busy { self.slowness } else { 1.0 }
    }

    /// Whether who drafts evidently computes on the same cores.
    pub fn shows_shared_cores(&self) -> bool {
        self.n_busy >= SHARED.0 && self.slowness >= SHARED.1
    }

    /// A step as it is, to ask what further rows would take; `None` before the first measurement.
    pub fn beside(&self, load: Load) -> Option<Beside<'_>> {
        let ms = self.predict(load)?;
        let mut least_row_ms = 0.0;
        if load.n_rows >= STEEP.0 {
            let half = Load { n_rows: load.n_rows / 2, n_keys: load.n_keys / 2 };
            least_row_ms = STEEP.1 * (ms - self.predict(half)?) / (load.n_rows - half.n_rows) as f64;
        }
        Some(Beside { times: self, load, ms, least_row_ms })
    }

    /// Milliseconds a step will take while nobody drafts; `None` before the first measurement. Never less for more rows or
    /// keys.
    pub fn predict(&self, load: Load) -> Option<f64> {
        let n_rows = load.n_rows as f64;
        let place = self.curve.partition_point(|(rows, _)| *rows < n_rows);
        let below = place.checked_sub(1).map(|below| self.curve[below]);
        let rows_ms = match (below, self.curve.get(place)) {
            (Some(below), Some(here)) => between(below, *here, n_rows),
            (None, Some((_, ms))) => *ms,
            // Beyond what was measured every row costs as much as the mean of those that were.
            (Some((rows, ms)), None) => ms * n_rows / rows,
            (None, None) => return None,
        };
        Some(rows_ms + self.ms_per_key * load.n_keys as f64)
    }

    /// Milliseconds of each class without attention. A disturbance only ever makes a step slower, so no class takes
    /// longer than one of more rows.
    fn draw(&mut self) {
        self.ms_per_key = self.ms_per_key();
        self.curve.clear();
        let mut least = f64::INFINITY;
        for class in self.classes.iter().rev().filter(|class| class.n_seen > 0.0) {
            let without_keys =
                (class.ms - self.ms_per_key * class.n_keys).max(class.ms * LEAST_SHARE_OF_ROWS);
            least = least.min(without_keys);
            self.curve.push((class.n_rows, least));
        }
        self.curve.reverse();
    }

    fn ms_per_key(&self) -> f64 {
        if self.keys_keys > 0.0 { (self.keys_ms / self.keys_keys).max(0.0) } else { 0.0 }
    }
}

/// What a step takes with further rows, where many counts of them are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Beside<'a> {
    times: &'a StepTimes,
    load: Load,
    /// Without further rows.
    ms: f64,
    /// What a further row takes at least.
    least_row_ms: f64,
}

impl Beside<'_> {
    /// The step without further rows.
    pub fn load(&self) -> Load {
        self.load
    }

    /// Milliseconds with `n_more` rows. Where as many were never measured they are thought to cost little; prompts, whose
    /// rows are bound by arithmetic, say nothing of a few.
    pub fn ms(&self, n_more: usize) -> f64 {
        let Self { times, load, .. } = *self;
        let predict = |load| times.predict(load).unwrap_or(self.ms);
        let ms = predict(load.and_rows(n_more)).max(self.ms + self.least_row_ms * n_more as f64);
        let class = class_of(load.n_rows + n_more);
        let n_alike = if class < N_SINGLE { N_SINGLE } else { N_CLASSES };
        if n_more == 0 || times.classes[class..n_alike].iter().any(|class| class.n_seen > 0.0) {
            return ms;
        }
        // Beyond the most rows that were measured, the plain ones at least.
        let plain = class_of(load.n_rows).min(class);
        let known = times.classes[plain..class].iter().rposition(|class| class.n_seen > 0.0);
        let n_known = known.map_or(0, |known| plain + known + 1).clamp(load.n_rows, load.n_rows + n_more);
        let known_ms = predict(load.and_rows(n_known - load.n_rows));
        let n_beyond = load.n_rows + n_more - n_known;
        let assumed_ms = known_ms * (1.0 + ASSUMED_SLOPE * n_beyond as f64);
        if n_beyond <= ASSUMED_ROWS { ms.min(assumed_ms) } else { ms }
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

    fn with_rows(times: &StepTimes, load: Load, n_more: usize) -> f64 {
        times.beside(load).expect("something was measured").ms(n_more)
    }

    /// A machine: flat up to 8 rows, then half a millisecond a row; a microsecond for 10 keys.
    fn true_ms(load: Load) -> f64 {
        (load.n_rows as f64 * 0.5).max(4.0) + load.n_keys as f64 * 1e-4
    }

    #[test]
    fn few_rows_are_told_apart_and_many_by_half_octaves() {
        let classes: Vec<usize> = [1, 2, 15, 16, 17, 23, 24, 31, 32, 47, 48, 100_000].map(class_of).into();
        assert_eq!(classes, [0, 1, 14, 15, 16, 16, 17, 17, 18, 18, 19, N_CLASSES - 1]);
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
            times.observe(seen, true_ms(seen), Drafting::Quiet);
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
        (0..50).for_each(|_| times.observe(load(1, 10), 4.0, Drafting::Quiet));
        times.observe(load(1, 10), 400.0, Drafting::Quiet);
        assert!(times.predict(load(1, 10)).unwrap() < 4.5);
        (0..200).for_each(|_| times.observe(load(1, 10), 40.0, Drafting::Quiet));
        assert!(times.predict(load(1, 10)).unwrap() > 39.0);
    }

    #[test]
    fn a_change_of_pace_is_one_of_all_steps_of_few_rows() {
        let mut times = StepTimes::default();
        let measure = |times: &mut StepTimes, n_rows: usize, ms: f64| {
            times.observe(load(n_rows, 0), ms, Drafting::Quiet);
        };
        for _ in 0..70 {
            for (n, ms) in [(1, 40.0), (4, 42.0), (8, 64.0), (200, 900.0)] {
                measure(&mut times, n, ms);
            }
        }
        // Memory is twice as fast from now on, and nothing but plain steps is measured.
        (0..80).for_each(|_| measure(&mut times, 1, 20.0));
        let ratio = |n| times.predict(load(n, 0)).unwrap() / times.predict(load(1, 0)).unwrap();
        assert!((ratio(4) - 1.05).abs() < 0.12 && (ratio(8) - 1.6).abs() < 0.18, "{} {}", ratio(4), ratio(8));
        assert_eq!(times.predict(load(200, 0)), Some(900.0), "many rows are bound by something else");
    }

    #[test]
    fn longer_and_longer_texts_at_one_pace_leave_all_classes_where_they_are() {
        let mut times = StepTimes::default();
        for i in 0..3_000 {
            // Texts grow from 40 tokens to 168, again and again; four rows are seen now and then at first.
            let n_rows = if i < 200 && i % 5 == 0 { 4 } else { 1 };
            let load = load(n_rows, n_rows * (40 + i % 128));
            times.observe(load, 30.0 + 0.002 * load.n_keys as f64, Drafting::Quiet);
        }
        for n_rows in [1, 4] {
            let (found, expected) =
                (times.predict(load(n_rows, n_rows * 100)).unwrap(), 30.0 + 0.2 * n_rows as f64);
            assert!((found / expected - 1.0).abs() < 0.05, "{n_rows} rows: {found} ms instead of {expected}");
        }
    }

    #[test]
    fn a_class_that_began_badly_misleads_no_other() {
        let mut times = StepTimes::default();
        (0..60).for_each(|_| times.observe(load(1, 0), 30.0, Drafting::Quiet));
        // The first steps of four rows were disturbed.
        (0..3).for_each(|_| times.observe(load(4, 0), 60.0, Drafting::Quiet));
        for _ in 0..4 {
            (0..40).for_each(|_| times.observe(load(4, 0), 31.0, Drafting::Quiet));
            let plain = times.predict(load(1, 0)).unwrap();
            assert!((26.0..31.5).contains(&plain), "{plain}");
            (0..40).for_each(|_| times.observe(load(1, 0), 30.0, Drafting::Quiet));
        }
        let four = times.predict(load(4, 0)).unwrap();
        assert!((29.9..33.0).contains(&four), "{four}");
    }

    #[test]
    fn beyond_what_was_measured_every_row_counts_in_full() {
        let mut times = StepTimes::default();
        times.observe(load(10, 0), 5.0, Drafting::Quiet);
        assert_eq!(times.predict(load(5, 0)), Some(5.0));
        assert_eq!(times.predict(load(40, 0)), Some(20.0));
    }

    #[test]
    fn a_cliff_between_few_rows_is_seen() {
        let truth = |n_rows: usize| if n_rows <= 4 { 30.0 } else { 48.0 };
        let mut times = StepTimes::default();
        (0..90).for_each(|i| times.observe(load(1 + i % 9, 0), truth(1 + i % 9), Drafting::Quiet));
        for n_rows in [1, 4, 5, 9] {
            let found = times.predict(load(n_rows, 0)).unwrap();
            assert!((found - truth(n_rows)).abs() < 0.5, "{n_rows} rows: {found} ms");
        }
    }

    #[test]
    fn rows_that_were_never_tried_are_thought_cheap_until_they_are() {
        let mut times = StepTimes::default();
        assert_eq!(times.beside(load(1, 0)).map(|step| step.ms(1)), None);
        times.observe(load(1, 0), 10.0, Drafting::Quiet);
        assert_eq!(with_rows(&times, load(1, 0), 0), 10.0);
        assert_eq!(with_rows(&times, load(1, 0), 3), 11.5);
        times.observe(load(61, 0), 610.0, Drafting::Quiet);
        assert_eq!(with_rows(&times, load(1, 0), 3), 11.5, "a prompt is something else");
        assert!(with_rows(&times, load(1, 0), 4) > 40.0, "but one does not go far without knowing");
        times.observe(load(3, 0), 12.0, Drafting::Quiet);
        assert_eq!(with_rows(&times, load(1, 0), 3), 12.0 * 1.05, "a row more than was measured");
        times.observe(load(4, 0), 40.0, Drafting::Quiet);
        assert_eq!(with_rows(&times, load(1, 0), 3), 40.0);
        assert_eq!(load(2, 30).and_rows(1), load(3, 45));
    }

    #[test]
    fn rows_beside_many_cost_no_less_than_those_before() {
        let mut times = StepTimes::default();
        for (n_rows, ms) in [(4, 4.0), (8, 5.0), (16, 9.0), (20, 9.5)] {
            times.observe(load(n_rows, 0), ms, Drafting::Quiet);
        }
        // Half a millisecond for each of the last eight rows.
        assert_eq!(with_rows(&times, load(16, 0), 4), 9.0 + 4.0 * 0.9 * 0.5);
        assert_eq!(with_rows(&times, load(4, 0), 4), 5.0, "a few may be free");
        assert_eq!(times.predict(load(20, 0)), Some(9.5));
    }

    #[test]
    fn steps_beside_a_draft_tell_how_much_slower_they_are_and_nothing_else() {
        let mut times = StepTimes::default();
        (0..9).for_each(|_| times.observe(load(1, 0), 10.0, Drafting::Quiet));
        (0..60).for_each(|_| times.observe(load(1, 0), 15.0, Drafting::Busy));
        assert_eq!(times.predict(load(1, 0)), Some(10.0));
        assert!(
            (times.slowness(Drafting::Busy) - 1.5).abs() < 0.01 && times.slowness(Drafting::Quiet) == 1.0
        );
        times.observe(load(8, 0), 30.0, Drafting::Busy);
        let eight = times.predict(load(8, 0)).unwrap();
        assert!((eight - 20.0).abs() < 0.2, "{eight}");
        assert!(!times.shows_shared_cores());
    }

    #[test]
    fn a_draft_on_the_same_cores_is_found_out_soon() {
        let mut times = StepTimes::default();
        (0..4).for_each(|_| times.observe(load(1, 0), 10.0, Drafting::Quiet));
        times.observe(load(1, 0), 24.0, Drafting::Busy);
        assert!(
            times.slowness(Drafting::Busy) > 1.6 && !times.shows_shared_cores(),
            "once may be an accident"
        );
        (0..5).for_each(|_| times.observe(load(1, 0), 24.0, Drafting::Busy));
        assert!(times.shows_shared_cores());
    }

    proptest! {
        #[test]
        fn more_work_never_takes_less_time(
            seen in prop::collection::vec((1usize..600, 0usize..100_000, 0.0f64..500.0), 1..60),
            (n_rows, n_keys, more) in (1usize..700, 0usize..100_000, 0usize..100),
        ) {
            let mut times = StepTimes::default();
            seen.into_iter().for_each(|(n_rows, n_keys, ms)| times.observe(load(n_rows, n_keys), ms, Drafting::Quiet));
            let base = times.predict(load(n_rows, n_keys)).unwrap();
            prop_assert!(base.is_finite());
            prop_assert!(times.predict(load(n_rows + more, n_keys)).unwrap() >= base - 1e-9 * base.abs());
            prop_assert!(times.predict(load(n_rows, n_keys + more)).unwrap() >= base);
        }
    }
}
