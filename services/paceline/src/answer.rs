//! One generation as a client sees it: the request is sent, the answer goes to standard output as text while it
//! arrives or as one JSON object at the end, a summary to standard error.

use std::io::{self, IsTerminal as _, Write};

use anyhow::{Context as _, bail};
use paceline_wire::inference::{
    Chat, ChatMessage, Delta, FinishReason, Finished, GenerateRequest, ListModelsRequest, Model,
    ProposalCounts, Started, Timings, TokenLogprobs, Usage, generate_request::Input,
    generate_response::Event, inference_client::InferenceClient,
};
use serde::Serialize;
use tonic::{Request, transport::Channel};

use crate::{
    interrupt::Interrupted,
    options::{PromptArgs, SamplingArgs},
};

/// What shells know as SIGPIPE.
const BROKEN_PIPE: Interrupted = Interrupted(13);

/// How an answer is written to standard output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The generated text alone, as it arrives.
    Text,
    /// One [`Answer`] as JSON, at the end.
    Json,
}

/// What `--json` writes.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Answer {
    /// Number of the completion, from 0, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub choice: Option<usize>,
    /// The generated text.
    pub text: String,
    /// The generated token ids, an end token included.
    pub tokens: Vec<u32>,
    /// One for each token when asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logprobs: Vec<LogprobsJson>,
    /// One for each prompt token but the first when asked for; where there are several answers, the first has them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prompt_logprobs: Vec<LogprobsJson>,
    /// "stop", "length" or "cancelled".
    pub finish_reason: &'static str,
    /// Tokens counted.
    pub usage: UsageJson,
    /// Where the time went.
    pub timings: TimingsJson,
    /// What became of proposals, one entry for each source that made some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub speculation: Vec<ProposalsJson>,
    /// Name of the model that answered.
    pub model: String,
    /// Seed that was in force.
    pub seed: u64,
}

/// What became of the proposals of one source.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct ProposalsJson {
    /// "draft" or "ngram".
    pub source: String,
    /// Proposals that were verified.
    pub drafts: u64,
    /// Their tokens.
    pub draft_tokens: u64,
    /// Tokens of them that were accepted.
    pub accepted_tokens: u64,
    /// The same by position in the proposal.
    pub accepted_tokens_per_pos: Vec<u64>,
    /// Proposed tokens by position in the proposal.
    pub draft_tokens_per_pos: Vec<u64>,
    /// Second guesses that were verified beside them.
    pub branches: u64,
    /// Those of them that were right.
    pub accepted_branches: u64,
}

/// Natural logarithms of probabilities at one position, before temperature and filters.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct LogprobsJson {
    /// Of the token that is there.
    pub logprob: f32,
    /// Ids and those of the likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Tokens counted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct UsageJson {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, an end token included.
    pub completion_tokens: u32,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
}

/// Durations seen by the coordinator.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct TimingsJson {
    /// Microseconds from arrival to the first step that carried the request.
    pub queue_us: u64,
    /// Microseconds from arrival to the first token.
    pub first_token_us: u64,
    /// Microseconds from arrival to the last token.
    pub total_us: u64,
    /// Tokens a second after the first one; absent when there is only one.
    pub decode_tokens_per_second: Option<f64>,
}

/// Connects to a coordinator.
///
/// # Errors
/// When nobody answers there.
pub async fn connect(url: &str) -> anyhow::Result<InferenceClient<Channel>> {
    let context = || format!("no coordinator answers at {url}; `paceline up` starts one");
    InferenceClient::connect(url.to_owned()).await.with_context(context)
}

/// The model with this name, or the first one served.
///
/// # Errors
/// When it is not served.
pub async fn served_model(
    client: &mut InferenceClient<Channel>,
    name: Option<&str>,
) -> anyhow::Result<Model> {
    let models =
        client.list_models(traced(ListModelsRequest {})).await.map_err(readable)?.into_inner().models;
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let found = models.into_iter().find(|model| name.is_none_or(|name| model.name == name));
    match (found, name) {
        (Some(model), _) => Ok(model),
        (None, Some(name)) => bail!("`{name}` is not served there; served are {}", names.join(", ")),
        (None, None) => bail!("no model is served there"),
    }
}

/// The prompt as the model wants it: a user's turn when it has a chat template, text when it has none or `--raw`.
///
/// # Errors
/// When the prompt cannot be read.
fn input(prompt: &PromptArgs, model: &Model) -> anyhow::Result<Input> {
    let text = prompt.text()?;
    if prompt.raw || !model.chat {
        return Ok(Input::Prompt(text));
    }
    let message = ChatMessage { role: "user".into(), content: text };
    Ok(Input::Chat(Chat { messages: vec![message] }))
}

