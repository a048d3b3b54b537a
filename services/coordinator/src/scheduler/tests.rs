//! Tests of the scheduler: plans as data.

use paceline_domain::{SampledToken, SequenceSamples, StepPlan, StepResult, StepTimings};
use paceline_speculation::Load;

use super::*;
use crate::scheduler::toy_group::ToyGroup;

pub(super) const N_KV_BLOCKS: u32 = 8;
pub(super) const LIMITS: Limits = Limits {
    max_rows: 20,
    max_sampled_rows: 10,
    max_sequences: 3,
    itl_bound: ItlBound::Millis(1e9),
    run_ahead_below: Duration::ZERO,
    promote_after: 16,
    model: Digest([7; 32]),
};

/// Every step was measured once, so that prompts are read from the start.
pub(super) fn scheduler(limits: Limits, n_kv_blocks: u32) -> Scheduler {
    let mut scheduler = Scheduler::new(limits);
    scheduler.begin_epoch(Epoch(1), n_kv_blocks);
    for n_rows in 1..=limits.max_rows as usize {
        scheduler.times.observe(Load::plain(n_rows), n_rows as f64, Drafting::Quiet);
    }
    scheduler
}

fn ahead() -> Limits {
    Limits { run_ahead_below: Duration::from_secs(9), ..LIMITS }
}

pub(super) fn sequence(n_prompt: usize, max_tokens: u32) -> NewSequence {
    let prompt = (0..n_prompt as u32).map(TokenId).collect();
    NewSequence {
        prompt,
        max_tokens,
        sampling: SamplingParams::greedy(),
        tenant: String::new(),
        priority: Priority::Normal,
        sibling: None,
        held_back: None,
        is_constrained: false,
        n_prompt_logprobs: None,
    }
}

/// Of another tenant: it shares nothing.
fn stranger(name: &str, n_prompt: usize, max_tokens: u32) -> NewSequence {
    NewSequence { tenant: name.into(), ..sequence(n_prompt, max_tokens) }
}

/// Rank 0's answer when every chunk samples these tokens, as many as it can take.
pub(super) fn answer(plan: &StepPlan, tokens: &[u32]) -> StepResult {
    let sampled =
        |token: &u32| SampledToken { token: TokenId(*token), logprob: None, top_logprobs: Vec::new() };
    let samples = plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).map(|chunk| SequenceSamples {
        sequence: chunk.sequence,
        tokens: tokens
            .iter()
            .take(chunk.n_sampled as usize + chunk.branches.len().min(1))
            .map(sampled)
            .collect(),
    });
    let timings = StepTimings { total_us: 1_000 * plan.n_rows() as u64, ..StepTimings::default() };
    let (samples, scores) = (samples.collect(), Vec::new());
    StepResult { epoch: plan.epoch, step: plan.step, samples, scores, timings }
}

/// (sequence, start, tokens, sampled) of each chunk.
pub(super) fn shape(plan: &StepPlan) -> Vec<(u64, u32, usize, u32)> {
    let of = |chunk: &paceline_domain::SequenceChunk| {
        (chunk.sequence.0, chunk.start_pos, chunk.tokens.len(), chunk.n_sampled)
    };
    plan.chunks.iter().map(of).collect()
}

fn step(scheduler: &mut Scheduler) -> StepPlan {
    let plan = scheduler.plan().expect("something to do");
    scheduler.apply(answer(&plan, &[7])).expect("the answer");
    plan
}

#[test]
fn a_long_prompt_is_read_in_chunks_and_decode_goes_first() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(sequence(3, 5));
    scheduler.submit(stranger("b", 30, 5));
    let expected = [
        vec![(1, 0, 3, 1), (2, 0, 17, 0)],
        vec![(1, 3, 1, 1), (2, 17, 13, 1)],
        vec![(1, 4, 1, 1), (2, 30, 1, 1)],
    ];
    for expected in expected {
        let plan = scheduler.plan().unwrap();
        assert_eq!(shape(&plan), expected);
        assert_eq!(scheduler.plan(), None, "one step at a time");
        scheduler.apply(answer(&plan, &[7])).unwrap();
    }
}

#[test]
fn a_sequence_waits_for_blocks_and_gets_them_when_another_ends() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let first = scheduler.submit(sequence(96, 20));
    scheduler.submit(stranger("b", 20, 12));
    for _ in 0..6 {
        assert_eq!(shape(&step(&mut scheduler)).len(), 1);
    }
    assert_eq!(scheduler.n_sequences(), (1, 1));
    scheduler.finish(first);
    let plan = scheduler.plan().unwrap();
    assert_eq!(plan.closes, [first]);
    assert_eq!(shape(&plan), [(2, 0, 20, 1)]);
    assert_eq!(plan.chunks[0].new_blocks.len(), 2, "blocks for what it has, not for what may come");
}

