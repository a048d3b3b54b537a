//! Speculation of every mode changes no token of thousands of random requests: with sources that are good, wrong, stale,
//! silent, talk nonsense or end, in every batch, with preemption, cached prefixes and groups that are formed anew.

use std::time::Duration;

use paceline_domain::TokenId;
use paceline_tests::{
    hash_model::HashModel,
    hostile_draft::HostileDraft,
    in_process::{InProcessCluster, InProcessSpec, N_VOCAB},
    random::Random,
    schedule::{Alone, Job, MODES, Received, Schedules, Shape},
};
use paceline_wire::inference::SpeculationMode;

/// Clusters, each with other limits; schedules that each of them runs.
const N_CLUSTERS: u64 = 16;
const N_SCHEDULES: u64 = 14;
const DEADLINE: Duration = Duration::from_secs(60);
/// What a pass takes, so that proposals promise something.
const PASS: Duration = Duration::from_millis(1);
/// Second guesses that were right, to say that they change nothing.
const ENOUGH_BRANCHES: u64 = 20;
const CONTEXT: usize = 200;
const END: TokenId = TokenId(N_VOCAB as u32 - 1);

fn alone(job: &Job) -> Alone {
    Alone::on_hash_model(N_VOCAB, job)
}

fn flags(random: &mut Random, draft: &str) -> (Vec<String>, usize) {
    let max_sequences = *random.pick(&[1, 2, 3, 5, 8]);
    let max_rows = max_sequences + *random.pick(&[0, 5, 16, 48]);
    let n_kv_blocks = *random.pick(&[8, 10, 14, 20, 40]);
    let placement = random.pick(&["apart", "together"]);
    let flags = [
        ("--context", CONTEXT.to_string()),
        ("--max-sequences", max_sequences.to_string()),
        ("--max-rows", max_rows.to_string()),
        ("--kv-blocks", n_kv_blocks.to_string()),
        ("--draft", draft.to_owned()),
        ("--draft-placement", placement.to_string()),
        ("--draft-wait-ms", random.pick(&["0", "5", "50"]).to_string()),
    ];
    let flags = flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
    (flags, CONTEXT.min(16 * n_kv_blocks))
}

/// Requests to their end, proposed and accepted tokens, by what was allowed.
#[derive(Default, Debug)]
struct Seen {
    n_whole: usize,
    n_proposed: u64,
    n_accepted: u64,
    n_accepted_branches: u64,
}

impl Seen {
    fn add(&mut self, received: &Received) {
        self.n_whole += received.n_finished as usize;
        self.n_proposed += received.n_proposed;
        self.n_accepted += received.n_accepted;
        self.n_accepted_branches += received.n_accepted_branches;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_proposal_from_anywhere_changes_a_token() {
    let mut seen = MODES.map(|_| Seen::default());
    let mut problems = Vec::new();
    for cluster_seed in 0..N_CLUSTERS {
        let mut random = Random::new(cluster_seed);
        let (draft, serving) = HostileDraft::start(cluster_seed).await.expect("a port");
        let (flags, max_tokens) = flags(&mut random, &draft);
        let device = HashModel::taking(PASS);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let n_ranks = if random.happens(0.25) { 2 } else { 1 };
        let spec = InProcessSpec { n_ranks, ..InProcessSpec::new(&device, &flags) };
        let cluster = InProcessCluster::start(&spec).await.expect("starts");
        let client = cluster.client().await.expect("a connection");
        let shape = Shape {
            max_jobs: 10,
            max_tokens,
            max_output: 80,
            n_vocab: N_VOCAB,
            end_token: END,
            modes: &MODES,
            scored: 0.2,
        };
        let schedules = Schedules::new(cluster_seed, shape, &alone);
        for i in 0..N_SCHEDULES {
            if random.happens(0.2) {
                device.fail_after(random.within(0..30) as u32);
            }
            let schedule = schedules.schedule(cluster_seed * N_SCHEDULES + i);
            let ended = tokio::time::timeout(DEADLINE, schedule.run(&client)).await;
            let received = ended.unwrap_or_else(|_| panic!("{flags:?}: seed {} does not end", schedule.seed));
            for (job, received) in schedule.jobs.iter().zip(&received) {
                let mode = MODES.iter().position(|mode| *mode == job.speculation).expect("it is one of them");
                received.iter().for_each(|received| seen[mode].add(received));
            }
            let mismatches = schedule.mismatches(received);
            problems.extend(mismatches.iter().map(|mismatch| format!("{flags:?}: {mismatch}")));
        }
        drop(client);
        cluster.stop().await.expect("stops");
        serving.abort();
    }
    assert!(problems.is_empty(), "{} differ; the first: {}", problems.len(), problems[0]);
    println!("off, ngram, draft, auto: {seen:?}");
    let n_whole: usize = seen.iter().map(|seen| seen.n_whole).sum();
    assert!(n_whole >= 1_000, "{n_whole} requests are too few to say so");
    assert_eq!(seen[0].n_proposed, 0);
    let (n_proposed, n_accepted) =
        seen.iter().fold((0, 0), |sums, seen| (sums.0 + seen.n_proposed, sums.1 + seen.n_accepted));
    assert!(n_accepted > 200 && n_proposed > n_accepted + 50, "too few to say so: {seen:?}");
}

/// Rows for second guesses have to pay, which depends on what passes take here: so it is run until enough were right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_guesses_that_are_right_change_no_token() {
    let (draft, serving) = HostileDraft::start_unsure(7).await.expect("a port");
    let device = HashModel::taking(10 * PASS);
    let flags =
        ["--context", "200", "--draft", &draft, "--draft-placement", "apart", "--draft-wait-ms", "50"];
    let cluster = InProcessCluster::start(&InProcessSpec::new(&device, &flags)).await.expect("starts");
    let client = cluster.client().await.expect("a connection");
    let modes = &[SpeculationMode::Draft];
    let shape = Shape {
        max_jobs: 4,
        max_tokens: CONTEXT,
        max_output: 80,
        n_vocab: N_VOCAB,
        end_token: END,
        modes,
        scored: 0.0,
    };
    let (schedules, mut seen, mut seed) = (Schedules::new(7, shape, &alone), Seen::default(), 0);
    let until_enough = async {
        while seen.n_accepted_branches < ENOUGH_BRANCHES {
            let schedule = schedules.schedule(seed);
            let received = schedule.run(&client).await;
            received.iter().flatten().for_each(|received| seen.add(received));
            let mismatches = schedule.mismatches(received);
            assert!(mismatches.is_empty(), "{}", mismatches[0]);
            seed += 1;
        }
    };
    let ended = tokio::time::timeout(DEADLINE, until_enough).await;
    assert!(ended.is_ok(), "after {DEADLINE:?} {seen:?}");
    drop(client);
    cluster.stop().await.expect("stops");
    serving.abort();
}
