//! `HashModel`: a test double of a device. Its KV memory is real (blocks, slots, layers), its arithmetic is a hash: the
//! logits of a row depend on every KV entry that a correct cache holds for the row, read through the block table, and on
//! nothing else. A stale, foreign or missing entry gives other tokens. It computes nothing a model would.

mod definition;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use paceline_collectives::Collective;
use paceline_domain::{BlockCopy, BlockId, ErrorKind, group::BLOCK_POSITIONS};
use paceline_model::{
    Backend, Batch, Device, LoadSpec, ModelError,
    backend::{Half, Pass},
    logits::LogitRows,
};

use self::definition::{N_LAYERS, absorb, attended, embed, entry, logit};
pub use self::definition::{Request, scores_alone, tokens_after, tokens_alone};

/// What KV memory holds before anything is written.
const POISON: u64 = 0x0bad_0bad_0bad_0bad;

/// A device that hashes. Clones share their counters and their flaw.
#[derive(Clone, Debug, Default)]
pub struct HashModel {
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    flaw: Flaw,
    /// What a pass takes, whatever its rows.
    pass: Duration,
    /// Neither loads nor computes.
    is_broken: AtomicBool,
    /// The next failure breaks it.
    breaks: AtomicBool,
    /// Passes until one fails; negative when none will.
    n_until_failure: AtomicI64,
    n_failed: AtomicU64,
    n_copied: AtomicU64,
    n_loaded: AtomicU64,
    n_passes: AtomicU64,
    numerics: AtomicU32,
    recorded: Option<Mutex<Vec<RecordedPass>>>,
}

/// A way in which KV memory can be wrong, to prove that tests notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Flaw {
    /// It is right.
    #[default]
    None,
    /// What is written to the last slot of a block is lost.
    LostWrite,
    /// Every second block of a table is read where its predecessor lies.
    ForeignBlock,
    /// A position is read as the pass before left it.
    StaleEntry,
    /// A block that should become a copy of another stays as it is.
    LostCopy,
}

/// One pass as the device saw it.
#[derive(Clone, Copy, Debug)]
pub struct RecordedPass {
    /// Token rows.
    pub n_rows: usize,
    /// Sequences with rows in it.
    pub n_sequences: usize,
    /// The batch came.
    pub began: Instant,
    /// The last logits were asked for.
    pub ended: Instant,
}

impl HashModel {
    /// Right in everything, nothing recorded.
    pub fn new() -> Self {
        Self::flawed(Flaw::None)
    }

    /// Wrong in one way.
    pub fn flawed(flaw: Flaw) -> Self {
        Self { state: Arc::new(State { flaw, n_until_failure: AtomicI64::new(-1), ..State::default() }) }
    }

    /// Right in everything; a pass takes so long, whatever its rows, so that several tokens a pass are worth something.
    pub fn taking(pass: Duration) -> Self {
        Self { state: Arc::new(State { pass, n_until_failure: AtomicI64::new(-1), ..State::default() }) }
    }

    /// As [`Self::taking`]; passes are recorded for [`Self::take_recorded`].
    pub fn recording(pass: Duration) -> Self {
        let (recorded, n_until_failure) = (Some(Mutex::new(Vec::new())), AtomicI64::new(-1));
        Self { state: Arc::new(State { pass, recorded, n_until_failure, ..State::default() }) }
    }

    /// Lets the pass after the next `n_passes` fail, once.
    pub fn fail_after(&self, n_passes: u32) {
        self.state.n_until_failure.store(i64::from(n_passes), Ordering::Relaxed);
    }

    /// Lets the pass after the next `n_passes` fail, and every pass and load from then on until it is repaired.
    pub fn break_after(&self, n_passes: u32) {
        self.state.breaks.store(true, Ordering::Relaxed);
        self.fail_after(n_passes);
    }

    /// Whether it neither loads nor computes.
    pub fn is_broken(&self) -> bool {
        self.state.is_broken.load(Ordering::Relaxed)
    }

    /// It is well again, and will be.
    pub fn repair(&self) {
        self.state.n_until_failure.store(-1, Ordering::Relaxed);
        self.state.breaks.store(false, Ordering::Relaxed);
        self.state.is_broken.store(false, Ordering::Relaxed);
    }

    /// From its next load on it says that its bits depend on this, which is 0 at first. They do not.
    pub fn set_numerics(&self, numerics: u32) {
        self.state.numerics.store(numerics, Ordering::Relaxed);
    }

