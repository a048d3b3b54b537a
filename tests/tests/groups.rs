//! Several groups of one model: every request has the tokens it has alone, goes where its prefix is, and outlives its group.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use paceline_domain::TokenId;
use paceline_tests::{
    client::{Generation, from_tokens, generate},
    hash_model::{HashModel, tokens_alone},
    in_process::{InProcessCluster, InProcessSpec, N_VOCAB},
    random::Random,
    schedule::{Alone, Job, Schedule, Schedules, Shape, WITHOUT_DRAFT},
};
use paceline_wire::inference::inference_client::InferenceClient;
use tokio::task::JoinHandle;
use tonic::{Status, transport::Channel};

const BLOCK: usize = 16;
/// How long what must happen may take; far above what it takes.
const DEADLINE: Duration = Duration::from_secs(60);
/// What passes take: so long that requests are in both groups at the same time.
const PASS: Duration = Duration::from_micros(300);

type Client = InferenceClient<Channel>;

/// Two groups, and the devices they compute with.
async fn two_groups(flags: &[&str]) -> (InProcessCluster, [HashModel; 2]) {
    let devices = [HashModel::taking(PASS), HashModel::taking(PASS)];
    let spec = InProcessSpec::new(&devices[0], flags).group(&devices[1]);
    (InProcessCluster::start(&spec).await.expect("starts"), devices)
}

/// A prompt of `n` tokens of a text.
fn prompt(text: usize, n: usize) -> Vec<u32> {
    let mut random = Random::new(text as u64);
    (0..n).map(|_| random.within(0..N_VOCAB - 1) as u32).collect()
}

/// A greedy request of a text, with the tokens it has alone.
fn job(text: usize, n_prompt: usize, max_tokens: usize) -> Job {
    let prompt = prompt(text, n_prompt).into_iter().map(TokenId).collect();
    Job::greedy_on_hash_model(N_VOCAB, prompt, max_tokens)
}

fn cached(generation: &Generation) -> usize {
    generation.finished.usage.expect("usage").cached_tokens as usize
}

