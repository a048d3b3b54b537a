//! The walk over the table of tensors: which slice of which tensor goes to a backend's packer, straight from the memory
//! map. No full tensor is ever built; nothing is packed or multiplied here.

use std::sync::Arc;

use paceline_checkpoint::{Checkpoint, TensorView};
use paceline_domain::{Quantization, WeightType};
use paceline_kernels::{PackSpec, dequantize_row};

use crate::estimate::{Capacity, weight_bytes};
use crate::names::{self, Cut, Part};
use crate::quantization::{WeightTypes, loaded_type, types_in};
use crate::split::RowParallel;
use crate::weights::{
    AttentionRows, FfnRows, LayerWeights, MatrixRows, Packer, ProjectionRows, RowOrder, Weights, WeightsOf,
};
use crate::{ModelConfig, ModelError, SplitPlan};

/// What a backend is made from, whatever it runs on.
#[derive(Clone, Copy)]
pub struct LoadSpec<'a> {
    /// Where the weights are.
    pub checkpoint: &'a Arc<Checkpoint>,
    /// Its configuration.
    pub config: &'a ModelConfig,
    /// How it is split.
    pub plan: &'a SplitPlan,
    /// Whose slice to load.
    pub rank: usize,
    /// What matrices become.
    pub quantize: Option<Quantization>,
    /// What to allocate.
    pub capacity: Capacity,
    /// Called as weights are packed.
    pub progress: &'a dyn Fn(LoadProgress),
}

impl LoadSpec<'_> {
    /// Bytes of memory that this rank is saved: its matrices in the file's types, with an output head for the whole
    /// vocabulary, less what quantization at load and the plan's vocabulary leave of them.
    pub fn saved_bytes(&self) -> u64 {
        let in_file = &types_in(self.checkpoint);
        let bytes = |plan: &SplitPlan, quantize| {
            weight_bytes(self.config, plan, self.rank, &WeightTypes { in_file, quantize })
        };
        let whole = SplitPlan::new(self.config, self.plan.n_ranks())
            .expect("invariant: a plan for as many ranks was made before");
        bytes(&whole, None).saturating_sub(bytes(self.plan, self.quantize))
    }
}

/// How far loading is, in bytes of the rank's slices in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadProgress {
    /// Bytes packed.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// Hands a rank's slices to a packer.
pub struct Loader<'a> {
    spec: LoadSpec<'a>,
}

/// Counts bytes while they are packed.
struct Meter<'a> {
    progress: &'a dyn Fn(LoadProgress),
    state: LoadProgress,
}

impl Meter<'_> {
    fn add(&mut self, bytes: usize) {
        self.state.done_bytes += bytes as u64;
        (self.progress)(self.state);
    }
}

impl<'a> Loader<'a> {
    /// Checks what is to be loaded.
    ///
    /// # Errors
    /// A rank outside the plan; a capacity of nothing; a tensor that is missing, left over or misshapen.
    pub fn new(spec: &LoadSpec<'a>) -> Result<Self, ModelError> {
        let LoadSpec { checkpoint, config, plan, rank, capacity, .. } = *spec;
        if rank >= plan.n_ranks() {
            return Err(ModelError::Load(format!("rank {rank} of {}", plan.n_ranks())));
        }
        if capacity.max_rows == 0 || capacity.n_kv_blocks == 0 {
            let (rows, blocks) = (capacity.max_rows, capacity.n_kv_blocks);
            return Err(ModelError::Load(format!("room for {rows} rows and {blocks} KV blocks is none")));
        }
        names::check_tensors(config, checkpoint)?;
        Ok(Self { spec: *spec })
    }

    /// Loads the rank's slices of every tensor but the embedding.
    ///
    /// # Errors
    /// A tensor that cannot be packed.
    pub fn load<P: Packer>(&self, packer: &mut P) -> Result<WeightsOf<P>, ModelError> {
        let state = LoadProgress { done_bytes: 0, total_bytes: self.total_bytes()? };
        let mut meter = Meter { progress: self.spec.progress, state };
        meter.add(0);
        let layers = (0..self.spec.config.n_layers)
            .map(|layer| self.layer(layer, packer, &mut meter))
            .collect::<Result<Vec<_>, _>>()?;
        let output_norm = self.vector(Part::OutputNorm, 0, &mut meter)?;
        let head = match self.rows(self.head_part(), Cut::VocabRows, 0)? {
            None => None,
            Some(rows) => {
                let head = packer.head(&rows)?;
                self.packed([&rows], &mut meter);
                Some(head)
            }
        };
        Ok(Weights { layers, output_norm, head })
    }

