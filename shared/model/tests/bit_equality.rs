//! The same model gives the same bits whatever it runs on: any number of ranks, any instruction set, any threads,
//! any batch, any prefill chunks, either file format.

mod support;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Transport;
use paceline_domain::{KvType, Quantization};
use paceline_kernels::Isa;
use paceline_model::config::Architecture;
use paceline_model::synthetic::Synthetic;
use support::models;
use support::rig::{
    Link, Rig, Setup, Step, assert_same_bits, in_a_crowd, in_pieces, of_first_sequence, tokens,
};

const N_TOKENS: usize = 40;
const PLAIN: Setup = Setup {
    isa: Isa::Scalar,
    n_threads: 1,
    n_ranks: 1,
    kv_type: KvType::F16,
    quantize: None,
    n_tokens: usize::MAX,
    link: Link::Table,
};

fn gguf(synthetic: &Synthetic) -> Rig {
    Rig::new(Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint"))
}

/// The logits of the sequence under a schedule.
fn run(rig: &Rig, steps: &[Step]) -> Vec<Vec<f32>> {
    of_first_sequence(steps, rig.run(steps))
}

/// Calls `check(name, rig, sequence, expected bits)` for every model; expected is what one scalar thread computes
/// token by token.
fn for_each_model(check: impl Fn(&str, &Rig, &[u32], &[Vec<f32>])) {
    for (name, synthetic) in models::all() {
        let rig = gguf(&synthetic);
        let sequence = tokens(1, N_TOKENS, rig.config.n_vocab);
        let expected = run(&rig.with(PLAIN), &in_pieces(&sequence, &[1]));
        assert!(expected.iter().flatten().all(|logit| logit.is_finite()), "{name}: a logit is not finite");
        let spread = expected[N_TOKENS - 1].iter().copied().fold(f32::MIN, f32::max);
        assert!(spread > 0.5, "{name}: the largest logit is {spread}, the model says nothing");
        check(name, &rig, &sequence, &expected);
    }
}

#[test]
fn every_instruction_set_and_number_of_threads() {
    for_each_model(|name, rig, sequence, expected| {
        for isa in Isa::available() {
            for n_threads in [1, 2] {
                let rig = rig.with(Setup { isa, n_threads, ..PLAIN });
                assert_same_bits(
                    expected,
                    &run(&rig, &in_pieces(sequence, &[N_TOKENS])),
                    &format!("{name}, {isa}"),
                );
            }
        }
    });
}

#[test]
fn every_number_of_ranks() {
    for_each_model(|name, rig, sequence, expected| {
        for n_ranks in [2, 3, 4, 7] {
            let rig = rig.with(Setup { n_ranks, n_threads: 1, ..rig.setup });
            let found = run(&rig, &in_pieces(sequence, &[17, 1, 30]));
            assert_same_bits(expected, &found, &format!("{name}, {n_ranks} ranks"));
        }
    });
}

#[test]
fn more_ranks_than_heads_and_leaves() {
    let rig = gguf(&models::qwen2());
    let sequence = tokens(1, 9, rig.config.n_vocab);
    let expected = run(&rig, &in_pieces(&sequence, &[9]));
    for n_ranks in [13, 64] {
        let found = run(&rig.with(Setup { n_ranks, n_threads: 1, ..rig.setup }), &in_pieces(&sequence, &[4]));
        assert_same_bits(&expected, &found, &format!("{n_ranks} ranks"));
    }
}

#[test]
fn every_transport() {
    for synthetic in [models::llama_tied_q4_1(), models::qwen2()] {
        let rig = gguf(&synthetic);
        let sequence = tokens(1, N_TOKENS, rig.config.n_vocab);
        let steps = in_pieces(&sequence, &[17, 1, 30]);
        let expected = run(&rig, &steps);
        for transport in [Transport::SharedMemory, Transport::Tcp] {
            for n_ranks in [2, 3] {
                let link = Link::Real(transport);
                let found = run(&rig.with(Setup { n_ranks, n_threads: 1, link, ..rig.setup }), &steps);
                assert_same_bits(&expected, &found, &format!("{n_ranks} ranks by {transport:?}"));
            }
        }
    }
}

#[test]
fn any_prefill_chunks() {
    for_each_model(|name, rig, sequence, expected| {
        for lengths in [&[N_TOKENS][..], &[1], &[7], &[16, 3, 1, 1, 20]] {
            assert_same_bits(
                expected,
                &run(rig, &in_pieces(sequence, lengths)),
                &format!("{name}, {lengths:?}"),
            );
        }
    });
}

#[test]
fn any_batch() {
    for_each_model(|name, rig, sequence, expected| {
        for n_sequences in [1, 2, 7, 32] {
            let steps = in_a_crowd(sequence, n_sequences, rig.config.n_vocab);
            assert_same_bits(expected, &run(rig, &steps), &format!("{name}, {n_sequences} sequences"));
        }
    });
}

#[test]
fn contexts_of_several_attention_chunks() {
    for synthetic in [models::mistral(), models::llama_tied_q4_1()] {
        let rig = gguf(&synthetic);
        let sequence = tokens(3, 300, rig.config.n_vocab);
        let expected = run(&rig.with(PLAIN), &in_pieces(&sequence, &[300]));
        let found = run(&rig, &in_pieces(&sequence, &[250, 1, 1, 1, 1, 1, 1, 1, 1]));
        assert_same_bits(&expected, &found, "decode across position 256");
        let ranks = rig.with(Setup { n_ranks: 3, n_threads: 1, ..rig.setup });
        assert_same_bits(&expected, &run(&ranks, &in_pieces(&sequence, &[100])), "three ranks");
    }
}

/// Long enough for several blocks, heads of one group of codes and of more, and a short last group.
#[test]
fn other_kv_types_are_the_same_everywhere_too_and_not_f16() {
    let mut wide_heads = models::llama_tied_f32();
    wide_heads.config.head_dim = 80;
    for rig in [gguf(&models::llama_tied_q4_1()), gguf(&models::mistral()), gguf(&wide_heads)] {
        let sequence = tokens(1, N_TOKENS, rig.config.n_vocab);
        let f16 = run(&rig.with(PLAIN), &in_pieces(&sequence, &[1]));
        for kv_type in [KvType::F32, KvType::Q8] {
            let setup = Setup { kv_type, ..PLAIN };
            let expected = run(&rig.with(setup), &in_pieces(&sequence, &[1]));
            assert_ne!(expected, f16, "{kv_type}");
            for isa in Isa::available() {
                for (n_ranks, n_threads) in [(1, 2), (2, 1), (3, 2)] {
                    let rig = rig.with(Setup { isa, n_ranks, n_threads, ..setup });
                    for steps in [in_pieces(&sequence, &[N_TOKENS]), in_pieces(&sequence, &[17, 1, 30])] {
                        let what = format!("{kv_type} KV, {isa}, {n_ranks} ranks");
                        assert_same_bits(&expected, &run(&rig, &steps), &what);
                    }
                }
            }
            let crowd = in_a_crowd(&sequence, 7, rig.config.n_vocab);
            let rig = rig.with(Setup { kv_type, ..rig.setup });
            assert_same_bits(&expected, &run(&rig, &crowd), &format!("{kv_type} KV, 7 sequences"));
        }
    }
}

/// Decoding across the edge of an attention chunk, with codes.
#[test]
fn codes_in_several_attention_chunks() {
    let rig = gguf(&models::llama_tied_q4_1());
    let sequence = tokens(3, 300, rig.config.n_vocab);
    let setup = Setup { kv_type: KvType::Q8, ..PLAIN };
    let expected = run(&rig.with(setup), &in_pieces(&sequence, &[300]));
    let fast = rig.with(Setup { kv_type: KvType::Q8, ..rig.setup });
    let found = run(&fast, &in_pieces(&sequence, &[250, 1, 1, 1, 1, 1, 1, 1, 1]));
    assert_same_bits(&expected, &found, "decode across position 256");
}

/// Whole rows are quantized, whatever part of them a rank holds; either file format has the same rows.
#[test]
fn weights_quantized_at_load_are_the_same_everywhere_too() {
    for synthetic in [models::mistral(), models::qwen2_f16(), models::llama_wide_f16()] {
        let directory = tempfile::tempdir().expect("a directory");
        synthetic.write_hugging_face(directory.path()).expect("written");
        let rigs = [gguf(&synthetic), Rig::new(Checkpoint::open(directory.path()).expect("a checkpoint"))];
        let sequence = tokens(1, N_TOKENS, synthetic.config.n_vocab);
        let float = run(&rigs[0].with(PLAIN), &in_pieces(&sequence, &[1]));
        for quantization in Quantization::ALL {
            let quantize = Some(quantization);
            let expected = run(&rigs[0].with(Setup { quantize, ..PLAIN }), &in_pieces(&sequence, &[1]));
            assert_ne!(expected, float, "{quantization}");
            for (rig, isa) in
                rigs.iter().flat_map(|rig| Isa::available().into_iter().map(move |isa| (rig, isa)))
            {
                for (n_ranks, n_threads) in [(1, 2), (2, 1), (3, 2), (7, 1)] {
                    let rig = rig.with(Setup { isa, n_ranks, n_threads, quantize, ..PLAIN });
                    let found = run(&rig, &in_pieces(&sequence, &[17, 1, 30]));
                    assert_same_bits(&expected, &found, &format!("{quantization}, {isa}, {n_ranks} ranks"));
                }
            }
        }
    }
}

/// What a file has quantized is quantized again, whole rows at a time, for a draft.
#[test]
fn weights_of_a_draft_are_the_same_everywhere_too() {
    for synthetic in [models::llama_untied_k_quants(), models::llama_tied_q4_1()] {
        let rig = gguf(&synthetic);
        let sequence = tokens(1, N_TOKENS, rig.config.n_vocab);
        let kept = run(&rig.with(PLAIN), &in_pieces(&sequence, &[1]));
        for name in ["q4_0", "q4_k"] {
            let quantize = Quantization::of_draft(name).ok();
            let expected = run(&rig.with(Setup { quantize, ..PLAIN }), &in_pieces(&sequence, &[1]));
            assert_ne!(expected, kept, "{name}");
            for isa in Isa::available() {
                for (n_ranks, n_threads) in [(1, 2), (2, 1), (3, 2)] {
                    let rig = rig.with(Setup { isa, n_ranks, n_threads, quantize, ..PLAIN });
                    let found = run(&rig, &in_pieces(&sequence, &[17, 1, 30]));
                    assert_same_bits(&expected, &found, &format!("{name}, {isa}, {n_ranks} ranks"));
                }
            }
        }
    }
}

/// An output head for the first tokens gives them the logits that the whole one gives them. All tokens are looked up.
#[test]
fn a_head_for_fewer_tokens_gives_the_same_logits() {
    for synthetic in [models::llama_untied_k_quants(), models::llama_tied_q4_1(), models::qwen2_f16()] {
        let rig = gguf(&synthetic);
        let sequence = tokens(1, N_TOKENS, rig.config.n_vocab);
        let whole = run(&rig.with(PLAIN), &in_pieces(&sequence, &[1]));
        for n_tokens in [1, 100, 256, 9_999] {
            assert!(n_tokens > 256 || sequence.iter().any(|token| *token as usize >= n_tokens));
            let n_kept = n_tokens.min(rig.config.n_vocab);
            let expected: Vec<Vec<f32>> = whole.iter().map(|row| row[..n_kept].to_vec()).collect();
            for (n_ranks, n_threads) in [(1, 2), (2, 1), (3, 2)] {
                let rig = rig.with(Setup { n_ranks, n_threads, n_tokens, ..rig.setup });
                let found = run(&rig, &in_pieces(&sequence, &[17, 1]));
                assert_same_bits(&expected, &found, &format!("{n_tokens} tokens, {n_ranks} ranks"));
            }
        }
    }
}

/// Rows of llama's queries and keys are stored in another order in the two formats; the bits must not show it.
#[test]
fn either_file_format() {
    for (name, synthetic) in models::all() {
        let directory = tempfile::tempdir().expect("a directory");
        let Ok(()) = synthetic.write_hugging_face(directory.path()) else { continue };
        let from_gguf = gguf(&synthetic);
        let from_safetensors = Rig::new(Checkpoint::open(directory.path()).expect("a checkpoint"));
        if synthetic.config.architecture == Architecture::Llama {
            assert_ne!(from_gguf.config.rope.pair_layout, from_safetensors.config.rope.pair_layout);
        }
        let sequence = tokens(5, N_TOKENS, synthetic.config.n_vocab);
        let steps = in_pieces(&sequence, &[N_TOKENS]);
        assert_same_bits(&run(&from_gguf, &steps), &run(&from_safetensors, &steps), name);
    }
}
