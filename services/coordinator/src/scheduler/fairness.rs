//! What a tenant that has most of the places leaves to others: the last places, and the time to read their prompts at once.
//! Who is next among those that wait is not decided here.

use std::{collections::BTreeMap, sync::Arc};

use paceline_domain::SequenceId;

use super::{
    Scheduler,
    budget::{Wanted, share},
};

/// Of this many places one is kept from a tenant that has more than its share, while other tenants come now and then.
const PLACES_FOR_ONE_KEPT: usize = 8;

impl Scheduler {
    /// The tenant that gets no further place, if there is one: the last places are for those who have less than their share,
    /// however many of them are there already.
    pub(super) fn crowding(&self) -> Option<Arc<str>> {
        let n_kept = self.limits.max_sequences / PLACES_FOR_ONE_KEPT;
        if n_kept == 0 || self.running.len() < self.limits.max_sequences - n_kept {
            return None;
        }
        let places = self.places();
        // Those who come now and then are one more at least.
        let n_fair = self.limits.max_sequences / places.len().max(2);
        let (tenant, n_places) = places.into_iter().max_by_key(|(_, n_places)| *n_places)?;
        (n_places > n_fair && self.waiting.saw_others(tenant)).then(|| tenant.clone())
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

/// Shares rows among prompts as [`share`] does, but those of light tenants get all they want, as far as there is room for
/// it: others have what that leaves of `n_rows`, and at least half of them, so that nobody starves. Where that makes a step
/// longer than the bound, it is those who take more than their share that wait for their tokens.
pub fn favour(wanted: &[Wanted], is_light: &[bool], (n_rows, n_room): (usize, usize)) -> Vec<usize> {
    let n_tokens_if = |light: bool| {
        let of = move |(wanted, is_light): (&Wanted, &bool)| match *is_light == light {
            true => *wanted,
            false => Wanted { n_tokens: 0, ..*wanted },
        };
        wanted.iter().zip(is_light).map(of).collect::<Vec<Wanted>>()
    };
    let (light, others) = (n_tokens_if(true), n_tokens_if(false));
    let n_light: usize = light.iter().map(|wanted| wanted.n_tokens).sum();
    let n_others = n_rows.saturating_sub(n_light).max(n_rows.div_ceil(2)).min(n_rows);
    let others = share(n_others, &others);
    let light = share(n_room - others.iter().sum::<usize>(), &light);
    light.iter().zip(others).map(|(light, other)| light + other).collect()
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
            scheduler.times.observe(Load::plain(n_rows), n_rows as f64, Drafting::Quiet);
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
        for which in ["the first", "a second one", "a third one"] {
            let light = scheduler.submit(of("light", 2, 20));
            let plan = step(&mut scheduler);
            let has_place = plan.chunks.iter().any(|chunk| chunk.sequence == light);
            assert!(has_place, "{which} gets a place at once beside those that are there");
            (0..4).for_each(|_| _ = step(&mut scheduler));
        }
    }

    #[test]
    fn nothing_is_sent_ahead_of_a_long_step_while_others_wait() {
        // 60 rows of prompts are a step of 60 ms; more are left to be read.
        let sends_ahead = |n_sequences: usize| {
            let mut scheduler = scheduler();
            scheduler.limits.run_ahead_below = std::time::Duration::from_secs(9);
            // Tenants of their own, so that nobody waits for a prefix.
            (0..n_sequences).for_each(|i| _ = scheduler.submit(of(&format!("tenant {i}"), 50, 5)));
            assert_eq!(scheduler.plan().expect("something to do").n_rows(), 60);
            scheduler.plan().is_some()
        };
        assert!(sends_ahead(PLACES), "all have a place");
        assert!(!sends_ahead(PLACES + 1), "one waits");
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

    fn granted(n_tokens: &[usize], is_light: &[bool], rows: (usize, usize)) -> Vec<usize> {
        let wanted: Vec<Wanted> = n_tokens.iter().map(|n| Wanted { n_tokens: *n, turn: 0 }).collect();
        favour(&wanted, is_light, rows)
    }

    #[test]
    fn light_tenants_come_first_and_leave_half() {
        assert_eq!(granted(&[9, 4, 9], &[false, true, false], (12, 40)), [4, 4, 4]);
        assert_eq!(granted(&[9, 20, 9], &[false, true, false], (12, 40)), [3, 20, 3], "beyond the bound");
        assert_eq!(
            granted(&[9, 20, 9], &[false, true, false], (12, 16)),
            [3, 10, 3],
            "and not beyond the room"
        );
        assert_eq!(granted(&[9, 9], &[false, true], (1, 40)), [1, 9]);
        assert_eq!(granted(&[30, 9], &[false, false], (12, 40)), [6, 6], "nobody is light");
        assert_eq!(granted(&[30, 9], &[true, true], (12, 40)), [30, 9]);
    }
}
