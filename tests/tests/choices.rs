//! Several completions of one prompt: each is what a request with its seed gets alone, the prompt is computed once, and
//! they end, stop and are cancelled as one request.

use std::time::{Duration, Instant};

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{chat, generate, generate_choices, greedy, seeded},
};
use paceline_wire::inference::{FinishReason, GenerateRequest, generate_response::Event};
use tonic::Code;

const PROMPT: &str = "My favourite dishes, in order: first of all soup, because";
/// Far below the time that the dropped request takes, far above the time to notice.
const NOTICED: Duration = Duration::from_secs(10);

fn essence(generation: &Generation) -> impl PartialEq + std::fmt::Debug + use<> {
    let Generation { text, tokens, logprobs, finished, .. } = generation.clone();
    (text, tokens, logprobs, finished.reason, finished.stop_string)
}

/// Stop strings that some choices meet, and log probabilities.
fn request(n: u32, max_tokens: u32) -> GenerateRequest {
    let mut request = GenerateRequest { n: Some(n), ..seeded(PROMPT, max_tokens, 3) };
    request.sampling.as_mut().expect("has sampling").logprobs = Some(2);
    request.stop.as_mut().expect("has stop rules").strings = vec![" it".into(), "\n".into()];
    request
}

async fn alone(cluster: &TestCluster, request: &GenerateRequest, seeds: &[u64]) -> Vec<Generation> {
    let mut client = cluster.client().await;
    let mut generations = Vec::new();
    for seed in seeds {
        let mut request = GenerateRequest { n: None, ..request.clone() };
        request.sampling.as_mut().expect("has sampling").seed = Some(*seed);
        generations.push(generate(&mut client, request).await.expect("generates"));
    }
    generations
}

#[tokio::test]
async fn each_choice_is_what_its_seed_gives_alone() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let request = request(6, 24);
    let choices = generate_choices(&mut client, request.clone()).await.expect("generates");
    let seeds = &choices[0].started.choice_seeds;
    assert_eq!((choices.len(), seeds[0]), (6, 3), "the first has the request's own seed");
    for (choice, alone) in choices.iter().zip(alone(&cluster, &request, seeds).await) {
        assert_eq!(essence(choice), essence(&alone));
        assert_eq!(choice.logprobs.len(), choice.tokens.len());
    }
    let stopped = choices.iter().filter(|choice| choice.finished.stop_string.is_some()).count();
    let texts: std::collections::HashSet<&str> = choices.iter().map(|choice| choice.text.as_str()).collect();
    assert!((1..6).contains(&stopped) && texts.len() > 3, "{stopped} stopped, {texts:?}");
}

#[tokio::test]
async fn the_prompt_is_computed_once() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let mut client = cluster.client().await;
    let request = GenerateRequest { n: Some(4), ..chat("Name four animals that swim.", 8) };
    let choices = generate_choices(&mut client, request).await.expect("generates");
    let n_prompt = choices[0].started.n_prompt_tokens;
    assert!(!(n_prompt - 1).is_multiple_of(16), "the last block of {n_prompt} tokens is no part of one");
    let cached: Vec<u32> =
        choices.iter().map(|choice| choice.finished.usage.expect("usage").cached_tokens).collect();
    assert_eq!(cached, [0, n_prompt - 1, n_prompt - 1, n_prompt - 1]);
    assert!(choices.iter().all(|choice| choice.tokens == choices[0].tokens), "greedy choices are equal");
}

#[tokio::test]
async fn choices_count_for_admission_and_go_away_together() {
    let scarce = ["--max-sequences", "2", "--max-queued-tokens", "8100"];
    let cluster = TestCluster::start(ClusterSpec::small(1).coordinator_args(&scarce)).await;
    let mut client = cluster.client().await;
    let four = |max_tokens| GenerateRequest { n: Some(4), ..greedy("Once upon a time", max_tokens) };
    let mut long = client.generate(four(2000)).await.expect("starts").into_inner();
    while !matches!(long.message().await.expect("a chunk").expect("more").event, Some(Event::Delta(_))) {}
    let busy = generate_choices(&mut client, four(50)).await.expect_err("no place");
    assert_eq!(busy.code(), Code::ResourceExhausted, "8000 tokens and 200 more: {busy:?}");
    drop(long);
    let dropped = Instant::now();
    let choices = loop {
        match generate_choices(&mut client, four(50)).await {
            Ok(choices) => break choices,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}"),
        }
        assert!(dropped.elapsed() < NOTICED, "the places of the dropped stream are still taken");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    for choice in choices {
        assert_eq!((choice.tokens.len(), choice.finished.reason()), (50, FinishReason::Length));
    }
}
