//! All requests of a run: warm-up, then clients that wait for their answers or arrivals that wait for nobody. An interrupt
//! breaks requests off; what came until then is reported.

use std::{
    io::{IsTerminal as _, Write as _},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{sync::watch, task::JoinSet, time::interval};

use super::{
    Options,
    arrivals::{Planned, plan},
    figures::Figures,
    prompts::Prompts,
    target::{Answer, Outcome, Target},
};

/// Progress is shown this often: on a terminal, else.
const PROGRESS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Runs it all. The figures, and whether it was interrupted.
///
/// # Errors
/// Options or prompts that are wrong, a server that cannot be reached, or a warm-up request that fails.
pub async fn run(options: &Options) -> anyhow::Result<(Figures, Interrupted)> {
    let (answers, interrupted) = answers(options).await?;
    Ok((Figures::new(options, &answers), interrupted))
}

/// What [`run`] counts: the answer to each request that was sent.
///
/// # Errors
/// As [`run`].
pub async fn answers(options: &Options) -> anyhow::Result<(Vec<Answer>, Interrupted)> {
    options.check()?;
    let path = options.prompts.clone().unwrap_or_else(Prompts::default_path);
    let prompts = Prompts::read(&path, options.only.as_deref())?;
    let target = Target::connect(options).await?;
    let (interrupted, watched) = watch::channel(Interrupted::No);
    let listener = tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.send_replace(Interrupted::Yes);
        }
        // Whoever waits for it must not be told that it will never come.
        interrupted.closed().await;
    });
    // Numbers of the warm-up lie behind all others, so that it fills no cache for them.
    let warm_up = plan(
        &Options { cancel_fraction: 0.0, rate: None, tenants: Vec::new(), ..options.clone() },
        &prompts,
        options.requests,
        options.warmup,
    );
    let planned = plan(options, &prompts, 0, options.requests);
    let load = Arc::new(Load {
        target,
        planned,
        n_sent: AtomicUsize::new(0),
        n_ended: AtomicUsize::new(0),
        interrupted: watched,
    });
    for planned in &warm_up {
        let answer = load.one(0, planned).await;
        if let Outcome::Failed(problem) = answer.outcome
            && !load.is_interrupted()
        {
            anyhow::bail!("a warm-up request failed: {problem}");
        }
    }
    let started = Instant::now();
    let progress = tokio::spawn(load.clone().show_progress());
    let answers = match options.total_rate() {
        None => load.clone().closed(options.clients).await,
        Some(_) => load.clone().open(started).await,
    };
    progress.abort();
    listener.abort();
    let interrupted = if load.is_interrupted() { Interrupted::Yes } else { Interrupted::No };
    Ok((answers, interrupted))
}

/// Whether the user has broken the run off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interrupted {
    /// No.
    No,
    /// Yes.
    Yes,
}

struct Load {
    target: Target,
    planned: Vec<Planned>,
    n_sent: AtomicUsize,
    n_ended: AtomicUsize,
    interrupted: watch::Receiver<Interrupted>,
}

impl Load {
    fn is_interrupted(&self) -> bool {
        *self.interrupted.borrow() == Interrupted::Yes
    }

    async fn one(&self, client: usize, planned: &Planned) -> Answer {
        let mut answer = Answer { tenant: planned.tenant, ..Answer::new(Instant::now()) };
        let mut interrupted = self.interrupted.clone();
        tokio::select! {
            () = self.target.send(client, planned, &mut answer) => {}
            _ = interrupted.wait_for(|interrupted| *interrupted == Interrupted::Yes) => {}
        }
        answer
    }

    /// Each client sends its next request when its last one has ended.
    async fn closed(self: Arc<Self>, n_clients: usize) -> Vec<Answer> {
        let client = |client: usize| {
            let load = self.clone();
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !load.is_interrupted() {
                    let number = load.n_sent.fetch_add(1, Ordering::Relaxed);
                    let Some(planned) = load.planned.get(number) else { break };
                    answers.push(load.one(client, planned).await);
                    load.n_ended.fetch_add(1, Ordering::Relaxed);
                }
                answers
            })
        };
        let clients = join_all((0..n_clients).map(client)).await;
        clients.into_iter().flat_map(|answers| answers.expect("invariant: a client does not panic")).collect()
    }

    /// Each request is sent at its moment.
    async fn open(self: Arc<Self>, started: Instant) -> Vec<Answer> {
        let (mut requests, mut interrupted) = (JoinSet::new(), self.interrupted.clone());
        for number in 0..self.planned.len() {
            let moment = started + self.planned[number].sent_at;
            tokio::select! {
                () = tokio::time::sleep_until(moment.into()) => {}
                _ = interrupted.wait_for(|interrupted| *interrupted == Interrupted::Yes) => break,
            }
            let load = self.clone();
            self.n_sent.fetch_add(1, Ordering::Relaxed);
            requests.spawn(async move {
                let answer = load.one(number, &load.planned[number]).await;
                load.n_ended.fetch_add(1, Ordering::Relaxed);
                answer
            });
        }
        requests.join_all().await
    }

    async fn show_progress(self: Arc<Self>) {
        let is_terminal = std::io::stderr().is_terminal();
        let (end, period) = if is_terminal { ("\r", PROGRESS.0) } else { ("\n", PROGRESS.1) };
        let mut ticks = interval(period);
        // The first one comes at once.
        ticks.tick().await;
        loop {
            ticks.tick().await;
            let n_ended = self.n_ended.load(Ordering::Relaxed);
            let n_sent = self.n_sent.load(Ordering::Relaxed).min(self.planned.len());
            let (n_running, n_all) = (n_sent.saturating_sub(n_ended), self.planned.len());
            // Nobody has to see it.
            let _ =
                write!(std::io::stderr(), "{n_ended} of {n_all} requests ended, {n_running} running   {end}");
        }
    }
}
