//! Protobuf to domain. Every limit on a request is checked here, once, and every violation is reported.

use paceline_domain::{
    GenerateRequest, Grammar, Prompt, RequestId, SamplingParams, Speculation, SpeculationOptions, StopRules,
    TokenId,
    request::{MAX_CHOICES, MAX_PROPOSAL, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS},
    sampling::MAX_TOP_LOGPROBS,
};
use paceline_text::{ChatMessage, SpecialTokens};
use paceline_wire::{inference as proto, status::bad_request};
use tonic::Status;

use crate::{
    admission::Outline,
    scheduler::{Priority, Scheduler},
    text::TextInput,
};

/// Most stop tokens of one request.
const MAX_STOP_TOKENS: usize = 64;
/// Longest text of a prompt or conversation.
pub const MAX_PROMPT_BYTES: usize = 1 << 20;
/// Most messages of a conversation.
const MAX_MESSAGES: usize = 4096;

/// What requests are held against.
#[derive(Clone, Debug)]
pub struct Served {
    /// Name of the model.
    pub model: String,
    /// Usable tokens of the vocabulary.
    pub n_vocab: u32,
    /// Most tokens of prompt and output.
    pub context: usize,
}

/// Where a prompt comes from.
#[derive(Debug)]
pub enum Source {
    /// To be tokenized.
    Text(TextInput),
    /// As it is.
    Tokens(Vec<TokenId>),
}

/// NOT_FOUND when the name is not the served model's.
pub fn model(served: &Served, name: Option<&str>) -> Result<(), Status> {
    match name {
        Some(name) if name != served.model => Err(Status::not_found(format!(
            "model {name:?} is not served here; this server has {:?}",
            served.model
        ))),
        _ => Ok(()),
    }
}

/// The class of a request in the queue.
pub fn priority(given: Option<i32>) -> Result<Priority, Status> {
    use proto::Priority as Given;
    match given.map(Given::try_from) {
        None | Some(Ok(Given::Unspecified | Given::Normal)) => Ok(Priority::Normal),
        Some(Ok(Given::Low)) => Ok(Priority::Low),
        Some(Ok(Given::High)) => Ok(Priority::High),
        Some(Err(error)) => Err(violation("priority", format!("priority {} is not known", error.0))),
    }
}

fn violation(field: &str, problem: impl Into<String>) -> Status {
    bad_request(&[(field.into(), problem.into())])
}

/// The input of a request, with limits on its size.
pub fn source(served: &Served, input: Option<proto::generate_request::Input>) -> Result<Source, Status> {
    use proto::generate_request::Input;
    match input {
        None => Err(violation("input", "the request has no input; set `prompt`, `chat` or `token_ids`")),
        Some(Input::Prompt(text)) => raw(text, SpecialTokens::Literal).map(Source::Text),
        Some(Input::Chat(conversation)) => chat(conversation).map(Source::Text),
        Some(Input::TokenIds(tokens)) => {
            if let Some(id) = tokens.ids.iter().find(|id| **id >= served.n_vocab) {
                let problem =
                    format!("token id {id} is not below {}, the size of the vocabulary", served.n_vocab);
                return Err(violation("token_ids", problem));
            }
            Ok(Source::Tokens(tokens.ids.into_iter().map(TokenId).collect()))
        }
    }
}

/// Raw text within the size limit.
pub fn raw(text: String, special: SpecialTokens) -> Result<TextInput, Status> {
    check_bytes("prompt", text.len())?;
    Ok(TextInput::Raw(text, special))
}

/// A conversation within the size limits.
pub fn chat(chat: proto::Chat) -> Result<TextInput, Status> {
    if chat.messages.is_empty() || chat.messages.len() > MAX_MESSAGES {
        let n = chat.messages.len();
        return Err(violation(
            "chat",
            format!("chat has {n} messages; it must have from 1 to {MAX_MESSAGES}"),
        ));
    }
    check_bytes(
        "chat",
        chat.messages.iter().map(|message| message.role.len() + message.content.len()).sum(),
    )?;
    let message = |message: proto::ChatMessage| ChatMessage { role: message.role, content: message.content };
    Ok(TextInput::Chat(chat.messages.into_iter().map(message).collect()))
}

