//! How long a step takes, learnt from the steps that were measured. Pure: numbers in, a number out.
//!
//! The time of a pass is nearly flat in the number of rows while weights are read from memory and grows in proportion
//! once the multiply units are busy; where it bends depends on model and machine. So time is kept for classes of row
//! counts, without a formula; what lies between is interpolated. Attention adds a time for each key that a row looks at and
//! one for each that is read, two numbers for all classes: the rows of a chunk read their keys together. A
//! draft service at work on the same machine makes all steps slower by one factor.

use crate::{
    key_costs::{Deviations, KeyCosts},
    load::Load,
};

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
/// A step in which attention takes more than this says nothing of others' rows: neither of their pace nor that they take less.
const MOST_SHARE_OF_KEYS: f64 = 0.5;
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

/// Means of one class.
#[derive(Clone, Copy, Debug, Default)]
struct Class {
    n_seen: f64,
    n_rows: f64,
    n_keys: f64,
    n_reads: f64,
    ms: f64,
}

/// The model of one group's steps.
#[derive(Clone, Debug)]
pub struct StepTimes {
    classes: [Class; N_CLASSES],
    /// What predictions are read off: rows and milliseconds without attention of each class that was seen, and what keys
    /// add. It follows from the rest, and changes with each measurement only.
    curve: Vec<(f64, f64)>,
    key_costs: KeyCosts,
    deviations: Deviations,
    /// What steps take while somebody drafts, beside what they take else.
    slowness: f64,
    n_busy: u32,
}

impl Default for StepTimes {
    fn default() -> Self {
        Self {
            classes: [Class::default(); N_CLASSES],
            curve: Vec::with_capacity(N_CLASSES),
            key_costs: KeyCosts::default(),
            deviations: Deviations::default(),
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
        let (more_keys, more_reads) =
            (load.n_keys as f64 - class.n_keys, load.n_reads as f64 - class.n_reads);
        let usual_ms =
            (class.ms + self.key_costs.ms(more_keys, more_reads)).max(class.ms * LEAST_SHARE_OF_ROWS);
        let ms = match class.n_seen >= N_SETTLED {
            true => ms.clamp(usual_ms / MOST_DEVIATION, usual_ms * MOST_DEVIATION),
            false => ms,
        };
        let more_ms = ms - class.ms;
        if class.n_seen > 0.0 {
            // In a class of many rows a further one costs as much as the mean of them.
            let rows_ms = class.ms - self.key_costs.ms(class.n_keys, class.n_reads);
            let by_rows_ms = (load.n_rows as f64 / class.n_rows - 1.0) * rows_ms.max(0.0);
            let by_keys_ms = more_ms - by_rows_ms;
            self.deviations.add(more_keys / usual_ms, more_reads / usual_ms, by_keys_ms / usual_ms);
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
        class.n_reads += rate * more_reads;
        class.ms += rate * more_ms;
        let keys_ms = self.key_costs.ms(load.n_keys as f64, load.n_reads as f64);
        if is_pace && keys_ms <= MOST_SHARE_OF_KEYS * usual_ms {
            let pace = 1.0 + PACE.0 * (ms / usual_ms - 1.0);
            let few = self.classes[..N_SINGLE].iter_mut().enumerate();
            few.filter(|(other, _)| *other != idx).for_each(|(_, class)| class.ms *= pace);
        }
        self.draw();
    }

    /// Milliseconds of reading so many keys once more.
    pub fn read_ms(&self, n_keys: usize) -> f64 {
        self.key_costs.ms(0.0, n_keys as f64)
    }

    /// Milliseconds that a further row takes in a step of many rows, as those are that read prompts; `None` where none was
    /// measured.
    pub fn row_of_many_ms(&self) -> Option<f64> {
        let n_rows = self.curve.last().map(|(n_rows, _)| *n_rows as usize).filter(|n| *n > N_SINGLE)?;
        let (all, half) = (self.predict(Load::plain(n_rows))?, self.predict(Load::plain(n_rows / 2))?);
        Some((all - half) / (n_rows - n_rows / 2) as f64)
    }

    /// Whether a step of about so many rows was measured.
    pub fn knows(&self, n_rows: usize) -> bool {
        self.classes[class_of(n_rows)].n_seen > 0.0
    }

    /// Whether such steps were measured so often that one measurement says little.
    pub fn is_settled(&self, n_rows: usize) -> bool {
        self.classes[class_of(n_rows)].n_seen >= N_SETTLED
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
            let half = load.with_rows(load.n_rows / 2);
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
        Some(rows_ms + self.key_costs.ms(load.n_keys as f64, load.n_reads as f64))
    }

    /// Milliseconds of each class without attention. A disturbance only ever makes a step slower, so no class takes
    /// longer than one of more rows.
    fn draw(&mut self) {
        self.key_costs = self.deviations.costs();
        self.curve.clear();
        let mut least = f64::INFINITY;
        for class in self.classes.iter().rev().filter(|class| class.n_seen > 0.0) {
            let keys_ms = self.key_costs.ms(class.n_keys, class.n_reads);
            let rows_ms = (class.ms - keys_ms).max(class.ms * LEAST_SHARE_OF_ROWS).min(least);
            if keys_ms <= MOST_SHARE_OF_KEYS * class.ms {
                least = rows_ms;
            }
            self.curve.push((class.n_rows, rows_ms));
        }
        self.curve.reverse();
        // Those that say nothing of others: they take as long as ones of fewer rows at least.
        let mut least = 0.0f64;
        for (_, ms) in &mut self.curve {
            least = least.max(*ms);
            *ms = least;
        }
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
        let ms =
            predict(load.with_rows(load.n_rows + n_more)).max(self.ms + self.least_row_ms * n_more as f64);
        let class = class_of(load.n_rows + n_more);
        let n_alike = if class < N_SINGLE { N_SINGLE } else { N_CLASSES };
        if n_more == 0 || times.classes[class..n_alike].iter().any(|class| class.n_seen > 0.0) {
            return ms;
        }
        // Beyond the most rows that were measured, the plain ones at least.
        let plain = class_of(load.n_rows).min(class);
        let known = times.classes[plain..class].iter().rposition(|class| class.n_seen > 0.0);
        let n_known = known.map_or(0, |known| plain + known + 1).clamp(load.n_rows, load.n_rows + n_more);
        let known_ms = predict(load.with_rows(n_known));
        let n_beyond = load.n_rows + n_more - n_known;
        let assumed_ms = known_ms * (1.0 + ASSUMED_SLOPE * n_beyond as f64);
        if n_beyond <= ASSUMED_ROWS { ms.min(assumed_ms) } else { ms }
    }
}

fn between((x0, y0): (f64, f64), (x1, y1): (f64, f64), x: f64) -> f64 {
    y0 + (y1 - y0) * ((x - x0) / (x1 - x0).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
}

#[cfg(test)]
#[path = "step_times_tests.rs"]
mod tests;
