//! Masks come after their plan, so that they are made while the pass runs; here they are waited for. It applies none.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

use paceline_domain::{SequenceMasks, StepMasks, StepPlan};

use crate::{
    executor::ExecutorError,
    sequences::{PlanError, Sequences},
};

/// The queue of masks.
#[derive(Debug)]
pub struct MaskInbox {
    queue: Receiver<StepMasks>,
    /// How long a step waits for its masks.
    deadline: Duration,
}

impl MaskInbox {
    /// Masks that come through this queue.
    pub fn new(queue: Receiver<StepMasks>, deadline: Duration) -> Self {
        Self { queue, deadline }
    }

    /// Waits until every sampled row of a constrained sequence has its mask.
    ///
    /// # Errors
    /// When masks do not come, or fit no chunk of the plan.
    pub fn collect(&self, plan: &StepPlan, sequences: &mut Sequences) -> Result<(), ExecutorError> {
        let waits = |sequences: &Sequences| {
            let chunks = plan.chunks.iter().filter(|chunk| chunk.n_sampled > 0).map(|chunk| chunk.sequence);
            chunks.map(|id| sequences.get(id)).any(|one| one.is_constrained && one.masks.is_empty())
        };
        let until = Instant::now() + self.deadline;
        while waits(sequences) {
            let masks = self.queue.recv_timeout(until.saturating_duration_since(Instant::now()));
            let masks = masks.map_err(|error| match error {
                RecvTimeoutError::Timeout => {
                    ExecutorError::Order(format!("no masks for step {} after {:?}", plan.step, self.deadline))
                }
                RecvTimeoutError::Disconnected => ExecutorError::Order("the session is over".into()),
            })?;
            if (masks.epoch, masks.step) != (plan.epoch, plan.step) {
                return Err(ExecutorError::Order(format!(
                    "masks for step {} of epoch {} in step {} of epoch {}",
                    masks.step, masks.epoch, plan.step, plan.epoch
                )));
            }
            masks.sequences.into_iter().try_for_each(|masks| take(plan, sequences, masks))?;
        }
        Ok(())
    }
}

fn take(plan: &StepPlan, sequences: &mut Sequences, masks: SequenceMasks) -> Result<(), PlanError> {
    let SequenceMasks { sequence, rows } = masks;
    let chunk = plan.chunks.iter().find(|chunk| chunk.sequence == sequence);
    let n_sampled = chunk.map_or(0, |chunk| chunk.n_sampled as usize);
    if n_sampled == 0 || rows.len() != n_sampled {
        let problem = format!("{} masks for {n_sampled} sampled rows", rows.len());
        return Err(PlanError { sequence, problem });
    }
    sequences.get_mut(sequence).masks = rows;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use paceline_domain::{
        BlockId, Epoch, SamplingParams, Scoring, SequenceChunk, SequenceId, SequenceOpen, StepNumber,
        TokenId, TokenMask,
    };

    use super::*;

    fn plan() -> StepPlan {
        let ids = [1, 2].map(SequenceId);
        let opens = ids.map(|sequence| SequenceOpen {
            sequence,
            sampling: SamplingParams::greedy(),
            n_prompt: 2,
            cached_tokens: Vec::new(),
            cached_blocks: Vec::new(),
            copied: None,
            held_back: None,
            is_constrained: true,
        });
        let chunks = ids.map(|sequence| SequenceChunk {
            sequence,
            start_pos: 0,
            tokens: vec![TokenId(0); 2],
            new_blocks: vec![BlockId(sequence.0 as u32)],
            n_kept_blocks: 0,
            n_sampled: sequence.0 as u32,
            runs_ahead: false,
            scoring: Scoring::default(),
            branches: Vec::new(),
        });
        let (opens, chunks) = (opens.to_vec(), chunks.to_vec());
        StepPlan { epoch: Epoch(1), step: StepNumber(1), closes: Vec::new(), opens, chunks }
    }

    fn masks(step: u64, sequence: u64, n_rows: usize) -> StepMasks {
        let rows = vec![TokenMask::of_words(vec![1]); n_rows];
        let sequences = vec![SequenceMasks { sequence: SequenceId(sequence), rows }];
        StepMasks { epoch: Epoch(1), step: StepNumber(step), sequences }
    }

    /// What comes of these messages, for the plan of step 1.
    fn collected(messages: Vec<StepMasks>) -> Result<Sequences, String> {
        let (sender, queue) = sync_channel(8);
        let inbox = MaskInbox::new(queue, Duration::from_secs(600));
        let mut sequences = Sequences::new(8);
        sequences.begin(&plan()).expect("a plan");
        messages.into_iter().for_each(|message| sender.send(message).expect("room"));
        drop(sender);
        inbox.collect(&plan(), &mut sequences).map_err(|error| error.to_string())?;
        Ok(sequences)
    }

    #[test]
    fn a_step_waits_for_all_its_masks_and_takes_no_others() {
        let sequences = collected(vec![masks(1, 2, 2), masks(1, 1, 1)]).expect("all are there");
        assert_eq!([1, 2].map(|id| sequences.get(SequenceId(id)).masks.len()), [1, 2]);
        for (messages, problem) in [
            (vec![masks(1, 1, 1)], "the session is over"),
            (vec![masks(2, 1, 1)], "masks for step 2"),
            (vec![masks(1, 2, 1)], "1 masks for 2 sampled rows"),
            (vec![masks(1, 3, 1)], "1 masks for 0 sampled rows"),
        ] {
            let error = collected(messages).expect_err("contradicts");
            assert!(error.contains(problem), "{error}");
        }
    }
}
