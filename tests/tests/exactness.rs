//! Every request gets the tokens it has when it runs alone, whatever else is going on. On a model whose tokens follow from
//! every KV entry that a correct cache holds, so that a wrong one cannot stay hidden; through the real services.

use std::{
    fmt::{self, Display, Formatter, Write as _},
    time::Duration,
};

use paceline_domain::TokenId;
use paceline_tests::{
    hash_model::{Flaw, HashModel},
    in_process::{InProcessCluster, InProcessSpec, N_VOCAB},
    random::Random,
    schedule::{Alone, Job, Mismatch, Received, Schedule, Schedules, Shape, WITHOUT_DRAFT},
};
use paceline_wire::inference::inference_client::InferenceClient;
use tonic::{Status, transport::Channel};

/// Clusters, each with other limits; schedules that each of them runs.
const N_CLUSTERS: u64 = 50;
const N_SCHEDULES: u64 = 40;
/// Mismatches that a failed test shows.
const N_SHOWN: usize = 8;
/// How long a schedule may take; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(60);
/// What passes take in some clusters.
const PASS: Duration = Duration::from_micros(300);
const CONTEXT: usize = 160;
const END: TokenId = TokenId(N_VOCAB as u32 - 1);

fn alone(job: &Job) -> Alone {
    Alone::on_hash_model(N_VOCAB, job)
}

/// Limits of a cluster, and what its requests may need.
struct Limits {
    flags: Vec<String>,
    n_groups: usize,
    n_ranks: usize,
    shape: Shape,
}

impl Limits {
    fn random(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let max_sequences = *random.pick(&[1, 2, 3, 5, 8, 16]);
        let max_rows = max_sequences + *random.pick(&[0, 1, 5, 15, 16, 48]);
        // Down to pools that hold one short request.
        let n_kv_blocks = *random.pick(&[1, 2, 3, 4, 6, 8, 10, 10, 11, 14, 20, 40]);
        let flags = [
            ("--context", CONTEXT),
            ("--max-sequences", max_sequences),
            ("--max-rows", max_rows),
            ("--kv-blocks", n_kv_blocks),
        ];
        let shape = Shape {
            max_jobs: 14,
            max_tokens: CONTEXT.min(16 * n_kv_blocks),
            max_output: 40,
            n_vocab: N_VOCAB,
            end_token: END,
            modes: &WITHOUT_DRAFT,
            scored: 0.2,
        };
        Self {
            flags: flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value.to_string()]).collect(),
            n_ranks: if random.happens(0.2) { 2 } else { 1 },
            n_groups: if random.happens(0.3) { 2 } else { 1 },
            shape,
        }
    }

    async fn start(&self, device: &HashModel) -> InProcessCluster {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        let one_group = InProcessSpec { n_ranks: self.n_ranks, ..InProcessSpec::new(device, &flags) };
        let spec = (1..self.n_groups).fold(one_group, |spec, _| spec.group(device));
        let started = InProcessCluster::start(&spec).await;
        started.unwrap_or_else(|error| panic!("{:?} does not start: {error:#}", self.flags))
    }

    /// Runs a schedule; one that does not end is told by its seed.
    async fn run(
        &self,
        schedule: &Schedule,
        client: &InferenceClient<Channel>,
    ) -> Vec<Result<Received, Status>> {
        let ended = tokio::time::timeout(DEADLINE, schedule.run(client)).await;
        ended.unwrap_or_else(|_| panic!("{self}: seed {} does not end", schedule.seed))
    }

    fn schedules(&self, seed: u64) -> Schedules<'static> {
        Schedules::new(seed, self.shape.clone(), &alone)
    }
}

impl Display for Limits {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { flags, n_groups, n_ranks, .. } = self;
        write!(formatter, "{}, {n_groups} groups of {n_ranks} ranks", flags.join(" "))
    }
}

/// Differences so far, with the flags of the cluster each was met on.
#[derive(Default)]
struct Differences {
    shown: String,
    n: usize,
}

impl Differences {
    fn add(&mut self, limits: &Limits, mismatches: &[Mismatch]) {
        for mismatch in mismatches {
            self.n += 1;
            if self.n <= N_SHOWN {
                writeln!(self.shown, "{limits}: {mismatch}").expect("a string takes everything");
            }
        }
    }

    fn assert_none(&self) {
        assert_eq!(self.n, 0, "requests got other tokens than alone; the first of them:\n{}", self.shown);
    }
}