#[test]
fn blocks_come_as_a_sequence_grows() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(sequence(15, 40));
    let new_blocks: Vec<usize> = (0..20).map(|_| step(&mut scheduler).chunks[0].new_blocks.len()).collect();
    let expected: Vec<usize> = (0..20).map(|i| usize::from(i == 0 || i == 2 || i == 18)).collect();
    assert_eq!(new_blocks, expected);
    assert_eq!(scheduler.n_free_blocks(), 5);
}

#[test]
fn a_sequence_cancelled_in_flight_is_closed_on_the_shards() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 5));
    let plan = scheduler.plan().unwrap();
    scheduler.finish(id);
    assert_eq!(scheduler.apply(answer(&plan, &[7])).unwrap(), Applied::default());
    let plan = scheduler.plan().unwrap();
    assert_eq!((plan.closes.as_slice(), plan.chunks.len()), ([id].as_slice(), 0));
    assert_eq!(scheduler.n_free_blocks(), 8);
}

#[test]
fn a_new_epoch_starts_every_sequence_from_its_tokens() {
    let mut scheduler = scheduler(ahead(), N_KV_BLOCKS);
    scheduler.submit(sequence(3, 5));
    scheduler.submit(sequence(4, 5));
    for _ in 0..2 {
        let plan = scheduler.plan().unwrap();
        scheduler.apply(answer(&plan, &[7])).unwrap();
    }
    scheduler.plan().unwrap();
    scheduler.plan().unwrap();
    scheduler.begin_epoch(Epoch(2), N_KV_BLOCKS);
    let plan = scheduler.plan().unwrap();
    assert_eq!((plan.epoch, plan.step, plan.opens.len()), (Epoch(2), StepNumber(1), 2));
    assert_eq!(shape(&plan), [(1, 0, 5, 1), (2, 0, 6, 1)]);
}

#[test]
#[should_panic(expected = "the pool keeps its size")]
fn a_later_group_cannot_have_another_pool() {
    scheduler(LIMITS, N_KV_BLOCKS).begin_epoch(Epoch(2), N_KV_BLOCKS + 1);
}

#[test]
fn an_answer_to_another_plan_is_refused() {
    type Change = fn(&mut StepResult);
    let changes: [Change; 5] = [
        |result| result.step = StepNumber(9),
        |result| result.epoch = Epoch(9),
        |result| result.samples.clear(),
        |result| result.samples[0].sequence = SequenceId(9),
        |result| {
            let more = result.samples[0].tokens.clone();
            result.samples[0].tokens.extend(more);
        },
    ];
    for change in changes {
        let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
        scheduler.submit(sequence(3, 5));
        let plan = scheduler.plan().unwrap();
        let mut result = answer(&plan, &[7]);
        change(&mut result);
        assert!(scheduler.apply(result).is_err());
    }
    assert!(
        scheduler(LIMITS, N_KV_BLOCKS)
            .apply(answer(
                &StepPlan {
                    epoch: Epoch(1),
                    step: StepNumber(1),
                    closes: Vec::new(),
                    opens: Vec::new(),
                    chunks: Vec::new(),
                },
                &[]
            ))
            .is_err()
    );
}

#[test]
fn proposals_are_verified_and_only_committed_tokens_count_as_computed() {
    let tokens = |ids: &[u32]| ids.iter().copied().map(TokenId).collect::<Vec<_>>();
    // (proposed, sampled, where the next step starts)
    for (sampled, start, n_accepted) in
        [(vec![7, 8, 9], 6, 2), (vec![7, 3], 5, 1), (vec![4], 4, 0), (vec![7, 8], 5, 1)]
    {
        let mut scheduler = scheduler(ahead(), N_KV_BLOCKS);
        let id = scheduler.submit(sequence(3, 20));
        scheduler.propose(id, tokens(&[1]));
        assert_eq!(scheduler.open_to_proposals().count(), 0, "its prompt is not read");
        let plan = scheduler.plan().unwrap();
        assert_eq!(shape(&plan), [(1, 0, 3, 1)]);
        scheduler.apply(answer(&plan, &[5])).unwrap();
        assert_eq!(scheduler.open_to_proposals().collect::<Vec<_>>(), [(id, 18)]);
        scheduler.propose(id, tokens(&[7, 8]));
        let plan = scheduler.plan().unwrap();
        assert_eq!(shape(&plan), [(1, 3, 3, 3)]);
        assert_eq!(plan.chunks[0].tokens, tokens(&[5, 7, 8]));
        assert_eq!(scheduler.plan(), None, "where it goes on is not known");
        let applied = scheduler.apply(answer(&plan, &sampled)).unwrap();
        let correction = (n_accepted < 2).then(|| TokenId(sampled[n_accepted]));
        let verified = Verified {
            sequence: id,
            n_proposed: 2,
            n_accepted,
            correction,
            n_branches: 0,
            took_branch: false,
        };
        assert_eq!(applied.verified, [verified]);
        assert_eq!(applied.commits.iter().map(|commit| commit.sampled.token.0).collect::<Vec<_>>(), sampled);
        assert_eq!(scheduler.tokens(id).unwrap()[4..], tokens(&sampled));
        let plan = scheduler.plan().unwrap();
        assert_eq!(shape(&plan), [(1, start, 1, 1)]);
    }
}