/// Waits for something that must happen.
async fn until(what: &str, mut happens: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !happens().await {
        assert!(started.elapsed() < DEADLINE, "not after {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ready(cluster: &InProcessCluster, expected: [bool; 2]) {
    until("groups are ready, or not", async || cluster.ready_groups().await.expect("it answers") == expected)
        .await;
}

/// Sends all jobs of a schedule; they go on in the background.
fn running(client: &Client, jobs: Vec<Job>) -> JoinHandle<()> {
    let (client, schedule) = (client.clone(), Schedule { seed: 0, jobs });
    tokio::spawn(async move {
        let mismatches = schedule.mismatches(schedule.run(&client).await);
        assert!(mismatches.is_empty(), "{} differ; the first: {}", mismatches.len(), mismatches[0]);
    })
}

async fn end(streams: JoinHandle<()>) {
    tokio::time::timeout(DEADLINE, streams).await.expect("streams end").expect("as alone");
}

#[tokio::test]
async fn a_prompt_goes_to_the_group_that_has_its_prefix() {
    let (cluster, devices) = two_groups(&[]).await;
    let client = cluster.client().await.expect("a connection");
    let ask = async |text: usize, n: usize| -> Result<Generation, Status> {
        generate(&mut client.clone(), from_tokens(prompt(text, n), 4)).await
    };
    let lengths = [BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1, 200];
    // In turns, so that what decides is neither who was used last nor who has less to do.
    for round in 0..3 {
        for (text, n) in lengths.into_iter().enumerate() {
            let answer = ask(text, n).await.expect("generates");
            let expected = if round == 0 { 0 } else { (n - 1) / BLOCK * BLOCK };
            assert_eq!(cached(&answer), expected, "{n} tokens, round {round}");
            assert_eq!(
                answer.tokens,
                job(text, n, 4).alone[0].iter().map(|token| token.0).collect::<Vec<_>>()
            );
        }
    }
    // Those that come together meet, too: only the first of each text is computed.
    let together = (0..24).map(|i| ask(100 + i % 3, 10 * BLOCK + 1));
    let answers = join_all(together).await;
    let n_cached: usize = answers.iter().map(|answer| cached(answer.as_ref().expect("generates"))).sum();
    assert!(n_cached >= 10 * BLOCK * 18, "{n_cached} tokens of 24 prompts of three texts were found");
    for device in devices {
        assert_eq!(device.n_loaded(), 1);
        assert!(device.n_passes() > 20, "both groups have work");
    }
}

#[tokio::test]
async fn requests_outlive_their_group_and_the_other_one_is_not_disturbed() {
    let (cluster, devices) = two_groups(&["--max-sequences", "8"]).await;
    let client = cluster.client().await.expect("a connection");
    // Some have a place, some wait for one; in both groups.
    let jobs = (0..24).map(|text| {
        let n_choices = 1 + text as u32 % 3;
        let mut job = Job { n_choices, ..job(text, 40, 120) };
        job.alone = (0..n_choices)
            .map(|choice| tokens_alone(N_VOCAB, &job.of_choice(choice).alone_request()))
            .collect();
        job
    });
    devices[0].break_after(20);
    let streams = running(&client, jobs.collect());
    // What was there goes on in group 1, which never notices, and so does what comes now.
    end(streams).await;
    assert!(devices[0].is_broken());
    ready(&cluster, [false, true]).await;
    assert_eq!(devices.each_ref().map(HashModel::n_loaded), [1, 1]);
    end(running(&client, (0..4).map(|text| job(text, 50, 10)).collect())).await;

    devices[0].repair();
    ready(&cluster, [true, true]).await;
    let n_before = devices[0].n_passes();
    end(running(&client, (0..4).map(|text| job(50 + text, 50, 10)).collect())).await;
    assert!(devices[0].n_passes() > n_before, "it gets requests again");
    assert_eq!(devices.each_ref().map(HashModel::n_loaded), [2, 1]);
}

#[tokio::test]
async fn where_all_groups_are_lost_requests_wait_for_the_first_that_is_back() {
    let (cluster, devices) = two_groups(&[]).await;
    let client = cluster.client().await.expect("a connection");
    devices.iter().for_each(|device| device.break_after(20));
    let streams = running(&client, (0..8).map(|text| job(text, 40, 200)).collect());
    until("both groups are lost", async || devices.iter().all(HashModel::is_broken)).await;
    ready(&cluster, [false, false]).await;
    let late = running(&client, vec![job(20, 40, 5)]);
    assert!(!streams.is_finished() && !late.is_finished());
    devices[1].repair();
    end(streams).await;
    end(late).await;
    assert_eq!(cluster.ready_groups().await.expect("it answers"), [false, true]);
}

#[tokio::test]
async fn a_group_that_would_compute_other_tokens_is_not_taken() {
    let (cluster, devices) = two_groups(&[]).await;
    let client = cluster.client().await.expect("a connection");
    devices[1].set_numerics(7);
    devices[1].fail_after(20);
    end(running(&client, (0..8).map(|text| job(text, 40, 120)).collect())).await;
    until("it was refused", async || devices[1].n_loaded() >= 3).await;
    assert_eq!(cluster.ready_groups().await.expect("it answers"), [true, false]);
    end(running(&client, (0..4).map(|text| job(text, 50, 10)).collect())).await;
    devices[1].set_numerics(0);
    ready(&cluster, [true, true]).await;
}

/// Breaks one group after another, for a while each.
async fn harm(devices: &[HashModel; 2], random: &mut Random) -> Infallible {
    loop {
        let device = random.pick(devices);
        device.break_after(random.within(0..15) as u32);
        until("it computes", async || device.is_broken()).await;
        tokio::time::sleep(Duration::from_millis(random.within(0..200) as u64)).await;
        device.repair();
    }
}

#[tokio::test]
async fn schedules_on_groups_that_break_and_are_repaired_have_the_tokens_they_have_alone() {
    let alone = |job: &Job| Alone::on_hash_model(N_VOCAB, job);
    let (mut n_lost, mut n_requests) = (0, 0);
    for seed in 0..6 {
        let mut random = Random::new(seed);
        let n_kv_blocks = random.pick(&["6", "10", "20", "40"]).to_string();
        let flags =
            ["--context", "96", "--max-sequences", "5", "--max-rows", "21", "--kv-blocks", &n_kv_blocks];
        let (cluster, devices) = two_groups(&flags).await;
        let client = cluster.client().await.expect("a connection");
        let shape = Shape {
            max_jobs: 14,
            max_tokens: 96,
            max_output: 40,
            n_vocab: N_VOCAB,
            end_token: TokenId(N_VOCAB as u32 - 1),
            modes: &WITHOUT_DRAFT,
            scored: 0.2,
        };
        let schedules = Schedules::new(seed, shape, &alone);
        for i in 0..6 {
            let schedule = schedules.schedule(seed * 6 + i);
            n_requests += schedule.jobs.len();
            let run = tokio::time::timeout(DEADLINE, schedule.run(&client));
            let received = tokio::select! {
                received = run => received.unwrap_or_else(|_| panic!("seed {} does not end", schedule.seed)),
                never = harm(&devices, &mut random) => match never {},
            };
            devices.iter().for_each(HashModel::repair);
            let mismatches = schedule.mismatches(received);
            assert!(mismatches.is_empty(), "{} differ; the first: {}", mismatches.len(), mismatches[0]);
        }
        n_lost += devices.iter().map(HashModel::n_loaded).sum::<u64>() - 2;
        drop(client);
        cluster.stop().await.expect("stops");
    }
    println!("{n_requests} requests, groups were formed {n_lost} times anew");
    assert!(n_lost > 10 && n_requests > 150, "{n_lost} and {n_requests} are too few to say so");
}
