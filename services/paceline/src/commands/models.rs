//! `paceline models`: what the catalogue knows, and fetching it.

use clap::Subcommand;

use crate::{
    answer::write_stdout,
    cache::ModelCache,
    catalogue::{Catalogue, Entry},
    error::PullError,
    interrupt::{CancelFlag, Interrupts},
    options::ModelPlaces,
    progress::{Progress, megabytes},
    pull::{Existing, pull},
};

/// What to do with models.
#[derive(Subcommand, Debug)]
pub enum ModelsCommand {
    /// Lists the models of the catalogue, and which are on this machine
    List,
    /// Fetches models and verifies those that are there; prints the path of each file
    #[command(after_help = "Examples:
  paceline models pull smollm2-135m-instruct
  paceline models pull --all")]
    Pull {
        /// Catalogue names
        #[arg(required_unless_present = "all", value_name = "NAME")]
        names: Vec<String>,
        /// Every model of the catalogue
        #[arg(long)]
        all: bool,
    },
}

/// Runs the command.
///
/// # Errors
/// When the catalogue is unusable, a model is unknown or cannot be fetched, or the user interrupts.
pub async fn models(command: &ModelsCommand, places: &ModelPlaces) -> anyhow::Result<()> {
    let (catalogue, cache) = (places.catalogue()?, places.cache()?);
    match command {
        ModelsCommand::List => write_stdout(&list(&catalogue, &cache)),
        ModelsCommand::Pull { all: true, .. } => pull_all(catalogue.entries().to_vec(), cache).await,
        ModelsCommand::Pull { names, all: false } => {
            let entries: Result<Vec<Entry>, _> =
                names.iter().map(|name| catalogue.entry(name).cloned()).collect();
            pull_all(entries?, cache).await
        }
    }
}

fn list(catalogue: &Catalogue, cache: &ModelCache) -> String {
    let mut text = String::new();
    for (i, entry) in catalogue.entries().iter().enumerate() {
        let here = if cache.has(entry) { "here" } else { "not here" };
        let default = if i == 0 { ", default" } else { "" };
        text += &format!("{} ({}, {here}{default})\n", entry.name, megabytes(entry.bytes));
        text += &format!("    {}\n    {}\n", entry.summary, entry.license);
        entry.sources.iter().for_each(|source| text += &format!("    from {source}\n"));
    }
    text + &format!("files are kept in {}\n", cache.dir().display())
}

async fn pull_all(entries: Vec<Entry>, cache: ModelCache) -> anyhow::Result<()> {
    let (mut interrupts, cancel) = (Interrupts::listen()?, CancelFlag::default());
    let flag = cancel.clone();
    let mut task = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let progress = Progress::to_stderr();
        for entry in &entries {
            let path = pull(entry, &cache, Existing::Verify, &progress, &flag)?;
            write_stdout(&format!("{}\n", path.display()))?;
        }
        Ok(())
    });
    tokio::select! {
        pulled = &mut task => pulled?,
        signal = interrupts.next() => {
            cancel.set();
            // It ends because of the flag; what it says no longer matters.
            let _ = task.await;
            eprintln!("{}", PullError::Interrupted);
            Err(signal.into())
        }
    }
}
