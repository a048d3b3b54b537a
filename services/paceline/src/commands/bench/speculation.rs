//! Speculation on a whole cluster, as `paceline run` starts it: every prompt in every mode in turn, by class of prompts.

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, ValueEnum as _};
use paceline_wire::inference::{
    Chat, ChatMessage, GenerateRequest, Model, SamplingOptions, SpeculationMode, SpeculationOptions,
    StopOptions, generate_request::Input, inference_client::InferenceClient,
};
use serde::Deserialize;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::{
    proposals,
    tally::{HEADING, Tally},
};
use crate::{
    answer::{Answer, connect, generate_request, served_model, traced, write_stdout},
    commands::up::{embedded_spec, start},
    draft_weights::DraftWeights,
    interrupt::Interrupts,
    options::{ClusterOptions, ModelPlaces, Speculate},
    process::Log,
    progress::Progress,
};

/// Tokens of the requests that come before those that count: models are in memory then, and steps were measured.
const WARM_UP_TOKENS: u32 = 32;

/// What to compare.
#[derive(Args, Clone, Debug)]
pub struct SpeculationArgs {
    /// Compare modes of speculation on a cluster of services with these prompts: one JSON object a line, with class and prompt
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shapes", "machine"], help_heading = "Speculation")]
    pub prompts: Option<PathBuf>,
    /// Draft model, as catalogue name or path
    #[arg(long, value_name = "NAME|PATH", requires = "prompts", help_heading = "Speculation")]
    pub draft: Option<String>,
    /// Compute threads of the draft model, which computes while the model waits [default: as many as --threads]
    #[arg(long, value_name = "N", requires = "draft", help_heading = "Speculation")]
    pub draft_threads: Option<NonZeroUsize>,
    /// Without prompts they are about --model itself.
    #[command(flatten, next_help_heading = "Speculation")]
    pub draft_weights: DraftWeights,
    /// Modes to compare; off is measured in any case, and a second time when it is given twice
    #[arg(
        long,
        value_name = "MODES",
        value_enum,
        value_delimiter = ',',
        default_value = "off,ngram,draft,auto",
        requires = "prompts",
        help_heading = "Speculation"
    )]
    pub speculate: Vec<Speculate>,
    /// Requests sent together; prompts of a class repeat where there are fewer
    #[arg(
        long,
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "1",
        requires = "prompts",
        help_heading = "Speculation"
    )]
    pub batch: Vec<NonZeroUsize>,
    /// Most tokens of each answer
    #[arg(long, value_name = "N", default_value = "128", requires = "prompts", help_heading = "Speculation")]
    pub max_tokens: u32,
    /// Take only so many prompts of each class
    #[arg(long, value_name = "N", requires = "prompts", help_heading = "Speculation")]
    pub per_class: Option<NonZeroUsize>,
    /// Take only these classes
    #[arg(
        long,
        value_name = "CLASS,...",
        value_delimiter = ',',
        requires = "prompts",
        help_heading = "Speculation"
    )]
    pub classes: Vec<String>,
}

/// A line of the prompt file.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prompt {
    class: String,
    prompt: String,
}

/// How results are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// One object a line.
    Json,
    /// For people.
    Table,
}

/// What to compare, how often, and how to write it.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Prompts and modes.
    pub args: &'a SpeculationArgs,
    /// Times that each prompt goes through all modes.
    pub n_repeats: usize,
    /// How results are written.
    pub format: Format,
}

/// Runs the comparison and writes its results, class by class.
///
/// # Errors
/// When prompts or models cannot be had, the cluster fails, or the user interrupts.
pub async fn compare(
    &Wanted { args, n_repeats, format }: &Wanted<'_>,
    options: &ClusterOptions,
    places: &ModelPlaces,
) -> anyhow::Result<()> {
    let file = args.prompts.as_deref().context("no --prompts are given")?;
    let classes = read_prompts(file, args)?;
    let modes = modes(args)?;
    let (mut interrupts, progress) = (Interrupts::listen()?, Progress::to_stderr());
    let model = places.obtain(options.model.as_deref(), &progress, &mut interrupts).await?;
    let mut spec = embedded_spec(options, model, "127.0.0.1:0")?;
    spec.draft = options.draft_spec(places, &progress, &mut interrupts).await?;
    if ["PACELINE_LOG", "RUST_LOG"].iter().any(|name| std::env::var_os(name).is_some()) {
        spec.log = Log::Forward;
    } else {
        spec.env.push(("PACELINE_LOG".into(), "warn".into()));
    }
    let mut cluster = start(&spec, &progress, &mut interrupts).await?;
    let address = cluster.address();
    let measured = async {
        let mut client = connect(&address).await?;
        let model = served_model(&mut client, None).await?;
        let max_tokens = args.max_tokens;
        Comparison { client, model, modes, n_repeats, max_tokens, format }.run(args, &classes).await
    };
    let result = tokio::select! {
        result = measured => result,
        ended = cluster.any_ended() => Err(ended.into()),
        signal = interrupts.next() => Err(signal.into()),
    };
    tokio::select! {
        () = cluster.stop() => result,
        signal = interrupts.next() => Err(signal.into()),
    }
}