#[tokio::test]
async fn two_thousand_schedules_give_each_request_what_it_gets_alone() {
    let mut differences = Differences::default();
    let (mut n_whole, mut n_cancelled, mut n_cached, mut n_copied) = (0, 0, 0, 0);
    let (mut n_constrained, mut n_accepted, mut n_scored) = (0, 0, 0);
    for cluster_seed in 0..N_CLUSTERS {
        let limits = Limits::random(cluster_seed);
        // Where passes take no time, proposals promise nothing and are seldom made.
        let takes_time = cluster_seed.is_multiple_of(4);
        let device = if takes_time { HashModel::taking(PASS) } else { HashModel::new() };
        let cluster = limits.start(&device).await;
        let client = cluster.client().await.expect("a connection");
        let schedules = limits.schedules(cluster_seed);
        for i in 0..N_SCHEDULES {
            let schedule = schedules.schedule(cluster_seed * N_SCHEDULES + i);
            let n = schedule.jobs.iter().filter(|job| job.cancelled_after.is_some()).count();
            (n_whole, n_cancelled) = (n_whole + schedule.jobs.len() - n, n_cancelled + n);
            let received = limits.run(&schedule, &client).await;
            n_cached += received.iter().flatten().map(|received| u64::from(received.n_cached)).sum::<u64>();
            n_scored += received.iter().flatten().map(|received| received.scores.len()).sum::<usize>();
            let constrained = schedule.jobs.iter().zip(&received).filter(|(job, _)| job.regex.is_some());
            for received in constrained.filter_map(|(_, received)| received.as_ref().ok()) {
                n_constrained += received.n_finished;
                n_accepted += received.n_accepted;
            }
            differences.add(&limits, &schedule.mismatches(received));
        }
        n_copied += device.n_copied();
        drop(client);
        cluster.stop().await.expect("stops");
    }
    differences.assert_none();
    println!(
        "{n_whole} requests to their end, {n_cancelled} cancelled, {n_cached} prompt tokens cached, {n_copied} blocks copied"
    );
    println!("{n_scored} prompt tokens scored");
    assert!(n_scored > 10_000, "only {n_scored} prompt tokens were scored");
    println!("{n_constrained} constrained choices to their end, {n_accepted} of their tokens were proposed");
    assert!(
        n_constrained > 1_000 && n_accepted > 0,
        "{n_constrained} and {n_accepted} are too few to say so"
    );
    assert!(n_copied > 1_000, "{n_copied} blocks copied are too few to say so");
    assert!(n_whole > 10_000 && n_cancelled > 2_000, "{n_whole} and {n_cancelled} are too few to say so");
}

#[tokio::test]
async fn so_they_do_when_passes_fail_and_the_group_is_formed_anew() {
    let (mut differences, mut n_failed) = (Differences::default(), 0);
    for cluster_seed in 1000..1008 {
        let limits = Limits::random(cluster_seed);
        let device = HashModel::new();
        let cluster = limits.start(&device).await;
        let client = cluster.client().await.expect("a connection");
        let (schedules, mut random) = (limits.schedules(cluster_seed), Random::new(cluster_seed));
        for i in 0..4 {
            device.fail_after(random.within(0..30) as u32);
            let schedule = schedules.schedule(cluster_seed * 4 + i);
            differences.add(&limits, &schedule.mismatches(limits.run(&schedule, &client).await));
        }
        n_failed += device.n_failed();
        drop(client);
        cluster.stop().await.expect("stops");
    }
    differences.assert_none();
    assert!(n_failed > 20, "only {n_failed} passes failed");
}

/// What `alone` says is what a request alone on a cluster gets.
#[tokio::test]
async fn alone_is_what_it_says() {
    let limits = Limits::random(7);
    let roomy = InProcessSpec::new(&HashModel::new(), &["--context", "160"]);
    let cluster = InProcessCluster::start(&roomy).await.expect("starts");
    let client = cluster.client().await.expect("a connection");
    let limits = Limits { shape: Shape { max_tokens: CONTEXT, ..limits.shape.clone() }, ..limits };
    let schedules = limits.schedules(7);
    let mut n_jobs = 0;
    for seed in 0..20 {
        let mut schedule = schedules.schedule(seed);
        for job in std::mem::take(&mut schedule.jobs) {
            schedule.jobs = vec![Job { cancelled_after: None, after: 0, ..job }];
            let mismatches = schedule.mismatches(limits.run(&schedule, &client).await);
            assert!(mismatches.is_empty(), "{}", mismatches[0]);
            n_jobs += 1;
        }
    }
    assert!(n_jobs >= 100, "{n_jobs} requests are too few to say so");
}

/// The harness is worth nothing unless it notices KV memory that is wrong.
#[tokio::test]
async fn wrong_kv_entries_do_not_stay_hidden() {
    for flaw in [Flaw::LostWrite, Flaw::ForeignBlock, Flaw::StaleEntry, Flaw::LostCopy] {
        let limits = Limits { n_groups: 1, n_ranks: 1, ..Limits::random(11) };
        let shape = Shape { max_tokens: CONTEXT, ..limits.shape.clone() };
        let limits = Limits { flags: vec!["--context".into(), CONTEXT.to_string()], shape, ..limits };
        let cluster = limits.start(&HashModel::flawed(flaw)).await;
        let client = cluster.client().await.expect("a connection");
        let (schedules, mut differ) = (limits.schedules(11), 0);
        for seed in 11..16 {
            let schedule = schedules.schedule(seed);
            let mismatches = schedule.mismatches(limits.run(&schedule, &client).await);
            differ += mismatches.iter().filter(|mismatch| mismatch.received.is_ok()).count();
        }
        assert!(differ > 0, "{flaw:?} was not noticed");
        drop(client);
        cluster.stop().await.expect("stops");
    }
}
