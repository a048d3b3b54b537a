//! Tests of the scheduler: prompts whose log probabilities are wanted. Plans as data.

use super::{
    tests::{LIMITS, N_KV_BLOCKS, answer, scheduler, sequence},
    *,
};
use paceline_domain::{ScoredToken, SequenceScores, StepPlan, StepResult};

fn scored(n_prompt: usize, max_tokens: u32) -> NewSequence {
    NewSequence { n_prompt_logprobs: Some(2), ..sequence(n_prompt, max_tokens) }
}

/// Rank 0's answer with scores that are their positions.
fn answer_with_scores(plan: &StepPlan) -> StepResult {
    let chunks = plan.chunks.iter().filter(|chunk| !chunk.scoring.tokens.is_empty());
    let scores = chunks.map(|chunk| SequenceScores {
        sequence: chunk.sequence,
        tokens: chunk
            .scoring
            .tokens
            .iter()
            .map(|token| ScoredToken { logprob: token.0 as f32, top_logprobs: Vec::new() })
            .collect(),
    });
    StepResult { scores: scores.collect(), ..answer(plan, &[7]) }
}

/// (sequence, start, tokens, first scored token, scored tokens, sampled) of each chunk.
fn shape(plan: &StepPlan) -> Vec<(u64, u32, usize, u32, usize, u32)> {
    let of = |chunk: &paceline_domain::SequenceChunk| {
        let scored = &chunk.scoring.tokens;
        let first = scored.first().map_or(0, |token| token.0);
        (chunk.sequence.0, chunk.start_pos, chunk.tokens.len(), first, scored.len(), chunk.n_sampled)
    };
    plan.chunks.iter().map(of).collect()
}

/// Plans and answers one step; the scores that came, as (sequence, start, how many).
fn step(scheduler: &mut Scheduler) -> (StepPlan, Vec<(u64, u32, usize)>) {
    let plan = scheduler.plan().expect("something to do");
    let applied = scheduler.apply(answer_with_scores(&plan)).expect("the answer");
    for scores in &applied.scores {
        // Prompts are their positions.
        let positions = scores.start_pos..;
        assert!(scores.tokens.iter().zip(positions).all(|(scored, at)| scored.logprob == at as f32));
    }
    let scores = applied.scores.iter().map(|one| (one.sequence.0, one.start_pos, one.tokens.len()));
    (plan, scores.collect())
}

#[test]
fn chunks_of_a_scored_prompt_have_no_more_rows_than_logits_have_room() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(scored(25, 5));
    let expected = [
        (vec![(1, 0, 10, 1, 10, 0)], vec![(1, 1, 10)]),
        (vec![(1, 10, 10, 11, 10, 0)], vec![(1, 11, 10)]),
        (vec![(1, 20, 5, 21, 4, 1)], vec![(1, 21, 4)]),
        (vec![(1, 25, 1, 0, 0, 1)], vec![]),
    ];
    for (chunks, scores) in expected {
        let (plan, told) = step(&mut scheduler);
        assert_eq!((shape(&plan), told), (chunks, scores));
    }
}

#[test]
fn a_scored_prompt_leaves_each_other_its_row() {
    let mut scheduler = scheduler(LIMITS, 2 * N_KV_BLOCKS);
    scheduler.submit(scored(40, 5));
    scheduler.submit(NewSequence { tenant: "b".into(), ..scored(40, 5) });
    scheduler.submit(NewSequence { tenant: "c".into(), ..sequence(2, 5) });
    let plan = scheduler.plan().expect("all three are read");
    // Of ten rows with logits each has one; the first prompt has the others, the third samples.
    assert_eq!(shape(&plan), [(1, 0, 8, 1, 8, 0), (2, 0, 1, 1, 1, 0), (3, 0, 2, 0, 0, 1)]);
}

#[test]
fn a_scored_prompt_takes_nothing_from_the_prefix_cache_and_leaves_its_blocks_there() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let first = scheduler.submit(scored(33, 5));
    while scheduler.tokens(first).expect("it runs").len() == 33 {
        step(&mut scheduler);
    }
    let second = scheduler.submit(scored(33, 5));
    let (plan, told) = step(&mut scheduler);
    assert!(plan.opens[0].cached_tokens.is_empty());
    assert_eq!((plan.opens[0].sequence, told[0].1), (second, 1));
    scheduler.finish(second);
    scheduler.submit(sequence(33, 5));
    assert_eq!(step(&mut scheduler).0.opens[0].cached_tokens.len(), 32);
}

#[test]
fn a_new_epoch_asks_again_for_the_scores_that_did_not_come() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(scored(25, 5));
    step(&mut scheduler);
    scheduler.plan().expect("its answer is lost");
    scheduler.begin_epoch(Epoch(2), N_KV_BLOCKS);
    // Ten tokens are read again, ten more have room for their logits.
    let (plan, told) = step(&mut scheduler);
    assert_eq!((shape(&plan), told), (vec![(1, 0, 20, 11, 10, 0)], vec![(1, 11, 10)]));
}

#[test]
fn an_answer_without_the_scores_is_refused() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(scored(4, 5));
    let plan = scheduler.plan().expect("a prompt");
    let error = scheduler.apply(answer(&plan, &[7])).expect_err("no scores").to_string();
    assert!(error.contains("scores of [(SequenceId(1), 3)]") && error.contains("scores of []"), "{error}");
}
