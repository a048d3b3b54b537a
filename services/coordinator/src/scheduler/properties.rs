//! Tests of the scheduler: properties over random events, on a group whose tokens tell a wrong cache.

use std::collections::BTreeMap;

use paceline_domain::{BlockId, StepPlan};
use paceline_speculation::{Guess, Load};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

use super::*;
use crate::scheduler::toy_group::{N_VOCAB, ToyGroup, next_alone, score_alone};

#[derive(Clone, Debug)]
enum Event {
    Submit {
        family: u32,
        n_prompt: usize,
        max_tokens: u32,
        tenant: u8,
        priority: Priority,
        /// Further sequences with the same prompt.
        n_siblings: u64,
        is_scored: bool,
    },
    /// Proposals for all that can have some; `misled` of eight are wrong from a random place on.
    Propose {
        n: usize,
        misled: u64,
    },
    Plan,
    Answer,
    Finish {
        which: usize,
    },
    SetPace {
        which: usize,
        pace: Pace,
    },
    /// A slow reader, or one that reads again.
    Hold {
        which: usize,
    },
    Release {
        which: usize,
    },
    NewEpoch,
    /// A sequence and those of its prompt leave, and come to a new group.
    Move {
        which: usize,
    },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    // Around the ends of blocks, or anything.
    let n_prompt = prop_oneof![Just(15usize), Just(16), Just(17), Just(31), Just(32), Just(33), 1usize..70];
    let n_siblings = prop_oneof![3 => Just(0u64), 1 => 1u64..4];
    let is_scored = prop::bool::weighted(0.3);
    let submit = (0u32..3, n_prompt, 1u32..40, 0u8..2, priority(), n_siblings, is_scored).prop_map(
        |(family, n_prompt, max_tokens, tenant, priority, n_siblings, is_scored)| Event::Submit {
            family,
            n_prompt,
            max_tokens,
            tenant,
            priority,
            n_siblings,
            is_scored,
        },
    );
    let pace = prop_oneof![Just(Pace::RunAhead), Just(Pace::StepByStep)];
    let event = prop_oneof![
        3 => submit,
        3 => (1usize..6, 0u64..8).prop_map(|(n, misled)| Event::Propose { n, misled }),
        9 => Just(Event::Plan),
        8 => Just(Event::Answer),
        1 => (0usize..8).prop_map(|which| Event::Finish { which }),
        1 => (0usize..8, pace).prop_map(|(which, pace)| Event::SetPace { which, pace }),
        1 => (0usize..8).prop_map(|which| Event::Hold { which }),
        2 => (0usize..8).prop_map(|which| Event::Release { which }),
        1 => Just(Event::NewEpoch),
        1 => (0usize..8).prop_map(|which| Event::Move { which }),
    ];
    prop::collection::vec(event, 0..150)
}

fn priority() -> impl Strategy<Value = Priority> {
    prop_oneof![Just(Priority::High), Just(Priority::Normal), Just(Priority::Low)]
}

fn limits() -> impl Strategy<Value = (Limits, u32)> {
    // With eight places one may be kept from a tenant that has the others.
    let max_sequences = prop_oneof![4 => 1usize..4, 1 => Just(8)];
    let sizes = (3u32..40, 0u32..8, max_sequences, prop_oneof![Just(7u32), Just(8), 9u32..30]);
    let bound = prop_oneof![Just(ItlBound::Twice), Just(ItlBound::Millis(1e9)), Just(ItlBound::Millis(5.0))];
    let ahead = prop_oneof![Just(Duration::ZERO), Just(Duration::from_secs(9))];
    (sizes, bound, ahead).prop_map(
        |((max_rows, n_more, max_sequences, n_blocks), itl_bound, run_ahead_below)| {
            let max_sequences = max_sequences.min(max_rows as usize);
            let max_sampled_rows = (max_sequences as u32 + n_more).min(max_rows);
            let model = Digest([7; 32]);
            let limits = Limits {
                max_rows,
                max_sampled_rows,
                max_sequences,
                itl_bound,
                run_ahead_below,
                promote_after: 1 + max_rows % 4,
                model,
            };
            (limits, n_blocks)
        },
    )
}

/// Prompts of a family begin alike.
fn prompt(family: u32, n: usize) -> Vec<TokenId> {
    (0..n as u32).map(|i| TokenId((i * 7 + i / 5 + family) % N_VOCAB)).collect()
}