    /// Passes so far, on all ranks.
    pub fn n_passes(&self) -> u64 {
        self.state.n_passes.load(Ordering::Relaxed)
    }

    /// Passes that failed so far, on all ranks.
    pub fn n_failed(&self) -> u64 {
        self.state.n_failed.load(Ordering::Relaxed)
    }

    /// How often it was loaded, on all ranks: once for each life of a group.
    pub fn n_loaded(&self) -> u64 {
        self.state.n_loaded.load(Ordering::Relaxed)
    }

    /// Blocks that were copied so far, on all ranks.
    pub fn n_copied(&self) -> u64 {
        self.state.n_copied.load(Ordering::Relaxed)
    }

    /// What was recorded since the last call.
    ///
    /// # Panics
    /// When a rank panicked while it recorded.
    pub fn take_recorded(&self) -> Vec<RecordedPass> {
        let take = |passes: &Mutex<Vec<_>>| std::mem::take(&mut *passes.lock().expect("no rank panicked"));
        self.state.recorded.as_ref().map(take).unwrap_or_default()
    }
}

impl Device for HashModel {
    fn name(&self) -> String {
        "hash model".into()
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        if self.state.is_broken.load(Ordering::Relaxed) {
            return Err(ModelError::Load("the device is broken".into()));
        }
        if spec.config.n_layers != N_LAYERS {
            let problem = format!("the hash model has {N_LAYERS} layers, not {}", spec.config.n_layers);
            return Err(ModelError::Load(problem));
        }
        self.state.n_loaded.fetch_add(1, Ordering::Relaxed);
        let n_entries = spec.capacity.n_kv_blocks * BLOCK_POSITIONS;
        Ok(Box::new(HashRank {
            state: self.state.clone(),
            vocab: spec.plan.share(spec.rank).vocab.clone(),
            entries: vec![vec![POISON; n_entries]; N_LAYERS],
            before: vec![vec![POISON; n_entries]; N_LAYERS],
            rows: Rows::default(),
            row: Vec::new(),
        }))
    }
}

/// One rank's KV memory and the pass it is in.
struct HashRank {
    state: Arc<State>,
    vocab: Range<usize>,
    /// `[N_LAYERS][n_kv_blocks * BLOCK_POSITIONS]`.
    entries: Vec<Vec<u64>>,
    /// The same as it was before the pass; kept for [`Flaw::StaleEntry`] only.
    before: Vec<Vec<u64>>,
    rows: Rows,
    /// Logits of the row asked for last.
    row: Vec<f32>,
}

/// A batch, copied.
#[derive(Default)]
struct Rows {
    states: Vec<u64>,
    positions: Vec<u32>,
    sequence_of_row: Vec<u32>,
    tables: Vec<Vec<BlockId>>,
    output_rows: Vec<usize>,
    copies: Vec<BlockCopy>,
    began: Option<Instant>,
}

impl HashRank {
    fn slot(&self, row: usize, position: usize) -> usize {
        let table = &self.rows.tables[self.rows.sequence_of_row[row] as usize];
        let place = match (self.state.flaw, position / BLOCK_POSITIONS) {
            (Flaw::ForeignBlock, place) => place - place % 2,
            (_, place) => place,
        };
        table[place].idx() * BLOCK_POSITIONS + position % BLOCK_POSITIONS
    }

    /// Its own position is new in any case.
    fn read(&self, layer: usize, row: usize, position: usize) -> u64 {
        let slot = self.slot(row, position);
        let is_own = position == self.rows.positions[row] as usize;
        let stale = self.state.flaw == Flaw::StaleEntry && !is_own;
        if stale { self.before[layer][slot] } else { self.entries[layer][slot] }
    }

    fn copy_in(&mut self, layer: usize, copy: BlockCopy) {
        let (from, to) = (copy.from.idx() * BLOCK_POSITIONS, copy.to.idx() * BLOCK_POSITIONS);
        if self.state.flaw != Flaw::LostCopy {
            self.entries[layer].copy_within(from..from + BLOCK_POSITIONS, to);
        }
    }

