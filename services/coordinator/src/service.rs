//! The gRPC face for clients. It validates, tokenizes, asks for a place and hands over to the engine; it holds no
//! state of its own.

use std::{sync::Arc, time::Instant};

use paceline_domain::{ErrorKind, Grammar, RequestId, TokenId};
use paceline_grammar::Matcher;
use paceline_telemetry::context;
use paceline_text::{ControlText, SpecialTokens};
use paceline_wire::{
    inference::{
        DetokenizeRequest, DetokenizeResponse, Echo, GenerateRequest, GenerateResponse, ListModelsRequest,
        ListModelsResponse, Model, Started, TokenizeRequest, TokenizeResponse,
        generate_response::Event as Chunk, inference_server::Inference, tokenize_request,
    },
    status::{bad_request, busy, status},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, Span, field, info_span};

use crate::{
    admission::{Admission, Busy},
    caller::Caller,
    client::Client,
    constraint::Grammars,
    engine::{Event, Submission},
    groups::{GroupStatus, Groups},
    metrics::Metrics,
    output::Output,
    reader::Reader,
    text::{PromptError, TextModel},
    validate::{self, GivenOptions, Served, Source},
};

/// Most token ids that Detokenize takes.
const MAX_DETOKENIZE: usize = 1 << 20;

/// Answers clients.
pub struct InferenceService {
    /// What requests are held against.
    pub served: Served,
    /// What ListModels says.
    pub model: Model,
    /// Tokenizer and template.
    pub text: TextModel,
    /// Who is told of refusals.
    pub metrics: Arc<Metrics>,
    /// What grammars become.
    pub grammars: Grammars,
    /// The token budget.
    pub admission: Arc<Admission>,
    /// Chunks that may wait for a client to read them.
    pub reader_buffer: usize,
    /// Who executes requests. Once there has been one of them, requests wait for the next one.
    pub groups: Groups,
}

fn prompt_status(error: PromptError) -> Status {
    status(error.kind(), error.to_string())
}

