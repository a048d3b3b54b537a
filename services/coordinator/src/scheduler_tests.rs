//! Tests of the scheduler: plans as data, and properties over random events.

use proptest::prelude::*;

use super::*;
use paceline_domain::{SequenceSamples, StepTimings};

const N_KV_BLOCKS: u32 = 8;
const LIMITS: Limits = Limits { max_rows: 20, max_sequences: 3 };

fn scheduler(limits: Limits) -> Scheduler {
    let mut scheduler = Scheduler::new(limits);
    scheduler.begin_epoch(Epoch(1), N_KV_BLOCKS);
    scheduler
}

fn sequence(n_prompt: usize, max_tokens: u32) -> NewSequence {
    let prompt = (0..n_prompt as u32).map(TokenId).collect();
    NewSequence { prompt, max_tokens, sampling: SamplingParams::greedy() }
}

/// Rank 0's answer when every sampled row gives this token.
fn answer(plan: &StepPlan, token: u32) -> StepResult {
    let sampled = SampledToken { token: TokenId(token), logprob: None, top_logprobs: Vec::new() };
    let samples = plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).map(|chunk| SequenceSamples {
        sequence: chunk.sequence,
        tokens: vec![sampled.clone(); chunk.n_sampled as usize],
    });
    StepResult {
        epoch: plan.epoch,
        step: plan.step,
        samples: samples.collect(),
        timings: StepTimings::default(),
    }
}

/// (sequence, start, tokens, sampled) of each chunk.
fn shape(plan: &StepPlan) -> Vec<(u64, u32, usize, u32)> {
    plan.chunks
        .iter()
        .map(|chunk| (chunk.sequence.0, chunk.start_pos, chunk.tokens.len(), chunk.n_sampled))
        .collect()
}

#[test]
fn a_long_prompt_is_read_in_chunks_and_decode_goes_first() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.submit(sequence(3, 5));
    scheduler.submit(sequence(30, 5));
    let expected = [
        vec![(1, 0, 3, 1), (2, 0, 17, 0)],
        vec![(1, 3, 1, 1), (2, 17, 13, 1)],
        vec![(1, 4, 1, 1), (2, 30, 1, 1)],
    ];
    for expected in expected {
        let plan = scheduler.plan().unwrap();
        assert_eq!(shape(&plan), expected);
        assert_eq!(scheduler.plan(), None, "one step at a time");
        scheduler.apply(answer(&plan, 7)).unwrap();
    }
}

#[test]
fn a_sequence_waits_for_blocks_and_gets_them_when_another_ends() {
    let mut scheduler = scheduler(LIMITS);
    let first = scheduler.submit(sequence(10, 86));
    scheduler.submit(sequence(10, 23));
    let plan = scheduler.plan().unwrap();
    assert_eq!(shape(&plan), [(1, 0, 10, 1)]);
    scheduler.apply(answer(&plan, 7)).unwrap();
    scheduler.finish(first);
    let plan = scheduler.plan().unwrap();
    assert_eq!(plan.closes, [first]);
    assert_eq!(shape(&plan), [(2, 0, 10, 1)]);
    assert_eq!(plan.chunks[0].new_blocks.len(), 3);
}

#[test]
fn a_sequence_cancelled_in_flight_is_closed_on_the_shards() {
    let mut scheduler = scheduler(LIMITS);
    let id = scheduler.submit(sequence(3, 5));
    let plan = scheduler.plan().unwrap();
    scheduler.finish(id);
    assert_eq!(scheduler.apply(answer(&plan, 7)).unwrap(), []);
    let plan = scheduler.plan().unwrap();
    assert_eq!((plan.closes.as_slice(), plan.chunks.len()), ([id].as_slice(), 0));
    assert_eq!(scheduler.n_free_blocks(), 8);
}

#[test]
fn a_new_epoch_starts_every_sequence_from_its_tokens() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.submit(sequence(3, 5));
    scheduler.submit(sequence(4, 5));
    for _ in 0..2 {
        let plan = scheduler.plan().unwrap();
        scheduler.apply(answer(&plan, 7)).unwrap();
    }
    scheduler.plan().unwrap();
    scheduler.begin_epoch(Epoch(2), N_KV_BLOCKS);
    let plan = scheduler.plan().unwrap();
    assert_eq!((plan.epoch, plan.step, plan.opens.len()), (Epoch(2), StepNumber(1), 2));
    assert_eq!(shape(&plan), [(1, 0, 5, 1), (2, 0, 6, 1)]);
}

