//! Thousands of short requests, some broken off, each answer held against what it is alone; and what the process looks like
//! from outside: memory, processor time of its threads. It judges nothing.

use std::{fs, sync::Arc};

use anyhow::Context as _;
use futures_util::future::join_all;
use paceline::answer::connect;
use paceline_domain::TokenId;
use paceline_wire::inference::{
    SpeculationMode, generate_response::Event, inference_client::InferenceClient,
};
use tonic::{Status, transport::Channel};

use crate::{in_process::N_VOCAB, random::Random, schedule::Job};

/// Requests that a connection is used for.
const MAX_USES: usize = 500;

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct Soak {
    /// Requests.
    pub n_requests: usize,
    /// Those that run at the same time.
    pub n_clients: usize,
    /// Share of them that the client breaks off.
    pub cancelled: f64,
    /// What they follow from.
    pub seed: u64,
}

/// What became of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Soaked {
    /// With the tokens they get alone.
    pub n_right: usize,
    /// With other tokens, or too few.
    pub n_wrong: usize,
    /// With an error.
    pub n_failed: usize,
    /// Of the first error.
    pub problem: Option<String>,
    /// Broken off, with tokens that were right so far.
    pub n_cancelled: usize,
}

impl Soak {
    /// Sends all of it to a coordinator; each client has a connection of its own.
    pub async fn run(self, address: &str) -> Soaked {
        let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let clients = (0..self.n_clients).map(|_| {
            let (mut connection, next) = (Connection::new(address), next.clone());
            tokio::spawn(async move {
                let mut soaked = Soaked::default();
                loop {
                    let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if number >= self.n_requests {
                        return soaked;
                    }
                    match self.one(number, &mut connection).await {
                        Ok(Came::Whole) => soaked.n_right += 1,
                        Ok(Came::Part) => soaked.n_cancelled += 1,
                        Ok(Came::Wrong) => soaked.n_wrong += 1,
                        Err(status) => {
                            soaked.n_failed += 1;
                            soaked.problem.get_or_insert_with(|| format!("{status:?}"));
                        }
                    }
                }
            })
        });
        let mut all = Soaked::default();
        for soaked in join_all(clients).await {
            let soaked = soaked.expect("invariant: a client does not panic");
            all.n_right += soaked.n_right;
            all.n_wrong += soaked.n_wrong;
            all.n_failed += soaked.n_failed;
            all.problem = all.problem.or(soaked.problem);
            all.n_cancelled += soaked.n_cancelled;
        }
        all
    }

    async fn one(&self, number: usize, connection: &mut Connection) -> Result<Came, Status> {
        let mut random = Random::new(self.seed ^ (number as u64) << 20);
        let job = short_job(&mut random, self.cancelled);
        let mut tokens = Vec::new();
        let enough = |tokens: &[TokenId]| job.cancelled_after.is_some_and(|most| tokens.len() >= most);
        let mut stream = connection.client().await?.generate(job.request()).await?.into_inner();
        while !enough(&tokens) {
            match stream.message().await?.and_then(|chunk| chunk.event) {
                Some(Event::Delta(delta)) => tokens.extend(delta.token_ids.into_iter().map(TokenId)),
                Some(Event::Finished(_)) if tokens == job.alone[0] => return Ok(Came::Whole),
                Some(Event::Started(_)) => {}
                Some(Event::Finished(_) | Event::PromptLogprobs(_)) | None => return Ok(Came::Wrong),
            }
        }
        Ok(if job.alone[0].starts_with(&tokens) { Came::Part } else { Came::Wrong })
    }
}

/// A connection that is made anew now and then: the HTTP/2 library of a client gives a connection up when it has broken off
/// about a thousand streams that still had something to come.
struct Connection {
    address: String,
    client: Option<InferenceClient<Channel>>,
    n_used: usize,
}

impl Connection {
    fn new(address: &str) -> Self {
        Self { address: address.into(), client: None, n_used: 0 }
    }

    async fn client(&mut self) -> Result<&mut InferenceClient<Channel>, Status> {
        self.n_used += 1;
        if self.client.is_none() || self.n_used.is_multiple_of(MAX_USES) {
            let connected = connect(&self.address).await;
            self.client = Some(connected.map_err(|error| Status::unavailable(format!("{error:#}")))?);
        }
        Ok(self.client.as_mut().expect("invariant: connected above"))
    }
}

/// What came of one request.
enum Came {
    Whole,
    Part,
    Wrong,
}

/// A request of few tokens; one in four begins as others do.
fn short_job(random: &mut Random, cancelled: f64) -> Job {
    let mut prompt: Vec<TokenId> =
        if random.happens(0.25) { (0..20).map(TokenId).collect() } else { Vec::new() };
    let n_own = random.within(1..12);
    prompt.extend((0..n_own).map(|_| TokenId(random.within(0..N_VOCAB) as u32)));
    let max_tokens = random.within(1..9);
    let cancelled_after = random.happens(cancelled).then(|| random.within(0..max_tokens));
    let job = Job::greedy_on_hash_model(N_VOCAB, prompt, max_tokens);
    Job { cancelled_after, speculation: SpeculationMode::Auto, ..job }
}

/// Bytes of this process that are in memory.
///
/// # Errors
/// When the system does not say.
pub fn resident_bytes() -> anyhow::Result<u64> {
    resident_bytes_of(std::process::id())
}

/// Bytes of a process that are in memory.
///
/// # Errors
/// When the system does not say.
pub fn resident_bytes_of(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024)
}

/// Processor time of threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ThreadTime {
    /// All of it.
    pub nanoseconds: u64,
    /// What the system samples of it: hundredths of a second outside and inside the system.
    pub user_ticks: u64,
    /// See `user_ticks`.
    pub system_ticks: u64,
}

impl ThreadTime {
    /// What the threads of this name have run so far.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn of(name: &str) -> anyhow::Result<Self> {
        let mut total = Self::default();
        for task in fs::read_dir("/proc/self/task")? {
            let task = task?.path();
            // A thread may have ended meanwhile.
            let Ok(own) = fs::read_to_string(task.join("comm")) else { continue };
            if own.trim() == name {
                let times = fs::read_to_string(task.join("schedstat"))?;
                total.nanoseconds += times.split(' ').next().context("an empty schedstat")?.parse::<u64>()?;
                let stat = fs::read_to_string(task.join("stat"))?;
                // The name is in parentheses; user and system time are the 12th and 13th field after it.
                let (_, fields) = stat.rsplit_once(')').context("no name in stat")?;
                let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u64>);
                total.user_ticks += ticks.next().context("a short stat")??;
                total.system_ticks += ticks.next().context("a short stat")??;
            }
        }
        Ok(total)
    }

    /// What was added to an earlier reading; threads that ended meanwhile are not in it.
    pub fn since(self, before: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds.saturating_sub(before.nanoseconds),
            user_ticks: self.user_ticks.saturating_sub(before.user_ticks),
            system_ticks: self.system_ticks.saturating_sub(before.system_ticks),
        }
    }

    /// Both together.
    pub fn and(self, other: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds + other.nanoseconds,
            user_ticks: self.user_ticks + other.user_ticks,
            system_ticks: self.system_ticks + other.system_ticks,
        }
    }

    /// The part of it inside the system, from 0 to 1.
    pub fn system_share(self) -> f64 {
        self.system_ticks as f64 / (self.user_ticks + self.system_ticks).max(1) as f64
    }
}
