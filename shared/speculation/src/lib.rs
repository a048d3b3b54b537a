//! Speculation without a model: what to propose from a request's own tokens, how likely proposals are accepted, and how
//! many of them are worth a row of the next step. Pure: no IO, no randomness, and time is an argument.
//!
//! Nothing here can change a token. Every choice may be wrong; wrong ones cost time only, and how much is bounded by
//! [`controller`].
//!
//! # Layout
//! * [`proposal`] – proposed tokens and where they come from
//! * [`suffix_automaton`] – all substrings of a growing text, and where they were last
//! * [`alignment`] – where a text copies from, over small changes
//! * [`ngram`] – proposes what followed the longest suffix that occurred before, or follows in what is copied
//! * [`acceptance`] – how often proposals are accepted, by source, position and confidence
//! * [`newcomers`] – what is expected of a sequence that nothing was drafted for
//! * [`step_times`] – how long a step takes, learnt from the steps that were measured
//! * [`account`] – what speculation may lose
//! * [`controller`] – how many proposals of which sequences enter the next step
//! * [`branches`] – which second guesses enter beside them
//! * [`turns`] – how many tokens a draft on the target's machine drafts before a step
//! * [`breaker`] – leaves out a source that is late, dead or talks nonsense, until it is well again

#![forbid(unsafe_code)]

pub mod acceptance;
pub mod account;
pub mod alignment;
pub mod branches;
pub mod breaker;
pub mod controller;
mod key_costs;
mod load;
pub mod newcomers;
pub mod ngram;
pub mod proposal;
pub mod step_times;
pub mod suffix_automaton;
pub mod turns;

pub use acceptance::{AcceptanceTable, SequenceAcceptance};
pub use account::{Account, AccountConfig};
pub use branches::{BranchOffer, add_branches};
pub use breaker::{Breaker, BreakerConfig, Fault};
pub use controller::{Choice, Controller, ControllerConfig, Promise, StepCost, StepLoad};
pub use load::Load;
pub use newcomers::{Newcomers, Tried};
pub use ngram::{NgramConfig, NgramProposer};
pub use proposal::{Guess, ProposedToken, Source, SourceCounters};
pub use step_times::{Beside, Drafting, StepTimes};
pub use suffix_automaton::SuffixAutomaton;
pub use turns::Turn;
