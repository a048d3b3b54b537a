//! Tests of second guesses beside proposals: which rows and blocks they get, and where a sequence goes on after one was right.

use paceline_domain::{Branch, SampledToken, SequenceId, StepPlan};
use paceline_speculation::Guess;

use super::{
    tests::{LIMITS, answer, scheduler, sequence, shape},
    *,
};

/// Ready to verify, on a group that copies blocks.
fn decoding(limits: Limits, n_blocks: u32, new: NewSequence) -> (Scheduler, SequenceId) {
    let mut scheduler = scheduler(limits, n_blocks);
    scheduler.copy_blocks();
    let id = scheduler.submit(new);
    let plan = scheduler.plan().expect("its prompt");
    scheduler.apply(answer(&plan, &[5])).expect("the answer");
    (scheduler, id)
}

fn guesses(pairs: &[(u32, Option<u32>)]) -> Vec<Guess> {
    let guess =
        |(token, second): &(u32, Option<u32>)| Guess { token: TokenId(*token), second: second.map(TokenId) };
    pairs.iter().map(guess).collect()
}

fn branches(plan: &StepPlan) -> Vec<(u32, u32)> {
    plan.chunks[0].branches.iter().map(|branch| (branch.after, branch.token.0)).collect()
}

#[test]
fn a_branch_that_was_right_comes_again_with_the_token_after_it() {
    // (sampled, accepted, took a branch, tokens of the next chunk and where it starts)
    for (sampled, n_accepted, took_branch, next, start) in [
        (vec![7, 8, 9], 2, false, vec![9], 6),
        (vec![7, 4, 3], 1, true, vec![4, 3], 5),
        (vec![7, 6], 1, false, vec![6], 5),
        (vec![2, 1], 0, true, vec![2, 1], 4),
        (vec![9], 0, false, vec![9], 4),
    ] {
        let (mut scheduler, id) = decoding(LIMITS, 8, sequence(3, 20));
        let n_free = scheduler.n_free_blocks();
        scheduler.propose(id, guesses(&[(7, Some(2)), (8, Some(4))]));
        let plan = scheduler.plan().unwrap();
        assert_eq!((shape(&plan), branches(&plan)), (vec![(1, 3, 3, 3)], vec![(0, 2), (1, 4)]));
        assert_eq!((plan.n_rows(), scheduler.n_free_blocks()), (5, n_free), "their blocks are lent");
        let blocks: Vec<_> = plan.chunks[0].branches.iter().map(|branch| branch.block).collect();
        assert!(
            blocks[0] != blocks[1] && !scheduler.sequences[&id].blocks.iter().any(|own| blocks.contains(own))
        );
        let applied = scheduler.apply(answer(&plan, &sampled)).unwrap();
        let [verified] = applied.verified.as_slice() else { panic!("{applied:?}") };
        assert_eq!(
            (verified.n_accepted, verified.n_branches, verified.took_branch),
            (n_accepted, 2, took_branch)
        );
        assert_eq!(verified.correction, (n_accepted < 2).then(|| TokenId(sampled[n_accepted])));
        assert_eq!(
            scheduler.tokens(id).unwrap()[4..],
            sampled.iter().copied().map(TokenId).collect::<Vec<_>>()
        );
        let n_open = scheduler.open_to_proposals().next().map(|(_, n)| n);
        assert_eq!(n_open, Some(18 - sampled.len()));
        scheduler.propose(id, guesses(&[(1, None)]));
        let plan = scheduler.plan().unwrap();
        let tokens: Vec<u32> = plan.chunks[0].tokens.iter().map(|token| token.0).collect();
        assert_eq!((tokens, plan.chunks[0].start_pos), ([next, vec![1]].concat(), start));
        assert_eq!(plan.chunks[0].n_sampled, 2, "what comes again does not sample");
    }
}

#[test]
fn an_answer_that_no_branch_explains_is_refused() {
    for sampled in [&[2][..], &[7, 4], &[7, 2, 1], &[9, 1], &[7, 8, 9, 1]] {
        let (mut scheduler, id) = decoding(LIMITS, 8, sequence(3, 20));
        scheduler.propose(id, guesses(&[(7, Some(2)), (8, Some(4))]));
        let plan = scheduler.plan().unwrap();
        let mut result = answer(&plan, &[7]);
        let token =
            |token: &u32| SampledToken { token: TokenId(*token), logprob: None, top_logprobs: Vec::new() };
        result.samples[0].tokens = sampled.iter().map(token).collect();
        assert!(scheduler.apply(result).is_err(), "{sampled:?}");
    }
}

#[test]
fn there_are_no_more_branches_than_room() {
    let planned = |limits: Limits, n_blocks, new: NewSequence| {
        let (mut scheduler, id) = decoding(limits, n_blocks, new);
        scheduler.propose(id, guesses(&[(7, None), (8, Some(4)), (9, Some(1))]));
        branches(&scheduler.plan().unwrap()).len()
    };
    assert_eq!(planned(LIMITS, 8, sequence(3, 20)), 2);
    assert_eq!(
        planned(Limits { max_sampled_rows: 5, max_sequences: 1, ..LIMITS }, 8, sequence(3, 20)),
        1,
        "rows"
    );
    assert_eq!(planned(LIMITS, 2, sequence(3, 10)), 1, "blocks");
    assert_eq!(planned(LIMITS, 8, NewSequence { is_constrained: true, ..sequence(3, 20) }), 0);
    let mut scheduler = scheduler(LIMITS, 8);
    let id = scheduler.submit(sequence(3, 20));
    let plan = scheduler.plan().unwrap();
    scheduler.apply(answer(&plan, &[5])).unwrap();
    scheduler.propose(id, guesses(&[(7, Some(2))]));
    assert_eq!(branches(&scheduler.plan().unwrap()), [], "the group copies no blocks");
}

#[test]
fn where_rows_are_short_what_comes_again_comes_alone() {
    let limits = Limits { max_rows: 4, max_sampled_rows: 4, max_sequences: 2, ..LIMITS };
    let (mut scheduler, first) = decoding(limits, 8, sequence(3, 20));
    scheduler.propose(first, guesses(&[(7, Some(2))]));
    let plan = scheduler.plan().unwrap();
    assert_eq!(
        plan.chunks[0].branches,
        [Branch { after: 0, token: TokenId(2), ..plan.chunks[0].branches[0] }]
    );
    scheduler.apply(answer(&plan, &[2, 1])).unwrap();
    scheduler.limits.max_rows = 1;
    let plan = scheduler.plan().unwrap();
    assert_eq!(shape(&plan), [(1, 4, 1, 0)]);
    scheduler.apply(answer(&plan, &[])).unwrap();
    assert_eq!(shape(&scheduler.plan().unwrap()), [(1, 5, 1, 1)]);
}
