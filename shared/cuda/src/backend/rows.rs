//! Logits on the device: rows come to the host when asked for; the best tokens are found where the rows are, after
//! penalties, bias and filters. Only what is beyond the kernels of filters, or has no room, is chosen on the host.

use paceline_domain::TokenId;
use paceline_model::ModelError;
use paceline_model::logits::{Choice, Columns, LogitRows};
use paceline_sampling::{Candidate, has_filter};

use super::GpuBackend;
use super::weights::model_error;
use crate::kernels::filter::{CutArgs, FilterRow, LastKept, find_cuts};
use crate::kernels::sampling::{
    AdjustArgs, Adjustment, BestArgs, BestToken, SampleRow, adjust_logits, adjustments, best_tokens, n_parts,
    restore_logits,
};
use crate::{CudaError, DevicePtr, Runtime};

/// Room for adjustments of a launch: some for each row, and what one row may have more.
const ADJUSTMENTS_OF_ROW: usize = 1024;
const MORE_ADJUSTMENTS: usize = 4096;

/// Device memory for the choice of tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChoiceBuffers {
    rows: DevicePtr,
    filters: DevicePtr,
    cuts: DevicePtr,
    of_part: DevicePtr,
    /// The best tokens, then a word for each row that is 1 where its filters are left to the host.
    found: DevicePtr,
    adjustments: DevicePtr,
    /// Logits before they were adjusted.
    before: DevicePtr,
    max_adjustments: usize,
}

impl ChoiceBuffers {
    pub(super) fn allocate(
        runtime: &mut dyn Runtime,
        max_output_rows: usize,
        n_vocab: usize,
    ) -> Result<Self, CudaError> {
        let n = max_output_rows.max(1);
        let n_parts = n_parts(n_vocab as u32) as usize;
        let max_adjustments = n * ADJUSTMENTS_OF_ROW + MORE_ADJUSTMENTS;
        let mut alloc = |n_bytes: usize| runtime.alloc(n_bytes);
        Ok(Self {
            rows: alloc(n * size_of::<SampleRow>())?,
            filters: alloc(n * size_of::<FilterRow>())?,
            cuts: alloc(n * size_of::<LastKept>())?,
            of_part: alloc(n * n_parts * size_of::<BestToken>())?,
            found: alloc(n * (size_of::<BestToken>() + size_of::<u32>()))?,
            adjustments: alloc(max_adjustments * size_of::<Adjustment>())?,
            before: alloc(max_adjustments * size_of::<f32>())?,
            max_adjustments,
        })
    }
}

/// What has come to the host of the pass at hand.
#[derive(Default, Debug)]
pub(super) struct HostRows {
    row: Vec<f32>,
    held: Option<usize>,
    staged: StagedChoices,
    /// As [`ChoiceBuffers::found`].
    found: Vec<u32>,
}

impl HostRows {
    /// The logits on the device are others now.
    pub(super) fn forget(&mut self) {
        self.held = None;
    }

    /// What was found for a row; nothing where that is left to the host.
    fn candidate(&self, row: usize) -> Option<Candidate> {
        let (best, is_undecided) = self.found.split_at(2 * self.staged.rows.len());
        if is_undecided.get(row) == Some(&1) {
            return None;
        }
        let BestToken { value, token } = bytemuck::cast_slice::<u32, BestToken>(best)[row];
        Some(Candidate { value, token: TokenId(token) })
    }
}

/// Choices on their way to the device, one for each row at most.
#[derive(Default, Debug)]
struct StagedChoices {
    rows: Vec<SampleRow>,
    filters: Vec<FilterRow>,
    has_filters: bool,
    adjustments: Vec<Adjustment>,
    /// Rows that have a choice.
    is_taken: Vec<bool>,
}

