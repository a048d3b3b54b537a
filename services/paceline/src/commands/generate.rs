//! `paceline generate`: one prompt on a cluster that is already running.

use clap::Args;

use crate::{
    answer::{connect, prompt_request, served_model, show},
    interrupt::Interrupts,
    options::{PromptArgs, SamplingArgs, server_url},
};

/// How to reach a running cluster.
#[derive(Args, Clone, Debug)]
pub struct ServerArgs {
    /// Address of the coordinator
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:50051", env = "PACELINE_SERVER")]
    pub server: String,
    /// Name of a served model [default: the first served]
    #[arg(long, short, value_name = "NAME")]
    pub model: Option<String>,
}

/// Streams the answer of a running cluster to one prompt.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline generate \"Name three prime numbers.\"
  paceline generate --server http://10.0.0.7:50051 --temperature 0 --json \"Once upon a time\"
  paceline generate --n 3 --regex \"[A-Z][a-z]+\" \"Name a city in Italy.\"
  paceline generate --json-schema person.json --json \"Invent a person.\"
  paceline generate --raw --prompt-logprobs 2 --max-tokens 1 --json \"Colorless green ideas sleep furiously\"")]
pub struct GenerateArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
///
/// # Errors
/// When the server does not answer or refuses, or the user interrupts.
pub async fn generate(args: &GenerateArgs) -> anyhow::Result<()> {
    let mut interrupts = Interrupts::listen()?;
    tokio::select! {
        result = answer(args) => result,
        // The stream is dropped, so the server forgets the request.
        signal = interrupts.next() => Err(signal.into()),
    }
}

async fn answer(args: &GenerateArgs) -> anyhow::Result<()> {
    let mut client = connect(&server_url(&args.server.server)?).await?;
    let model = served_model(&mut client, args.server.model.as_deref()).await?;
    let request = prompt_request(&model, &args.prompt, &args.sampling)?;
    show(&mut client, request, args.prompt.format()).await
}
