//! Speculation changes no token: whoever proposes, in whatever company, and whatever happens to the draft service.

use std::process::Command;

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{Generation, generate, request},
    models,
};
use paceline_wire::inference::{
    GenerateRequest, ProposalCounts, SamplingOptions, SpeculationMode, SpeculationOptions, StopOptions,
    generate_request::Input, inference_client::InferenceClient,
};
use tokio::sync::Mutex;
use tonic::transport::Channel;

/// One cluster at a time: whether drafting pays is measured, and on cores that two share it does not.
static ALONE: Mutex<()> = Mutex::const_new(());

const N_TOKENS: u32 = 60;

/// Requests of many kinds; the first repeats itself.
fn requests() -> Vec<GenerateRequest> {
    let greedy = SamplingOptions { temperature: Some(0.0), ..Default::default() };
    let noisy = |seed| SamplingOptions { temperature: Some(0.8), seed: Some(seed), ..Default::default() };
    let kinds = [
        (greedy.clone(), "one two three four one two three four one two three four one two"),
        (SamplingOptions { logprobs: Some(2), ..greedy.clone() }, "The capital of France is"),
        (noisy(1), "fn main() {\n    let x = 1;\n    let y = 2;\n"),
        (SamplingOptions { top_k: Some(20), top_p: Some(0.9), ..noisy(2) }, "Dear friend, tea is"),
        (
            SamplingOptions { repetition_penalty: Some(1.2), frequency_penalty: Some(0.3), ..noisy(3) },
            "a a a b a a a b",
        ),
        (
            SamplingOptions { presence_penalty: Some(0.5), logit_bias: [(40, 3.0)].into(), ..greedy },
            "1, 2, 3, 4, 5, 6,",
        ),
        (SamplingOptions { min_p: Some(0.05), logprobs: Some(0), ..noisy(4) }, "Once upon a time"),
    ];
    let of_kind = |(sampling, prompt): (SamplingOptions, &str)| {
        request(Input::Prompt(prompt.into()), sampling, N_TOKENS)
    };
    let mut requests: Vec<_> = kinds.into_iter().map(of_kind).collect();
    let stop =
        StopOptions { max_tokens: Some(N_TOKENS), strings: vec!["three four".into()], ..Default::default() };
    requests.push(GenerateRequest { stop: Some(stop), ..requests[0].clone() });
    requests
}

fn with(request: GenerateRequest, mode: SpeculationMode) -> GenerateRequest {
    let options = SpeculationOptions { mode: Some(mode.into()), max_tokens: Some(6) };
    GenerateRequest { speculation: Some(options), ..request }
}

/// All requests at the same time.
async fn together(client: &InferenceClient<Channel>, mode: SpeculationMode) -> Vec<Generation> {
    let start = |request| {
        let mut client = client.clone();
        tokio::spawn(async move { generate(&mut client, with(request, mode)).await.expect("generates") })
    };
    let mut done = Vec::new();
    for task in requests().into_iter().map(start).collect::<Vec<_>>() {
        done.push(task.await.expect("no panic"));
    }
    done
}

/// Everything that must be equal.
fn said(generation: &Generation) -> impl PartialEq + std::fmt::Debug + use<> {
    let finished = &generation.finished;
    (
        generation.tokens.clone(),
        generation.text.clone(),
        generation.logprobs.clone(),
        (finished.reason, finished.stop_string, finished.stop_token_id),
    )
}

fn proposals<'a>(generations: &'a [Generation], source: &'a str) -> impl Iterator<Item = &'a ProposalCounts> {
    let all = generations.iter().flat_map(|generation| &generation.finished.proposals);
    all.filter(move |counts| counts.source == source)
}

#[tokio::test]
async fn whoever_proposes_the_tokens_are_the_same() {
    let _alone = ALONE.lock().await;
    // The draft is the target itself: it computes the same bits, so nothing it proposes is ever rejected.
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    let mut plain = Vec::new();
    for request in requests() {
        let request = with(request, SpeculationMode::Off);
        plain.push(generate(&mut client, request).await.expect("generates"));
    }
    assert!(plain.iter().all(|generation| generation.finished.proposals.is_empty()));
    for mode in [SpeculationMode::Ngram, SpeculationMode::Draft, SpeculationMode::Auto] {
        let mut alone = Vec::new();
        for request in requests() {
            alone.push(generate(&mut client, with(request, mode)).await.expect("generates"));
        }
        for generations in [alone, together(&client, mode).await] {
            for (i, (one, other)) in generations.iter().zip(&plain).enumerate() {
                assert_eq!(said(one), said(other), "request {i}, {mode:?}");
            }
            if mode == SpeculationMode::Ngram {
                let n_tried: u64 = proposals(&generations, "ngram").map(|counts| counts.draft_tokens).sum();
                assert!(n_tried > 0, "a text that repeats itself was not made use of");
                assert_eq!(proposals(&generations, "draft").count(), 0);
            }
            if mode == SpeculationMode::Draft {
                for counts in proposals(&generations, "draft") {
                    assert_eq!(counts.accepted_tokens, counts.draft_tokens, "{counts:?}");
                    assert_eq!(counts.accepted_tokens_per_pos.iter().sum::<u64>(), counts.accepted_tokens);
                }
                assert_eq!(proposals(&generations, "ngram").count(), 0);
            }
        }
    }
    cluster.stop().await;
}

