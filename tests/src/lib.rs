//! The harness for tests with real processes.
