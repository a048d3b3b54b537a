//! Log probabilities of prompts, and prompts repeated: the reference's, the same however they are computed, and of the
//! model alone.

use std::path::Path;

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{chat, from_tokens, generate, generate_choices, greedy},
};
use paceline_wire::inference::{
    DetokenizeRequest, GenerateRequest, TokenLogprobs, TokenizeRequest, inference_client::InferenceClient,
    tokenize_request,
};
use serde_json::Value;
use tonic::{Code, transport::Channel};

const PROMPT: &str =
    "The three largest cities of France are Paris, Marseille and Lyon, in this order; of Italy";
/// How near to llama.cpp in float32 the perplexity of a text and its likeliest tokens must be, as in the tests of models.
const PERPLEXITY_CHANGE: f64 = 0.0015;
const TOP1_AGREEMENT: f64 = 0.97;

fn scored(n_top: u32, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { prompt_logprobs: Some(n_top), ..request }
}

async fn ok(client: &mut InferenceClient<Channel>, request: GenerateRequest) -> Generation {
    generate(client, request).await.expect("generates")
}

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/models/smollm2-135m-instruct.text.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("golden data")).expect("JSON")
}

fn ids(golden: &Value) -> Vec<u32> {
    golden.as_array().expect("a list").iter().map(|id| id.as_u64().expect("a token") as u32).collect()
}

#[tokio::test]
async fn a_text_has_the_perplexity_and_the_likeliest_tokens_of_the_reference() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let golden = golden();
    let (ids, top1) = (ids(&golden["ids"]), ids(&golden["top1"]));
    let generation = ok(&mut client, scored(1, from_tokens(ids.clone(), 1))).await;
    let scores = &generation.prompt_logprobs;
    assert_eq!(scores.len(), ids.len() - 1, "the first token has nothing before it");
    let sum: f64 = scores.iter().map(|score| f64::from(score.logprob)).sum();
    let perplexity = (-sum / scores.len() as f64).exp();
    let change = perplexity / golden["perplexity"].as_f64().expect("a number") - 1.0;
    assert!(change.abs() <= PERPLEXITY_CHANGE, "{perplexity}: {change}");
    let n_equal = scores.iter().zip(&top1).filter(|(score, best)| score.top[0].token_id == **best).count();
    assert!(n_equal as f64 >= TOP1_AGREEMENT * scores.len() as f64, "{n_equal} of {}", scores.len());
    println!(
        "perplexity {perplexity}, {change:+} of the reference's; {n_equal} of {} top tokens",
        scores.len()
    );
}

/// Prompts of several lengths at once, and what follows them.
async fn scores(spec: ClusterSpec) -> Vec<(Vec<TokenLogprobs>, Vec<u32>)> {
    let cluster = TestCluster::start(spec).await;
    let prompts = [PROMPT.repeat(12), PROMPT.into(), "Once".into()];
    let requests = prompts.iter().map(async |prompt| {
        let mut client = cluster.client().await;
        let generation = ok(&mut client, scored(3, greedy(prompt, 6))).await;
        (generation.prompt_logprobs, generation.tokens)
    });
    futures_util::future::join_all(requests).await
}

#[tokio::test]
async fn chunks_ranks_and_pools_change_no_bit() {
    let one = scores(ClusterSpec::small(1)).await;
    assert!(one[0].0.len() > 200 && one[2].0.is_empty(), "{} and {}", one[0].0.len(), one[2].0.len());
    let small_steps = ["--max-rows", "7", "--max-sequences", "3"];
    let small_pool = ["--kv-blocks", "19", "--context", "300"];
    for (what, spec) in [
        ("3 ranks", ClusterSpec::small(3)),
        ("small steps", ClusterSpec::small(1).coordinator_args(&small_steps)),
        ("small pool", ClusterSpec::small(2).coordinator_args(&small_pool)),
    ] {
        assert!(scores(spec).await == one, "{what}: not the numbers of one rank");
    }
}

#[tokio::test]
async fn what_was_generated_is_scored_with_the_bits_it_was_generated_with() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let mut request = scored(4, greedy(PROMPT, 24));
    request.sampling.as_mut().expect("has sampling").logprobs = Some(4);
    request.echo = Some(true);
    let generated = ok(&mut client, request).await;
    let prompt = generated.started.echo.expect("was asked for").token_ids;
    // Penalties change what is chosen, not what the model thinks.
    let all = [prompt, generated.tokens].concat();
    let mut again = scored(4, from_tokens(all, 1));
    again.sampling.as_mut().expect("has sampling").frequency_penalty = Some(2.0);
    let again = ok(&mut client, again).await;
    let expected = [generated.prompt_logprobs, generated.logprobs].concat();
    assert_eq!(again.prompt_logprobs, expected);
}

#[tokio::test]
async fn a_scored_prompt_is_read_as_a_whole_and_cached_for_others() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let mut client = cluster.client().await;
    let prompt = PROMPT.repeat(4);
    let cached = |generation: &Generation| generation.finished.usage.expect("usage").cached_tokens;
    let first = ok(&mut client, scored(0, greedy(&prompt, 4))).await;
    let second = ok(&mut client, scored(0, greedy(&prompt, 4))).await;
    let plain = ok(&mut client, greedy(&prompt, 4)).await;
    assert_eq!((cached(&first), cached(&second)), (0, 0));
    assert!(cached(&plain) > 48 && plain.prompt_logprobs.is_empty(), "{}", cached(&plain));
    assert_eq!(first.prompt_logprobs, second.prompt_logprobs);
    assert!(first.prompt_logprobs.iter().all(|score| score.top.is_empty()));
    assert_eq!((&first.tokens, &second.tokens), (&plain.tokens, &plain.tokens));
    let choices =
        generate_choices(&mut client, GenerateRequest { n: Some(3), ..scored(0, greedy(&prompt, 4)) });
    for choice in choices.await.expect("generates") {
        assert_eq!(choice.prompt_logprobs, first.prompt_logprobs, "told once, for all choices");
    }
}

#[tokio::test]
async fn the_prompt_is_repeated_as_the_model_sees_it() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let mut client = cluster.client().await;
    let echo = |request| GenerateRequest { echo: Some(true), ..request };
    let raw = ok(&mut client, echo(greedy(PROMPT, 1))).await.started.echo.expect("was asked for");
    let text = Some(tokenize_request::Input::Text(PROMPT.into()));
    let tokenized = client.tokenize(TokenizeRequest { input: text, ..TokenizeRequest::default() }).await;
    assert_eq!((raw.text.as_str(), raw.token_ids), (PROMPT, tokenized.expect("ids").into_inner().token_ids));
    let chat = ok(&mut client, echo(chat("Hi", 1))).await.started.echo.expect("was asked for");
    assert!(chat.text.contains("<|im_start|>user\nHi<|im_end|>"), "{}", chat.text);
    let detokenized = client
        .detokenize(DetokenizeRequest { token_ids: chat.token_ids, ..DetokenizeRequest::default() })
        .await
        .expect("text");
    assert_eq!(detokenized.into_inner().text, chat.text);
    assert_eq!(ok(&mut client, greedy(PROMPT, 1)).await.started.echo, None);
    let status = generate(&mut client, scored(21, greedy(PROMPT, 1))).await.expect_err("too many");
    assert!(status.code() == Code::InvalidArgument && status.message().contains("at most 20"), "{status:?}");
}
