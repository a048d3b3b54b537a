//! Quantization of float weights while they are loaded: its names. Which matrix gets which type is known by `model`.

use std::fmt;
use std::str::FromStr;

use crate::WeightType;

/// What float matrices become at load.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(non_camel_case_types)]
pub enum Quantization {
    /// 8 bits, a scale for each 32: 8.5 bits a weight.
    Q8_0,
    /// 4 bits, a scale and a minimum for each 32: 4.5 bits a weight.
    Q4_K,
}

impl Quantization {
    /// Every one.
    pub const ALL: [Self; 2] = [Self::Q8_0, Self::Q4_K];

    /// The storage type of most matrices.
    pub const fn weight_type(self) -> WeightType {
        match self {
            Self::Q8_0 => WeightType::Q8_0,
            Self::Q4_K => WeightType::Q4_K,
        }
    }

    /// The name used on the command line and in messages.
    pub const fn name(self) -> &'static str {
        self.weight_type().name()
    }

    /// The name of a choice, for people.
    pub fn name_or_none(choice: Option<Self>) -> &'static str {
        choice.map_or("none", Self::name)
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
        }
        assert!("q5_0".parse::<Quantization>().is_err_and(|error| error.contains("`q5_0`")));
        assert_eq!(Quantization::name_or_none(None), "none");
    }
}