    /// The whole table of embeddings, `[n_vocab, n_embd]`: for a backend that does not look rows up in the file. Its bytes
    /// are not part of the progress.
    ///
    /// # Errors
    /// When the checkpoint lacks it.
    pub fn embedding(&self) -> Result<MatrixRows<'a>, ModelError> {
        let rows = self.rows(Part::Embedding, Cut::Whole, 0)?;
        Ok(rows.expect("invariant: no dimension of a model is 0"))
    }

    /// The tensor that is the output head.
    fn head_part(&self) -> Part {
        if self.spec.config.tied_embeddings { Part::Embedding } else { Part::Head }
    }

    fn layer<P: Packer>(
        &self,
        layer: usize,
        packer: &mut P,
        meter: &mut Meter<'_>,
    ) -> Result<LayerWeights<P::Attention, P::Ffn>, ModelError> {
        let share = self.spec.plan.share(self.spec.rank);
        let attention_norm = self.vector(Part::AttentionNorm, layer, meter)?;
        let mut attention = None;
        if !share.heads.is_empty() {
            let rows = AttentionRows {
                query: self.projection(Part::Query, Part::QueryBias, layer, meter)?,
                key: self.projection(Part::Key, Part::KeyBias, layer, meter)?,
                value: self.projection(Part::Value, Part::ValueBias, layer, meter)?,
                output: self.matrix(Part::AttentionOutput, layer)?,
            };
            attention = Some(packer.attention(&rows)?);
            let AttentionRows { query, key, value, output } = &rows;
            self.packed([&query.matrix, &key.matrix, &value.matrix, output], meter);
        }
        let ffn_norm = self.vector(Part::FfnNorm, layer, meter)?;
        let mut ffn = None;
        if !share.ffn.is_empty() {
            let rows = FfnRows {
                gate: self.matrix(Part::Gate, layer)?,
                up: self.matrix(Part::Up, layer)?,
                down: self.matrix(Part::Down, layer)?,
            };
            ffn = Some(packer.ffn(&rows)?);
            self.packed([&rows.gate, &rows.up, &rows.down], meter);
        }
        Ok(LayerWeights { attention_norm, attention, ffn_norm, ffn })
    }

    fn projection(
        &self,
        part: Part,
        bias: Part,
        layer: usize,
        meter: &mut Meter<'_>,
    ) -> Result<ProjectionRows<'a>, ModelError> {
        let matrix = self.matrix(part, layer)?;
        let bias = if self.spec.config.qkv_bias { Some(self.vector(bias, layer, meter)?) } else { None };
        Ok(ProjectionRows { matrix, bias })
    }

    fn matrix(&self, part: Part, layer: usize) -> Result<MatrixRows<'a>, ModelError> {
        let rows = self.rows(part, names::cut(part), layer)?;
        Ok(rows.expect("invariant: only ranks with a share of the layer ask for its matrices"))
    }

    /// The rank's slice of a matrix under this cut; `None` when it is empty.
    fn rows(&self, part: Part, cut: Cut, layer: usize) -> Result<Option<MatrixRows<'a>>, ModelError> {
        let view = self.view(part, layer)?;
        let slice = self.spec.plan.slice(self.spec.rank, cut, view.shape());
        if slice.is_empty() {
            return Ok(None);
        }
        // A whole table is one that rows are looked up in.
        let quantize = self.spec.quantize.filter(|_| cut != Cut::Whole);
        let weight_type = loaded_type(quantize, part, view.weight_type(), view.n_cols());
        let spec = match row_parallel(self.spec.plan, cut) {
            Some(columns) => {
                let leaves = columns.tree.leaves(self.spec.rank);
                PackSpec::cut_rows(weight_type, slice.rows.len(), &columns.leaf_edges, leaves)
            }
            None => PackSpec::whole_rows(weight_type, slice.rows.len(), view.n_cols()),
        };
        let head = (cut == Cut::VocabRows).then(|| self.spec.plan.head());
        Ok(Some(MatrixRows { view, part, spec, first_row: slice.rows.start, order: self.order(), head }))
    }

    /// Counts what was packed and gives the pages of the file back.
    fn packed<const N: usize>(&self, matrices: [&MatrixRows<'_>; N], meter: &mut Meter<'_>) {
        for rows in matrices {
            self.spec.checkpoint.release(rows.name());
            meter.add(slice_bytes(&rows.view, rows.spec.n_rows * rows.spec.k_range.len()));
        }
    }

    /// The rank's slice of a vector as f32.
    fn vector(&self, part: Part, layer: usize, meter: &mut Meter<'_>) -> Result<Vec<f32>, ModelError> {
        let view = self.view(part, layer)?;
        if view.weight_type().is_quantized() {
            let problem = format!("is {}; norms and biases are plain numbers", view.weight_type().name());
            return Err(ModelError::tensor(view.name(), problem));
        }
        let slice = self.spec.plan.slice(self.spec.rank, names::cut(part), view.shape());
        let mut all = vec![0.0; view.shape()[0]];
        dequantize_row(view.weight_type(), view.data(), &mut all);
        meter.add(slice_bytes(&view, slice.len()));
        Ok(slice.rows.map(|row| all[self.order().file_row(part, row)]).collect())
    }

    fn order(&self) -> RowOrder {
        let config = self.spec.config;
        RowOrder { pair_layout: config.rope.pair_layout, head_dim: config.head_dim }
    }

    fn view(&self, part: Part, layer: usize) -> Result<TensorView<'a>, ModelError> {
        let name = names::name(part, self.spec.checkpoint.format(), layer);
        self.spec
            .checkpoint
            .tensor(&name)
            .ok_or_else(|| ModelError::tensor(name, "is missing from the checkpoint"))
    }

    fn total_bytes(&self) -> Result<u64, ModelError> {
        let LoadSpec { config, plan, rank, checkpoint, .. } = self.spec;
        let mut total = 0;
        for tensor in names::expected_tensors(config, checkpoint.format()) {
            let view = self.view(tensor.part, tensor.layer.unwrap_or(0))?;
            let mut cuts: Vec<Cut> = vec![tensor.cut];
            if tensor.part == self.head_part() && tensor.cut != Cut::VocabRows {
                cuts.push(Cut::VocabRows);
            }
            for cut in cuts {
                total += slice_bytes(&view, plan.slice(rank, cut, view.shape()).len()) as u64;
            }
        }
        Ok(total)
    }
}

fn row_parallel(plan: &SplitPlan, cut: Cut) -> Option<&RowParallel> {
    match cut {
        Cut::AttentionColumns => Some(plan.attention()),
        Cut::FfnColumns => Some(plan.ffn()),
        _ => None,
    }
}

/// Bytes of `n` weights of a tensor, to the nearest whole block.
fn slice_bytes(view: &TensorView<'_>, n: usize) -> usize {
    let kind: WeightType = view.weight_type();
    n / kind.block_len() * kind.block_bytes()
}
