//! A service of a cluster that is started again when it ends, at the same address, where the others look for it: at once
//! the first time, after pauses that grow when it goes on like that. What it does is its own matter.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use tokio::time::sleep_until;

use crate::process::{ServiceEnded, ServiceProcess, ServiceSpec};

/// Ends further back than this do not count.
const WINDOW: Duration = Duration::from_secs(60);
/// Most ends within [`WINDOW`] of a service that the cluster needs.
const MOST_ENDS: usize = 6;
/// Pauses before it is started again: after the second end of a window, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// What a service is to its cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// The cluster ends when it ends too often.
    Needed,
    /// It is started again as often as it ends.
    Advice,
}

/// A service, and how to start it again. Dropped, it is killed.
#[derive(Debug)]
pub struct Supervised {
    /// The process; one that has ended until the next one is started.
    process: ServiceProcess,
    spec: ServiceSpec,
    need: Need,
    ends: Ends,
    /// When the next process is started, if this one has ended.
    due: Option<Instant>,
}

/// When a service ended lately.
#[derive(Debug, Default)]
struct Ends(VecDeque<Instant>);

/// What is done about an end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    StartAfter(Duration),
    GiveUp,
}

impl Supervised {
    /// A process that runs; `spec` starts another one in its place, at the same address.
    pub fn new(process: ServiceProcess, spec: ServiceSpec, need: Need) -> Self {
        Self { process, spec, need, ends: Ends::default(), due: None }
    }

    /// The process, to look at or to harm; it may have ended.
    pub fn process(&mut self) -> &mut ServiceProcess {
        &mut self.process
    }

    /// The process without its supervisor.
    pub fn into_process(self) -> ServiceProcess {
        self.process
    }

    /// Starts it again whenever it ends; how it ended when it is given up, which is never for [`Need::Advice`]. Safe to
    /// cancel.
    pub async fn keep(&mut self) -> ServiceEnded {
        loop {
            if let Some(at) = self.due {
                sleep_until(at.into()).await;
                self.start();
            }
            let ended = self.process.ended().await;
            match self.ends.note(Instant::now(), self.need) {
                Verdict::StartAfter(pause) => {
                    let pause_ms = pause.as_millis() as u64;
                    tracing::warn!(%ended, pause_ms, "{} is started again", self.spec.name);
                    self.due = Some(Instant::now() + pause);
                }
                Verdict::GiveUp => return ServiceEnded { n_restarts: MOST_ENDS - 1, ..ended },
            }
        }
    }

    /// Where that fails, the one that has ended stays, and its end counts again.
    fn start(&mut self) {
        self.due = None;
        match ServiceProcess::start(&self.spec) {
            Ok(process) => self.process = process,
            Err(error) => tracing::warn!(%error, "{} cannot be started", self.spec.name),
        }
    }
}

impl Ends {
    fn note(&mut self, now: Instant, need: Need) -> Verdict {
        self.0.retain(|at| now.saturating_duration_since(*at) < WINDOW);
        self.0.push_back(now);
        let n_ends = self.0.len();
        if need == Need::Needed && n_ends >= MOST_ENDS {
            return Verdict::GiveUp;
        }
        let n_doublings = n_ends.saturating_sub(2).min(31) as u32;
        let pause = PAUSES.0.saturating_mul(1 << n_doublings).min(PAUSES.1);
        Verdict::StartAfter(if n_ends == 1 { Duration::ZERO } else { pause })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Log;

    /// Milliseconds of ends; the pause after each in milliseconds, none when it is given up.
    fn check(need: Need, ends_ms: &[u64], expected: &[Option<u64>]) {
        let (mut ends, start) = (Ends::default(), Instant::now());
        let pauses = ends_ms.iter().map(|ms| match ends.note(start + Duration::from_millis(*ms), need) {
            Verdict::StartAfter(pause) => Some(pause.as_millis() as u64),
            Verdict::GiveUp => None,
        });
        assert_eq!(pauses.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn the_first_end_costs_no_pause_and_each_further_one_a_longer_one() {
        let ends = [0, 10, 20, 30, 40, 50];
        check(Need::Needed, &ends, &[Some(0), Some(100), Some(200), Some(400), Some(800), None]);
        let ends: Vec<u64> = (0..10).collect();
        let pauses = [0, 100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000].map(Some);
        check(Need::Advice, &ends, &pauses);
    }

    #[test]
    fn ends_of_long_ago_do_not_count() {
        check(Need::Needed, &[0, 1, 2, 3, 60_002, 60_003], &[0, 100, 200, 400, 100, 100].map(Some));
        check(Need::Needed, &[0, 60_000, 120_000, 180_000, 240_000, 300_000, 360_000], &[Some(0); 7]);
    }

    fn shell(script: &str) -> ServiceSpec {
        ServiceSpec {
            name: "shard 0".into(),
            program: "/bin/sh".into(),
            args: vec!["-c".into(), script.into()],
            env: Vec::new(),
            log: Log::Keep,
        }
    }

    #[tokio::test]
    async fn who_is_needed_and_never_stays_is_given_up_with_its_log() {
        let spec = shell("echo no memory >&2; exit 4");
        let process = ServiceProcess::start(&spec).expect("starts");
        let ended = Supervised::new(process, spec, Need::Needed).keep().await.to_string();
        assert!(
            ended.contains("shard 0 ended (exit status: 4) after it was started again 5 times"),
            "{ended}"
        );
        assert!(ended.contains("no memory"), "{ended}");
    }

    #[tokio::test]
    async fn a_wait_that_is_cancelled_forgets_no_end() {
        let spec = shell("cat");
        let process = ServiceProcess::start(&spec).expect("starts");
        let mut supervised = Supervised::new(process, spec, Need::Needed);
        let first = supervised.process().pid().expect("it runs");
        supervised.process().kill().await.expect("it runs");
        // Cancelled at every point it can wait at.
        while supervised.process().pid().is_none() {
            tokio::select! {
                biased;
                ended = supervised.keep() => panic!("{ended}"),
                () = tokio::task::yield_now() => {}
            }
        }
        assert_ne!(supervised.process().pid(), Some(first));
        assert_eq!(supervised.ends.0.len(), 1, "it ended once");
        supervised.into_process().stop(Duration::from_secs(30)).await;
    }
}
