//! What a checkpoint must hold, what loading reports, and what a decoder refuses.

mod support;

use std::fs;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Solo;
use paceline_domain::{BlockId, ErrorKind, KvType, Quantization, TokenId, WeightType};
use paceline_kernels::Kernels;
use paceline_model::names::check_tensors;
use paceline_model::{
    Batch, Capacity, Cpu, Decoder, HeadTokens, LoadProgress, LoadSpec, MemoryEstimate, ModelConfig,
    ModelError, SplitPlan, WeightTypes, quantization::types_in,
};
use support::models;

const CAPACITY: Capacity = Capacity { kv_type: KvType::F16, n_kv_blocks: 3, max_rows: 4, max_output_rows: 2 };

fn load(checkpoint: &Arc<Checkpoint>, n_ranks: usize, rank: usize) -> Result<Decoder, ModelError> {
    load_with(checkpoint, n_ranks, rank, &|_| ())
}

/// The same with float matrices quantized, and what that saves.
fn load_quantized(
    checkpoint: &Arc<Checkpoint>,
    (n_ranks, rank): (usize, usize),
    quantize: Option<Quantization>,
) -> (Decoder, u64) {
    let config = ModelConfig::from_checkpoint(checkpoint).expect("a configuration");
    let plan = SplitPlan::new(&config, n_ranks).expect("a plan");
    let (config, plan, progress) = (&config, &plan, &|_| ());
    let spec = LoadSpec { checkpoint, config, plan, rank, quantize, capacity: CAPACITY, progress };
    (Decoder::load(&spec, &cpu()).expect("loads"), spec.saved_bytes())
}

fn load_with(
    checkpoint: &Arc<Checkpoint>,
    n_ranks: usize,
    rank: usize,
    progress: &dyn Fn(LoadProgress),
) -> Result<Decoder, ModelError> {
    let config = ModelConfig::from_checkpoint(checkpoint)?;
    let plan = SplitPlan::new(&config, n_ranks)?;
    let spec = LoadSpec {
        checkpoint,
        config: &config,
        plan: &plan,
        rank,
        quantize: None,
        capacity: CAPACITY,
        progress,
    };
    Decoder::load(&spec, &cpu())
}

fn cpu() -> Cpu {
    Cpu { kernels: Kernels::detect(), n_threads: 1 }
}

fn gguf(bytes: Vec<u8>) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::from_gguf_bytes(bytes).expect("a checkpoint"))
}

/// A Hugging Face directory in whose files a text was replaced by another of the same length.
fn edited(file: &str, from: &str, to: &str) -> Arc<Checkpoint> {
    let directory = tempfile::tempdir().expect("a directory");
    models::mistral().write_hugging_face(directory.path()).expect("written");
    let path = directory.path().join(file);
    let mut bytes = fs::read(&path).expect("read");
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).expect("the text");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(&path, bytes).expect("written");
    Arc::new(Checkpoint::open(directory.path()).expect("a checkpoint"))
}

