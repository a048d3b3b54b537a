//! A decoder in f64, written as plainly as the papers: no cache, no batching, no tricks. The standard library's
//! functions, the file's own order of rotated pairs, whole-matrix sums.

use paceline_checkpoint::{Checkpoint, Format};
use paceline_kernels::formats::dequantize_row;
use paceline_model::ModelConfig;
use paceline_model::config::{PairLayout, RopeScaling};
use paceline_model::names::{self, Part};

type Matrix = Vec<Vec<f64>>;

pub struct Reference<'a> {
    pub checkpoint: &'a Checkpoint,
    pub config: &'a ModelConfig,
}

impl Reference<'_> {
    /// Logits of every position: `[tokens.len()][n_vocab]`.
    pub fn logits(&self, tokens: &[u32]) -> Matrix {
        let config = self.config;
        let embedding = self.matrix(Part::Embedding, 0);
        let mut hidden: Matrix = tokens.iter().map(|token| embedding[*token as usize].clone()).collect();
        for layer in 0..config.n_layers {
            let normed = self.norm(&hidden, Part::AttentionNorm, layer);
            let attended = self.attention(&normed, layer);
            add(&mut hidden, &self.project(&attended, Part::AttentionOutput, layer));
            let normed = self.norm(&hidden, Part::FfnNorm, layer);
            let gate = self.project(&normed, Part::Gate, layer);
            let mut gated = self.project(&normed, Part::Up, layer);
            for (up, gate) in gated.iter_mut().flatten().zip(gate.iter().flatten()) {
                *up *= gate / (1.0 + (-gate).exp());
            }
            add(&mut hidden, &self.project(&gated, Part::Down, layer));
        }
        let normed = self.norm(&hidden, Part::OutputNorm, 0);
        self.project(&normed, if config.tied_embeddings { Part::Embedding } else { Part::Head }, 0)
    }

    fn attention(&self, normed: &Matrix, layer: usize) -> Matrix {
        let config = self.config;
        let (dim, per_kv) = (config.head_dim, config.n_heads / config.n_kv_heads);
        let mut query = self.biased(normed, Part::Query, Part::QueryBias, layer);
        let mut key = self.biased(normed, Part::Key, Part::KeyBias, layer);
        let value = self.biased(normed, Part::Value, Part::ValueBias, layer);
        for rows in [&mut query, &mut key] {
            for (position, row) in rows.iter_mut().enumerate() {
                row.chunks_mut(dim).for_each(|head| self.rotate(head, position));
            }
        }
        let mut out = vec![vec![0.0; config.n_heads * dim]; normed.len()];
        for position in 0..normed.len() {
            let first =
                config.window_of_layer(layer).map_or(0, |window| (position + 1).saturating_sub(window));
            for head in 0..config.n_heads {
                let part = |row: &[f64], head: usize| row[head * dim..][..dim].to_vec();
                let own = part(&query[position], head);
                let scores: Vec<f64> = (first..=position)
                    .map(|seen| dot(&own, &part(&key[seen], head / per_kv)) / (dim as f64).sqrt())
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                for (seen, weight) in (first..=position).zip(&weights) {
                    let seen = part(&value[seen], head / per_kv);
                    for (out, value) in out[position][head * dim..][..dim].iter_mut().zip(seen) {
                        *out += weight / total * value;
                    }
                }
            }
        }
        out
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        for i in 0..half {
            let frequency = self.config.rope.theta.powf(-2.0 * i as f64 / head.len() as f64);
            let (sin, cos) = (position as f64 * self.scaled(frequency, i)).sin_cos();
            let interleaved = self.checkpoint.format() == Format::Gguf
                && self.config.rope.pair_layout == PairLayout::Interleaved;
            let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
            (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
        }
    }

    fn scaled(&self, frequency: f64, i: usize) -> f64 {
        match &self.config.rope.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear(factor) => frequency / factor,
            RopeScaling::Factors(factors) => frequency / f64::from(factors[i]),
            RopeScaling::Llama3(scaling) => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                let ratio = scaling.original_context / wavelength;
                let smooth =
                    (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
                let smooth = smooth.clamp(0.0, 1.0);
                (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
            }
        }
    }

    fn biased(&self, input: &Matrix, part: Part, bias: Part, layer: usize) -> Matrix {
        let mut out = self.project(input, part, layer);
        if self.config.qkv_bias {
            let bias = self.vector(bias, layer);
            out.iter_mut().for_each(|row| row.iter_mut().zip(&bias).for_each(|(x, bias)| *x += bias));
        }
        out
    }

    fn norm(&self, rows: &Matrix, part: Part, layer: usize) -> Matrix {
        let weight = self.vector(part, layer);
        let one = |row: &Vec<f64>| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + f64::from(self.config.rms_eps)).sqrt();
            row.iter().zip(&weight).map(|(x, weight)| x * scale * weight).collect()
        };
        rows.iter().map(one).collect()
    }

    fn project(&self, input: &Matrix, part: Part, layer: usize) -> Matrix {
        let matrix = self.matrix(part, layer);
        input.iter().map(|row| matrix.iter().map(|weights| dot(row, weights)).collect()).collect()
    }

    fn matrix(&self, part: Part, layer: usize) -> Matrix {
        let view =
            self.checkpoint.tensor(&names::name(part, self.checkpoint.format(), layer)).expect("tensor");
        let mut row = vec![0.0f32; view.n_cols()];
        (0..view.n_rows())
            .map(|r| {
                dequantize_row(view.weight_type(), view.row(r), &mut row);
                row.iter().copied().map(f64::from).collect()
            })
            .collect()
    }

    fn vector(&self, part: Part, layer: usize) -> Vec<f64> {
        let view =
            self.checkpoint.tensor(&names::name(part, self.checkpoint.format(), layer)).expect("tensor");
        let mut values = vec![0.0f32; view.shape()[0]];
        dequantize_row(view.weight_type(), view.data(), &mut values);
        values.into_iter().map(f64::from).collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(rows: &mut Matrix, more: &Matrix) {
    rows.iter_mut().flatten().zip(more.iter().flatten()).for_each(|(x, y)| *x += y);
}
