//! Reads a [`ModelConfig`] from a Hugging Face config.json. Unknown keys that change the computation are errors.

use serde_json::Value;

use crate::ModelError;
use crate::config::{
    Architecture, Llama3Scaling, ModelConfig, PairLayout, RopeConfig, RopeScaling, SUPPORTED, SlidingWindow,
};

/// The model classes of the transformers library that can be run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Llama,
    Mistral,
    Qwen2,
}

/// Typed access to one JSON object.
struct Object<'a>(&'a Value);

pub(crate) fn read(json: &Value) -> Result<ModelConfig, ModelError> {
    let object = Object(json);
    let class = class(&object)?;
    refuse_unsupported(&object)?;
    let n_embd = object.count("hidden_size")?;
    let n_heads = object.count("num_attention_heads")?;
    let head_dim = match object.optional_count("head_dim")? {
        Some(head_dim) => head_dim,
        None if n_heads > 0 && n_embd.is_multiple_of(n_heads) => n_embd / n_heads,
        None => {
            return Err(ModelError::config("hidden_size", format!("{n_embd} is not {n_heads} whole heads")));
        }
    };
    let n_layers = object.count("num_hidden_layers")?;
    let config = ModelConfig {
        architecture: if class == Class::Qwen2 { Architecture::Qwen2 } else { Architecture::Llama },
        n_layers,
        n_embd,
        n_heads,
        n_kv_heads: object.optional_count("num_key_value_heads")?.unwrap_or(n_heads),
        head_dim,
        n_ff: object.count("intermediate_size")?,
        n_vocab: object.count("vocab_size")?,
        context_length: object.count("max_position_embeddings")?,
        rms_eps: object.number("rms_norm_eps")? as f32,
        rope: rope(&object)?,
        sliding_window: sliding_window(&object, class, n_layers)?,
        tied_embeddings: object.optional_bool("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: class == Class::Qwen2,
    };
    config.checked()
}

fn class(object: &Object<'_>) -> Result<Class, ModelError> {
    let listed = object.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    let model_type = object.get("model_type").and_then(Value::as_str);
    let class = match (listed, model_type) {
        (Some("LlamaForCausalLM"), _) => Some(Class::Llama),
        (Some("MistralForCausalLM"), _) => Some(Class::Mistral),
        (Some("Qwen2ForCausalLM"), _) => Some(Class::Qwen2),
        (None, Some("llama")) => Some(Class::Llama),
        (None, Some("mistral")) => Some(Class::Mistral),
        (None, Some("qwen2")) => Some(Class::Qwen2),
        _ => None,
    };
    class.ok_or_else(|| {
        let found = listed.or(model_type).unwrap_or("(none given)");
        ModelError::Unfit(format!("its architecture is {found}; supported are {SUPPORTED}"))
    })
}

fn refuse_unsupported(object: &Object<'_>) -> Result<(), ModelError> {
    if let Some(activation) = object.optional_str("hidden_act")?.filter(|name| *name != "silu") {
        return Err(ModelError::Unfit(format!("hidden_act is {activation}; only silu is supported")));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if object.optional_bool(key)? == Some(true) {
            return Err(ModelError::Unfit(format!("{key} is set; such biases are not supported")));
        }
    }
    for owner in [Some(object), object.object("rope_parameters").as_ref()].into_iter().flatten() {
        if let Some(part) = owner.optional_number("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(ModelError::Unfit(format!("partial_rotary_factor is {part}; only 1 is supported")));
        }
    }
    if let Some(quantization) = object.object("quantization_config") {
        let method = quantization.optional_str("quant_method")?.unwrap_or("unnamed");
        return Err(ModelError::Unfit(format!(
            "it is quantized by {method}; of safetensors only float32, float16 and bfloat16 are supported"
        )));
    }
    Ok(())
}

fn rope(object: &Object<'_>) -> Result<RopeConfig, ModelError> {
    let parameters = object.object("rope_parameters");
    let theta = match parameters.as_ref().map(|parameters| parameters.optional_number("rope_theta")) {
        Some(theta) => theta?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => object.optional_number("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match parameters.or_else(|| object.object("rope_scaling")) {
        Some(scaling) => rope_scaling(&scaling)?,
        None => RopeScaling::None,
    };
    Ok(RopeConfig { theta, pair_layout: PairLayout::Half, scaling })
}

fn rope_scaling(scaling: &Object<'_>) -> Result<RopeScaling, ModelError> {
    let kind = match scaling.optional_str("rope_type")? {
        Some(kind) => Some(kind),
        None => scaling.optional_str("type")?,
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear(scaling.number("factor")?)),
        Some("llama3") => Ok(RopeScaling::Llama3(Llama3Scaling {
            factor: scaling.number("factor")?,
            low_freq_factor: scaling.number("low_freq_factor")?,
            high_freq_factor: scaling.number("high_freq_factor")?,
            original_context: scaling.number("original_max_position_embeddings")?,
        })),
        Some(other) => Err(ModelError::Unfit(format!(
            "its rope scaling is {other}; supported are none, linear and llama3"
        ))),
    }
}

fn sliding_window(
    object: &Object<'_>,
    class: Class,
    n_layers: usize,
) -> Result<Option<SlidingWindow>, ModelError> {
    let window = match class {
        Class::Llama => None,
        Class::Mistral => object
            .optional_count("sliding_window")?
            .map(|n_positions| SlidingWindow { n_positions, first_layer: 0 }),
        Class::Qwen2 if object.optional_bool("use_sliding_window")? == Some(true) => Some(SlidingWindow {
            n_positions: object.count("sliding_window")?,
            first_layer: object.optional_count("max_window_layers")?.unwrap_or(n_layers),
        }),
        Class::Qwen2 => None,
    };
    if let Some(kinds) = object.get("layer_types").and_then(Value::as_array) {
        let expected = |layer: usize| match window {
            Some(window) if layer >= window.first_layer => "sliding_attention",
            _ => "full_attention",
        };
        if kinds.len() != n_layers || kinds.iter().enumerate().any(|(layer, kind)| *kind != *expected(layer))
        {
            return Err(ModelError::Unfit("its layer_types are not those its class usually has".into()));
        }
    }
    Ok(window)
}

impl<'a> Object<'a> {
    /// The value of a key; JSON null is the same as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn object(&self, key: &str) -> Option<Object<'a>> {
        self.get(key).map(Object)
    }

    fn optional<T>(
        &self,
        key: &str,
        kind: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| ModelError::config(key, format!("is {value}, not {kind}")))
    }

    fn optional_count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.optional(key, "a count", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        self.optional(key, "a number", Value::as_f64)
    }

    fn optional_bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    fn optional_str(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a text", Value::as_str)
    }

    fn count(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_count(key)?.ok_or_else(|| ModelError::config(key, "is missing"))
    }

    fn number(&self, key: &str) -> Result<f64, ModelError> {
        self.optional_number(key)?.ok_or_else(|| ModelError::config(key, "is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mistral() -> Value {
        json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
        })
    }

    fn with(mut json: Value, key: &str, value: Value) -> Value {
        json[key] = value;
        json
    }

    fn problem(json: &Value) -> String {
        read(json).expect_err("must be refused").to_string()
    }

    #[test]
    fn mistral_is_read_with_its_window() {
        let config = read(&mistral()).expect("reads");
        assert_eq!(config.head_dim, 128);
        assert_eq!(config.window_of_layer(0), Some(4096));
        assert_eq!(config.rope.pair_layout, PairLayout::Half);
        assert!(!config.qkv_bias && !config.tied_embeddings);
        let full = read(&with(mistral(), "sliding_window", Value::Null)).expect("reads");
        assert_eq!(full.sliding_window, None);
    }

    #[test]
    fn qwen2_windows_only_when_asked_and_only_late_layers() {
        let qwen = with(mistral(), "architectures", json!(["Qwen2ForCausalLM"]));
        let plain = read(&with(qwen.clone(), "use_sliding_window", json!(false))).expect("reads");
        assert_eq!((plain.sliding_window, plain.qkv_bias), (None, true));
        let windowed = with(with(qwen, "use_sliding_window", json!(true)), "max_window_layers", json!(28));
        let config = read(&windowed).expect("reads");
        assert_eq!((config.window_of_layer(27), config.window_of_layer(28)), (None, Some(4096)));
        let odd = with(windowed, "layer_types", json!(["full_attention"]));
        assert!(problem(&odd).contains("layer_types"));
    }

    #[test]
    fn rope_variants() {
        let llama3 = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        let config = read(&with(mistral(), "rope_scaling", llama3)).expect("reads");
        assert!(matches!(config.rope.scaling, RopeScaling::Llama3(scaling) if scaling.factor == 8.0));
        let linear = json!({ "type": "linear", "factor": 4.0 });
        let config = read(&with(mistral(), "rope_scaling", linear)).expect("reads");
        assert_eq!(config.rope.scaling, RopeScaling::Linear(4.0));
        let yarn = json!({ "rope_type": "yarn", "factor": 4.0 });
        assert!(problem(&with(mistral(), "rope_scaling", yarn)).contains("yarn"));
        let newer = json!({ "rope_type": "default", "rope_theta": 1e6 });
        assert_eq!(read(&with(mistral(), "rope_parameters", newer)).expect("reads").rope.theta, 1e6);
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let unknown = problem(&with(mistral(), "architectures", json!(["FalconForCausalLM"])));
        assert!(unknown.contains("FalconForCausalLM") && unknown.contains("qwen2"), "{unknown}");
        assert!(problem(&with(mistral(), "hidden_act", json!("gelu"))).contains("gelu"));
        assert!(problem(&with(mistral(), "attention_bias", json!(true))).contains("attention_bias"));
        let quantized = json!({ "quant_method": "gptq" });
        assert!(problem(&with(mistral(), "quantization_config", quantized)).contains("gptq"));
    }

    #[test]
    fn hostile_values_are_typed_errors() {
        let keys = [
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "sliding_window",
            "head_dim",
        ];
        for key in keys {
            for value in [json!(0), json!(u64::MAX), json!(-1), json!("7"), json!([]), json!(1e300)] {
                let error = read(&with(mistral(), key, value.clone())).expect_err("must be refused");
                assert!(matches!(error, ModelError::Config { .. }), "{key} = {value}: {error}");
            }
        }
        assert!(read(&json!(null)).is_err());
        assert!(problem(&with(mistral(), "num_key_value_heads", json!(5))).contains("do not divide"));
        assert!(problem(&with(mistral(), "head_dim", json!(127))).contains("even"));
    }
}