/// Scheduler and group, and what is expected of them.
struct World {
    limits: Limits,
    n_blocks: u32,
    scheduler: Scheduler,
    group: ToyGroup,
    plans: VecDeque<StepPlan>,
    /// Prompt and noise of each live sequence.
    live: BTreeMap<SequenceId, (Vec<TokenId>, u64)>,
    /// Scores that came for those whose prompt is scored.
    n_scores: BTreeMap<SequenceId, usize>,
    n_epochs: u64,
    /// All plans there were.
    log: Vec<StepPlan>,
}

impl World {
    fn new(limits: Limits, n_blocks: u32) -> Self {
        let mut scheduler = Scheduler::new(limits);
        scheduler.begin_epoch(Epoch(1), n_blocks);
        for n_rows in 1..=limits.max_rows as usize {
            scheduler.times.observe(Load::plain(n_rows), n_rows as f64, Drafting::Quiet);
        }
        let mut world = Self {
            limits,
            n_blocks,
            scheduler,
            group: ToyGroup::new(n_blocks),
            plans: VecDeque::new(),
            live: BTreeMap::new(),
            n_scores: BTreeMap::new(),
            n_epochs: 1,
            log: Vec::new(),
        };
        world.allow_copies();
        world
    }

    /// In most groups.
    fn allow_copies(&mut self) {
        if !(u64::from(self.n_blocks) + self.n_epochs).is_multiple_of(4) {
            self.scheduler.copy_blocks();
        }
    }

    fn happen(&mut self, event: &Event) {
        match *event {
            Event::Submit { family, n_prompt, max_tokens, tenant, priority, n_siblings, is_scored } => {
                let seed = u64::from(family) * 31 + n_prompt as u64;
                let sampling = SamplingParams { seed, ..SamplingParams::greedy() };
                let (prompt, tenant) = (prompt(family, n_prompt), tenant.to_string());
                let new = NewSequence {
                    prompt,
                    max_tokens,
                    sampling,
                    tenant,
                    priority,
                    sibling: None,
                    held_back: None,
                    is_constrained: false,
                    n_prompt_logprobs: is_scored.then_some(0),
                };
                let sibling = self.submit(new.clone());
                let new = NewSequence { n_prompt_logprobs: None, ..new };
                for i in 1..n_siblings + 1 {
                    let sampling = SamplingParams { seed: seed + 1000 * i, ..new.sampling.clone() };
                    self.submit(NewSequence { sampling, sibling, ..new.clone() });
                }
            }
            Event::Propose { n, misled } => self.propose(n, misled),
            Event::Plan => self.plan(),
            Event::Answer => self.answer(),
            Event::Finish { which } => {
                if let Some(id) = self.some_live(which) {
                    self.live.remove(&id);
                    self.scheduler.finish(id);
                }
            }
            Event::SetPace { which, pace } => {
                if let Some(id) = self.some_live(which) {
                    self.scheduler.set_pace(id, pace);
                }
            }
            Event::Hold { which } => {
                if let Some(id) = self.some_live(which) {
                    self.scheduler.hold(id);
                }
            }
            Event::Release { which } => {
                if let Some(id) = self.some_live(which) {
                    self.scheduler.release(id);
                }
            }
            Event::NewEpoch => self.new_epoch(),
            Event::Move { which } => {
                if let Some(id) = self.some_live(which) {
                    self.move_family(id);
                }
            }
        }
        self.check_blocks();
    }

    fn new_epoch(&mut self) {
        self.n_epochs += 1;
        self.plans.clear();
        self.group = ToyGroup::new(self.n_blocks);
        self.scheduler.begin_epoch(Epoch(self.n_epochs), self.n_blocks);
        self.allow_copies();
    }

    fn move_family(&mut self, id: SequenceId) {
        let family = self.scheduler.sequences[&id].family;
        let members = self.scheduler.sequences.iter().filter(|(_, one)| one.family == family);
        let mut members: Vec<SequenceId> = members.map(|(id, _)| *id).collect();
        members.sort_unstable();
        let departed = members.iter().filter_map(|id| self.scheduler.take(*id)).collect();
        self.check_blocks();
        self.new_epoch();
        self.scheduler.adopt(departed);
    }

    fn some_live(&self, which: usize) -> Option<SequenceId> {
        self.live.keys().nth(which % self.live.len().max(1)).copied()
    }

