//! The command line: what there is to type, and which command it runs.

use std::{future::Future, process::ExitCode};

use clap::{Parser, Subcommand};
use paceline_telemetry::{Telemetry, TelemetryConfig};
use tracing::{Instrument as _, Span, info_span};

#[cfg(feature = "cuda")]
use crate::commands::selftest;
use crate::{
    commands::{
        bench::{self, BenchArgs},
        chat::{self, ChatArgs},
        estimate::{self, EstimateArgs},
        generate::{self, GenerateArgs},
        models::{self, ModelsCommand},
        plan::{self, PlanArgs},
        run::{self, RunArgs},
        service::{self, CoordinatorArgs, DraftArgs, ShardArgs},
        synth::{self, SynthArgs},
        up::{self, UpArgs},
    },
    interrupt::Interrupted,
    options::ModelPlaces,
};

/// Serves large language models from a cluster of small gRPC services.
#[derive(Parser, Debug)]
#[command(name = "paceline", version, about, max_term_width = 110)]
#[command(after_help = "Examples:
  paceline run \"Write a limerick about a bicycle race.\"
  paceline up --ranks 2          and then, elsewhere:  paceline chat

Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + n stopped by signal n (130 for Ctrl-C).
Logs: PACELINE_LOG or RUST_LOG, for instance `info`. Traces: OTEL_EXPORTER_OTLP_ENDPOINT.")]
struct Cli {
    #[command(flatten)]
    places: ModelPlaces,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Run(RunArgs),
    Up(UpArgs),
    Generate(GenerateArgs),
    Chat(ChatArgs),
    /// Lists and fetches models
    #[command(subcommand)]
    Models(ModelsCommand),
    Plan(PlanArgs),
    Estimate(EstimateArgs),
    Bench(BenchArgs),
    Synth(SynthArgs),
    #[cfg(feature = "cuda")]
    Selftest(selftest::SelftestArgs),
    Shard(ShardArgs),
    Draft(DraftArgs),
    Coordinator(CoordinatorArgs),
}

/// Parses the arguments, runs the command, reports its error.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Into::into).and_then(
            |runtime| {
                let result = runtime.block_on(dispatch(&cli));
                // A thread that is blocked on standard input must not hold up the end.
                runtime.shutdown_background();
                result
            },
        );
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref::<Interrupted>() {
            Some(interrupted) => interrupted.exit_code(),
            None => {
                eprintln!("error: {}", message(&error));
                ExitCode::FAILURE
            }
        },
    }
}

/// The error and its causes; a cause that the text before it ends with is not said again.
fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

async fn dispatch(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Shard(args) => with_telemetry("paceline-shard", "info", |_| service::shard(args)).await,
        Command::Draft(args) => with_telemetry("paceline-draft", "info", |_| service::draft(args)).await,
        Command::Coordinator(args) => {
            with_telemetry("paceline-coordinator", "info", |_| service::coordinator(args)).await
        }
        _ => with_telemetry("paceline", "warn", |config| command(cli).instrument(span(cli, config))).await,
    }
}

async fn command(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::Run(args) => run::run(args, &cli.places).await,
        Command::Up(args) => up::up(args, &cli.places).await,
        Command::Generate(args) => generate::generate(args).await,
        Command::Chat(args) => chat::chat(args).await,
        Command::Models(command) => models::models(command, &cli.places).await,
        Command::Plan(args) => plan::plan(args, &cli.places).await,
        Command::Estimate(args) => estimate::estimate(args),
        Command::Bench(args) => bench::bench(args, &cli.places).await,
        Command::Synth(args) => synth::synth(args).await,
        #[cfg(feature = "cuda")]
        Command::Selftest(args) => tokio::task::block_in_place(|| selftest::selftest(args)),
        Command::Shard(args) => service::shard(args).await,
        Command::Draft(args) => service::draft(args).await,
        Command::Coordinator(args) => service::coordinator(args).await,
    }
}

/// The root of the traces of a client command. Without an exporter there is none: its context, not sampled, would
/// tell servers that do export to leave their spans out.
fn span(cli: &Cli, config: &TelemetryConfig) -> Span {
    let name = match &cli.command {
        Command::Run(_) => "paceline run",
        Command::Generate(_) => "paceline generate",
        Command::Chat(_) => "paceline chat",
        _ => return Span::none(),
    };
    if config.export { info_span!("command", otel.name = name, otel.kind = "client") } else { Span::none() }
}

async fn with_telemetry<W>(
    service: &'static str,
    default_log: &str,
    work: impl FnOnce(&TelemetryConfig) -> W,
) -> anyhow::Result<()>
where
    W: Future<Output = anyhow::Result<()>>,
{
    let mut config = TelemetryConfig::from_env(service);
    let unset = |name: &&str| std::env::var_os(name).is_none_or(|value| value.is_empty());
    if ["PACELINE_LOG", "RUST_LOG"].iter().all(unset) {
        config.log_filter = default_log.into();
    }
    let telemetry = Telemetry::start(&config)?;
    let result = work(&config).await;
    telemetry.stop();
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_promised_command_lines_parse() {
        let lines = [
            "run --model M --ranks 2 --max-tokens 5 --temperature 0 --seed 7 --ignore-eos --json PROMPT",
            "run --temperature -1 PROMPT",
            "run --model M --draft D --draft-threads 2 --speculate draft PROMPT",
            "run --model M --draft D --draft-quantize q4_0 --draft-vocabulary 0 PROMPT",
            "up --draft D",
            "up --listen 127.0.0.1:0",
            "up --groups 2 --ranks 1",
            "generate --server http://localhost:1 PROMPT",
            "chat --system S",
            "models list",
            "models pull a b",
            "models pull --all --models-dir /tmp",
            "plan --model M --ranks 3",
            "estimate --config config.json --dtype bfloat16",
            "synth --shape qwen2.5-7b --type q4_k --seed 1 --out model.gguf --json",
            "synth --config config.json --out model",
            "shard --listen 127.0.0.1:0 --model M --threads 2 --events --exit-with-stdin",
            "draft --listen 127.0.0.1:0 --model D --threads 1 --max-ahead 8 --events --exit-with-stdin",
            "draft --model D --quantize q4_1 --vocabulary 32768",
            "coordinator --listen 127.0.0.1:0 --model M --shards http://a:1,http://b:2",
            "coordinator --model M --shards http://a:1,http://b:2 --shards http://c:1,http://d:2",
        ];
        for line in lines {
            let parsed = Cli::try_parse_from(["paceline"].into_iter().chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.expect_err("checked"));
        }
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = anyhow::anyhow!("disk full").context("cannot write a: disk full").context("no model");
        assert_eq!(message(&error), "no model: cannot write a: disk full");
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "",
            "run",
            "run --ranks 0 PROMPT",
            "run --groups 0 PROMPT",
            "models pull",
            "fly",
            "run --draft D --draft-quantize q5_0 PROMPT",
            "run --quantize q4_0 PROMPT",
            "synth --out a",
            "synth --shape a --config b --out c",
        ] {
            let arguments = ["paceline"].into_iter().chain(line.split(' ').filter(|word| !word.is_empty()));
            assert!(Cli::try_parse_from(arguments).is_err(), "{line}");
        }
    }
}
