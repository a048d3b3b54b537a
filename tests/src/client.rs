//! Requests and collected answers. Whatever a stream must always keep to is asserted here.

use paceline_wire::inference::{
    Chat, ChatMessage, Delta, Finished, GenerateRequest, SamplingOptions, Started, StopOptions, TokenIds,
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
    /// Those of the prompt, from its second token on; the same for each choice.
    pub prompt_logprobs: Vec<TokenLogprobs>,
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
    GenerateRequest { input: Some(input), sampling: Some(sampling), stop: Some(stop), ..Default::default() }
}

/// Runs a generation of one choice to its end.
///
/// # Errors
/// The status that the server answers.
///
/// # Panics
/// As [`generate_choices`], or when it has several choices.
pub async fn generate(
    client: &mut InferenceClient<Channel>,
    request: impl IntoRequest<GenerateRequest>,
) -> Result<Generation, Status> {
    let mut choices = generate_choices(client, request).await?;
    assert_eq!(choices.len(), 1, "one choice was asked for");
    Ok(choices.swap_remove(0))
}

/// Runs a generation to its end, all choices of it.
///
/// # Errors
/// The status that the server answers.
///
/// # Panics
/// When the stream breaks a rule: chunks are numbered without gaps, `Started` comes first, log probabilities of the prompt come
/// in order and before tokens, a choice says nothing after its `Finished`, and usage counts what came.
pub async fn generate_choices(
    client: &mut InferenceClient<Channel>,
    request: impl IntoRequest<GenerateRequest>,
) -> Result<Vec<Generation>, Status> {
    let mut stream = client.generate(request.into_request()).await?.into_inner();
    let mut choices: Vec<Part> = Vec::new();
    let (mut started, mut prompt_logprobs) = (None, Vec::new());
    let mut next_index = 0;
    while let Some(chunk) = stream.message().await? {
        assert_eq!(chunk.index, next_index, "chunks are numbered without gaps");
        next_index += 1;
        match chunk.event.expect("a chunk has an event") {
            Event::Started(event) => {
                assert_eq!(chunk.index, 0, "Started comes first");
                choices = vec![Part::default(); event.choice_seeds.len()];
                started = Some(event);
            }
            Event::PromptLogprobs(part) => {
                assert!(choices.iter().all(|choice| choice.n_deltas == 0), "before all tokens");
                assert_eq!(part.start_pos as usize, prompt_logprobs.len() + 1, "parts without gaps");
                prompt_logprobs.extend(part.logprobs);
            }
            Event::Delta(delta) => choices[chunk.choice as usize].take(delta),
            Event::Finished(event) => {
                let before = choices[chunk.choice as usize].finished.replace(event);
                assert!(before.is_none(), "a choice ends once");
            }
        }
    }
    let started = started.expect("a Started chunk");
    Ok(choices.into_iter().map(|part| part.end(&started, &prompt_logprobs)).collect())
}

/// What came of one choice.
#[derive(Clone, Default)]
struct Part {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    n_deltas: usize,
    finished: Option<Finished>,
}

impl Part {
    fn take(&mut self, delta: Delta) {
        assert!(self.finished.is_none(), "a chunk after the last");
        self.n_deltas += 1;
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.token_ids);
        self.logprobs.extend(delta.logprobs);
    }

    fn end(self, started: &Started, prompt_logprobs: &[TokenLogprobs]) -> Generation {
        let Self { text, tokens, logprobs, n_deltas, finished } = self;
        let finished = finished.expect("a Finished chunk");
        let usage = finished.usage.expect("usage");
        assert_eq!(usage.completion_tokens as usize, tokens.len(), "usage counts the tokens that came");
        assert_eq!(usage.prompt_tokens, started.n_prompt_tokens, "usage counts the prompt");
        let timings = finished.timings.expect("timings");
        assert!(timings.queue_us <= timings.first_token_us && timings.first_token_us <= timings.total_us);
        let (started, prompt_logprobs) = (started.clone(), prompt_logprobs.to_vec());
        Generation { started, text, tokens, logprobs, prompt_logprobs, n_deltas, finished }
    }
}