    fn submit(&mut self, new: NewSequence) -> Option<SequenceId> {
        if !Scheduler::could_fit(self.n_blocks, new.prompt.len() + new.max_tokens as usize) {
            return None;
        }
        let expected = (new.prompt.clone(), new.sampling.seed);
        let is_scored = new.n_prompt_logprobs.is_some();
        let id = self.scheduler.submit(new);
        self.n_scores.extend(is_scored.then_some((id, 0)));
        self.live.insert(id, expected);
        Some(id)
    }

    fn propose(&mut self, n: usize, misled: u64) {
        let open: Vec<_> = self.scheduler.open_to_proposals().collect();
        for (id, room) in open {
            let mut tokens = self.scheduler.tokens(id).expect("it runs").to_vec();
            let n_before = tokens.len();
            let mut guesses = Vec::new();
            for i in 0..n as u64 {
                let right = next_alone(self.live[&id].1, &tokens);
                let is_wrong = (id.0 + i * 3 + n_before as u64) % 8 < misled;
                tokens.push(if is_wrong { TokenId(N_VOCAB) } else { right });
                // Behind a wrong one nothing is known.
                let second = (i % 3 != 1).then_some(if is_wrong { right } else { TokenId(N_VOCAB + 1) });
                guesses.push(Guess { token: tokens[tokens.len() - 1], second });
            }
            assert!(room > 0);
            self.scheduler.propose(id, guesses);
        }
    }

    fn plan(&mut self) {
        let n_in_flight = self.plans.len();
        let Some(plan) = self.scheduler.plan() else {
            assert!(
                n_in_flight > 0 || self.live.is_empty() || self.is_somebody_held(),
                "nothing runs, nothing is planned, somebody waits"
            );
            return;
        };
        let n_outputs: usize =
            plan.chunks.iter().map(|chunk| chunk.n_output_rows() + chunk.branches.len()).sum();
        assert!(plan.n_rows() <= self.limits.max_rows as usize, "{} rows", plan.n_rows());
        assert!(n_outputs <= self.limits.max_sampled_rows as usize, "{n_outputs} rows with logits");
        assert!(n_in_flight < MAX_STEPS_IN_FLIGHT && plan.chunks.len() <= self.limits.max_sequences);
        if n_in_flight == 0
            && let Some(oldest) = self.scheduler.running.first()
            && !self.is_somebody_held()
        {
            assert!(plan.chunks.iter().any(|chunk| chunk.sequence == *oldest), "{oldest} stands still");
        }
        let was_held =
            |id: &SequenceId| self.scheduler.sequences.get(id).is_some_and(|sequence| sequence.is_held);
        assert!(!plan.chunks.iter().any(|chunk| was_held(&chunk.sequence)), "a step for one that is held");
        self.plans.push_back(plan.clone());
        self.log.push(plan);
    }

    fn is_somebody_held(&self) -> bool {
        self.scheduler.sequences.values().any(|sequence| sequence.is_held)
    }

    fn answer(&mut self) {
        let Some(plan) = self.plans.pop_front() else { return };
        let applied = self.scheduler.apply(self.group.step(&plan)).expect("the answer to the plan");
        for scores in &applied.scores {
            self.check_scores(scores);
        }
        for commit in applied.commits {
            let id = commit.sequence;
            // Like the engine, this drops what follows the end.
            let Some((_, seed)) = self.live.get(&id) else { continue };
            let n_prompt = self.live[&id].0.len();
            assert!(
                self.n_scores.get(&id).is_none_or(|n| n + 1 == n_prompt),
                "{id} is not scored as a whole"
            );
            let tokens = self.scheduler.tokens(id).expect("it is live");
            let n_after = tokens.len();
            // Tokens of one step come together: each is what follows all before it.
            let first_wrong =
                (self.live[&id].0.len()..n_after).find(|i| tokens[*i] != next_alone(*seed, &tokens[..*i]));
            assert_eq!(first_wrong, None, "{id} of {n_after} tokens");
            if n_after == self.scheduler.sequences[&id].n_limit {
                self.live.remove(&id);
                self.scheduler.finish(id);
            }
        }
    }

    /// Each token but the first once, in order, with what it has alone.
    fn check_scores(&mut self, scores: &Scores) {
        let Some((prompt, _)) = self.live.get(&scores.sequence) else { return };
        let n = self.n_scores.get_mut(&scores.sequence).expect("its prompt is scored");
        assert_eq!(scores.start_pos as usize, *n + 1);
        for scored in &scores.tokens {
            *n += 1;
            assert_eq!(*scored, score_alone(&prompt[..=*n]), "{} at {n}", scores.sequence);
        }
    }

