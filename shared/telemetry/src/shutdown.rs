//! When a service should end: SIGTERM, SIGINT, or its parent is gone.

use std::{io::Read as _, thread};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// Whether a closed standard input also ends the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ParentWatch {
    /// Only signals end it.
    Off,
    /// The end of standard input means that the parent is gone.
    Stdin,
}

/// Resolves when the process should end. Call inside a Tokio runtime.
///
/// # Panics
/// When the process cannot install signal handlers.
pub async fn requested(watch: ParentWatch) {
    let mut terminate = signal(SignalKind::terminate()).expect("invariant: SIGTERM can be handled");
    let mut interrupt = signal(SignalKind::interrupt()).expect("invariant: SIGINT can be handled");
    let parent_gone = parent_gone(watch);
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: shutting down"),
        _ = interrupt.recv() => tracing::info!("SIGINT: shutting down"),
        () = parent_gone => tracing::info!("standard input closed: shutting down"),
    }
}

/// Resolves when standard input ends. The reading thread cannot be joined: it blocks until then, and ends with the
/// process.
async fn parent_gone(watch: ParentWatch) {
    let (gone, ended) = oneshot::channel::<()>();
    if watch == ParentWatch::Stdin {
        thread::spawn(move || {
            let mut buffer = [0; 256];
            while std::io::stdin().read(&mut buffer).is_ok_and(|n_bytes| n_bytes > 0) {}
            drop(gone);
        });
        // The sender never sends: its end is the message.
        let _ = ended.await;
    } else {
        std::future::pending::<()>().await;
    }
}
