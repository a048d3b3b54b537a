//! What a step's result changes: tokens are committed, full blocks of them become known to the prefix cache.

use paceline_domain::{
    SampledToken, ScoredToken, SequenceId, SequenceSamples, StepNumber, StepResult, TokenId,
};
use paceline_speculation::Drafting;

use super::{
    Scheduler,
    plan::{Asked, InFlight},
};

/// A token that is now part of its sequence.
#[derive(Clone, PartialEq, Debug)]
pub struct Commit {
    /// Whose.
    pub sequence: SequenceId,
    /// The token.
    pub sampled: SampledToken,
}

/// What became of proposals.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verified {
    /// Whose.
    pub sequence: SequenceId,
    /// Proposals that were verified.
    pub n_proposed: usize,
    /// Those of them, from the first on, that were sampled.
    pub n_accepted: usize,
    /// What was sampled in place of the next one, if there was one.
    pub correction: Option<TokenId>,
    /// Second guesses that were verified beside them, and whether one of them was the correction.
    pub n_branches: usize,
    /// See `n_branches`.
    pub took_branch: bool,
}

/// Log probabilities of tokens of a prompt. Those of one sequence come in order, each once.
#[derive(Clone, PartialEq, Debug)]
pub struct Scores {
    /// Whose.
    pub sequence: SequenceId,
    /// Position of the first.
    pub start_pos: u32,
    /// The numbers.
    pub tokens: Vec<ScoredToken>,
}

/// What a result has changed.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Applied {
    /// New tokens, those of one sequence in order.
    pub commits: Vec<Commit>,
    /// One for each sequence with proposals that is still there.
    pub verified: Vec<Verified>,
    /// Log probabilities of prompts.
    pub scores: Vec<Scores>,
    /// What the draft service did during the step.
    pub drafting: Drafting,
}

/// What came for one chunk.
struct Answer {
    sampled: Vec<SampledToken>,
    scored: Vec<ScoredToken>,
}

/// A result that does not answer the oldest plan in flight: the group is beyond use.
#[derive(thiserror::Error, Clone, PartialEq, Eq, Debug)]
#[error("rank 0 answered with {found}; the plan in flight wants {wanted}")]
pub struct ResultMismatch {
    /// What the plan asked for.
    pub wanted: String,
    /// What came.
    pub found: String,
}

impl Scheduler {
    /// Takes rank 0's answer to the oldest plan in flight. Of a chunk that samples several tokens it takes as many as
    /// there are: the proposals that were sampled and one more, or two where the first of these is a branch. Tokens of
    /// sequences that were finished meanwhile are dropped.
    ///
    /// # Errors
    /// When it is not the answer to that plan.
    pub fn apply(&mut self, result: StepResult) -> Result<Applied, ResultMismatch> {
        let Some(in_flight) = self.in_flight.pop_front() else {
            return Err(ResultMismatch { wanted: "nothing".into(), found: format!("step {}", result.step) });
        };
        check(&in_flight, &result)?;
        let (load, ms) = (in_flight.load, result.timings.total_us as f64 / 1e3);
        tracing::debug!(
            load.n_rows,
            load.n_keys,
            ms,
            predicted_ms = in_flight.predicted_ms,
            drafting = ?in_flight.drafting,
            "step measured"
        );
        self.times.observe(load, ms, in_flight.drafting);
        let (mut samples, mut scores) = (result.samples.into_iter(), result.scores.into_iter());
        let mut applied = Applied { drafting: in_flight.drafting, ..Applied::default() };
        for asked in &in_flight.asked {
            let sampled = if asked.n_sampled > 0 { samples.next() } else { None };
            let scored = if asked.n_scored > 0 { scores.next() } else { None };
            let answer = Answer {
                sampled: sampled.map(|samples| samples.tokens).unwrap_or_default(),
                scored: scored.map(|scores| scores.tokens).unwrap_or_default(),
            };
            self.settle(in_flight.step, asked, answer, &mut applied);
        }
        Ok(applied)
    }