    fn check_blocks(&self) {
        let mut n_holders: BTreeMap<BlockId, u32> = BTreeMap::new();
        for sequence in self.scheduler.sequences.values() {
            sequence.blocks.iter().for_each(|block| *n_holders.entry(*block).or_default() += 1);
            assert!(sequence.n_preempted <= MAX_PREEMPTIONS);
            // What is written from here on is in blocks of its own.
            let own = &sequence.blocks[(sequence.n_computed / BLOCK_POSITIONS).min(sequence.blocks.len())..];
            assert!(
                own.iter().all(|block| n_holders[block] == 1),
                "a block is written that another one reads"
            );
        }
        for (block_idx, n) in self.scheduler.ledger.n_holders().enumerate() {
            assert_eq!(
                n,
                n_holders.get(&BlockId(block_idx as u32)).copied().unwrap_or(0),
                "block {block_idx}"
            );
        }
        assert_eq!(
            self.scheduler.n_free_blocks() + n_holders.len(),
            self.n_blocks as usize,
            "a block is lost"
        );
    }

    /// Everybody comes to the end in a bounded number of steps.
    fn drain(&mut self) {
        self.live.keys().for_each(|id| self.scheduler.release(*id));
        let pending = |one: &Sequence| one.n_limit * (1 + MAX_PREEMPTIONS as usize) + 2;
        let n_most: usize = self.scheduler.sequences.values().map(pending).sum();
        for _ in 0..2 * n_most {
            self.happen(&Event::Plan);
            self.happen(&Event::Plan);
            self.happen(&Event::Answer);
        }
        assert!(self.live.is_empty(), "{:?} after {n_most} steps", self.live.keys());
        self.happen(&Event::Plan);
        self.happen(&Event::Answer);
        assert_eq!(self.scheduler.n_free_blocks(), self.n_blocks as usize);
        assert_eq!(self.scheduler.n_sequences(), (0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Whatever happens, each sequence gets the tokens it has alone, no budget is exceeded, no block is lost, owned
    /// twice or written while shared, the oldest goes on, and
    /// everybody ends, once all may go on.
    #[test]
    fn every_sequence_gets_the_tokens_it_has_alone((limits, n_blocks) in limits(), events in events()) {
        let mut world = World::new(limits, n_blocks);
        events.iter().for_each(|event| world.happen(event));
        world.drain();
    }

    #[test]
    fn plans_are_a_function_of_events((limits, n_blocks) in limits(), events in events()) {
        let run = || {
            let mut world = World::new(limits, n_blocks);
            events.iter().for_each(|event| world.happen(event));
            world.log
        };
        prop_assert_eq!(run(), run());
    }
}

/// The properties would be worth little if random events never met these.
#[test]
fn random_events_meet_hits_preemption_and_running_ahead() {
    let (mut n_cached, mut n_preemptions, mut n_ahead, mut n_verified, mut n_copied) = (0, 0, 0, 0, 0);
    let (mut n_scored_again, mut n_branches) = (0, 0);
    let mut runner = TestRunner::deterministic();
    for _ in 0..200 {
        let (limits, n_blocks) = limits().new_tree(&mut runner).expect("limits").current();
        let events = events().new_tree(&mut runner).expect("events").current();
        let mut world = World::new(limits, n_blocks);
        events.iter().for_each(|event| world.happen(event));
        world.drain();
        n_cached += world.scheduler.counters().n_cached_tokens;
        n_preemptions += world.scheduler.counters().n_preemptions;
        let chunks = || world.log.iter().flat_map(|plan| &plan.chunks);
        n_ahead += chunks().filter(|chunk| chunk.runs_ahead).count();
        n_verified += chunks().filter(|chunk| chunk.n_sampled > 1).count();
        n_branches += chunks().map(|chunk| chunk.branches.len()).sum::<usize>();
        // Chunks whose first rows were scored before their sequence lost its place.
        n_scored_again += chunks()
            .filter(|chunk| !chunk.scoring.tokens.is_empty() && chunk.n_output_rows() < chunk.tokens.len())
            .count();
        n_copied +=
            world.log.iter().flat_map(|plan| &plan.opens).filter(|open| open.copied.is_some()).count();
    }
    let met = (n_cached, n_preemptions, n_ahead, n_verified, n_copied, n_scored_again, n_branches);
    assert!(n_cached > 1000 && n_preemptions > 10 && n_ahead > 1000, "{met:?}");
    assert!(n_verified > 100 && n_copied > 50 && n_scored_again > 0 && n_branches > 30, "{met:?}");
}
