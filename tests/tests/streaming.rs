//! What one client sees: streams, stop rules, sampling parameters, for several numbers of ranks.

use std::collections::HashMap;

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{chat, from_tokens, generate, greedy, request, seeded},
};
use paceline_wire::inference::{
    DetokenizeRequest, FinishReason, GenerateRequest, ListModelsRequest, SamplingOptions, StopOptions,
    TokenizeRequest, generate_request::Input, inference_client::InferenceClient, tokenize_request,
};
use tonic::transport::Channel;

const PROMPT: &str = "The three largest cities of France are";

type Client = InferenceClient<Channel>;

async fn ok(client: &mut Client, request: GenerateRequest) -> Generation {
    generate(client, request).await.expect("generates")
}

fn sampling(of: &mut GenerateRequest) -> &mut SamplingOptions {
    of.sampling.as_mut().expect("has sampling")
}

fn stop(of: &mut GenerateRequest) -> &mut StopOptions {
    of.stop.as_mut().expect("has stop rules")
}

/// Requests of every kind that must not depend on how the model is split.
fn varied_requests() -> Vec<GenerateRequest> {
    let mut filtered = seeded(PROMPT, 24, 11);
    let options = sampling(&mut filtered);
    (options.top_k, options.top_p, options.min_p) = (Some(40), Some(0.9), Some(0.01));
    let mut penalized = greedy(PROMPT, 24);
    let options = sampling(&mut penalized);
    options.repetition_penalty = Some(1.2);
    (options.presence_penalty, options.frequency_penalty) = (Some(0.5), Some(0.25));
    options.logit_bias = HashMap::from([(260, 2.0), (28, -100.0)]);
    let mut with_logprobs = greedy(PROMPT, 8);
    sampling(&mut with_logprobs).logprobs = Some(3);
    vec![
        greedy(PROMPT, 32),
        greedy("def fibonacci(n):\n", 32),
        chat("Name three primes.", 32),
        seeded(PROMPT, 24, 7),
        filtered,
        penalized,
        with_logprobs,
    ]
}

/// What must be equal: everything but names and times.
fn essence(generation: Generation) -> impl PartialEq + std::fmt::Debug {
    let Generation { text, tokens, logprobs, finished, .. } = generation;
    (text, tokens, logprobs, finished.reason, finished.usage)
}

async fn answers(spec: ClusterSpec) -> Vec<impl PartialEq + std::fmt::Debug> {
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    let mut answers = Vec::new();
    for request in varied_requests() {
        answers.push(essence(ok(&mut client, request).await));
    }
    cluster.stop().await;
    answers
}

#[tokio::test]
async fn any_split_thread_count_transport_and_instruction_set_give_the_same_answers() {
    let one = answers(ClusterSpec::small(1)).await;
    let two_threads = ClusterSpec { threads_per_rank: 2, ..ClusterSpec::small(1) };
    let others = [
        ("2 ranks", ClusterSpec::small(2)),
        ("3 ranks", ClusterSpec::small(3)),
        ("4 ranks, tcp", ClusterSpec::small(4).shard_args(&["--transport", "tcp"])),
        ("1 rank, 2 threads", two_threads),
        ("2 ranks, scalar", ClusterSpec::small(2).shard_args(&["--isa", "scalar"])),
        (
            "2 ranks, small steps",
            ClusterSpec::small(2).coordinator_args(&["--max-rows", "5", "--max-sequences", "5"]),
        ),
    ];
    for (what, spec) in others {
        assert!(answers(spec).await == one, "{what}: not the answers of one rank");
    }
}

#[tokio::test]
async fn a_stream_has_a_chunk_for_each_token_and_its_seed_is_reported() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let generation = ok(&mut client, greedy(PROMPT, 24)).await;
    assert_eq!(generation.tokens.len(), 24);
    assert_eq!(generation.n_deltas, 24, "tokens are not held back");
    assert_eq!(generation.finished.reason(), FinishReason::Length);
    assert_eq!(generation.started.model, "test-model");
    assert_eq!(generation.started.request_id.len(), 32);

    let unseeded = || {
        let mut request = seeded(PROMPT, 24, 0);
        sampling(&mut request).seed = None;
        request
    };
    let (first, second) = (ok(&mut client, unseeded()).await, ok(&mut client, unseeded()).await);
    assert_ne!(first.started.seed, second.started.seed);
    assert_ne!(first.tokens, second.tokens);
    let again = ok(&mut client, seeded(PROMPT, 24, first.started.seed)).await;
    assert_eq!(again.tokens, first.tokens, "the reported seed gives the same tokens");
}