#[test]
fn a_sampled_token_after_a_rejected_proposal_is_refused() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 20));
    step(&mut scheduler);
    scheduler.propose(id, vec![TokenId(8), TokenId(9)]);
    let plan = scheduler.plan().unwrap();
    assert!(scheduler.apply(answer(&plan, &[7, 9])).is_err());
}

#[test]
fn proposals_stay_below_every_limit() {
    let n_verified = |limits: Limits, n_blocks, max_tokens| {
        let mut scheduler = scheduler(limits, n_blocks);
        let id = scheduler.submit(sequence(3, max_tokens));
        step(&mut scheduler);
        scheduler.propose(id, vec![TokenId(1); 100]);
        scheduler.plan().unwrap().chunks[0].n_sampled - 1
    };
    assert_eq!(n_verified(LIMITS, 8, 4), 2, "two more and the free one are all it may have");
    assert_eq!(n_verified(LIMITS, 8, 100), 9, "sampled rows");
    assert_eq!(n_verified(Limits { max_sampled_rows: 20, ..LIMITS }, 8, 100), 19, "rows");
    assert_eq!(n_verified(Limits { max_sampled_rows: 20, ..LIMITS }, 1, 13), 11, "tokens");
    let mut scheduler = scheduler(LIMITS, 3);
    let id = scheduler.submit(sequence(3, 5));
    scheduler.submit(stranger("b", 3, 5));
    step(&mut scheduler);
    scheduler.propose(id, vec![TokenId(1); 3]);
    assert_eq!(shape(&scheduler.plan().unwrap()), [(1, 3, 4, 4), (2, 3, 1, 1)]);
}

#[test]
fn the_next_step_is_planned_before_the_last_token_is_known() {
    let mut scheduler = scheduler(ahead(), N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 3));
    let first = scheduler.plan().unwrap();
    let second = scheduler.plan().unwrap();
    assert_eq!((shape(&second), second.chunks[0].runs_ahead), (vec![(1, 3, 1, 1)], true));
    assert_eq!(scheduler.plan(), None, "no more than two");
    scheduler.apply(answer(&first, &[7])).unwrap();
    let third = scheduler.plan().unwrap();
    assert_eq!((shape(&third), third.chunks[0].runs_ahead), (vec![(1, 4, 1, 1)], true));
    scheduler.apply(answer(&second, &[8])).unwrap();
    assert_eq!(scheduler.plan(), None, "it has all tokens it may have, as soon as the third is back");
    scheduler.apply(answer(&third, &[9])).unwrap();
    assert_eq!(scheduler.tokens(id).unwrap()[3..], [7, 8, 9].map(TokenId));
}

#[test]
fn who_needs_its_token_is_waited_for() {
    let mut scheduler = scheduler(ahead(), N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 9));
    scheduler.submit(stranger("b", 3, 9));
    scheduler.set_pace(id, Pace::StepByStep);
    let plan = scheduler.plan().unwrap();
    assert_eq!(scheduler.plan(), None);
    scheduler.apply(answer(&plan, &[7])).unwrap();
    let plan = scheduler.plan().unwrap();
    assert!(plan.chunks.iter().all(|chunk| !chunk.runs_ahead));
    scheduler.set_pace(id, Pace::RunAhead);
    let plan = scheduler.plan().unwrap();
    assert!(plan.chunks.iter().all(|chunk| chunk.runs_ahead));
}

