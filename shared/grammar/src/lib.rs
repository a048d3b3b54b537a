//! Which tokens a JSON schema, a regular expression or a grammar allows next. Grammars are compiled and run by the
//! `llguidance` crate, under limits; here they are tied to our tokenizers and to proposals that are verified together. It
//! chooses no token and knows neither requests nor steps.
//!
//! # Layout
//! * [`compiler`] – a grammar becomes a matcher, or a clear error
//! * [`matcher`] – where one sequence stands in its grammar: masks, before and after proposals
#![forbid(unsafe_code)]

pub mod compiler;
pub mod matcher;

pub use compiler::{Compiler, GrammarError};
pub use matcher::Matcher;