#[tokio::test]
async fn stop_strings_end_the_text_before_them() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let whole = ok(&mut client, greedy(PROMPT, 32)).await;
    let middle = whole.text.char_indices().nth(whole.text.chars().count() / 2).expect("text").0;
    // Across token boundaries: six characters from the middle.
    let wanted: String = whole.text[middle..].chars().take(6).collect();
    let mut request = greedy(PROMPT, 32);
    stop(&mut request).strings = vec!["\u{1F9ED} never".into(), wanted.clone()];
    let stopped = ok(&mut client, request).await;
    let expected = &whole.text[..whole.text.find(&wanted).expect("it is in there")];
    assert_eq!(stopped.text, expected);
    assert_eq!(stopped.finished.reason(), FinishReason::Stop);
    assert_eq!(stopped.finished.stop_string, Some(1));
    assert!(stopped.tokens.len() < whole.tokens.len());
    assert_eq!(stopped.tokens, whole.tokens[..stopped.tokens.len()]);

    let mut request = greedy(PROMPT, 32);
    stop(&mut request).strings = vec![wanted[..1].repeat(40)];
    let held_back = ok(&mut client, request).await;
    assert_eq!(held_back.text, whole.text, "text that only began like a stop string comes in the end");
}

#[tokio::test]
async fn stop_tokens_and_end_tokens_end_the_answer_and_are_not_text() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let whole = ok(&mut client, greedy(PROMPT, 24)).await;
    let token = whole.tokens[9];
    let n = whole.tokens.iter().position(|other| *other == token).expect("it is in there") + 1;
    let mut request = greedy(PROMPT, 24);
    stop(&mut request).token_ids = vec![token];
    let stopped = ok(&mut client, request).await;
    assert_eq!(stopped.tokens, whole.tokens[..n]);
    assert_eq!(stopped.finished.stop_token_id, Some(token));
    assert_eq!(stopped.finished.reason(), FinishReason::Stop);
    assert!(whole.text.starts_with(&stopped.text) && stopped.text.len() < whole.text.len());

    let mut request = chat("Answer with one word: what is the capital of France?", 200);
    stop(&mut request).ignore_eos = Some(false);
    let ended = ok(&mut client, request.clone()).await;
    assert_eq!(ended.finished.reason(), FinishReason::Stop, "{}", ended.text);
    let end_token = ended.finished.stop_token_id.expect("an end token");
    assert_eq!(ended.tokens.last(), Some(&end_token));
    assert!(!ended.text.contains("<|im_end|>"), "{}", ended.text);

    let n_least = ended.tokens.len() as u32 + 3;
    stop(&mut request).min_tokens = Some(n_least);
    let longer = ok(&mut client, request.clone()).await;
    let n_same = ended.tokens.len() - 1;
    assert_eq!(longer.tokens[..n_same], ended.tokens[..n_same]);
    assert!(longer.tokens.len() as u32 > n_least, "{:?}", longer.text);
    assert!(!longer.tokens[..n_least as usize].contains(&end_token), "the end token is held back");
    stop(&mut request).min_tokens = None;

    let n_more = ended.tokens.len() as u32 + 5;
    (stop(&mut request).ignore_eos, stop(&mut request).max_tokens) = (Some(true), Some(n_more));
    let went_on = ok(&mut client, request).await;
    assert_eq!(went_on.tokens.len() as u32, n_more);
    assert_eq!(went_on.tokens[..ended.tokens.len()], ended.tokens);
}

#[tokio::test]
async fn the_context_ends_an_answer_without_a_limit() {
    let spec = ClusterSpec::small(2).coordinator_args(&["--context", "48"]);
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    let mut request = greedy(PROMPT, 1);
    stop(&mut request).max_tokens = None;
    let generation = ok(&mut client, request).await;
    let usage = generation.finished.usage.expect("usage");
    assert_eq!(usage.prompt_tokens + usage.completion_tokens, 48);
    assert_eq!(generation.finished.reason(), FinishReason::Length);
    assert_eq!(usage.cached_tokens, 0);
}

#[tokio::test]
async fn log_probabilities_are_of_the_chosen_tokens_and_sorted() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let plain = ok(&mut client, greedy(PROMPT, 16)).await;
    assert!(plain.logprobs.is_empty());
    let mut request = greedy(PROMPT, 16);
    sampling(&mut request).logprobs = Some(5);
    let generation = ok(&mut client, request).await;
    assert_eq!(generation.tokens, plain.tokens, "asking does not change the answer");
    assert_eq!(generation.logprobs.len(), 16);
    let mut bytes = Vec::new();
    for (token, logprobs) in generation.tokens.iter().zip(&generation.logprobs) {
        assert_eq!(logprobs.top.len(), 5);
        assert_eq!((logprobs.top[0].token_id, logprobs.top[0].logprob), (*token, logprobs.logprob));
        assert!(logprobs.top.windows(2).all(|pair| pair[0].logprob >= pair[1].logprob));
        let mass: f32 = logprobs.top.iter().map(|top| top.logprob.exp()).sum();
        assert!(mass > 0.0 && mass < 1.0 + 1e-4, "{mass}");
        bytes.extend_from_slice(&logprobs.top[0].token);
    }
    assert_eq!(String::from_utf8_lossy(&bytes), generation.text);

    let mut request = seeded(PROMPT, 8, 3);
    sampling(&mut request).logprobs = Some(0);
    let generation = ok(&mut client, request).await;
    assert!(generation.logprobs.iter().all(|logprobs| logprobs.top.is_empty() && logprobs.logprob <= 0.0));
    assert_eq!(generation.logprobs.len(), 8);
}

