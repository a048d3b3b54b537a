//! Tests of the crate through its public face: equality with other implementations, hostile input, properties.

#![allow(clippy::unwrap_used)]

mod chat_templates;
mod detokenizing;
mod fixture;
mod golden;
mod hostile;
mod tokenizer_json;
