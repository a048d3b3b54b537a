//! Logits on the device: rows come to the host when asked for; the best tokens of plain rows are found where they are.

use paceline_domain::TokenId;
use paceline_model::ModelError;
use paceline_model::logits::{Choice, Columns, LogitRows};
use paceline_sampling::Candidate;

use super::GpuBackend;
use super::weights::model_error;
use crate::kernels::sampling::{BestArgs, BestToken, SampleRow, best_tokens, n_parts};
use crate::{CudaError, DevicePtr, Runtime};

/// Device memory for the choice of tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChoiceBuffers {
    rows: DevicePtr,
    of_part: DevicePtr,
    best: DevicePtr,
}

impl ChoiceBuffers {
    pub(super) fn allocate(
        runtime: &mut dyn Runtime,
        max_output_rows: usize,
        n_vocab: usize,
    ) -> Result<Self, CudaError> {
        let n = max_output_rows.max(1);
        let n_parts = n_parts(n_vocab as u32) as usize;
        let mut alloc = |n_bytes: usize| runtime.alloc(n_bytes);
        Ok(Self {
            rows: alloc(n * size_of::<SampleRow>())?,
            of_part: alloc(n * n_parts * size_of::<BestToken>())?,
            best: alloc(n * size_of::<BestToken>())?,
        })
    }
}

/// What has come to the host of the pass at hand.
#[derive(Default, Debug)]
pub(super) struct HostRows {
    row: Vec<f32>,
    held: Option<usize>,
    samples: Vec<SampleRow>,
    best: Vec<BestToken>,
}

impl HostRows {
    /// The logits on the device are others now.
    pub(super) fn forget(&mut self) {
        self.held = None;
    }

    fn candidate(&self, row: usize) -> Candidate {
        let BestToken { value, token } = self.best[row];
        Candidate { value, token: TokenId(token) }
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
        choices: &[Choice],
        best: &mut Vec<Candidate>,
    ) -> Result<(), ModelError> {
        best.clear();
        let mut rest = choices;
        // A launch has one choice for each row.
        while !rest.is_empty() {
            let n = distinct_rows(rest);
            let (now, later) = rest.split_at(n);
            self.best_of_rows(columns, now).map_err(model_error)?;
            best.extend(now.iter().map(|choice| self.host_rows.candidate(choice.row)));
            rest = later;
        }
        Ok(())
    }
}

/// How many choices from the first on are of different rows.
fn distinct_rows(choices: &[Choice]) -> usize {
    let repeats = |i: &usize| choices[..*i].iter().any(|earlier| earlier.row == choices[*i].row);
    (1..choices.len()).find(repeats).unwrap_or(choices.len())
}

impl GpuBackend {
    /// Fills the best candidate of each row that one of the choices names.
    fn best_of_rows(&mut self, columns: Columns, choices: &[Choice]) -> Result<(), CudaError> {
        let n_rows = self.staged.n_output_rows;
        let HostRows { samples, best, .. } = &mut self.host_rows;
        samples.clear();
        samples.resize(n_rows, SampleRow { seed: 0, position: 0, temperature: 0.0 });
        for choice in choices {
            let Choice { row, position, seed, temperature } = *choice;
            samples[row] = SampleRow { seed, position, temperature };
        }
        self.runtime.upload(self.choices.rows, bytemuck::cast_slice(samples))?;
        let args = BestArgs {
            logits: self.buffers.logits,
            rows: self.choices.rows,
            cuts: 0,
            header: self.addresses.header,
            of_part: self.choices.of_part,
            best: self.choices.best,
            row_stride: self.widths.vocab as u32,
            vocab_start: columns.first_token.0,
            n_tokens: columns.n_usable as u32,
            n_parts: n_parts(columns.n_usable as u32),
        };
        best_tokens(self.runtime.as_mut(), n_rows, &args)?;
        best.resize(n_rows, BestToken { value: 0.0, token: 0 });
        self.runtime.download(self.choices.best, bytemuck::cast_slice_mut(best))
    }
}
