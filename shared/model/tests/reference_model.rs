//! The decoder against a forward pass in f64 that shares nothing with it but the weights.

mod support;

use paceline_checkpoint::Checkpoint;
use paceline_domain::{KvType, Quantization};
use paceline_model::synthetic::Synthetic;
use support::models;
use support::reference::Reference;
use support::rig::{Rig, Setup, in_pieces, of_first_sequence, tokens};

const N_TOKENS: usize = 36;

/// Largest difference of a logit and smallest cosine of a row.
fn compare(rig: &Rig) -> (f64, f64) {
    let sequence = tokens(9, N_TOKENS, rig.config.n_vocab);
    let steps = in_pieces(&sequence, &[20, 1]);
    let found = of_first_sequence(&steps, rig.run(&steps));
    let expected = Reference { checkpoint: &rig.checkpoint, config: &rig.config }.logits(&sequence);
    let (mut largest, mut smallest) = (0.0f64, 1.0f64);
    for (found, expected) in found.iter().zip(&expected) {
        let found: Vec<f64> = found.iter().copied().map(f64::from).collect();
        for (found, expected) in found.iter().zip(expected) {
            largest = largest.max((found - expected).abs());
        }
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = dot(&found, expected) / (dot(&found, &found) * dot(expected, expected)).sqrt();
        smallest = smallest.min(cosine);
    }
    (largest, smallest)
}

fn from_gguf(synthetic: &Synthetic) -> Rig {
    let rig =
        Rig::new(Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint"));
    rig.with(Setup { kv_type: KvType::F32, ..rig.setup })
}

fn from_safetensors(synthetic: &Synthetic) -> Rig {
    let directory = tempfile::tempdir().expect("a directory");
    synthetic.write_hugging_face(directory.path()).expect("written");
    let rig = Rig::new(Checkpoint::open(directory.path()).expect("a checkpoint"));
    rig.with(Setup { kv_type: KvType::F32, ..rig.setup })
}

#[test]
fn float_weights_agree_to_rounding() {
    let floats = [
        models::llama_tied_f32(),
        models::mistral(),
        models::qwen2_f16(),
        models::llama3_scaled(),
        Synthetic { weight_type: |_, _| paceline_domain::WeightType::F32, ..models::llama_linear() },
    ];
    for synthetic in floats {
        for rig in [from_gguf(&synthetic), from_safetensors(&synthetic)] {
            let (difference, _) = compare(&rig);
            assert!(difference < 2e-5, "seed {}: a logit differs by {difference}", synthetic.seed);
        }
    }
}

#[test]
fn quantized_weights_agree_but_for_the_quantization_of_activations() {
    for (name, synthetic) in models::all() {
        let (difference, cosine) = compare(&from_gguf(&synthetic));
        // These models are tiny, and all activations but those of the head have eight bits.
        assert!(
            cosine > 0.996 && difference < 0.4,
            "{name}: cosine {cosine}, largest difference {difference}"
        );
    }
}

/// The reference multiplies with the float weights of the file.
#[test]
fn weights_quantized_at_load_stay_near_the_float_model() {
    for synthetic in
        [models::llama_tied_f32(), models::mistral(), models::qwen2_f16(), models::llama_wide_f16()]
    {
        let rig = from_safetensors(&synthetic);
        let of_draft = |name| Quantization::of_draft(name).expect("a name");
        let (q4_0, q4_1) = (of_draft("q4_0"), of_draft("q4_1"));
        for (quantization, least) in
            [(Quantization::Q8_0, 0.996), (Quantization::Q4_K, 0.96), (q4_0, 0.9), (q4_1, 0.92)]
        {
            let (_, cosine) = compare(&rig.with(Setup { quantize: Some(quantization), ..rig.setup }));
            println!("seed {}, {quantization}: cosine {cosine}", synthetic.seed);
            assert!(cosine > least, "seed {}, {quantization}: cosine {cosine}", synthetic.seed);
        }
    }
}

#[test]
fn f16_kv_costs_little() {
    let rig = from_gguf(&models::llama_tied_f32());
    let (difference, _) = compare(&rig.with(Setup { kv_type: KvType::F16, ..rig.setup }));
    assert!((1e-6..5e-3).contains(&difference), "a logit differs by {difference}");
}

#[test]
fn q8_kv_costs_more_but_little() {
    let rig = from_gguf(&models::llama_tied_f32());
    let (difference, cosine) = compare(&rig.with(Setup { kv_type: KvType::Q8, ..rig.setup }));
    println!("q8 KV: largest difference {difference}, cosine {cosine}");
    assert!((1e-4..6e-2).contains(&difference) && cosine > 0.9998, "{difference}, cosine {cosine}");
}
