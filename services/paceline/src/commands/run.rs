//! `paceline run`: one prompt on a cluster of its own.

use clap::Args;

use crate::{
    answer::{connect, prompt_request, served_model, show},
    commands::up::{embedded_spec, start},
    interrupt::Interrupts,
    options::{ClusterOptions, ModelPlaces, PromptArgs, SamplingArgs},
    process::Log,
    progress::Progress,
};

/// Starts a cluster on this machine, streams the answer to a prompt, stops the cluster.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline run \"Write a limerick about a bicycle race.\"
  paceline run --model qwen2.5-coder-1.5b-instruct --ranks 2 --temperature 0 \"Reverse a list in Rust.\"
  paceline run --raw --max-tokens 32 --json \"Once upon a time\"
  git diff | paceline run -

Standard output gets the generated text alone (or the JSON object); everything else goes to standard error.")]
pub struct RunArgs {
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    cluster: ClusterOptions,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Runs the command.
///
/// # Errors
/// When the model cannot be had, the cluster fails, the server refuses, or the user interrupts.
pub async fn run(args: &RunArgs, places: &ModelPlaces) -> anyhow::Result<()> {
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let model = places.obtain(args.cluster.model.as_deref(), &progress, &mut interrupts).await?;
    let user_wants_logs = ["PACELINE_LOG", "RUST_LOG"].iter().any(|name| std::env::var_os(name).is_some());
    let mut spec = embedded_spec(&args.cluster, model, "127.0.0.1:0")?;
    spec.draft = args.cluster.draft_spec(places, &progress, &mut interrupts).await?;
    if user_wants_logs {
        spec.log = Log::Forward;
    } else {
        spec.env.push(("PACELINE_LOG".into(), "warn".into()));
    }
    let mut cluster = start(&spec, &progress, &mut interrupts).await?;
    let address = cluster.address();
    let result = tokio::select! {
        result = answer(args, &address) => result,
        ended = cluster.any_ended() => Err(ended.into()),
        signal = interrupts.next() => Err(signal.into()),
    };
    tokio::select! {
        () = cluster.stop() => result,
        // Impatience: dropping the cluster kills it.
        signal = interrupts.next() => Err(signal.into()),
    }
}

async fn answer(args: &RunArgs, address: &str) -> anyhow::Result<()> {
    let mut client = connect(address).await?;
    let model = served_model(&mut client, None).await?;
    let request = prompt_request(&model, &args.prompt, &args.sampling)?;
    show(&mut client, request, args.prompt.format()).await
}