/// Off first: the others are compared with it, a second off too. Else each mode once.
fn modes(args: &SpeculationArgs) -> anyhow::Result<Vec<Speculate>> {
    if args.speculate.contains(&Speculate::Draft) && args.draft.is_none() {
        bail!("mode draft needs --draft MODEL; without one give --speculate off,ngram");
    }
    let mut modes = vec![Speculate::Off];
    let n_off = args.speculate.iter().filter(|mode| **mode == Speculate::Off).count();
    modes.extend((n_off > 1).then_some(Speculate::Off));
    for mode in &args.speculate {
        if !modes.contains(mode) {
            modes.push(*mode);
        }
    }
    Ok(modes)
}

/// Prompts by class, classes in the order of the file.
fn read_prompts(file: &Path, args: &SpeculationArgs) -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let classes = by_class(&text).with_context(|| file.display().to_string())?;
    let most = args.per_class.map_or(usize::MAX, NonZeroUsize::get);
    let is_wanted = |class: &String| args.classes.is_empty() || args.classes.contains(class);
    let wanted = classes.into_iter().filter(|(class, _)| is_wanted(class));
    let wanted: Vec<_> =
        wanted.map(|(class, prompts)| (class, prompts.into_iter().take(most).collect())).collect();
    ensure!(!wanted.is_empty(), "{} has no prompts of these classes", file.display());
    Ok(wanted)
}

fn by_class(text: &str) -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let mut classes: Vec<(String, Vec<String>)> = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let Prompt { class, prompt } =
            serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
        match classes.iter_mut().find(|(known, _)| *known == class) {
            Some((_, prompts)) => prompts.push(prompt),
            None => classes.push((class, vec![prompt])),
        }
    }
    Ok(classes)
}

struct Comparison {
    client: InferenceClient<Channel>,
    model: Model,
    modes: Vec<Speculate>,
    n_repeats: usize,
    max_tokens: u32,
    format: Format,
}

impl Comparison {
    async fn run(&self, args: &SpeculationArgs, classes: &[(String, Vec<String>)]) -> anyhow::Result<()> {
        for mode in &self.modes {
            let prompt = classes[0].1[0].clone();
            self.together(&[prompt], *mode, ("warm-up", WARM_UP_TOKENS)).await?;
        }
        if self.format == Format::Table {
            write_stdout(HEADING)?;
        }
        let (mut is_identical, mut by_position) = (true, proposals::heading());
        for batch in args.batch.iter().map(|batch| batch.get()) {
            let mut all = BTreeMap::new();
            for (class, prompts) in classes {
                let tallies = self.class(prompts, batch).await?;
                self.write(class, batch, &tallies)?;
                by_position += &self.by_position(class, batch, &tallies);
                for (i, tally) in tallies.iter().enumerate() {
                    all.entry(i).or_insert_with(Tally::default).merge(tally);
                }
            }
            let all: Vec<Tally> = all.into_values().collect();
            is_identical &= all.iter().all(Tally::is_identical);
            if self.format == Format::Table && classes.len() > 1 {
                self.write("all", batch, &all)?;
            }
        }
        if self.format == Format::Table {
            write_stdout(&by_position)?;
        }
        ensure!(is_identical, "speculation changed tokens: this is a bug");
        Ok(())
    }