#[test]
#[should_panic(expected = "the pool keeps its size")]
fn a_later_group_cannot_have_another_pool() {
    scheduler(LIMITS).begin_epoch(Epoch(2), N_KV_BLOCKS + 1);
}

#[test]
fn an_answer_to_another_plan_is_refused() {
    let mut scheduler = scheduler(LIMITS);
    scheduler.submit(sequence(3, 5));
    let plan = scheduler.plan().unwrap();
    let mut result = answer(&plan, 7);
    result.step = StepNumber(9);
    assert!(scheduler.apply(result).is_err());
}

#[derive(Clone, Debug)]
enum Event {
    Submit { n_prompt: usize, max_tokens: u32 },
    Step,
    Finish { which: usize },
    NewEpoch,
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => (1usize..60, 1u32..40).prop_map(|(n_prompt, max_tokens)| Event::Submit { n_prompt, max_tokens }),
        8 => Just(Event::Step),
        2 => (0usize..8).prop_map(|which| Event::Finish { which }),
        1 => Just(Event::NewEpoch),
    ];
    prop::collection::vec(event, 0..120)
}

proptest! {
    #[test]
    fn budgets_hold_the_oldest_progresses_and_no_block_is_lost(events in events()) {
        let mut scheduler = scheduler(LIMITS);
        let mut live: Vec<SequenceId> = Vec::new();
        let mut epoch = 1;
        for event in events {
            match event {
                Event::Submit { n_prompt, max_tokens } => live.push(scheduler.submit(sequence(n_prompt, max_tokens))),
                Event::Finish { which } if !live.is_empty() => {
                    let id = live.remove(which % live.len());
                    scheduler.finish(id);
                }
                Event::Finish { .. } => {}
                Event::NewEpoch => {
                    epoch += 1;
                    scheduler.begin_epoch(Epoch(epoch), N_KV_BLOCKS);
                }
                Event::Step => {
                    let Some(plan) = scheduler.plan() else { prop_assert!(live.is_empty()); continue };
                    prop_assert!(plan.n_rows() <= LIMITS.max_rows as usize);
                    prop_assert!(plan.chunks.len() <= LIMITS.max_sequences);
                    if let Some(oldest) = live.first() {
                        prop_assert!(plan.chunks.iter().any(|chunk| chunk.sequence == *oldest));
                    }
                    let result = answer(&plan, 7);
                    for commit in scheduler.apply(result).unwrap() {
                        let sequence = &scheduler.sequences[&commit.sequence];
                        if sequence.tokens.len() == sequence.n_prompt + sequence.max_tokens {
                            live.retain(|id| *id != commit.sequence);
                            scheduler.finish(commit.sequence);
                        }
                    }
                }
            }
            let mut held: Vec<BlockId> =
                scheduler.sequences.values().flat_map(|sequence| sequence.blocks.iter().copied()).collect();
            let n_held = held.len();
            held.sort_unstable();
            held.dedup();
            prop_assert_eq!(held.len(), n_held, "a block has two owners");
            prop_assert_eq!(n_held + scheduler.n_free_blocks(), N_KV_BLOCKS as usize);
        }
    }

    #[test]
    fn plans_are_a_function_of_events(events in events()) {
        let run = || {
            let mut scheduler = scheduler(LIMITS);
            let mut plans = Vec::new();
            for event in &events {
                match event {
                    Event::Submit { n_prompt, max_tokens } => drop(scheduler.submit(sequence(*n_prompt, *max_tokens))),
                    Event::Finish { which } => scheduler.finish(SequenceId(*which as u64)),
                    Event::NewEpoch => scheduler.begin_epoch(Epoch(2), N_KV_BLOCKS),
                    Event::Step => {
                        if let Some(plan) = scheduler.plan() {
                            scheduler.apply(answer(&plan, 7)).unwrap();
                            plans.push(plan);
                        }
                    }
                }
            }
            plans
        };
        prop_assert_eq!(run(), run());
    }
}
