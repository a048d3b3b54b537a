//! Which operations the decoder asks of a backend, and which rows of the file a packer is handed: with a backend that only
//! writes down what it is asked.

mod support;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Collective;
use paceline_domain::{BlockId, KvType, TokenId};
use paceline_model::backend::{Backend, Device, Half, Pass};
use paceline_model::loader::Loader;
use paceline_model::logits::LogitRows;
use paceline_model::names::Part;
use paceline_model::weights::{AttentionRows, FfnRows, MatrixRows, Packer};
use paceline_model::{Batch, Capacity, Decoder, LoadSpec, ModelConfig, ModelError, SplitPlan};
use support::models;
use support::threads::Threads;

const CAPACITY: Capacity = Capacity { kv_type: KvType::F16, n_kv_blocks: 1, max_rows: 4, max_output_rows: 4 };

type Asked = Arc<Mutex<Vec<String>>>;

/// Writes down what it is asked.
struct Scribe {
    asked: Asked,
    pass: Pass,
}

impl Scribe {
    fn note(&self, what: String) -> Result<(), ModelError> {
        self.asked.lock().expect("lock").push(what);
        Ok(())
    }
}

impl LogitRows for Scribe {
    fn row(&mut self, _row: usize) -> Result<&[f32], ModelError> {
        Ok(&[])
    }
}

impl Backend for Scribe {
    fn name(&self) -> String {
        "scribe".into()
    }

    fn device_numerics(&self) -> u32 {
        77
    }

    fn memory_bytes(&self) -> (usize, usize) {
        (0, 0)
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<Pass, ModelError> {
        self.note(format!("begin {}", batch.n_rows()))?;
        Ok(self.pass)
    }

    fn normalize(&mut self, layer: usize, half: Half) -> Result<(), ModelError> {
        self.note(format!("normalize {layer} {half:?}"))
    }

    fn project(&mut self, layer: usize) -> Result<(), ModelError> {
        self.note(format!("project {layer}"))
    }

    fn attend(&mut self, layer: usize) -> Result<(), ModelError> {
        self.note(format!("attend {layer}"))
    }

    fn output(&mut self, layer: usize) -> Result<(), ModelError> {
        self.note(format!("output {layer}"))
    }

    fn gate_up(&mut self, layer: usize) -> Result<(), ModelError> {
        self.note(format!("gate_up {layer}"))
    }

    fn down(&mut self, layer: usize) -> Result<(), ModelError> {
        self.note(format!("down {layer}"))
    }

    fn reduce(&mut self, half: Half, _collective: &mut dyn Collective) -> Result<(), ModelError> {
        self.note(format!("reduce {half:?}"))
    }

    fn finish(&mut self) -> Result<(), ModelError> {
        self.note("finish".into())
    }

    fn logits(&mut self) -> Result<(), ModelError> {
        self.note("logits".into())
    }
}

impl Device for Scribe {
    fn name(&self) -> String {
        "scribe".into()
    }

