//! How a draft model is made smaller than its file: options of the commands that start or measure one.

use std::ffi::OsString;

use clap::Args;
use paceline_domain::DraftQuantization;

/// What a draft model may lose, because its tokens are verified.
#[derive(Args, Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DraftWeights {
    /// Quantize matrices of the draft model while they are loaded, also those that its file has quantized: q4_k, q4_0, q4_1,
    /// q8_0, or none [default: chosen by the draft service]
    #[arg(long, value_name = "TYPE")]
    pub draft_quantize: Option<DraftQuantization>,
    /// Let the draft model propose only the first N tokens of its vocabulary, the frequent ones; 0 is for all [default: chosen
    /// by the draft service]
    #[arg(long, value_name = "N")]
    pub draft_vocabulary: Option<usize>,
}

impl DraftWeights {
    /// Whether something is asked for.
    pub fn is_given(self) -> bool {
        self != Self::default()
    }

    /// Arguments for the draft service.
    pub fn args(self) -> Vec<OsString> {
        let quantize = self.draft_quantize.map(|quantization| ("--quantize", quantization.to_string()));
        let vocabulary = self.draft_vocabulary.map(|n_tokens| ("--vocabulary", n_tokens.to_string()));
        let given = quantize.into_iter().chain(vocabulary);
        given.flat_map(|(flag, value)| [OsString::from(flag), value.into()]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_given_is_passed_on() {
        assert!(!DraftWeights::default().is_given() && DraftWeights::default().args().is_empty());
        let weights =
            DraftWeights { draft_quantize: Some(DraftQuantization::SMALLEST), draft_vocabulary: Some(0) };
        assert!(weights.is_given());
        assert_eq!(weights.args(), ["--quantize", "q4_0", "--vocabulary", "0"]);
        let as_in_file =
            DraftWeights { draft_quantize: Some(DraftQuantization(None)), draft_vocabulary: None };
        assert_eq!(as_in_file.args(), ["--quantize", "none"]);
    }
}
