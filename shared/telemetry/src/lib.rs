//! Tracing set-up, OTLP export and W3C trace context in gRPC metadata. It names no spans and records no text of
//! prompts or outputs.
//!
//! # Layout
//! * [`init`] – log lines on standard error, spans by OTLP when an endpoint is configured
//! * [`shutdown`] – when a service should end
//! * [`context`] – trace context into and out of gRPC metadata and plan messages
#![forbid(unsafe_code)]

pub mod context;
pub mod init;
pub mod shutdown;

pub use init::{Telemetry, TelemetryConfig};