fn check_bytes(field: &str, n_bytes: usize) -> Result<(), Status> {
    match n_bytes {
        0 => Err(violation(field, format!("{field} is empty; give at least one character"))),
        n if n > MAX_PROMPT_BYTES => {
            Err(violation(field, format!("{field} has {n} bytes; at most {MAX_PROMPT_BYTES} are taken")))
        }
        _ => Ok(()),
    }
}

/// Options of a request as they came.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct GivenOptions {
    /// How tokens are chosen.
    pub sampling: Option<proto::SamplingOptions>,
    /// When to stop.
    pub stop: Option<proto::StopOptions>,
    /// Who may propose.
    pub speculation: Option<proto::SpeculationOptions>,
    /// Completions.
    pub n: Option<u32>,
    /// Alternatives to report for each prompt token.
    pub prompt_logprobs: Option<u32>,
    /// What the text must be.
    pub response_format: Option<proto::ResponseFormat>,
}

/// Options within their limits.
#[derive(Clone, PartialEq, Debug)]
pub struct Options {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When to stop; the number of tokens still depends on the prompt.
    pub stop: proto::StopOptions,
    /// Who may propose.
    pub speculation: SpeculationOptions,
    /// Completions.
    pub n_choices: u32,
    /// Alternatives to report for each prompt token.
    pub n_prompt_logprobs: Option<u32>,
    /// What the text must be.
    pub grammar: Option<Grammar>,
}

/// Everything but the prompt, checked before the work of tokenizing is done.
pub fn options(served: &Served, given: GivenOptions, drawn_seed: u64) -> Result<Options, Status> {
    let sampling = sampling_params(given.sampling.unwrap_or_default(), drawn_seed);
    let stop = given.stop.unwrap_or_default();
    let speculation = speculation(given.speculation.unwrap_or_default());
    let mut violations: Vec<(String, String)> = sampling
        .problems(served.n_vocab)
        .into_iter()
        .map(|problem| ("sampling".to_owned(), problem))
        .collect();
    violations.extend(stop_problems(served, &stop).into_iter().map(|problem| ("stop".to_owned(), problem)));
    let speculation = speculation.map_err(|problem| violations.push(("speculation".into(), problem)));
    let grammar = given.response_format.map(grammar).transpose().unwrap_or_else(|problem| {
        violations.push(("response_format".into(), problem));
        None
    });
    if grammar.is_some() && (stop.min_tokens.unwrap_or(0) > 0 || stop.ignore_eos == Some(true)) {
        let problem = "it ends with the text: not together with min_tokens or ignore_eos";
        violations.push(("response_format".into(), problem.into()));
    }
    let n_choices = given.n.unwrap_or(1);
    if !(1..=MAX_CHOICES).contains(&n_choices) {
        violations.push(("n".into(), format!("n is {n_choices}; it must be from 1 to {MAX_CHOICES}")));
    }
    let n_prompt_logprobs = given.prompt_logprobs;
    if let Some(n) = n_prompt_logprobs.filter(|n| *n > MAX_TOP_LOGPROBS) {
        let problem =
            format!("prompt_logprobs asks for {n} alternatives; at most {MAX_TOP_LOGPROBS} are given");
        violations.push(("prompt_logprobs".into(), problem));
    }
    match speculation {
        Ok(speculation) if violations.is_empty() => {
            Ok(Options { sampling, stop, speculation, n_choices, n_prompt_logprobs, grammar })
        }
        _ => Err(bad_request(&violations)),
    }
}

fn grammar(format: proto::ResponseFormat) -> Result<Grammar, String> {
    use proto::response_format::Format;
    match format.format {
        Some(Format::JsonObject(_)) => Ok(Grammar::JsonObject),
        Some(Format::JsonSchema(schema)) => Ok(Grammar::JsonSchema(schema)),
        Some(Format::Regex(regex)) => Ok(Grammar::Regex(regex)),
        Some(Format::Lark(grammar)) => Ok(Grammar::Lark(grammar)),
        None => Err("it has no format; set json_object, json_schema, regex or lark".into()),
    }
}