fn random<const N: usize>() -> Result<[u8; N], Status> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Status::internal(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

impl InferenceService {
    fn span(&self, request: &Request<GenerateRequest>) -> Span {
        let operation = match request.get_ref().input {
            Some(paceline_wire::inference::generate_request::Input::Chat(_)) => "chat",
            _ => "generate",
        };
        let span = info_span!(
            "generate",
            otel.name = format!("{operation} {}", self.served.model),
            otel.kind = "server",
            gen_ai.operation.name = operation,
            gen_ai.provider.name = "paceline",
            gen_ai.request.model = self.served.model,
            paceline.group = field::Empty,
            gen_ai.usage.input_tokens = field::Empty,
            gen_ai.usage.output_tokens = field::Empty,
        );
        context::adopt(&span, request.metadata());
        span
    }

    async fn matcher(&self, grammar: Option<Grammar>) -> Result<Option<Matcher>, Status> {
        let Some(grammar) = grammar else { return Ok(None) };
        let compiled = self.grammars.compile(grammar).instrument(info_span!("compile_grammar")).await;
        compiled.map(Some).map_err(|error| match error.kind() {
            ErrorKind::Invalid => bad_request(&[("response_format".into(), error.to_string())]),
            kind => status(kind, error.to_string()),
        })
    }

    /// The prompt as the model sees it.
    async fn echo(&self, tokens: &[TokenId]) -> Result<Echo, Status> {
        let text = self.text.decode(tokens.to_vec(), ControlText::Show).await.map_err(prompt_status)?;
        Ok(Echo { token_ids: tokens.iter().map(|token| token.0).collect(), text })
    }

    fn started(&self, request: &paceline_domain::GenerateRequest, echo: Option<Echo>) -> Started {
        let seed_of = |choice| request.sampling.of_choice(choice).seed;
        Started {
            request_id: request.id.to_string(),
            model: self.served.model.clone(),
            n_prompt_tokens: request.prompt.tokens().len() as u32,
            seed: request.sampling.seed,
            choice_seeds: (0..request.n_choices).map(seed_of).collect(),
            echo,
        }
    }

    async fn submit(
        &self,
        request: GenerateRequest,
        caller: Caller,
        arrived: Instant,
    ) -> Result<ReceiverStream<Result<GenerateResponse, Status>>, Status> {
        let Some(n_kv_blocks) = self.groups.largest_pool() else {
            return Err(Status::unavailable("the shard group is still being formed; try again in a moment"));
        };
        validate::model(&self.served, request.model.as_deref())?;
        let priority = validate::priority(request.priority)?;
        let seed = u64::from_le_bytes(random()?);
        let given = GivenOptions {
            sampling: request.sampling,
            stop: request.stop,
            speculation: request.speculation,
            n: request.n,
            prompt_logprobs: request.prompt_logprobs,
            response_format: request.response_format,
        };
        let mut options = validate::options(&self.served, given, seed)?;
        let source = validate::source(&self.served, request.input)?;
        // Who has no place anyway is told so before any work is done.
        let outline = validate::outline(&self.served, &options, &source);
        let refused = |refusal: Busy| busy(refusal.to_string(), refusal.retry_after);
        self.admission.check(&caller.tenant, outline, Instant::now()).map_err(refused)?;
        let matcher = self.matcher(options.grammar.take()).await?;
        let tokens = match source {
            Source::Tokens(tokens) => tokens,
            Source::Text(input) => {
                let work = self.text.prompt_tokens(input);
                work.instrument(info_span!("tokenize")).await.map_err(prompt_status)?
            }
        };
        let wants_echo = request.echo == Some(true);
        let id = RequestId(u128::from_le_bytes(random()?));
        let request = validate::request(&self.served, n_kv_blocks, id, tokens, options)?;
        let n_prompt_tokens = request.prompt.tokens().len() as u32;
        let n_tokens =
            u64::from(n_prompt_tokens) + u64::from(request.stop.max_tokens) * u64::from(request.n_choices);
        let place =
            self.admission.admit(&caller.tenant, (outline, n_tokens), Instant::now()).map_err(refused)?;
        let (reader, chunks) = Reader::new(self.reader_buffer);
        let (route, span) = (self.groups.route(&request, &caller.tenant), Span::current());
        let group = route.group();
        span.record("paceline.group", group as i64);
        let mut client = Client::new(reader, place, route, span);
        let echo = if wants_echo { Some(self.echo(request.prompt.tokens()).await?) } else { None };
        client.push(0, Chunk::Started(self.started(&request, echo)));
        let output = |_| Output::new(&request, self.text.tokenizer(), arrived);
        let outputs = (0..request.n_choices).map(output).collect();
        let submission = Box::new(Submission { request, outputs, matcher, client, caller, priority });
        if !self.groups.send(group, Event::Submit(submission)).await {
            return Err(Status::unavailable("the server is shutting down"));
        }
        Ok(ReceiverStream::new(chunks))
    }
}

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ReceiverStream<Result<GenerateResponse, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (span, arrived) = (self.span(&request), Instant::now());
        let submit = async {
            let caller = Caller::of(request.metadata(), arrived)?;
            self.submit(request.into_inner(), caller, arrived).await
        };
        let accepted = submit.instrument(span).await.map(Response::new);
        accepted.inspect_err(|refusal| self.metrics.rejected(refusal.code()))
    }

    async fn tokenize(
        &self,
        request: Request<TokenizeRequest>,
    ) -> Result<Response<TokenizeResponse>, Status> {
        let request = request.into_inner();
        validate::model(&self.served, request.model.as_deref())?;
        let special = if request.parse_special { SpecialTokens::Parse } else { SpecialTokens::Literal };
        let input = match request.input {
            Some(tokenize_request::Input::Text(text)) => validate::raw(text, special)?,
            Some(tokenize_request::Input::Chat(chat)) => validate::chat(chat)?,
            None => return Err(bad_request(&[("input".into(), "set `text` or `chat`".into())])),
        };
        let tokens = self.text.prompt_tokens(input).await.map_err(prompt_status)?;
        Ok(Response::new(TokenizeResponse { token_ids: tokens.into_iter().map(|token| token.0).collect() }))
    }

    async fn detokenize(
        &self,
        request: Request<DetokenizeRequest>,
    ) -> Result<Response<DetokenizeResponse>, Status> {
        let request = request.into_inner();
        validate::model(&self.served, request.model.as_deref())?;
        let n_tokens = request.token_ids.len();
        if n_tokens > MAX_DETOKENIZE {
            let problem = format!("{n_tokens} token ids; at most {MAX_DETOKENIZE} are taken");
            return Err(bad_request(&[("token_ids".into(), problem)]));
        }
        let control = if request.skip_special { ControlText::Skip } else { ControlText::Show };
        let tokens = request.token_ids.into_iter().map(paceline_domain::TokenId).collect();
        let text = self.text.decode(tokens, control).await.map_err(prompt_status)?;
        Ok(Response::new(DetokenizeResponse { text }))
    }

    async fn list_models(
        &self,
        _request: Request<ListModelsRequest>,
    ) -> Result<Response<ListModelsResponse>, Status> {
        let mut model = self.model.clone();
        for (group, status) in model.groups.iter_mut().zip(self.groups.status().borrow().iter()) {
            group.ready = status.is_ready();
            if let GroupStatus::Ready { n_kv_blocks, .. } = status {
                group.kv_blocks = *n_kv_blocks;
            }
        }
        Ok(Response::new(ListModelsResponse { models: vec![model] }))
    }
}
