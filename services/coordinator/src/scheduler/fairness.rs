//! What a tenant that has most of the places leaves to others: the last places, and the time to read their prompts at once.
//! Who is next among those that wait is not decided here.

use std::{collections::BTreeMap, sync::Arc};

use paceline_domain::SequenceId;

use super::Scheduler;

/// Of this many places one is kept from a tenant that has all others, while other tenants come now and then.
const PLACES_FOR_ONE_KEPT: usize = 8;

impl Scheduler {
    /// The tenant that gets no further place, if there is one.
    pub(super) fn crowding(&self) -> Option<Arc<str>> {
        let n_most = self.limits.max_sequences - self.limits.max_sequences / PLACES_FOR_ONE_KEPT;
        if n_most == self.limits.max_sequences || self.running.len() < n_most {
            return None;
        }
        let places = self.places();
        let (tenant, _) = places.into_iter().find(|(_, n_places)| *n_places >= n_most)?;
        self.waiting.saw_others(tenant).then(|| tenant.clone())
    }

    /// Which of these sequences belong to tenants that have at most half of their fair share of the places.
    pub(super) fn are_light(&self, ids: &[SequenceId]) -> Vec<bool> {
        let places = self.places();
        let is_light = |id: &SequenceId| {
            let n_places = places.get(&self.sequences[id].tenant).copied().unwrap_or(0);
            2 * n_places * places.len() <= self.running.len()
        };
        ids.iter().map(is_light).collect()
    }

    /// Places of each tenant that has some.
    fn places(&self) -> BTreeMap<&Arc<str>, usize> {
        let mut places = BTreeMap::new();
        for id in &self.running {
            *places.entry(&self.sequences[id].tenant).or_default() += 1;
        }
        places
    }
}

/// Adds to what prompts were granted: those of light tenants get all they want, as far as there are rows. Others wait
/// longer for their tokens, because it is they who take more than their share.
pub fn favour(granted: &mut [usize], wanted: &[usize], is_light: &[bool], mut n_rows_left: usize) {
    for ((granted, wanted), _) in granted.iter_mut().zip(wanted).zip(is_light).filter(|(_, light)| **light) {
        let more = (wanted - *granted).min(n_rows_left);
        *granted += more;
        n_rows_left -= more;
    }
}

#[cfg(test)]
mod tests {
    use paceline_domain::StepPlan;
    use paceline_speculation::Load;

    use super::super::{
        tests::{LIMITS, answer, sequence},
        *,
    };
    use super::*;

    const PLACES: usize = 8;

    /// Rows take a millisecond each; decode rows and little more keep the bound.
    fn scheduler() -> Scheduler {
        let limits = Limits {
            max_rows: 60,
            max_sampled_rows: 20,
            max_sequences: PLACES,
            itl_bound: ItlBound::Millis(12.0),
            ..LIMITS
        };
        let mut scheduler = Scheduler::new(limits);
        scheduler.begin_epoch(Epoch(1), 200);
        for n_rows in 1..=60 {
            scheduler.times.observe(Load { n_rows, n_keys: 0 }, n_rows as f64, Drafting::Quiet);
        }
        scheduler
    }

    fn of(tenant: &str, n_prompt: usize, max_tokens: u32) -> NewSequence {
        NewSequence { tenant: tenant.into(), ..sequence(n_prompt, max_tokens) }
    }

    fn step(scheduler: &mut Scheduler) -> StepPlan {
        let plan = scheduler.plan().expect("something to do");
        let applied = scheduler.apply(answer(&plan, &[7])).expect("the answer");
        for commit in applied.commits {
            let id = commit.sequence;
            if scheduler.sequences[&id].tokens.len() == scheduler.sequences[&id].n_limit {
                scheduler.finish(id);
            }
        }
        plan
    }

    #[test]
    fn a_crowd_leaves_a_place_once_others_were_seen() {
        let mut scheduler = scheduler();
        (0..30).for_each(|i| _ = scheduler.submit(of("flood", 2, 3 + i % 5)));
        step(&mut scheduler);
        assert_eq!(scheduler.n_sequences().0, PLACES, "nobody else was ever there");
        let light = scheduler.submit(of("light", 2, 2));
        while scheduler.tokens(light).is_some() {
            step(&mut scheduler);
        }
        let most = (0..6).map(|_| step(&mut scheduler).chunks.len()).max();
        assert_eq!(most, Some(PLACES - 1), "one place is kept");
        let light = scheduler.submit(of("light", 2, 2));
        let plan = step(&mut scheduler);
        assert!(plan.chunks.iter().any(|chunk| chunk.sequence == light), "it gets it at once");
    }

    #[test]
    fn prompts_of_light_tenants_are_read_beyond_the_bound() {
        // Of seven sequences that decode and one that comes after them, the rows of the last one.
        let rows_of_last = |tenant: &str| {
            let mut scheduler = scheduler();
            (0..7).for_each(|_| _ = scheduler.submit(of("flood", 2, 30)));
            (0..3).for_each(|_| _ = step(&mut scheduler));
            let last = scheduler.submit(of(tenant, 40, 5));
            let plan = step(&mut scheduler);
            let chunk = plan.chunks.iter().find(|chunk| chunk.sequence == last);
            chunk.map(|chunk| chunk.tokens.len())
        };
        assert_eq!(rows_of_last("flood"), Some(5), "seven decode rows and five more keep the bound");
        assert_eq!(rows_of_last("light"), Some(40), "one of eight places is less than half a share");
    }

    #[test]
    fn light_tenants_get_what_rows_are_left() {
        let mut granted = [4, 2, 0, 1];
        favour(&mut granted, &[9, 9, 9, 9], &[false, true, false, true], 10);
        assert_eq!(granted, [4, 9, 0, 4]);
    }
}