/// The request for an input.
///
/// # Errors
/// When a file that the flags name cannot be used.
pub fn request(model: &Model, input: Input, sampling: &SamplingArgs) -> anyhow::Result<GenerateRequest> {
    Ok(GenerateRequest {
        model: Some(model.name.clone()),
        input: Some(input),
        sampling: Some(sampling.sampling()),
        stop: Some(sampling.stop()),
        speculation: sampling.speculation(),
        response_format: sampling.response_format.response_format()?,
        ..GenerateRequest::default()
    })
}

/// The request for a prompt of the command line.
///
/// # Errors
/// When the prompt or a file that the flags name cannot be used.
pub fn prompt_request(
    model: &Model,
    prompt: &PromptArgs,
    sampling: &SamplingArgs,
) -> anyhow::Result<GenerateRequest> {
    let request = request(model, input(prompt, model)?, sampling)?;
    Ok(GenerateRequest { n: prompt.n, prompt_logprobs: prompt.prompt_logprobs, ..request })
}

/// Generates; `on_text` gets each new piece of text.
///
/// # Errors
/// When the server refuses, the stream breaks off, or `on_text` fails.
pub async fn generate(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
    on_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    generate_request(client, traced(request), on_text).await
}

/// As [`generate`], with metadata of the caller's own.
///
/// # Errors
/// As [`generate`].
pub async fn generate_request(
    client: &mut InferenceClient<Channel>,
    request: Request<GenerateRequest>,
    mut on_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Answer> {
    Ok(generate_choices(client, request, |_, text| on_text(text)).await?.swap_remove(0))
}

/// All choices of a request, at least one; `on_text` gets each new piece of text and whose it is.
///
/// # Errors
/// As [`generate`].
async fn generate_choices(
    client: &mut InferenceClient<Channel>,
    request: Request<GenerateRequest>,
    mut on_text: impl FnMut(usize, &str) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Answer>> {
    let mut stream = client.generate(request).await.map_err(readable)?.into_inner();
    let (mut started, mut prompt_logprobs) = (Started::default(), Vec::new());
    let mut choices = vec![Choice::default()];
    while let Some(chunk) = stream.message().await.map_err(readable)? {
        let number = chunk.choice as usize;
        match (chunk.event, choices.get_mut(number)) {
            (Some(Event::Started(event)), _) => {
                choices.resize_with(event.choice_seeds.len().max(1), Choice::default);
                started = event;
            }
            (Some(Event::PromptLogprobs(part)), _) => {
                prompt_logprobs.extend(part.logprobs.iter().map(logprobs_json));
            }
            (Some(Event::Delta(delta)), Some(choice)) => {
                if !delta.text.is_empty() {
                    on_text(number, &delta.text)?;
                }
                choice.take(delta);
            }
            (Some(Event::Finished(finished)), Some(choice)) => choice.finished = Some(finished),
            // A kind of event of a later version.
            _ => {}
        }
        if choices.iter().all(|choice| choice.finished.is_some()) {
            let answers = choices.into_iter().enumerate().map(|(i, choice)| choice.answer(i, &started));
            let mut answers: Vec<Answer> = answers.collect();
            answers[0].prompt_logprobs = prompt_logprobs;
            return Ok(answers);
        }
    }
    let n_tokens: usize = choices.iter().map(|choice| choice.tokens.len()).sum();
    bail!("the stream ended without a finish reason after {n_tokens} tokens")
}

/// What came of one choice.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<LogprobsJson>,
    finished: Option<Finished>,
}

impl Choice {
    fn take(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.tokens.extend(delta.token_ids);
        self.logprobs.extend(delta.logprobs.iter().map(logprobs_json));
    }

    fn answer(self, number: usize, started: &Started) -> Answer {
        let finished = self.finished.unwrap_or_default();
        let (usage, timings) = (finished.usage.unwrap_or_default(), finished.timings.unwrap_or_default());
        let several = started.choice_seeds.len() > 1;
        Answer {
            choice: several.then_some(number),
            text: self.text,
            tokens: self.tokens,
            logprobs: self.logprobs,
            prompt_logprobs: Vec::new(),
            finish_reason: finish_reason(&finished),
            usage: usage_json(&usage),
            timings: timings_json(&timings, usage.completion_tokens),
            speculation: finished.proposals.into_iter().map(proposals_json).collect(),
            model: started.model.clone(),
            seed: started.choice_seeds.get(number).copied().unwrap_or(started.seed),
        }
    }
}

/// Generates and shows: text as it arrives, or JSON at the end; a summary on standard error. Texts of several choices come
/// one after the other, each under a line with its number; JSON objects of several are a line each.
///
/// # Errors
/// As [`generate`], or when standard output cannot be written.
pub async fn show(
    client: &mut InferenceClient<Channel>,
    request: GenerateRequest,
    format: Format,
) -> anyhow::Result<()> {
    let is_streamed = format == Format::Text && request.n.unwrap_or(1) == 1;
    let on_text = |_, text: &str| if is_streamed { write_stdout(text) } else { Ok(()) };
    let answers = generate_choices(client, traced(request), on_text).await?;
    for answer in &answers {
        match format {
            Format::Json => write_stdout(&format!("{}\n", serde_json::to_string(answer)?))?,
            Format::Text if !is_streamed => {
                write_stdout(&format!("--- {} ---\n{}\n", answer.choice.unwrap_or(0), answer.text))?;
            }
            Format::Text if io::stdout().is_terminal() => write_stdout("\n")?,
            Format::Text => {}
        }
        eprintln!("{}", summary(answer));
    }
    Ok(())
}

/// Writes and flushes. A reader that went away is not an error of ours: it ends the program as it does elsewhere.
///
/// # Errors
/// When standard output cannot be written.
pub fn write_stdout(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(BROKEN_PIPE.into()),
        result => result.context("standard output cannot be written"),
    }
}