#[test]
fn the_row_of_a_sequence_that_ended_meanwhile_is_dropped() {
    let mut scheduler = scheduler(ahead(), N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 9));
    let (first, second) = (scheduler.plan().unwrap(), scheduler.plan().unwrap());
    scheduler.apply(answer(&first, &[7])).unwrap();
    scheduler.finish(id);
    assert_eq!(scheduler.n_free_blocks(), N_KV_BLOCKS as usize);
    let other = scheduler.submit(stranger("b", 3, 9));
    let third = scheduler.plan().unwrap();
    assert_eq!((third.closes.as_slice(), shape(&third)), ([id].as_slice(), vec![(other.0, 0, 3, 1)]));
    assert_eq!(scheduler.apply(answer(&second, &[8])).unwrap(), Applied::default());
    assert_eq!(scheduler.apply(answer(&third, &[8])).unwrap().commits.len(), 1);
}

#[test]
fn prefixes_of_whole_blocks_are_shared_and_one_token_is_always_run() {
    for (n_prompt, n_cached) in [(15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (40, 32)] {
        let mut scheduler = scheduler(Limits { max_rows: 64, ..LIMITS }, 16);
        let first = scheduler.submit(sequence(40, 5));
        step(&mut scheduler);
        step(&mut scheduler);
        let held = scheduler.sequences[&first].blocks.clone();
        scheduler.submit(sequence(n_prompt, 5));
        scheduler.submit(stranger("b", n_prompt, 5));
        let plan = scheduler.plan().unwrap();
        let [own, foreign] = plan.opens.as_slice() else { panic!("two opens in {plan:?}") };
        assert_eq!((own.cached_tokens.len(), foreign.cached_tokens.len()), (n_cached, 0));
        assert_eq!(own.cached_blocks, held[..n_cached / BLOCK_POSITIONS]);
        assert_eq!(shape(&plan)[1], (2, n_cached as u32, n_prompt - n_cached, 1));
        assert_eq!(scheduler.counters().n_cached_tokens, n_cached as u64);
    }
}

#[test]
fn blocks_are_not_shared_before_they_are_computed() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.submit(sequence(34, 5));
    scheduler.submit(sequence(36, 5));
    // While the first reads what both begin with the second waits for it, then it goes on from there.
    let expected = [vec![(1, 0, 20, 0)], vec![(1, 20, 14, 1)], vec![(1, 34, 1, 1), (2, 32, 4, 1)]];
    for expected in expected {
        assert_eq!(shape(&step(&mut scheduler)), expected);
    }
}

#[test]
fn generated_tokens_are_shared_with_the_next_turn() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let first = scheduler.submit(sequence(10, 30));
    (0..25).for_each(|_| drop(step(&mut scheduler)));
    let history = scheduler.tokens(first).unwrap().to_vec();
    scheduler.finish(first);
    scheduler.submit(NewSequence { prompt: [history, vec![TokenId(1); 3]].concat(), ..sequence(1, 5) });
    assert_eq!(scheduler.plan().unwrap().opens[0].cached_tokens.len(), 32);
}

#[test]
fn the_youngest_gives_up_its_blocks_and_goes_on_later() {
    let mut scheduler = scheduler(LIMITS, 4);
    let mut group = ToyGroup::new(4);
    let old = scheduler.submit(sequence(17, 30));
    let young = scheduler.submit(stranger("b", 10, 20));
    let mut n_steps = 0;
    while scheduler.n_sequences().0 + scheduler.n_sequences().1 > 0 {
        let plan = scheduler.plan().unwrap();
        assert!(plan.chunks.iter().any(|chunk| chunk.sequence == old) || scheduler.tokens(old).is_none());
        scheduler.apply(group.step(&plan)).unwrap();
        for id in [old, young] {
            let is_done = scheduler.sequences.get(&id).is_some_and(|one| one.tokens.len() == one.n_limit);
            if is_done {
                scheduler.finish(id);
            }
        }
        n_steps += 1;
        assert!(n_steps < 100);
    }
    assert!(scheduler.counters().n_preemptions > 0);
    assert_eq!(scheduler.n_free_blocks(), 4);
}

