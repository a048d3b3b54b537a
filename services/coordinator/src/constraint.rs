//! Grammars of requests: compiled off the async threads, run off the loop. Masks of a step are made while its forward pass
//! runs and go to the ranks after the plan. It decides nothing about steps.

use std::sync::{Arc, Mutex, OnceLock};

use paceline_domain::{Grammar, SequenceId, SequenceMasks, StepMasks, StepPlan, TokenId, TokenMask};
use paceline_grammar::{Compiler, GrammarError, Matcher};
use paceline_text::Tokenizer;
use paceline_wire::shard::{CoordinatorMessage, coordinator_message};
use tokio::sync::{Semaphore, mpsc};

use crate::engine::Event;

/// Grammars that are compiled at the same time; more wait for one of them.
const MAX_COMPILING: usize = 2;
/// Parts that the masks of a step are made in, at the same time.
const MAX_PARTS: usize = 4;

/// Compiles grammars for one tokenizer.
#[derive(Clone)]
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    n_vocab: u32,
    /// Made for the first grammar.
    compiler: Arc<OnceLock<Result<Compiler, GrammarError>>>,
    places: Arc<Semaphore>,
}

impl Grammars {
    /// Nothing is compiled yet.
    pub fn new(tokenizer: Arc<Tokenizer>, n_vocab: u32) -> Self {
        Self { tokenizer, n_vocab, compiler: Arc::default(), places: Arc::new(Semaphore::new(MAX_COMPILING)) }
    }

    /// The beginning of a text in this grammar.
    ///
    /// # Errors
    /// When it cannot be used.
    pub async fn compile(&self, grammar: Grammar) -> Result<Matcher, GrammarError> {
        let _place = self.places.acquire().await.expect("invariant: the semaphore is never closed");
        let Self { tokenizer, n_vocab, compiler, .. } = self.clone();
        let work = move || {
            let compiler = compiler.get_or_init(|| Compiler::new(&tokenizer, n_vocab as usize));
            compiler.as_ref().map_err(Clone::clone)?.compile(&grammar)
        };
        let panicked = |_| GrammarError::Stuck("compiling it failed".into());
        tokio::task::spawn_blocking(work).await.map_err(panicked)?
    }
}

/// Where one choice stands in its grammar.
pub struct Constraint {
    matcher: Arc<Mutex<Matcher>>,
    /// Committed since the matcher was last used.
    pending: Vec<TokenId>,
}

impl Constraint {
    /// At the beginning.
    pub fn new(matcher: Matcher) -> Self {
        Self { matcher: Arc::new(Mutex::new(matcher)), pending: Vec::new() }
    }

    /// A token was committed.
    pub fn commit(&mut self, token: TokenId) {
        self.pending.push(token);
    }

    /// The work for its chunk of a step, where that samples.
    pub fn job(&mut self, sequence: SequenceId, plan: &StepPlan) -> Option<Job> {
        let chunk = plan.chunks.iter().find(|chunk| chunk.sequence == sequence && chunk.n_sampled > 0)?;
        let proposals = chunk.tokens[chunk.tokens.len() - chunk.n_sampled as usize + 1..].to_vec();
        let (matcher, committed) = (self.matcher.clone(), std::mem::take(&mut self.pending));
        Some(Job { sequence, matcher, committed, proposals })
    }
}

/// Masks to be made for one sequence.
pub struct Job {
    sequence: SequenceId,
    matcher: Arc<Mutex<Matcher>>,
    committed: Vec<TokenId>,
    proposals: Vec<TokenId>,
}

impl Job {
    fn masks(&self) -> Result<Vec<TokenMask>, GrammarError> {
        let broken = || GrammarError::Stuck("it failed before".into());
        let mut matcher = self.matcher.lock().map_err(|_| broken())?;
        self.committed.iter().try_for_each(|token| matcher.commit(*token))?;
        matcher.masks(&self.proposals)
    }
}

/// Makes the masks of a step and sends them to all ranks. Who has none gets open ones, after the loop was told that its
/// sequence is over: so the group goes on, and what it samples is never used.
pub fn send_masks(
    jobs: Vec<Job>,
    plan: &StepPlan,
    ranks: &[mpsc::Sender<CoordinatorMessage>],
    events: &mpsc::Sender<Event>,
) {
    let (epoch, step) = (plan.epoch, plan.step);
    let n_of_part = jobs.len().div_ceil(MAX_PARTS).max(1);
    let mut jobs = jobs.into_iter();
    loop {
        let part: Vec<Job> = jobs.by_ref().take(n_of_part).collect();
        if part.is_empty() {
            return;
        }
        let (ranks, events) = (ranks.to_vec(), events.clone());
        tokio::task::spawn_blocking(move || {
            let sequences = part.iter().map(|job| masks_of(job, &events)).collect();
            let masks = StepMasks { epoch, step, sequences };
            for rank in ranks {
                let message = Some(coordinator_message::Message::Masks((&masks).into()));
                // A rank that is gone is reported by its reader.
                let _ = rank.blocking_send(CoordinatorMessage { message });
            }
        });
    }
}

fn masks_of(job: &Job, events: &mpsc::Sender<Event>) -> SequenceMasks {
    let rows = job.masks().unwrap_or_else(|error| {
        let _ = events.blocking_send(Event::Stuck(job.sequence, error));
        vec![TokenMask::default(); job.proposals.len() + 1]
    });
    SequenceMasks { sequence: job.sequence, rows }
}