fn refusal(checkpoint: &Arc<Checkpoint>) -> String {
    let error = load(checkpoint, 1, 0).err().expect("must be refused");
    assert!(matches!(error, ModelError::Tensor { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    error.to_string()
}

#[test]
fn a_missing_tensor_is_named() {
    let checkpoint = edited("model.safetensors", "layers.1.mlp.up_proj", "layers.1.mlp.xx_proj");
    let message = refusal(&checkpoint);
    assert!(
        message.contains("model.layers.1.mlp.up_proj.weight") && message.contains("missing"),
        "{message}"
    );
}

#[test]
fn a_tensor_that_is_left_over_is_named() {
    let checkpoint = edited("config.json", "\"num_hidden_layers\":2", "\"num_hidden_layers\":1");
    let message = refusal(&checkpoint);
    assert!(message.contains("model.layers.1.") && message.contains("not part of"), "{message}");
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let checkpoint = edited("config.json", "\"intermediate_size\":160", "\"intermediate_size\":192");
    let message = refusal(&checkpoint);
    assert!(message.contains("mlp.gate_proj") && message.contains("[160, 128], not [192, 128]"), "{message}");
}

#[test]
fn harmless_leftovers_of_older_writers_pass() {
    let vector = |n: usize| vec![0; 4 * n];
    let writer = models::mistral()
        .gguf_writer()
        .tensor("blk.0.attn_rot_embd.weight", WeightType::F32, &[16], vector(16))
        .tensor("model.layers.0.self_attn.rotary_emb.inv_freq", WeightType::F32, &[16], vector(16));
    load(&gguf(writer.to_bytes().expect("bytes")), 1, 0).expect("loads");
    let writer = models::mistral().gguf_writer().tensor("blk.0.extra", WeightType::F32, &[16], vector(16));
    assert!(refusal(&gguf(writer.to_bytes().expect("bytes"))).contains("blk.0.extra"));
}

#[test]
fn every_synthetic_model_has_the_tensors_it_must() {
    for (name, synthetic) in models::all() {
        let checkpoint = gguf(synthetic.to_gguf().expect("bytes"));
        let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
        check_tensors(&config, &checkpoint).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn progress_rises_to_the_whole() {
    let checkpoint = gguf(models::llama_tied_q4_1().to_gguf().expect("bytes"));
    for (n_ranks, rank) in [(1, 0), (4, 1), (16, 15)] {
        let seen = Mutex::new(Vec::new());
        load_with(&checkpoint, n_ranks, rank, &|progress| seen.lock().expect("lock").push(progress))
            .expect("loads");
        let seen = seen.into_inner().expect("lock");
        assert!(seen.is_sorted_by_key(|progress| progress.done_bytes));
        let (first, last) = (seen[0], seen[seen.len() - 1]);
        assert_eq!((first.done_bytes, last.done_bytes), (0, last.total_bytes), "rank {rank} of {n_ranks}");
    }
}

/// The estimate is what is then held: KV exactly, weights up to the filling of tiles.
#[test]
fn memory_is_as_estimated() {
    for (name, synthetic) in models::all() {
        let checkpoint = gguf(synthetic.to_gguf().expect("bytes"));
        let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
        let in_file = &types_in(&checkpoint);
        for (n_ranks, rank) in [(1, 0), (3, 0), (3, 1), (3, 2)] {
            let plan = SplitPlan::new(&config, n_ranks).expect("a plan");
            let place = format!("{name}, rank {rank} of {n_ranks}");
            let mut in_float = None;
            for quantize in [None, Some(Quantization::Q8_0), Some(Quantization::Q4_K)] {
                let types = WeightTypes { in_file, quantize };
                let estimate = MemoryEstimate::new(&config, &plan, rank, CAPACITY, &types);
                let (decoder, saved) = load_quantized(&checkpoint, (n_ranks, rank), quantize);
                let (weights, kv) = decoder.memory_bytes();
                assert_eq!(kv as u64, estimate.kv_bytes, "{place}");
                let ratio = weights as f64 / estimate.weight_bytes as f64;
                assert!((0.95..1.1).contains(&ratio), "{place}, {quantize:?}: ratio {ratio}");
                let before = *in_float.get_or_insert(estimate.weight_bytes);
                assert_eq!(saved, before - estimate.weight_bytes, "{place}, {quantize:?}");
            }
        }
    }
}

#[test]
fn codes_take_half_of_the_cache_and_a_little() {
    let checkpoint = gguf(models::qwen2().to_gguf().expect("bytes"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let plan = SplitPlan::new(&config, 2).expect("a plan");
    let bytes = |kv_type| {
        let capacity = Capacity { kv_type, ..CAPACITY };
        let (checkpoint, config, plan, progress) = (&checkpoint, &config, &plan, &|_| ());
        let spec = LoadSpec { checkpoint, config, plan, rank: 1, quantize: None, capacity, progress };
        let held = Decoder::load(&spec, &cpu()).expect("loads").memory_bytes().1 as u64;
        let types = WeightTypes { in_file: &types_in(checkpoint), quantize: None };
        assert_eq!(held, MemoryEstimate::new(config, plan, 1, capacity, &types).kv_bytes, "{kv_type}");
        held
    };
    assert_eq!(bytes(KvType::Q8) * 64, bytes(KvType::F16) * 34);
    assert_eq!(bytes(KvType::F32), bytes(KvType::F16) * 2);
}

/// Of a float model little is left, of a model that is quantized already everything.
#[test]
fn quantization_saves_what_it_should() {
    let saved = |synthetic: paceline_model::synthetic::Synthetic, quantization| {
        let checkpoint = gguf(synthetic.to_gguf().expect("bytes"));
        let (decoder, saved) = load_quantized(&checkpoint, (1, 0), Some(quantization));
        saved as f64 / (saved as f64 + decoder.memory_bytes().0 as f64)
    };
    let eight = saved(models::qwen2_f16(), Quantization::Q8_0);
    assert!((0.42..0.5).contains(&eight), "q8_0 saves {eight} of float16");
    let four = saved(models::llama_wide_f16(), Quantization::Q4_K);
    assert!((0.6..0.72).contains(&four), "q4_k saves {four} of float16");
    assert_eq!(saved(models::llama_wide(), Quantization::Q4_K), 0.0);
}

/// Bits that the file has, and the output head of rare tokens: what is held and what is saved are together the whole.
#[test]
fn what_a_draft_loses_is_saved() {
    let checkpoint = gguf(models::llama_tied_q4_1().to_gguf().expect("bytes"));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let (in_file, progress) = (&types_in(&checkpoint), &|_: LoadProgress| ());
    let whole = load(&checkpoint, 1, 0).expect("loads").memory_bytes().0;
    let four = Quantization::of_draft("q4_0").ok();
    for (quantize, n_tokens, least) in [(None, 96, 0.05), (four, config.n_vocab, 0.05), (four, 96, 0.12)] {
        let plan = SplitPlan::with_head(&config, 1, &HeadTokens::first(n_tokens)).expect("a plan");
        let (checkpoint, config, plan) = (&checkpoint, &config, &plan);
        let spec = LoadSpec { checkpoint, config, plan, rank: 0, quantize, capacity: CAPACITY, progress };
        let held = Decoder::load(&spec, &cpu()).expect("loads").memory_bytes().0;
        let saved = (whole - held) as f64 / spec.saved_bytes() as f64;
        assert!((0.9..1.1).contains(&saved), "{n_tokens} tokens: {saved} of what is told");
        assert!((whole - held) as f64 > least * whole as f64, "{n_tokens} tokens: {held} of {whole}");
        let types = WeightTypes { in_file, quantize };
        let estimate = MemoryEstimate::new(config, plan, 0, CAPACITY, &types).weight_bytes as f64;
        assert!((0.95..1.1).contains(&(held as f64 / estimate)), "{held} held, {estimate} estimated");
    }
}

#[test]
fn a_decoder_needs_a_rank_of_the_plan_and_room() {
    let checkpoint = gguf(models::qwen2().to_gguf().expect("bytes"));
    assert!(matches!(load(&checkpoint, 2, 2), Err(ModelError::Load(_))));
    let config = ModelConfig::from_checkpoint(&checkpoint).expect("a configuration");
    let spec = LoadSpec {
        checkpoint: &checkpoint,
        config: &config,
        plan: &SplitPlan::new(&config, 1).expect("a plan"),
        rank: 0,
        quantize: None,
        capacity: Capacity { max_rows: 0, ..CAPACITY },
        progress: &|_| (),
    };
    assert!(matches!(Decoder::load(&spec, &cpu()), Err(ModelError::Load(_))));
}

/// A refused batch leaves no trace: the next good one gives what it gives in a fresh decoder.
#[test]
fn a_bad_batch_is_refused_and_changes_nothing() {
    let checkpoint = gguf(models::qwen2().to_gguf().expect("bytes"));
    let good = Batch {
        tokens: &[TokenId(5), TokenId(6)],
        positions: &[0, 1],
        sequence_of_row: &[0, 0],
        block_tables: &[&[BlockId(2)]],
        output_rows: &[1],
        copies: &[],
    };
    let expected = {
        let mut fresh = load(&checkpoint, 1, 0).expect("loads");
        fresh.forward(&good, &mut Solo::new()).expect("runs").row(0).expect("a row").to_vec()
    };
    let mut decoder = load(&checkpoint, 1, 0).expect("loads");
    let n_layers = decoder.config().n_layers as u64;
    let layers_done = decoder.layers_done();
    let bad = Batch { tokens: &[TokenId(5), TokenId(331)], ..good };
    let error = decoder.forward(&bad, &mut Solo::new()).err().expect("must be refused");
    assert!(error.to_string().contains("token 331 of 331"), "{error}");
    assert_eq!((error.kind(), layers_done.load(Ordering::Relaxed)), (ErrorKind::Invalid, 0));
    let mut logits = decoder.forward(&good, &mut Solo::new()).expect("runs");
    assert_eq!((logits.n_rows(), logits.vocab_range()), (1, 0..331));
    assert_eq!(logits.row(0).expect("a row"), expected);
    assert_eq!(layers_done.load(Ordering::Relaxed), n_layers);
}

#[test]
fn fingerprints_tell_models_and_kv_types_apart() {
    let of =
        |checkpoint: &Arc<Checkpoint>, kv_type| paceline_model::fingerprint(checkpoint, None, kv_type, 0);
    let one = gguf(models::qwen2().to_gguf().expect("bytes"));
    let again = gguf(models::qwen2().to_gguf().expect("bytes"));
    let other = gguf(models::qwen2_f16().to_gguf().expect("bytes"));
    assert_eq!(of(&one, KvType::F16), of(&again, KvType::F16));
    assert_eq!(load(&one, 1, 0).expect("loads").fingerprint(), &of(&one, KvType::F16));
    assert_ne!(of(&one, KvType::F16), of(&other, KvType::F16));
    assert_ne!(of(&one, KvType::F16), of(&one, KvType::F32));
    let quantized = |quantize| load_quantized(&other, (1, 0), quantize).0.fingerprint().clone();
    let [eight, four] = Quantization::ALL.map(|quantization| quantized(Some(quantization)));
    assert_ne!(eight, four);
    assert!(![eight, four].contains(&quantized(None)));
}