#[test]
fn who_lost_its_place_three_times_keeps_the_fourth() {
    let mut scheduler = scheduler(LIMITS, 4);
    let old = scheduler.submit(sequence(3, 60));
    let young = scheduler.submit(stranger("b", 3, 50));
    step(&mut scheduler);
    scheduler.sequence(young).n_preempted = MAX_PREEMPTIONS - 1;
    let mut n_places = 1;
    while scheduler.tokens(old).is_some() {
        let plan = step(&mut scheduler);
        assert!(plan.chunks.iter().any(|chunk| chunk.sequence == old));
        n_places += usize::from(plan.opens.iter().any(|open| open.sequence == young));
        if scheduler.tokens(old).unwrap().len() == 63 {
            scheduler.finish(old);
        }
    }
    assert_eq!((n_places, scheduler.counters().n_preemptions), (1, 1), "both together never fit");
    let plan = step(&mut scheduler);
    assert_eq!(plan.chunks[0].sequence, young);
    assert_eq!(
        plan.chunks[0].new_blocks.len() + plan.opens[0].cached_blocks.len(),
        4,
        "all it can ever need"
    );
}

#[test]
fn who_is_held_keeps_its_place_and_nobody_else_waits() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let id = scheduler.submit(sequence(3, 9));
    scheduler.submit(stranger("b", 3, 9));
    step(&mut scheduler);
    scheduler.hold(id);
    assert_eq!(shape(&step(&mut scheduler)), [(2, 3, 1, 1)]);
    scheduler.release(id);
    assert_eq!(shape(&step(&mut scheduler)), [(1, 3, 1, 1), (2, 4, 1, 1)]);
}

#[test]
fn a_flooding_tenant_leaves_every_other_place_to_a_light_one() {
    let mut scheduler = scheduler(Limits { max_sequences: 1, ..LIMITS }, N_KV_BLOCKS);
    for _ in 0..6 {
        scheduler.submit(stranger("flood", 5, 3));
    }
    let order: Vec<u64> = (0..6)
        .map(|i| {
            let id = step(&mut scheduler).chunks[0].sequence;
            scheduler.finish(id);
            if i < 2 {
                scheduler.submit(stranger("light", 5, 3));
            }
            id.0
        })
        .collect();
    assert_eq!(order, [1, 2, 7, 3, 8, 4]);
}

/// With the same prompt, and what its tokens follow from besides.
fn sibling(of: SequenceId, seed: u64, n_prompt: usize, max_tokens: u32) -> NewSequence {
    let sampling = SamplingParams { seed, ..SamplingParams::greedy() };
    NewSequence { sampling, sibling: Some(of), ..sequence(n_prompt, max_tokens) }
}

#[test]
fn siblings_share_a_prompt_that_is_read_once_and_copy_its_last_block() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    scheduler.copy_blocks();
    let first = scheduler.submit(sequence(25, 3));
    let others = [1, 2].map(|seed| scheduler.submit(sibling(first, seed, 25, 3)));
    assert_eq!(scheduler.n_sequences(), (0, 1), "they wait beside the first, not in the queue");
    let stranger = scheduler.submit(stranger("b", 2, 1));
    assert_eq!(shape(&step(&mut scheduler)), [(1, 0, 18, 0), (4, 0, 2, 1)]);
    scheduler.finish(stranger);
    assert_eq!(shape(&step(&mut scheduler)), [(1, 18, 7, 1)]);
    let plan = step(&mut scheduler);
    assert_eq!(shape(&plan), [(1, 25, 1, 1), (2, 24, 1, 1), (3, 24, 1, 1)]);
    assert_eq!(plan.opens.iter().map(|open| open.sequence).collect::<Vec<_>>(), others);
    let blocks = |id: SequenceId| scheduler.sequences[&id].blocks.clone();
    for open in &plan.opens {
        let own = blocks(open.sequence);
        assert_eq!((open.cached_tokens.len(), &open.cached_blocks), (24, &own[..1].to_vec()));
        assert_eq!(open.copied, Some(paceline_domain::BlockCopy { from: blocks(first)[1], to: own[1] }));
    }
    assert_eq!(scheduler.n_free_blocks(), N_KV_BLOCKS as usize - 4, "one block shared, three of their own");
}

#[test]
fn siblings_read_what_cannot_be_copied_and_outlive_the_first() {
    let mut scheduler = scheduler(LIMITS, N_KV_BLOCKS);
    let first = scheduler.submit(sequence(20, 3));
    scheduler.submit(sibling(first, 1, 20, 3));
    step(&mut scheduler);
    assert_eq!(shape(&step(&mut scheduler)), [(1, 20, 1, 1), (2, 16, 4, 1)], "the group copies nothing");
    let second = scheduler.submit(stranger("b", 20, 3));
    let third = scheduler.submit(NewSequence { tenant: "b".into(), ..sibling(second, 1, 20, 3) });
    scheduler.finish(second);
    [first, SequenceId(2)].into_iter().for_each(|id| scheduler.finish(id));
    assert_eq!(shape(&step(&mut scheduler)), [(third.0, 0, 20, 1)]);
}