    fn write(&self, class: &str, batch: usize, tallies: &[Tally]) -> anyhow::Result<()> {
        let off = &tallies[0];
        for (mode, tally) in self.modes.iter().zip(tallies) {
            let mode = name(*mode);
            let kind = (class, batch, mode.as_str());
            let line = match self.format {
                Format::Json => format!("{}\n", tally.json(kind, off)),
                Format::Table => tally.row(kind, off),
            };
            write_stdout(&line)?;
        }
        Ok(())
    }

    fn by_position(&self, class: &str, batch: usize, tallies: &[Tally]) -> String {
        let rows = self.modes.iter().zip(tallies);
        rows.map(|(mode, tally)| tally.proposals().rows((class, batch, &name(*mode)))).collect()
    }

    /// Each group of prompts in all modes in turn, as often as is wanted, and another mode first each time: what the
    /// machine does for a while is done to all modes alike.
    async fn class(&self, prompts: &[String], batch: usize) -> anyhow::Result<Vec<Tally>> {
        let n_modes = self.modes.len();
        let mut tallies = vec![Tally::default(); n_modes];
        for (turn, start) in (0..prompts.len()).step_by(batch).enumerate() {
            let group: Vec<String> = prompts.iter().cycle().skip(start).take(batch).cloned().collect();
            let mut rounds = vec![Vec::new(); n_modes];
            for round in 0..self.n_repeats {
                for i in (0..n_modes).map(|i| (turn + round + i) % n_modes) {
                    let mode = self.modes[i];
                    // The prefix cache of one tenant knows nothing of another's prompts: all are read anew.
                    let tenant = format!("{}-{i}-{batch}-{turn}-{round}", name(mode));
                    rounds[i].push(self.together(&group, mode, (&tenant, self.max_tokens)).await?);
                }
            }
            for (tally, of_mode) in tallies.iter_mut().zip(&rounds) {
                tally.add(of_mode, &rounds[0]);
            }
        }
        Ok(tallies)
    }

    /// Sends prompts at the same time; their answers in order.
    async fn together(
        &self,
        prompts: &[String],
        mode: Speculate,
        (tenant, max_tokens): (&str, u32),
    ) -> anyhow::Result<Vec<Answer>> {
        let mut tasks = JoinSet::new();
        for (i, prompt) in prompts.iter().enumerate() {
            let mut request = traced(self.request(prompt, mode, max_tokens));
            let tenant = tenant.parse().context("invariant: names of modes are ASCII")?;
            request.metadata_mut().insert("x-tenant", tenant);
            let mut client = self.client.clone();
            tasks.spawn(async move { (i, generate_request(&mut client, request, |_| Ok(())).await) });
        }
        let mut answers = BTreeMap::new();
        while let Some(joined) = tasks.join_next().await {
            let (i, answer) = joined?;
            answers.insert(i, answer?);
        }
        Ok(answers.into_values().collect())
    }

    fn request(&self, prompt: &str, mode: Speculate, max_tokens: u32) -> GenerateRequest {
        let message = ChatMessage { role: "user".into(), content: prompt.into() };
        let input = if self.model.chat {
            Input::Chat(Chat { messages: vec![message] })
        } else {
            Input::Prompt(prompt.into())
        };
        let mode = SpeculationMode::from(mode);
        GenerateRequest {
            model: Some(self.model.name.clone()),
            input: Some(input),
            sampling: Some(SamplingOptions { temperature: Some(0.0), ..SamplingOptions::default() }),
            stop: Some(StopOptions { max_tokens: Some(max_tokens), ..StopOptions::default() }),
            speculation: Some(SpeculationOptions { mode: Some(mode.into()), max_tokens: None }),
            ..GenerateRequest::default()
        }
    }
}

fn name(mode: Speculate) -> String {
    mode.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_gathered_by_class_and_bad_lines_named() {
        let text = "{\"class\":\"a\",\"prompt\":\"1\"}\n\n{\"class\":\"b\",\"prompt\":\"2\"}\n{\"class\":\"a\",\"prompt\":\"3\"}\n";
        let classes = by_class(text).expect("is fine");
        let expected = [("a".into(), vec!["1".to_owned(), "3".into()]), ("b".into(), vec!["2".into()])];
        assert_eq!(classes, expected);
        let error = by_class("{\"class\":\"a\",\"prompt\":\"1\"}\n{\"class\":\"a\"}").expect_err("no prompt");
        assert_eq!(error.to_string(), "line 2");
    }
}
