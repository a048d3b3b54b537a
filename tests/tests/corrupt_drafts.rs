//! A network to the draft service that flips bytes, leaves some out, cuts connections, or lets nothing arrive, while requests
//! run without a pause: every request gets the tokens it gets without speculation, and when the network is well again, so is
//! speculation. The services are the real ones; the models are doubles, so that the draft is worth asking on any machine.

use std::time::{Duration, Instant};

use paceline_tests::{
    client::from_tokens,
    corrupt_network::CorruptNetwork,
    draft_load::{Known, during, known},
    foreseeing_draft::ForeseeingDraft,
    hash_model::HashModel,
    in_process::{InProcessCluster, InProcessSpec, N_VOCAB},
};
use paceline_wire::inference::{
    GenerateRequest, SamplingOptions, SpeculationMode, inference_client::InferenceClient,
};
use tonic::transport::Channel;

/// Far above what anything here takes.
const DEADLINE: Duration = Duration::from_secs(240);
/// What a pass of the target takes: much more than asking the draft, on any machine.
const PASS: Duration = Duration::from_millis(10);
const N_CLIENTS: usize = 3;
/// Harms of each kind that requests must have met.
const N_HARMS: u64 = 6;
const N_TOKENS: u32 = 60;
/// Verified tokens of the draft that show that it is used again, and not only what was on its way.
const N_AGAIN: u64 = 200;

/// Greedy and sampled ones, of several lengths.
fn requests() -> Vec<GenerateRequest> {
    let request = |i: u32| {
        let ids = (0..12 + 7 * i).map(|n| (n * n + 11 * i) % N_VOCAB as u32).collect();
        let noisy = SamplingOptions {
            temperature: Some(0.9),
            repetition_penalty: Some(1.1),
            seed: Some(u64::from(i)),
            ..Default::default()
        };
        let greedy = from_tokens(ids, N_TOKENS);
        if i.is_multiple_of(2) { greedy } else { GenerateRequest { sampling: Some(noisy), ..greedy } }
    };
    (0..6).map(request).collect()
}

/// Requests without a pause, as often as is wanted.
struct Load<'a> {
    client: &'a InferenceClient<Channel>,
    known: &'a [Known],
    started: Instant,
}

impl Load<'_> {
    /// Rounds until it is enough, by the drafted tokens that were verified so far.
    async fn until(&self, what: &str, is_enough: impl Fn(u64) -> bool) {
        let mut n_drafted = 0;
        while !is_enough(n_drafted) {
            n_drafted += self.round(what).await;
            assert!(self.started.elapsed() < DEADLINE, "not after {DEADLINE:?}: {what}");
        }
    }

    /// One request of each client; drafted tokens that were verified.
    async fn round(&self, what: &str) -> u64 {
        let round = during(self.client, (self.known, SpeculationMode::Draft), N_CLIENTS, async {}).await;
        let ((), seen) = round.expect("every request ends");
        assert_eq!(seen.n_different, 0, "of {} requests: {what}", seen.n_requests);
        seen.n_drafted
    }
}

/// What a network does to what passes.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    /// It harms pieces, until all kinds of harm were met.
    Corrupts { seed: u64 },
    /// It lets nothing arrive while rounds of requests end without it.
    Holds { n_rounds: u32 },
}

async fn is_outlived(placement: &str, trouble: Trouble) {
    let draft = ForeseeingDraft::start().await.expect("a port");
    let seed = if let Trouble::Corrupts { seed } = trouble { seed } else { 0 };
    let network = CorruptNetwork::start(seed, draft.address()).await.expect("a port");
    let flags = ["--draft", network.address(), "--draft-placement", placement, "--draft-wait-ms", "50"];
    let device = HashModel::taking(PASS);
    let cluster = InProcessCluster::start(&InProcessSpec::new(&device, &flags)).await.expect("starts");
    let client = cluster.client().await.expect("a connection");
    let known = known(&client, requests()).await.expect("generates");
    let load = Load { client: &client, known: &known, started: Instant::now() };

    load.until("drafted tokens are verified", |n_drafted| n_drafted > 0).await;
    match trouble {
        Trouble::Corrupts { .. } => {
            network.corrupt();
            let has_met_all = || network.n_harmed().iter().all(|n_harmed| *n_harmed >= N_HARMS);
            load.until("all kinds of harm are met", |n_drafted| n_drafted > 0 && has_met_all()).await;
        }
        Trouble::Holds { n_rounds } => {
            network.hold();
            for _ in 0..n_rounds {
                load.round("nothing arrives").await;
            }
        }
    }
    network.repair();
    load.until("drafted tokens are verified again", |n_drafted| n_drafted > N_AGAIN).await;
    drop(client);
    cluster.stop().await.expect("stops");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_network_changes_no_token_and_is_outlived_by_a_draft_on_its_own_machine() {
    is_outlived("apart", Trouble::Corrupts { seed: 3 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_corrupt_network_changes_no_token_and_is_outlived_by_a_draft_that_takes_turns() {
    is_outlived("together", Trouble::Corrupts { seed: 4 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draft_on_its_own_machine_that_says_nothing_is_missed_by_nobody_and_used_again() {
    is_outlived("apart", Trouble::Holds { n_rounds: 3 }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draft_that_takes_turns_and_says_nothing_is_missed_by_nobody_and_used_again() {
    is_outlived("together", Trouble::Holds { n_rounds: 3 }).await;
}
