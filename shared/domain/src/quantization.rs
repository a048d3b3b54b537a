//! Quantization of weights while they are loaded: its names. Which matrix gets which type is known by `model`.

use std::fmt;
use std::str::FromStr;

use crate::WeightType;

/// What matrices become at load.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Quantization {
    weight_type: WeightType,
    of: Of,
}

/// Which matrices are quantized.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Of {
    /// Those of plain numbers: what a file has quantized keeps its bits.
    Plain,
    /// All that become smaller.
    All,
}

impl Quantization {
    /// 8 bits, a scale for each 32: 8.5 bits a weight.
    pub const Q8_0: Self = Self { weight_type: WeightType::Q8_0, of: Of::Plain };
    /// 4 bits, a scale and a minimum for each 32: 4.5 bits a weight.
    pub const Q4_K: Self = Self { weight_type: WeightType::Q4_K, of: Of::Plain };

    /// Every one of a model whose tokens count.
    pub const ALL: [Self; 2] = [Self::Q8_0, Self::Q4_K];

    /// Every one of a draft model. Its tokens are verified, so what its file has quantized may lose bits too.
    pub const OF_DRAFT: [Self; 4] = [
        Self { weight_type: WeightType::Q8_0, of: Of::All },
        Self { weight_type: WeightType::Q4_K, of: Of::All },
        Self { weight_type: WeightType::Q4_0, of: Of::All },
        Self { weight_type: WeightType::Q4_1, of: Of::All },
    ];

    /// The storage type of most matrices.
    pub const fn weight_type(self) -> WeightType {
        self.weight_type
    }

    /// Whether matrices that a file has quantized are quantized again.
    pub const fn is_of_all(self) -> bool {
        matches!(self.of, Of::All)
    }

    /// The name used on the command line and in messages.
    pub const fn name(self) -> &'static str {
        self.weight_type.name()
    }

    /// The name of a choice, for people.
    pub fn name_or_none(choice: Option<Self>) -> &'static str {
        choice.map_or("none", Self::name)
    }

    /// The one of [`Self::OF_DRAFT`] with this name.
    ///
    /// # Errors
    /// A name that none has.
    pub fn of_draft(name: &str) -> Result<Self, String> {
        let found = Self::OF_DRAFT.into_iter().find(|quantization| quantization.name() == name);
        found.ok_or_else(|| {
            format!("weights of a draft are quantized to q8_0, q4_k, q4_0, q4_1 or none, not to `{name}`")
        })
    }
}

/// What matrices of a draft model become at load, where somebody says: one of [`Quantization::OF_DRAFT`], or nothing else than
/// they are in the file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DraftQuantization(pub Option<Quantization>);

impl DraftQuantization {
    /// Where nobody says and memory bounds the draft: four bits and a scale, the fewest there are.
    pub const SMALLEST: Self = Self(Some(Quantization { weight_type: WeightType::Q4_0, of: Of::All }));
}

impl fmt::Display for DraftQuantization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(Quantization::name_or_none(self.0))
    }
}

impl FromStr for DraftQuantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == Quantization::name_or_none(None) {
            return Ok(Self(None));
        }
        Quantization::of_draft(text).map(|quantization| Self(Some(quantization)))
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|quantization| quantization.name() == text);
        found.ok_or_else(|| format!("weights are quantized to q8_0 or q4_k, not to `{text}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for quantization in Quantization::ALL {
            assert_eq!(quantization.to_string().parse(), Ok(quantization));
            assert!(!quantization.is_of_all());
        }
        for quantization in Quantization::OF_DRAFT {
            assert_eq!(Quantization::of_draft(quantization.name()), Ok(quantization));
            assert!(quantization.is_of_all());
        }
        assert!("q5_0".parse::<Quantization>().is_err_and(|error| error.contains("`q5_0`")));
        assert!("q4_0".parse::<Quantization>().is_err(), "only drafts");
        assert!(Quantization::of_draft("q5_0").is_err_and(|error| error.contains("`q5_0`")));
        assert_eq!(Quantization::name_or_none(None), "none");
        for choice in [DraftQuantization::SMALLEST, DraftQuantization(None)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("q5_0".parse::<DraftQuantization>().is_err());
    }
}