impl StagedChoices {
    /// Takes choices of different rows from the first on, as many as have room; returns how many.
    fn stage(
        &mut self,
        choices: &[Choice<'_>],
        columns: Columns,
        n_rows: usize,
        max_adjustments: usize,
    ) -> usize {
        self.rows.clear();
        self.rows.resize(n_rows, SampleRow { seed: 0, position: 0, temperature: 0.0 });
        self.filters.clear();
        self.filters.resize(n_rows, FilterRow::OPEN);
        self.is_taken.clear();
        self.is_taken.resize(n_rows, false);
        self.adjustments.clear();
        self.has_filters = false;
        for (i, choice) in choices.iter().enumerate() {
            let Choice { row, position, sampling, .. } = *choice;
            let n_before = self.adjustments.len();
            if !self.is_taken[row] {
                adjustments(choice, columns, &mut self.adjustments);
            }
            if self.is_taken[row] || self.adjustments.len() > max_adjustments {
                self.adjustments.truncate(n_before);
                return i;
            }
            self.is_taken[row] = true;
            self.rows[row] = SampleRow { seed: sampling.seed, position, temperature: sampling.temperature };
            if has_filter(sampling) {
                self.filters[row] = FilterRow::new(sampling);
                self.has_filters = true;
            }
        }
        choices.len()
    }
}

impl LogitRows for GpuBackend {
    fn row(&mut self, row: usize) -> Result<&[f32], ModelError> {
        let n_vocab = self.widths.vocab;
        if self.host_rows.held != Some(row) {
            self.host_rows.held = None;
            self.host_rows.row.resize(n_vocab, 0.0);
            let from = self.buffers.logits + (4 * row * n_vocab) as u64;
            let to = bytemuck::cast_slice_mut(&mut self.host_rows.row);
            self.runtime.download(from, to).map_err(model_error)?;
            self.host_rows.held = Some(row);
        }
        Ok(&self.host_rows.row)
    }

    fn best(
        &mut self,
        columns: Columns,
        choices: &[Choice<'_>],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        best.clear();
        let (n_rows, max_adjustments) = (self.staged.n_output_rows, self.choices.max_adjustments);
        while best.len() < choices.len() {
            let rest = &choices[best.len()..];
            let n = self.host_rows.staged.stage(rest, columns, n_rows, max_adjustments);
            if n > 0 {
                self.find_best(columns).map_err(model_error)?;
            }
            // A choice that does not even fit alone is made on the host.
            for (i, choice) in rest[..n.max(1)].iter().enumerate() {
                let found = if i < n { self.host_rows.candidate(choice.row) } else { None };
                best.push(match found {
                    Some(found) => found,
                    None => choice.best_of(columns, self.row(choice.row)?),
                });
            }
        }
        Ok(())
    }
}

impl GpuBackend {
    /// Finds the best token of each row, as the staged choices say. The logits are as before when it is done.
    fn find_best(&mut self, columns: Columns) -> Result<(), CudaError> {
        let HostRows { staged, found, .. } = &mut self.host_rows;
        let StagedChoices { rows, filters, has_filters, adjustments, .. } = staged;
        let (n_rows, choices) = (rows.len(), self.choices);
        let is_undecided = choices.found + (n_rows * size_of::<BestToken>()) as u64;
        let runtime = self.runtime.as_mut();
        runtime.upload(choices.rows, bytemuck::cast_slice(rows))?;
        let adjust = AdjustArgs {
            logits: self.buffers.logits,
            adjustments: choices.adjustments,
            before: choices.before,
            row_stride: self.widths.vocab as u32,
            n_adjustments: adjustments.len() as u32,
        };
        if !adjustments.is_empty() {
            runtime.upload(choices.adjustments, bytemuck::cast_slice(adjustments))?;
            adjust_logits(runtime, &adjust)?;
        }
        if *has_filters {
            runtime.upload(choices.filters, bytemuck::cast_slice(filters))?;
            let args = CutArgs {
                logits: self.buffers.logits,
                rows: choices.filters,
                header: self.addresses.header,
                cuts: choices.cuts,
                is_undecided,
                row_stride: self.widths.vocab as u32,
                n_tokens: columns.n_usable as u32,
            };
            find_cuts(runtime, n_rows, &args)?;
        }
        let args = BestArgs {
            logits: self.buffers.logits,
            rows: choices.rows,
            cuts: if *has_filters { choices.cuts } else { 0 },
            header: self.addresses.header,
            of_part: choices.of_part,
            best: choices.found,
            row_stride: self.widths.vocab as u32,
            vocab_start: columns.first_token.0,
            n_tokens: columns.n_usable as u32,
            n_parts: n_parts(columns.n_usable as u32),
        };
        best_tokens(runtime, n_rows, &args)?;
        if !adjustments.is_empty() {
            restore_logits(runtime, &adjust)?;
        }
        let n_words = if *has_filters { 3 } else { 2 };
        found.clear();
        found.resize(n_words * n_rows, 0);
        runtime.download(choices.found, bytemuck::cast_slice_mut(found))
    }
}