fn speculation(options: proto::SpeculationOptions) -> Result<SpeculationOptions, String> {
    use proto::SpeculationMode as Mode;
    let defaults = SpeculationOptions::default();
    let mode = match options.mode.map(Mode::try_from) {
        None | Some(Ok(Mode::Unspecified)) => defaults.mode,
        Some(Ok(Mode::Auto)) => Speculation::Auto,
        Some(Ok(Mode::Off)) => Speculation::Off,
        Some(Ok(Mode::Ngram)) => Speculation::Ngram,
        Some(Ok(Mode::Draft)) => Speculation::Draft,
        Some(Err(error)) => return Err(format!("speculation mode {} is not known", error.0)),
    };
    let max_tokens = options.max_tokens.map_or(defaults.max_tokens, |n| n as usize);
    if !(1..=MAX_PROPOSAL).contains(&max_tokens) {
        return Err(format!("speculation max_tokens is {max_tokens}; it must be from 1 to {MAX_PROPOSAL}"));
    }
    Ok(SpeculationOptions { mode, max_tokens })
}

fn sampling_params(options: proto::SamplingOptions, drawn_seed: u64) -> SamplingParams {
    let defaults = SamplingParams::default();
    let mut logit_bias: Vec<_> =
        options.logit_bias.into_iter().map(|(token, bias)| (TokenId(token), bias)).collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    SamplingParams {
        temperature: options.temperature.unwrap_or(defaults.temperature),
        top_k: options.top_k.unwrap_or(defaults.top_k),
        top_p: options.top_p.unwrap_or(defaults.top_p),
        min_p: options.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: options.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        presence_penalty: options.presence_penalty.unwrap_or(defaults.presence_penalty),
        frequency_penalty: options.frequency_penalty.unwrap_or(defaults.frequency_penalty),
        logit_bias,
        seed: options.seed.unwrap_or(drawn_seed),
        n_logprobs: options.logprobs,
    }
}

fn stop_problems(served: &Served, stop: &proto::StopOptions) -> Vec<String> {
    let mut problems = Vec::new();
    if stop.max_tokens == Some(0) {
        problems.push("max_tokens is 0; it must be at least 1".into());
    }
    if let Some((min, max)) = stop.min_tokens.zip(stop.max_tokens).filter(|(min, max)| min > max) {
        problems.push(format!("min_tokens is {min}; it must not be above max_tokens, {max}"));
    }
    if stop.strings.len() > MAX_STOP_STRINGS {
        problems.push(format!("{} stop strings; at most {MAX_STOP_STRINGS} are taken", stop.strings.len()));
    }
    for (i, string) in stop.strings.iter().take(MAX_STOP_STRINGS).enumerate() {
        if string.is_empty() || string.len() > MAX_STOP_STRING_BYTES {
            let n = string.len();
            problems.push(format!(
                "stop string {i} has {n} bytes; it must have from 1 to {MAX_STOP_STRING_BYTES}"
            ));
        }
    }
    if stop.token_ids.len() > MAX_STOP_TOKENS {
        problems.push(format!("{} stop tokens; at most {MAX_STOP_TOKENS} are taken", stop.token_ids.len()));
    }
    for id in stop.token_ids.iter().take(MAX_STOP_TOKENS).filter(|id| **id >= served.n_vocab) {
        problems.push(format!("stop token {id} is not below {}, the size of the vocabulary", served.n_vocab));
    }
    problems
}

/// How large a request with these options is at least, as far as that is known before its text is tokenized.
pub fn outline(served: &Served, options: &Options, source: &Source) -> Outline {
    let (n_prompt, n_bytes) = match source {
        Source::Tokens(tokens) => (tokens.len() as u64, 0),
        Source::Text(TextInput::Raw(text, _)) => (1, text.len()),
        Source::Text(TextInput::Chat(messages)) => {
            (1, messages.iter().map(|message| message.content.len()).sum())
        }
    };
    let room = (served.context as u64).saturating_sub(n_prompt);
    let n_answer = options.stop.max_tokens.map_or(room, |max| room.min(u64::from(max)));
    Outline { n_least: n_prompt + n_answer * u64::from(options.n_choices), n_bytes }
}

