//! The draft service of a cluster: started again when it ends, at the same address, where the coordinator looks for it. A
//! cluster can do without it, so nothing waits for it.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use crate::{
    cluster::{ClusterSpec, STOP_GRACE, start_draft},
    process::ServiceProcess,
};

/// Pauses before it is started again: after the first end, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// Who has run so long is well: the next pause is the first one again.
const WELL_AFTER: Duration = Duration::from_secs(30);

/// The process, and how to start it again.
#[derive(Debug)]
pub struct DraftProcess {
    process: Option<ServiceProcess>,
    spec: ClusterSpec,
    address: String,
    started: Instant,
    pause: Duration,
}

impl DraftProcess {
    /// One that runs and listens there.
    pub fn new(process: ServiceProcess, spec: ClusterSpec, address: String) -> Self {
        Self { process: Some(process), spec, address, started: Instant::now(), pause: PAUSES.0 }
    }

    /// The process, while there is one.
    pub fn process(&mut self) -> Option<&mut ServiceProcess> {
        self.process.as_mut()
    }

    /// Starts it again whenever it ends. Safe to cancel.
    pub async fn keep(&mut self) -> Infallible {
        loop {
            if let Some(process) = &mut self.process {
                let ended = process.ended().await;
                self.process = None;
                if self.started.elapsed() > WELL_AFTER {
                    self.pause = PAUSES.0;
                }
                tracing::warn!(%ended, pause_ms = self.pause.as_millis() as u64, "the draft service is started again");
            }
            sleep(self.pause).await;
            self.pause = (self.pause * 2).min(PAUSES.1);
            self.start();
        }
    }

    fn start(&mut self) {
        let Some(draft) = &self.spec.draft else { return };
        self.started = Instant::now();
        match start_draft(&self.spec, draft, &self.address) {
            Ok(process) => self.process = Some(process),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the draft service cannot be started"),
        }
    }

    /// Stops it.
    pub async fn stop(self) {
        if let Some(process) = self.process {
            process.stop(STOP_GRACE).await;
        }
    }
}