/// A request that carries the trace context of the current span.
pub fn traced<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    paceline_telemetry::context::inject(&tracing::Span::current(), request.metadata_mut());
    request
}

/// A status in words for people.
pub fn readable(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

/// One line about an answer.
fn summary(answer: &Answer) -> String {
    let usage = &answer.usage;
    let speed = answer.timings.decode_tokens_per_second;
    format!(
        "{} tokens in {:.2} s{}, first after {:.0} ms; prompt of {} tokens, seed {}, {}",
        usage.completion_tokens,
        answer.timings.total_us as f64 / 1e6,
        speed.map_or(String::new(), |speed| format!(" ({speed:.1} tokens/s)")),
        answer.timings.first_token_us as f64 / 1e3,
        usage.prompt_tokens,
        answer.seed,
        answer.finish_reason,
    )
}

fn finish_reason(finished: &Finished) -> &'static str {
    match finished.reason() {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Unspecified => "unspecified",
    }
}

fn logprobs_json(logprobs: &TokenLogprobs) -> LogprobsJson {
    let top = logprobs.top.iter().map(|top| (top.token_id, top.logprob)).collect();
    LogprobsJson { logprob: logprobs.logprob, top }
}

fn proposals_json(counts: ProposalCounts) -> ProposalsJson {
    ProposalsJson {
        source: counts.source,
        drafts: counts.drafts,
        draft_tokens: counts.draft_tokens,
        accepted_tokens: counts.accepted_tokens,
        accepted_tokens_per_pos: counts.accepted_tokens_per_pos,
        draft_tokens_per_pos: counts.draft_tokens_per_pos,
        branches: counts.branches,
        accepted_branches: counts.accepted_branches,
    }
}

fn usage_json(usage: &Usage) -> UsageJson {
    UsageJson {
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        cached_tokens: usage.cached_tokens,
    }
}

fn timings_json(timings: &Timings, n_tokens: u32) -> TimingsJson {
    let decode_us = timings.total_us.saturating_sub(timings.first_token_us);
    let speed = || f64::from(n_tokens - 1) / (decode_us as f64 / 1e6);
    TimingsJson {
        queue_us: timings.queue_us,
        first_token_us: timings.first_token_us,
        total_us: timings.total_us,
        decode_tokens_per_second: (n_tokens > 1 && decode_us > 0).then(speed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        let timings = Timings { queue_us: 1_000, first_token_us: 50_000, total_us: 1_050_000 };
        Answer {
            choice: None,
            text: "a".into(),
            tokens: vec![1; 11],
            logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            finish_reason: "length",
            usage: usage_json(&Usage { prompt_tokens: 7, completion_tokens: 11, cached_tokens: 0 }),
            timings: timings_json(&timings, 11),
            speculation: Vec::new(),
            model: "m".into(),
            seed: 5,
        }
    }

    #[test]
    fn the_summary_is_one_line_with_speed_and_first_token() {
        let expected =
            "11 tokens in 1.05 s (10.0 tokens/s), first after 50 ms; prompt of 7 tokens, seed 5, length";
        assert_eq!(summary(&answer()), expected);
    }

    #[test]
    fn json_has_the_promised_fields_in_order() {
        let json = serde_json::to_value(answer()).expect("plain data");
        let fields: Vec<&String> = json.as_object().expect("object").keys().collect();
        assert_eq!(fields, ["text", "tokens", "finish_reason", "usage", "timings", "model", "seed"]);
        let logprobs = TokenLogprobs { logprob: -0.5, top: Vec::new() };
        let told = Answer { logprobs: vec![logprobs_json(&logprobs)], ..answer() };
        let json_told = serde_json::to_value(told).expect("plain data");
        assert_eq!(json_told["logprobs"], serde_json::json!([{ "logprob": -0.5, "top": [] }]));
        assert_eq!(json["usage"]["completion_tokens"], 11);
    }

    #[test]
    fn one_token_has_no_speed() {
        assert_eq!(timings_json(&Timings::default(), 1).decode_tokens_per_second, None);
    }
}