/// It proposes worse, and nothing else.
#[tokio::test]
async fn a_draft_that_lost_bits_and_tokens_changes_nothing() {
    let _alone = ALONE.lock().await;
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let spec = spec.env("PACELINE_DRAFT_QUANTIZE", "q4_0").env("PACELINE_DRAFT_VOCABULARY", "8192");
    let cluster = TestCluster::start(spec.coordinator_args(&["--draft-placement", "apart"])).await;
    let client = cluster.client().await;
    let plain = together(&client, SpeculationMode::Off).await;
    let accepted = async {
        loop {
            let generations = together(&client, SpeculationMode::Draft).await;
            for (one, other) in generations.iter().zip(&plain) {
                assert_eq!(said(one), said(other));
            }
            if proposals(&generations, "draft").any(|counts| counts.accepted_tokens > 0) {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(120), accepted).await.expect("it is of use");
    cluster.stop().await;
}

#[tokio::test]
async fn a_draft_service_that_is_killed_takes_nothing_with_it() {
    let _alone = ALONE.lock().await;
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let mut cluster = TestCluster::start(spec).await;
    let client = cluster.client().await;
    let plain = together(&client, SpeculationMode::Off).await;
    let mut running = Vec::new();
    for request in requests() {
        let mut client = client.clone();
        let request = with(request, SpeculationMode::Draft);
        running.push(tokio::spawn(async move { generate(&mut client, request).await.expect("generates") }));
    }
    let draft = cluster.processes().draft().expect("there is one");
    draft.kill().await.expect("it runs");
    for (i, task) in running.into_iter().enumerate() {
        assert_eq!(said(&task.await.expect("no panic")), said(&plain[i]), "request {i}");
    }
    for (one, other) in together(&client, SpeculationMode::Auto).await.iter().zip(&plain) {
        assert_eq!(said(one), said(other));
    }
    cluster.stop().await;
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(status.success(), "{name} {pid}");
}

/// Whether a request of this mode gets drafted tokens; tokens are compared in any case.
async fn is_drafted_for(client: &InferenceClient<Channel>, plain: &[Generation]) -> bool {
    let generations = together(client, SpeculationMode::Draft).await;
    for (one, other) in generations.iter().zip(plain) {
        assert_eq!(said(one), said(other));
    }
    proposals(&generations, "draft").any(|counts| counts.draft_tokens > 0)
}

/// Until the draft service is of use, which a deadline of the test bounds.
async fn wait_for_drafts(client: &InferenceClient<Channel>, plain: &[Generation]) {
    let drafted = async { while !is_drafted_for(client, plain).await {} };
    tokio::time::timeout(std::time::Duration::from_secs(120), drafted).await.expect("speculation comes back");
}

#[tokio::test]
async fn a_draft_service_that_is_stopped_is_missed_by_nobody_and_used_again() {
    let _alone = ALONE.lock().await;
    // It is said to have a machine of its own, so that it drafts whatever that costs here.
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let mut cluster = TestCluster::start(spec.coordinator_args(&["--draft-placement", "apart"])).await;
    let client = cluster.client().await;
    let plain = together(&client, SpeculationMode::Off).await;
    wait_for_drafts(&client, &plain).await;
    let pid = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs");
    signal(pid, "-STOP");
    for _ in 0..3 {
        is_drafted_for(&client, &plain).await;
    }
    signal(pid, "-CONT");
    wait_for_drafts(&client, &plain).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_draft_service_that_ends_is_started_again() {
    let _alone = ALONE.lock().await;
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let mut cluster = TestCluster::start(spec.coordinator_args(&["--draft-placement", "apart"])).await;
    let client = cluster.client().await;
    let plain = together(&client, SpeculationMode::Off).await;
    let before = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs");
    signal(before, "-KILL");
    // Who runs a cluster waits for the end of what it needs.
    tokio::select! {
        ended = cluster.processes().any_ended() => panic!("{ended}"),
        () = wait_for_drafts(&client, &plain) => {}
    }
    let after = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs again");
    assert_ne!(before, after);
    cluster.stop().await;
}
