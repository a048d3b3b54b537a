//! Speculation changes no token: whoever proposes, in whatever company, and whatever happens to the draft service.

use paceline_domain::SamplingParams;
use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{Generation, generate, request},
    models,
};
use paceline_wire::{
    draft::{ControlFrame, Open, draft_client::DraftClient},
    inference::{
        GenerateRequest, ProposalCounts, SamplingOptions, SpeculationMode, SpeculationOptions, StopOptions,
        generate_request::Input, inference_client::InferenceClient,
    },
};
use tokio::sync::Mutex;
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

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

/// One request after the other.
async fn in_turn(client: &InferenceClient<Channel>, mode: SpeculationMode) -> Vec<Generation> {
    let (mut client, mut done) = (client.clone(), Vec::new());
    for request in requests() {
        done.push(generate(&mut client, with(request, mode)).await.expect("generates"));
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
    let client = cluster.client().await;
    let plain = in_turn(&client, SpeculationMode::Off).await;
    assert!(plain.iter().all(|generation| generation.finished.proposals.is_empty()));
    for mode in [SpeculationMode::Ngram, SpeculationMode::Draft, SpeculationMode::Auto] {
        for generations in [in_turn(&client, mode).await, together(&client, mode).await] {
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

/// What a draft service foresees of a greedy continuation, without a coordinator that asks whether it is worth it.
async fn foreseen(address: &str, prompt: &[u32], n_tokens: usize) -> Result<Vec<u32>, tonic::Status> {
    let channel = Endpoint::from_shared(format!("http://{address}")).expect("a URL").connect_lazy();
    let mut client = DraftClient::new(channel);
    let open = Open {
        session: 1,
        generation: 1,
        tokens: prompt.to_vec(),
        n_prompt: prompt.len() as u32,
        sampling: Some((&SamplingParams::greedy()).into()),
        budget: n_tokens as u32,
        ..Default::default()
    };
    let frame = ControlFrame { opens: vec![open], ..Default::default() };
    // The stream stays open while answers are read.
    let frames = tokio_stream::once(frame).chain(tokio_stream::pending());
    let mut answers = client.session(frames).await?.into_inner();
    let mut foreseen = Vec::new();
    while foreseen.len() < n_tokens {
        let answer = answers.message().await?.expect("it goes on");
        assert_eq!(answer.nacks, [], "it knows the session");
        for proposal in answer.proposals {
            foreseen.truncate(proposal.start_pos as usize - prompt.len());
            foreseen.extend(proposal.tokens);
        }
    }
    Ok(foreseen)
}

/// It proposes worse, and nothing else.
#[tokio::test]
async fn a_draft_that_lost_bits_and_tokens_changes_nothing() {
    let _alone = ALONE.lock().await;
    let spec = ClusterSpec::small(1).draft(models::small_model());
    let spec = spec.env("PACELINE_DRAFT_QUANTIZE", "q4_0").env("PACELINE_DRAFT_VOCABULARY", "8192");
    let mut cluster = TestCluster::start(spec.coordinator_args(&["--draft-placement", "apart"])).await;
    let client = cluster.client().await;
    let plain = together(&client, SpeculationMode::Off).await;
    let generations = together(&client, SpeculationMode::Draft).await;
    for (one, other) in generations.iter().zip(&plain) {
        assert_eq!(said(one), said(other));
    }
    // Greedy and long: what follows its first tokens is known.
    let (prompt, tokens) = plain[1].tokens.split_at(30);
    let address = cluster.processes().draft_address().expect("there is one").to_owned();
    let foreseen = foreseen(&address, prompt, 8).await.expect("it answers");
    let n_right = foreseen.iter().zip(tokens).take_while(|(one, other)| one == other).count();
    assert!(n_right >= 4, "{foreseen:?} beside {tokens:?}");
    assert!(foreseen.iter().all(|token| *token < 8192), "{foreseen:?}");
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
