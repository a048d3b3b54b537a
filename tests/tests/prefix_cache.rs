//! A prompt that begins like an earlier one re-uses its blocks: what was found is reported, and no token changes.

use std::collections::HashSet;

use paceline_tests::{
    ClusterSpec, Generation, TestCluster,
    client::{chat, from_tokens, generate, greedy, seeded},
};
use paceline_wire::inference::{
    ChatMessage, GenerateRequest, generate_request::Input, inference_client::InferenceClient,
};
use tonic::{Code, Request, metadata::MetadataValue, transport::Channel};

const BLOCK: usize = 16;

type Client = InferenceClient<Channel>;

/// A request of a tenant.
fn of(tenant: &str, request: &GenerateRequest) -> Request<GenerateRequest> {
    let mut request = Request::new(request.clone());
    let name = MetadataValue::try_from(tenant).expect("a name");
    request.metadata_mut().insert("x-tenant", name);
    request
}

fn cached(generation: &Generation) -> usize {
    generation.finished.usage.as_ref().expect("usage").cached_tokens as usize
}

/// Token ids that are plain words, the first `n` of always the same ones.
fn prompt(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| 1000 + i * 37 % 5000).collect()
}

async fn cluster() -> (TestCluster, Client) {
    let cluster = TestCluster::start(ClusterSpec::small(2).coordinator_args(&[
        "--max-rows",
        "48",
        "--max-sequences",
        "8",
    ]))
    .await;
    let client = cluster.client().await;
    (cluster, client)
}

#[tokio::test]
async fn hits_are_reported_and_change_no_token() {
    let (_cluster, mut client) = cluster().await;
    let lengths = [BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1, 200];
    let mut answers = HashSet::new();
    for n in lengths {
        let with_penalties = {
            let mut request = GenerateRequest { input: from_tokens(prompt(n), 1).input, ..seeded("", 24, 5) };
            let sampling = request.sampling.as_mut().expect("has sampling");
            (sampling.repetition_penalty, sampling.frequency_penalty) = (Some(1.3), Some(0.4));
            request
        };
        for (kind, request) in [("greedy", from_tokens(prompt(n), 24)), ("noisy", with_penalties)] {
            let tenant = format!("{kind} {n}");
            let miss = generate(&mut client, of(&tenant, &request)).await.expect("generates");
            let hit = generate(&mut client, of(&tenant, &request)).await.expect("generates");
            let stranger =
                generate(&mut client, of(&format!("other {tenant}"), &request)).await.expect("generates");
            assert_eq!((cached(&miss), cached(&stranger)), (0, 0), "{tenant}: tenants share nothing");
            assert_eq!(cached(&hit), (n - 1) / BLOCK * BLOCK, "{tenant}");
            assert_eq!(miss.tokens, hit.tokens, "{tenant}");
            assert_eq!(miss.tokens, stranger.tokens, "{tenant}");
            answers.insert(miss.tokens);
        }
    }
    assert_eq!(answers.len(), 2 * lengths.len(), "other prompts have other answers");
}

#[tokio::test]
async fn the_next_turn_of_a_conversation_finds_the_last_one() {
    let (_cluster, mut client) = cluster().await;
    let first = chat("Tell me a long story about a lighthouse keeper and his dog.", 80);
    let answer = generate(&mut client, of("a", &first)).await.expect("generates");
    let Some(Input::Chat(mut conversation)) = first.input else { panic!("a chat") };
    let turn = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    conversation.messages.push(turn("assistant", &answer.text));
    conversation.messages.push(turn("user", "And then?"));
    let second = GenerateRequest { input: Some(Input::Chat(conversation)), ..greedy("", 16) };
    let hit = generate(&mut client, of("a", &second)).await.expect("generates");
    let miss = generate(&mut client, of("b", &second)).await.expect("generates");
    // More than the first prompt: what was generated is found, too.
    let n_prompt = answer.started.n_prompt_tokens as usize;
    assert!(cached(&hit) > n_prompt, "{} of a turn of {n_prompt} tokens and 80 more", cached(&hit));
    assert_eq!((cached(&miss), miss.tokens), (0, hit.tokens));
}

#[tokio::test]
async fn a_name_of_a_tenant_that_is_none_is_refused() {
    let (_cluster, mut client) = cluster().await;
    let request = of(&"x".repeat(129), &greedy("Hello", 1));
    let status = generate(&mut client, request).await.expect_err("too long");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("has 129 bytes; at most 128"), "{status:?}");
}
