//! How the user stops the program: signals for async code, a flag for blocking code.

use std::{
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::error::PullError;

/// Set once by whoever hears the signal, looked at by blocking work.
#[derive(Clone, Default, Debug)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks the work to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// When the flag is set.
    pub fn check(&self) -> Result<(), PullError> {
        if self.0.load(Ordering::Relaxed) { Err(PullError::Interrupted) } else { Ok(()) }
    }
}

/// The signal that ended the program. As an error it carries the exit code up to `main`.
#[derive(thiserror::Error, Clone, Copy, PartialEq, Eq, Debug)]
#[error("stopped by signal {0}")]
pub struct Interrupted(pub u8);

impl Interrupted {
    /// 128 + the signal's number, as shells have it.
    pub fn exit_code(self) -> ExitCode {
        ExitCode::from(128 + self.0)
    }
}

/// Hears SIGINT, SIGTERM and SIGHUP from its making on.
#[derive(Debug)]
pub struct Interrupts {
    int: Signal,
    term: Signal,
    hangup: Signal,
}

impl Interrupts {
    /// Starts to listen. From here on the signals do not end the process by themselves.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn listen() -> anyhow::Result<Self> {
        Ok(Self {
            int: signal(SignalKind::interrupt())?,
            term: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal.
    pub async fn next(&mut self) -> Interrupted {
        tokio::select! {
            _ = self.int.recv() => Interrupted(2),
            _ = self.term.recv() => Interrupted(15),
            _ = self.hangup.recv() => Interrupted(1),
        }
    }
}