    fn fail_when_due(&self) -> Result<(), ModelError> {
        self.state.n_passes.fetch_add(1, Ordering::Relaxed);
        if self.state.is_broken.load(Ordering::Relaxed) {
            return Err(ModelError::Device { kind: ErrorKind::Unavailable, problem: "it is broken".into() });
        }
        let due = |left: i64| (left >= 0).then_some(left - 1);
        let counter = &self.state.n_until_failure;
        if counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, due) != Ok(0) {
            return Ok(());
        }
        if self.state.breaks.swap(false, Ordering::Relaxed) {
            self.state.is_broken.store(true, Ordering::Relaxed);
        }
        self.state.n_failed.fetch_add(1, Ordering::Relaxed);
        Err(ModelError::Device { kind: ErrorKind::Unavailable, problem: "told to fail".into() })
    }
}

impl LogitRows for HashRank {
    fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
        let state = self.rows.states[self.rows.output_rows[row]];
        self.row.clear();
        self.row.extend(self.vocab.clone().map(|token| logit(state, token)));
        if let Some(recorded) = &self.state.recorded {
            let mut recorded = recorded.lock().expect("invariant: no panic while the lock is held");
            recorded.last_mut().expect("invariant: the pass is recorded").ended = Instant::now();
        }
        Ok(&self.row)
    }
}

impl Backend for HashRank {
    fn name(&self) -> String {
        "hash model".into()
    }

    fn device_numerics(&self) -> u32 {
        self.state.numerics.load(Ordering::Relaxed)
    }

    fn memory_bytes(&self) -> (usize, usize) {
        (0, self.entries.iter().map(|layer| layer.len() * size_of::<u64>()).sum())
    }

    fn copies_blocks(&self) -> bool {
        true
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) -> Result<(), ModelError> {
        (0..N_LAYERS).for_each(|layer| self.copy_in(layer, BlockCopy { from, to }));
        self.state.n_copied.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError> {
        self.fail_when_due()?;
        let began = Instant::now();
        std::thread::sleep(self.state.pass);
        if self.state.flaw == Flaw::StaleEntry {
            self.before.clone_from(&self.entries);
        }
        self.rows = Rows {
            states: batch.tokens.iter().copied().map(embed).collect(),
            positions: batch.positions.to_vec(),
            sequence_of_row: batch.sequence_of_row.to_vec(),
            tables: batch.block_tables.iter().map(|table| table.to_vec()).collect(),
            output_rows: batch.output_rows.to_vec(),
            copies: batch.copies.to_vec(),
            began: Some(began),
        };
        Ok(Pass::Run)
    }

    fn normalize(&mut self, _layer: usize, _half: Half) -> Result<(), ModelError> {
        Ok(())
    }

    /// All rows are written before one is read, as in every other backend, and those of branches last.
    fn project(&mut self, layer: usize) -> Result<(), ModelError> {
        let n_before = self.rows.states.len() - self.rows.copies.len();
        for row in 0..self.rows.states.len() {
            if let Some(copy) = row.checked_sub(n_before).map(|branch| self.rows.copies[branch]) {
                self.copy_in(layer, copy);
            }
            let position = self.rows.positions[row];
            let slot = self.slot(row, position as usize);
            let is_lost = self.state.flaw == Flaw::LostWrite && slot % BLOCK_POSITIONS == BLOCK_POSITIONS - 1;
            if !is_lost {
                self.entries[layer][slot] = entry(layer, position, self.rows.states[row]);
            }
        }
        Ok(())
    }

    fn attend(&mut self, layer: usize) -> Result<(), ModelError> {
        for row in 0..self.rows.states.len() {
            let n_positions = self.rows.positions[row] as usize + 1;
            let fold =
                (0..n_positions).fold(0, |fold, position| absorb(fold, self.read(layer, row, position)));
            self.rows.states[row] = attended(self.rows.states[row], fold);
        }
        Ok(())
    }

    fn output(&mut self, _layer: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn gate_up(&mut self, _layer: usize) -> Result<(), ModelError> {
        Ok(())
    }

    fn down(&mut self, _layer: usize) -> Result<(), ModelError> {
        Ok(())
    }

    /// Every rank has the whole state, so there is nothing to add.
    fn reduce(&mut self, _half: Half, _collective: &mut dyn Collective) -> Result<(), ModelError> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        if let Some((recorded, began)) = self.state.recorded.as_ref().zip(self.rows.began) {
            let pass = RecordedPass {
                n_rows: self.rows.states.len(),
                n_sequences: self.rows.tables.len(),
                began,
                ended: Instant::now(),
            };
            recorded.lock().expect("invariant: no panic while the lock is held").push(pass);
        }
        Ok(())
    }

    fn logits(&mut self) -> Result<(), ModelError> {
        Ok(())
    }
}
