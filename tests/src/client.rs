//! Requests and collected answers. Whatever a stream must always keep to is asserted here.

use paceline_wire::inference::{
    Chat, ChatMessage, Finished, GenerateRequest, SamplingOptions, Started, StopOptions, TokenIds,
    TokenLogprobs, generate_request::Input, generate_response::Event, inference_client::InferenceClient,
};
use tonic::{IntoRequest, Status, transport::Channel};

/// A finished generation.
#[derive(Clone, PartialEq, Debug)]
pub struct Generation {
    /// The first chunk.
    pub started: Started,
    /// All text.
    pub text: String,
    /// All token ids.
    pub tokens: Vec<u32>,
    /// All log probabilities.
    pub logprobs: Vec<TokenLogprobs>,
    /// Chunks with text or tokens.
    pub n_deltas: usize,
    /// The last chunk.
    pub finished: Finished,
}

/// A greedy request for a raw prompt.
pub fn greedy(prompt: &str, max_tokens: u32) -> GenerateRequest {
    request(
        Input::Prompt(prompt.into()),
        SamplingOptions { temperature: Some(0.0), ..Default::default() },
        max_tokens,
    )
}

/// A request with a seed and the temperature 1.
pub fn seeded(prompt: &str, max_tokens: u32, seed: u64) -> GenerateRequest {
    let sampling = SamplingOptions { temperature: Some(1.0), seed: Some(seed), ..Default::default() };
    request(Input::Prompt(prompt.into()), sampling, max_tokens)
}

/// A greedy request of one user's turn.
pub fn chat(content: &str, max_tokens: u32) -> GenerateRequest {
    let messages = vec![ChatMessage { role: "user".into(), content: content.into() }];
    GenerateRequest { input: Some(Input::Chat(Chat { messages })), ..greedy("", max_tokens) }
}

/// A greedy request for token ids.
pub fn from_tokens(ids: Vec<u32>, max_tokens: u32) -> GenerateRequest {
    GenerateRequest { input: Some(Input::TokenIds(TokenIds { ids })), ..greedy("", max_tokens) }
}

/// A request whose length does not depend on end tokens.
pub fn request(input: Input, sampling: SamplingOptions, max_tokens: u32) -> GenerateRequest {
    let stop = StopOptions { max_tokens: Some(max_tokens), ignore_eos: Some(true), ..Default::default() };
    GenerateRequest {
        model: None,
        input: Some(input),
        sampling: Some(sampling),
        stop: Some(stop),
        speculation: None,
        priority: None,
    }
}

/// Runs a generation to its end.
///
/// # Errors
/// The status that the server answers.
///
/// # Panics
/// When the stream breaks a rule: chunks are numbered without gaps, `Started` comes first, `Finished` last, and
/// usage counts what came.
pub async fn generate(
    client: &mut InferenceClient<Channel>,
    request: impl IntoRequest<GenerateRequest>,
) -> Result<Generation, Status> {
    let mut stream = client.generate(request.into_request()).await?.into_inner();
    let (mut started, mut finished) = (None, None);
    let (mut text, mut tokens, mut logprobs, mut n_deltas) = (String::new(), Vec::new(), Vec::new(), 0);
    let mut next_index = 0;
    while let Some(chunk) = stream.message().await? {
        assert_eq!(chunk.index, next_index, "chunks are numbered without gaps");
        next_index += 1;
        assert!(finished.is_none(), "a chunk after the last");
        match chunk.event.expect("a chunk has an event") {
            Event::Started(event) => {
                assert_eq!(chunk.index, 0, "Started comes first");
                started = Some(event);
            }
            Event::Delta(delta) => {
                assert!(started.is_some(), "Started comes first");
                n_deltas += 1;
                text.push_str(&delta.text);
                tokens.extend(delta.token_ids);
                logprobs.extend(delta.logprobs);
            }
            Event::Finished(event) => finished = Some(event),
        }
    }
    let (started, finished) = (started.expect("a Started chunk"), finished.expect("a Finished chunk"));
    let usage = finished.usage.expect("usage");
    assert_eq!(usage.completion_tokens as usize, tokens.len(), "usage counts the tokens that came");
    assert_eq!(usage.prompt_tokens, started.n_prompt_tokens, "usage counts the prompt");
    let timings = finished.timings.expect("timings");
    assert!(timings.queue_us <= timings.first_token_us && timings.first_token_us <= timings.total_us);
    Ok(Generation { started, text, tokens, logprobs, n_deltas, finished })
}