    fn settle(
        &mut self,
        step: StepNumber,
        asked: &Asked,
        Answer { sampled, scored }: Answer,
        applied: &mut Applied,
    ) {
        let (id, n_before) = (asked.sequence, asked.end - asked.n_sampled);
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if !scored.is_empty() {
            let start_pos = sequence.tell(scored.len());
            applied.scores.push(Scores { sequence: id, start_pos, tokens: scored });
        }
        if asked.n_sampled > 0 {
            assert_eq!(sequence.tokens.len(), n_before + 1, "invariant: steps are answered in order");
            sequence.n_unknown -= 1;
            // They were meant for what is no longer the end.
            sequence.proposals.clear();
        }
        // It may have lost its place, and even have another one, since the plan was made; its tokens are good.
        let has_kept_place = sequence.opened_at.is_some_and(|opened| opened <= step);
        let n_accepted = asked.n_accepted(&sampled);
        if has_kept_place && asked.n_sampled > 0 {
            // The key and value of a branch are in a block that is nobody's.
            sequence.n_computed = n_before + n_accepted + 1;
        } else if has_kept_place {
            sequence.n_computed = n_before;
        }
        if asked.n_sampled > 1 {
            let n_proposed = asked.n_sampled - 1;
            let correction = (n_accepted < n_proposed).then(|| sampled[n_accepted].token);
            applied.verified.push(Verified {
                sequence: id,
                n_proposed,
                n_accepted,
                correction,
                n_branches: asked.branches.len(),
                took_branch: sampled.len() > n_accepted + 1,
            });
            if has_kept_place {
                sequence.is_verifying = false;
                sequence.n_planned = sequence.n_computed;
            }
        }
        self.waiting.charge(&sequence.tenant, 0, sampled.len());
        let siblings = if sampled.is_empty() { Vec::new() } else { std::mem::take(&mut sequence.siblings) };
        sequence.tokens.extend(sampled.iter().map(|sampled| sampled.token));
        applied.commits.extend(sampled.into_iter().map(|sampled| Commit { sequence: id, sampled }));
        if has_kept_place {
            for (block, key) in sequence.publish() {
                self.ledger.publish(block, key);
            }
        }
        self.release_siblings(siblings);
    }
}

/// Whether the result answers the plan: the same step, for each chunk with sampled rows the proposals that were
/// sampled and what follows them, and the scores that were asked for.
fn check(plan: &InFlight, result: &StepResult) -> Result<(), ResultMismatch> {
    let sampling = || plan.asked.iter().filter(|asked| asked.n_sampled > 0);
    let is_answer = (plan.epoch, plan.step) == (result.epoch, result.step)
        && sampling().count() == result.samples.len()
        && sampling().zip(&result.samples).all(|(asked, samples)| answers(asked, samples));
    let (n_wanted, n_found) = n_scores(plan, result);
    if is_answer && n_wanted == n_found {
        return Ok(());
    }
    let wanted: Vec<_> = sampling().map(|asked| (asked.sequence, asked.n_sampled)).collect();
    let found: Vec<_> =
        result.samples.iter().map(|samples| (samples.sequence, samples.tokens.len())).collect();
    Err(ResultMismatch {
        wanted: format!(
            "epoch {} step {} samples of {wanted:?}, scores of {n_wanted:?}",
            plan.epoch, plan.step
        ),
        found: format!(
            "epoch {} step {} samples of {found:?}, scores of {n_found:?}",
            result.epoch, result.step
        ),
    })
}

/// Sequences with scores and how many.
type ScoreCounts = Vec<(SequenceId, usize)>;

/// Those that are wanted and those that came.
fn n_scores(plan: &InFlight, result: &StepResult) -> (ScoreCounts, ScoreCounts) {
    let wanted = plan.asked.iter().map(|asked| (asked.sequence, asked.n_scored));
    let found = result.scores.iter().map(|scores| (scores.sequence, scores.tokens.len()));
    (wanted.filter(|(_, n)| *n > 0).collect(), found.collect())
}

/// After the proposals that were sampled comes one more token; if that is a branch's, another one.
fn answers(asked: &Asked, samples: &SequenceSamples) -> bool {
    let n_accepted = asked.n_accepted(&samples.tokens);
    let is_branch = |token: &SampledToken| {
        asked.branches.iter().any(|branch| (branch.after as usize, branch.token) == (n_accepted, token.token))
    };
    let n_last = match samples.tokens.get(n_accepted) {
        Some(token) => 1 + usize::from(is_branch(token)),
        None => return false,
    };
    samples.sequence == asked.sequence && samples.tokens.len() == n_accepted + n_last
}

impl Asked {
    /// Proposals, from the first on, that were sampled; one more token at least comes after them.
    fn n_accepted(&self, sampled: &[SampledToken]) -> usize {
        let pairs = sampled.iter().zip(&self.proposals).take(sampled.len().saturating_sub(1));
        pairs.take_while(|(sampled, proposed)| sampled.token == **proposed).count()
    }
}
