//! Sampling as a pure function: row of logits, parameters, token history, seed and position give one token. It has
//! no state of its own, no clock and no random source, and it does not know which model the logits come from.
//!
//! `token = argmax over kept x of logit(x) + temperature * G(seed, position, x)`, with Gumbel noise `G` from a
//! counter-based generator; dividing by the temperature gives `log p + G`, so the token is distributed as the
//! softmax over the kept tokens. Verification of proposals is the same function: a proposal is accepted if and only
//! if it equals the sampled token ([`verify()`]).
//!
//! All numbers on the way to a token or a log probability come from additions, multiplications and divisions in a
//! fixed order, never from a mathematics library, so they are the same on every machine.
//!
//! # Layout
//! * [`sample`] – the function itself, for a whole row or for slices of the vocabulary that are merged
//! * [`verify()`] – sample and match
//! * [`history`] – token counts as a function of the token log
//! * [`noise`] – the counter-based generator and Gumbel noise
//! * `score` – log probabilities
//! * `adjust` – penalties and bias
//! * `restrict` – tokens that must not be chosen
//! * `filter` – top-k, top-p and min-p as one cut in the order of tokens
//! * `math` – exp and ln with fixed operations

#![forbid(unsafe_code)]

mod adjust;
mod filter;
pub mod history;
mod math;
pub mod noise;
mod restrict;
pub mod sample;
mod score;
pub mod verify;

pub use adjust::has_penalty;
pub use filter::{Cut, cut};
pub use history::{TokenCount, TokenHistory};
pub use restrict::{allow_only, forbid};
pub use sample::{
    Candidate, has_filter, is_plain, local_best, merge, needs_full_row, plain_best, sample_row,
};
pub use score::score_row;
pub use verify::{verify, verify_branches};