/// Puts prompt and options together. `max_tokens` is cut to what the context leaves; the pool has `n_kv_blocks`.
pub fn request(
    served: &Served,
    n_kv_blocks: u32,
    id: RequestId,
    tokens: Vec<TokenId>,
    Options { sampling, stop, speculation, n_choices, n_prompt_logprobs, .. }: Options,
) -> Result<GenerateRequest, Status> {
    let n_prompt = tokens.len();
    let prompt = Prompt::new(tokens).ok_or_else(|| violation("input", "the prompt has no tokens"))?;
    let Some(room) = served.context.checked_sub(n_prompt).filter(|room| *room > 0) else {
        let problem = format!(
            "the prompt has {n_prompt} tokens; the context holds {} and at least one is needed for the answer: \
             shorten the prompt by {} tokens",
            served.context,
            n_prompt + 1 - served.context
        );
        return Err(violation("input", problem));
    };
    let max_tokens = stop.max_tokens.map_or(room, |max| room.min(max as usize));
    let min_tokens = stop.min_tokens.unwrap_or(0);
    if min_tokens as usize > room {
        let problem =
            format!("min_tokens is {min_tokens}; beside {n_prompt} prompt tokens the context holds {room}");
        return Err(violation("stop", problem));
    }
    if !Scheduler::could_fit(n_kv_blocks, n_prompt + max_tokens) {
        return Err(Status::failed_precondition(format!(
            "{n_prompt} prompt tokens and {max_tokens} to generate never fit the KV pool of {n_kv_blocks} blocks of 16: \
             ask for fewer, or start the server with more --kv-blocks"
        )));
    }
    let stop = StopRules {
        max_tokens: max_tokens as u32,
        min_tokens,
        stop_strings: stop.strings,
        stop_tokens: stop.token_ids.into_iter().map(TokenId).collect(),
        ignore_eos: stop.ignore_eos.unwrap_or(false),
    };
    Ok(GenerateRequest { id, prompt, sampling, stop, speculation, n_choices, n_prompt_logprobs })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn served() -> Served {
        Served { model: "tiny".into(), n_vocab: 10, context: 100 }
    }

    #[test]
    fn an_unknown_model_is_not_found_and_the_served_one_named() {
        let status = model(&served(), Some("huge")).unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
        assert!(status.message().contains("\"tiny\""));
        assert!(model(&served(), Some("tiny")).is_ok() && model(&served(), None).is_ok());
    }

    #[test]
    fn the_size_of_a_request_is_outlined_before_its_text_is_tokenized() {
        let options = |max_tokens, n| {
            let stop = proto::StopOptions { max_tokens, ..Default::default() };
            options(&served(), GivenOptions { stop: Some(stop), n: Some(n), ..Default::default() }, 1)
                .unwrap()
        };
        let outline_of = |options, source| outline(&served(), &options, &source);
        let message = |content: &str| ChatMessage { role: "user".into(), content: content.into() };
        let tokens = || Source::Tokens(vec![TokenId(1); 40]);
        let chat = Source::Text(TextInput::Chat(vec![message("four"), message("seven")]));
        assert_eq!(outline_of(options(Some(7), 2), tokens()), Outline { n_least: 54, n_bytes: 0 });
        assert_eq!(outline_of(options(None, 1), tokens()), Outline { n_least: 100, n_bytes: 0 });
        assert_eq!(outline_of(options(Some(7), 1), chat), Outline { n_least: 8, n_bytes: 9 });
    }

    #[test]
    fn all_violations_come_at_once() {
        let sampling =
            proto::SamplingOptions { temperature: Some(-1.0), top_p: Some(2.0), ..Default::default() };
        let stop = proto::StopOptions {
            max_tokens: Some(0),
            strings: vec![String::new()],
            token_ids: vec![10],
            min_tokens: Some(1),
            ignore_eos: None,
        };
        let speculation = proto::SpeculationOptions { mode: None, max_tokens: Some(33) };
        let given = GivenOptions {
            sampling: Some(sampling),
            stop: Some(stop),
            speculation: Some(speculation),
            n: Some(17),
            prompt_logprobs: Some(21),
            response_format: Some(proto::ResponseFormat::default()),
        };
        let status = options(&served(), given, 1).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        for part in [
            "temperature is -1",
            "top_p is 2",
            "max_tokens is 0",
            "stop string 0",
            "stop token 10",
            "33",
            "n is 17",
            "prompt_logprobs asks for 21",
            "it has no format",
            "min_tokens is 1",
        ] {
            assert!(status.message().contains(part), "{part} in {}", status.message());
        }
    }

    #[test]
    fn zero_is_a_value_and_absence_a_default() {
        let given = proto::SamplingOptions { temperature: Some(0.0), seed: Some(0), ..Default::default() };
        let given = GivenOptions { sampling: Some(given), ..GivenOptions::default() };
        let params = options(&served(), given, 77).unwrap().sampling;
        assert_eq!((params.temperature, params.seed), (0.0, 0));
        let Options { sampling, speculation, .. } = options(&served(), GivenOptions::default(), 77).unwrap();
        assert_eq!((sampling.temperature, sampling.seed), (1.0, 77));
        assert_eq!(speculation, SpeculationOptions::default());
    }

    #[test]
    fn speculation_modes_are_told_apart() {
        let mode = |mode: i32| {
            let given = proto::SpeculationOptions { mode: Some(mode), max_tokens: None };
            let given = GivenOptions { speculation: Some(given), ..GivenOptions::default() };
            options(&served(), given, 1)
                .map(|options| options.speculation.mode)
                .map_err(|status| status.code())
        };
        let modes: Vec<_> = (0..5).map(mode).collect();
        use Speculation::{Auto, Draft, Ngram, Off};
        assert_eq!(modes, [Ok(Auto), Ok(Auto), Ok(Off), Ok(Ngram), Ok(Draft)]);
        assert_eq!(mode(5), Err(Code::InvalidArgument));
    }

    #[test]
    fn priorities_are_told_apart() {
        let classes = [None, Some(0), Some(1), Some(2), Some(3)].map(|given| priority(given).unwrap());
        use Priority::{High, Low, Normal};
        assert_eq!(classes, [Normal, Normal, Low, Normal, High]);
        assert_eq!(priority(Some(4)).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn sizes_are_held_against_context_and_pool() {
        let request = |n_prompt: usize, max_tokens: Option<u32>| {
            let stop = proto::StopOptions { max_tokens, ..Default::default() };
            let tokens = vec![TokenId(1); n_prompt];
            let given = GivenOptions { stop: Some(stop), ..GivenOptions::default() };
            let options = options(&served(), given, 1).unwrap();
            request(&served(), 4, RequestId(1), tokens, options)
        };
        assert_eq!(request(10, Some(5)).unwrap().stop.max_tokens, 5);
        assert_eq!(request(10, Some(54)).unwrap().stop.max_tokens, 54);
        assert_eq!(request(10, Some(55)).unwrap_err().code(), Code::FailedPrecondition);
        let long = proto::StopOptions { min_tokens: Some(91), ..Default::default() };
        let given = GivenOptions { stop: Some(long), ..GivenOptions::default() };
        let long = options(&served(), given, 1).unwrap();
        let status = super::request(&served(), 9, RequestId(1), vec![TokenId(1); 10], long).unwrap_err();
        assert!(status.message().contains("the context holds 90"), "{}", status.message());
        let status = request(100, Some(1)).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("by 1 tokens"), "{}", status.message());
        assert_eq!(request(0, Some(1)).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn inputs_are_bounded() {
        use proto::generate_request::Input;
        let code = |input| source(&served(), input).map(drop).map_err(|status| status.code());
        assert_eq!(code(None), Err(Code::InvalidArgument));
        assert_eq!(code(Some(Input::Prompt(String::new()))), Err(Code::InvalidArgument));
        assert_eq!(code(Some(Input::Prompt("x".repeat(MAX_PROMPT_BYTES + 1)))), Err(Code::InvalidArgument));
        assert_eq!(code(Some(Input::Chat(proto::Chat::default()))), Err(Code::InvalidArgument));
        assert_eq!(
            code(Some(Input::TokenIds(proto::TokenIds { ids: vec![10] }))),
            Err(Code::InvalidArgument)
        );
        assert_eq!(code(Some(Input::TokenIds(proto::TokenIds { ids: vec![9] }))), Ok(()));
    }
}