    fn load(&self, _spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        Ok(Box::new(Self { asked: Arc::clone(&self.asked), pass: self.pass }))
    }
}

/// Sets a rank of the small mistral up.
fn with_spec<T>(n_ranks: usize, rank: usize, run: impl FnOnce(&LoadSpec<'_>) -> T) -> T {
    let bytes = models::mistral().to_gguf().expect("bytes");
    let checkpoint = Arc::new(Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let plan = SplitPlan::new(&config, n_ranks).expect("a plan");
    let (checkpoint, config, plan) = (&checkpoint, &config, &plan);
    run(&LoadSpec { checkpoint, config, plan, rank, quantize: None, capacity: CAPACITY, progress: &|_| () })
}

/// What a rank's backend is asked during a batch of two rows, and how many layers are counted.
fn asked(n_ranks: usize, rank: usize, pass: Pass, output_rows: &[usize]) -> (Vec<String>, u64) {
    let scribe = Scribe { asked: Asked::default(), pass };
    let mut decoder =
        with_spec(n_ranks, rank, |spec| Decoder::load(spec, &scribe)).expect("a scribe loads nothing");
    assert_eq!((decoder.device_name().as_str(), decoder.fingerprint().device_numerics), ("scribe", 77));
    let batch = Batch {
        tokens: &[TokenId(1), TokenId(2)],
        positions: &[0, 1],
        sequence_of_row: &[0, 0],
        block_tables: &[&[BlockId(0)]],
        output_rows,
        copies: &[],
    };
    let mut collective = Threads::group(n_ranks).remove(rank);
    decoder.forward(&batch, &mut collective).expect("a scribe never fails");
    let asked = scribe.asked.lock().expect("lock").clone();
    (asked, decoder.layers_done().load(Ordering::Relaxed))
}

#[test]
fn the_operations_come_in_order() {
    let (found, n_layers) = asked(1, 0, Pass::Run, &[1]);
    let mut expected = vec!["begin 2".to_owned()];
    for layer in 0..2 {
        let attention =
            ["normalize {} Attention", "project {}", "attend {}", "output {}", "reduce Attention"];
        let ffn = ["normalize {} Ffn", "gate_up {}", "down {}", "reduce Ffn"];
        expected.extend(attention.iter().chain(&ffn).map(|it| it.replace("{}", &layer.to_string())));
    }
    expected.extend(["finish", "logits"].map(str::to_owned));
    assert_eq!((found, n_layers), (expected, 2));
}

#[test]
fn a_pass_that_is_done_goes_on_with_the_logits() {
    assert_eq!(asked(1, 0, Pass::Done, &[0]), (vec!["begin 2".into(), "logits".into()], 2));
    assert_eq!(asked(1, 0, Pass::Done, &[]).0, ["begin 2"]);
}

#[test]
fn a_rank_with_empty_shares_only_normalizes_and_reduces() {
    let is_idle =
        with_spec(64, 0, |spec| spec.plan.share(0).heads.is_empty() && spec.plan.share(0).ffn.is_empty());
    assert!(is_idle, "with so many ranks the first has nothing");
    let (found, n_layers) = asked(64, 0, Pass::Run, &[1]);
    let own = ["project", "attend", "output", "gate_up", "down"];
    assert!(found.iter().all(|it| own.iter().all(|own| !it.starts_with(own))), "{found:?}");
    assert_eq!((found.iter().filter(|it| it.starts_with("reduce")).count(), n_layers), (4, 2));
}

/// Lays the rows of fused projections one after the other: what a packer can do that the CPU's does not.
#[derive(Default)]
struct Fuser {
    parts: Vec<Part>,
}

impl Packer for Fuser {
    type Attention = Vec<u8>;
    type Ffn = Vec<u8>;
    type Head = usize;

    fn attention(&mut self, rows: &AttentionRows<'_>) -> Result<Vec<u8>, ModelError> {
        let AttentionRows { query, key, value, output } = rows;
        self.parts.extend([&query.matrix, &key.matrix, &value.matrix, output].map(MatrixRows::part));
        Ok([query, key, value].into_iter().flat_map(|it| all_rows(&it.matrix)).collect())
    }

    fn ffn(&mut self, rows: &FfnRows<'_>) -> Result<Vec<u8>, ModelError> {
        self.parts.extend([&rows.gate, &rows.up, &rows.down].map(MatrixRows::part));
        let n_rows = rows.gate.spec().n_rows;
        Ok((0..n_rows).flat_map(|row| [rows.gate.row(row), rows.up.row(row)].concat()).collect())
    }

    fn head(&mut self, rows: &MatrixRows<'_>) -> Result<usize, ModelError> {
        Ok(rows.spec().n_rows)
    }
}

fn all_rows(rows: &MatrixRows<'_>) -> Vec<u8> {
    (0..rows.spec().n_rows).flat_map(|row| rows.row(row).to_vec()).collect()
}

#[test]
fn a_packer_can_lay_out_together_what_belongs_together() {
    with_spec(1, 0, |spec| {
        let mut fuser = Fuser::default();
        let loader = Loader::new(spec).expect("a good model");
        let weights = loader.load(&mut fuser).expect("loads");
        let of_layer =
            [Part::Query, Part::Key, Part::Value, Part::AttentionOutput, Part::Gate, Part::Up, Part::Down];
        assert_eq!(fuser.parts, [of_layer; 2].concat());
        let data = |name: &str| spec.checkpoint.tensor(name).expect("a tensor").data();
        // The value rows are never permuted: they end what was fused.
        let fused = weights.layers[1].attention.as_ref().expect("heads");
        let value = data("blk.1.attn_v.weight");
        let n_others = data("blk.1.attn_q.weight").len() + data("blk.1.attn_k.weight").len();
        assert_eq!((fused.len(), &fused[n_others..]), (n_others + value.len(), value));
        let gated = weights.layers[1].ffn.as_ref().expect("columns");
        let row_bytes = spec.checkpoint.tensor("blk.1.ffn_up.weight").expect("a tensor").row_bytes();
        assert_eq!(gated[row_bytes..][..row_bytes], data("blk.1.ffn_up.weight")[..row_bytes]);
        assert_eq!(weights.head, Some(spec.config.n_vocab));
        assert_eq!(all_rows(&loader.embedding().expect("a table")), data("token_embd.weight"));
    });
}