#[tokio::test]
async fn sampling_parameters_do_what_they_say() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let plain = ok(&mut client, greedy(PROMPT, 16)).await;
    let (one, same, other) = (seeded(PROMPT, 16, 1), seeded(PROMPT, 16, 1), seeded(PROMPT, 16, 2));
    let one = ok(&mut client, one).await;
    assert_eq!(one.tokens, ok(&mut client, same).await.tokens);
    assert_ne!(one.tokens, ok(&mut client, other).await.tokens);
    assert_ne!(one.tokens, plain.tokens);

    let narrowed: [fn(&mut SamplingOptions); 3] = [
        |options| options.top_k = Some(1),
        |options| options.top_p = Some(1e-6),
        |options| options.min_p = Some(1.0),
    ];
    for narrow in narrowed {
        let mut request = seeded(PROMPT, 16, 1);
        narrow(sampling(&mut request));
        assert_eq!(ok(&mut client, request).await.tokens, plain.tokens, "one token left is the likeliest");
    }

    let mut request = greedy(PROMPT, 8);
    sampling(&mut request).logit_bias = HashMap::from([(plain.tokens[0], -100.0)]);
    assert_ne!(ok(&mut client, request).await.tokens[0], plain.tokens[0]);
    let mut request = seeded(PROMPT, 8, 1);
    sampling(&mut request).logit_bias = HashMap::from([(1234, 100.0)]);
    assert_eq!(ok(&mut client, request).await.tokens, [1234; 8]);

    // A bias large enough to repeat one token, and a penalty for each repetition that overcomes it at once.
    let mut request = greedy(PROMPT, 8);
    sampling(&mut request).logit_bias = HashMap::from([(1234, 100.0)]);
    sampling(&mut request).presence_penalty = Some(100.0);
    let tokens = ok(&mut client, request).await.tokens;
    assert_eq!(tokens[0], 1234);
    assert_ne!(tokens[1], 1234);
}

#[tokio::test]
async fn text_tokens_and_chat_are_three_ways_to_say_the_same() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let tokenize = |input, parse_special| TokenizeRequest { model: None, input: Some(input), parse_special };
    let text = tokenize_request::Input::Text(PROMPT.into());
    let ids = client.tokenize(tokenize(text, false)).await.expect("tokenizes").into_inner().token_ids;
    let from_text = ok(&mut client, greedy(PROMPT, 16)).await;
    let from_ids = ok(&mut client, from_tokens(ids.clone(), 16)).await;
    assert_eq!(from_text.started.n_prompt_tokens as usize, ids.len());
    assert_eq!(from_text.tokens, from_ids.tokens);

    let turn = chat("Hello \u{1F44B}\u{1F3FD} you", 16);
    let Some(Input::Chat(conversation)) = turn.input.clone() else { panic!("a chat") };
    let input = tokenize_request::Input::Chat(conversation);
    let ids = client.tokenize(tokenize(input, false)).await.expect("tokenizes").into_inner().token_ids;
    let from_ids = ok(&mut client, from_tokens(ids, 16)).await;
    assert_eq!(ok(&mut client, turn).await.tokens, from_ids.tokens);

    let special = |parse| tokenize(tokenize_request::Input::Text("<|im_end|>".into()), parse);
    let parsed = client.tokenize(special(true)).await.expect("tokenizes").into_inner().token_ids;
    let literal = client.tokenize(special(false)).await.expect("tokenizes").into_inner().token_ids;
    assert_eq!(parsed.len(), 1);
    assert!(literal.len() > 1);

    let detokenize = |token_ids, skip_special| DetokenizeRequest { model: None, token_ids, skip_special };
    let tokens = detokenize(from_text.tokens.clone(), false);
    assert_eq!(client.detokenize(tokens).await.expect("detokenizes").into_inner().text, from_text.text);
    let skipped = client.detokenize(detokenize(parsed, true)).await.expect("detokenizes").into_inner().text;
    assert_eq!(skipped, "");
}

#[tokio::test]
async fn the_served_model_is_described() {
    let cluster = TestCluster::start(ClusterSpec::small(3)).await;
    let mut client = cluster.client().await;
    let models = client.list_models(ListModelsRequest {}).await.expect("lists").into_inner().models;
    assert_eq!(models.len(), 1);
    let model = &models[0];
    assert_eq!((model.name.as_str(), model.architecture.as_str()), ("test-model", "llama"));
    assert_eq!((model.ranks, model.vocabulary_tokens, model.context_tokens), (3, 49152, 8192));
    assert!(model.chat);
    assert_eq!(model.digest.len(), 64);
    let mut named = request(Input::Prompt(PROMPT.into()), SamplingOptions::default(), 2);
    named.model = Some("test-model".into());
    assert_eq!(ok(&mut client, named).await.tokens.len(), 2);
}
