//! Sequences that wait for a place. It decides who is next and nothing else.
//!
//! Who had a place and lost it goes before all others, then who continues a prompt that was just read for another. Then classes: the highest that waits, unless another one was
//! passed over too often. In a class the tenant that was served least, by a virtual token counter (Sheng et al., "Fairness
//! in Serving Large Language Models", 2024): it rises with what the tenant's sequences read and generate, and a tenant
//! that starts to wait is lifted to the least of those that wait already, so that nobody saves up by being absent.
//! A tenant's own sequences of one class keep their order.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use paceline_domain::SequenceId;

/// What a token read costs a tenant.
const INPUT_WEIGHT: u64 = 1;
/// What a token generated costs a tenant; a step for it is as long as one for many tokens of a prompt.
const OUTPUT_WEIGHT: u64 = 2;
/// Tenants that do not wait and whose counters are kept.
const MAX_IDLE_TENANTS: usize = 1024;
const N_CLASSES: usize = 3;
/// Places among whose tenants others are looked for.
const N_RECENT: usize = 64;

/// How urgent a sequence is, most urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Priority {
    /// Before all others.
    High,
    /// As most.
    #[default]
    Normal,
    /// After all others.
    Low,
}

/// Fair share of places among tenants, in classes.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Who had a place, or shares the prompt of one that has, next first.
    returned: VecDeque<SequenceId>,
    /// By [`Priority`].
    classes: [Class; N_CLASSES],
    /// A class that was passed over so often is next.
    promote_after: u32,
    counters: BTreeMap<Arc<str>, u64>,
    /// Whoever stopped waiting last; its counter stands for all when nobody waits.
    last_to_leave: Option<Arc<str>>,
    next_ticket: u64,
    /// It gets no place now.
    passed_over: Option<Arc<str>>,
    /// Whose the last places were.
    recent: VecDeque<Arc<str>>,
}

/// Sequences of one priority. No queue is empty.
#[derive(Debug, Default)]
struct Class {
    queues: BTreeMap<Arc<str>, VecDeque<Ticket>>,
    /// Places that others got while this class waited, since its last one.
    n_passed: u32,
}

/// One that waits; numbers rise with arrival.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    number: u64,
    id: SequenceId,
}

impl Waiting {
    /// Nobody waits. A class that others were placed before this often is next; at least 1.
    pub(super) fn new(promote_after: u32) -> Self {
        Self {
            returned: VecDeque::new(),
            classes: Default::default(),
            promote_after: promote_after.max(1),
            counters: BTreeMap::new(),
            last_to_leave: None,
            next_ticket: 0,
            passed_over: None,
            recent: VecDeque::with_capacity(N_RECENT),
        }
    }

    /// From now on this tenant, or nobody, is not next, unless it had a place or continues a prompt.
    pub(super) fn pass_over(&mut self, tenant: Option<Arc<str>>) {
        self.passed_over = tenant;
    }

    /// A tenant got a place.
    pub(super) fn placed(&mut self, tenant: Arc<str>) {
        if self.recent.len() == N_RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(tenant);
    }

    /// Whether one of the last places was another tenant's.
    pub(super) fn saw_others(&self, tenant: &Arc<str>) -> bool {
        self.recent.iter().any(|other| other != tenant)
    }

    /// At the end of its tenant's queue.
    pub(super) fn push(&mut self, id: SequenceId, tenant: &Arc<str>, priority: Priority) {
        if !self.waits(tenant) {
            self.forget_idle();
            let least = self.least();
            let counter = self.counters.entry(tenant.clone()).or_insert(least);
            *counter = least.max(*counter);
        }
        let ticket = Ticket { number: self.next_ticket, id };
        self.next_ticket += 1;
        self.classes[priority as usize].queues.entry(tenant.clone()).or_default().push_back(ticket);
    }

    /// Before all others, because it had a place and lost it.
    pub(super) fn push_front(&mut self, id: SequenceId) {
        self.returned.push_front(id);
    }

    /// Before all that never had a place: what it shares with another one is there now.
    pub(super) fn push_next(&mut self, id: SequenceId) {
        self.returned.push_back(id);
    }

    /// Who is next.
    pub(super) fn front(&self) -> Option<SequenceId> {
        let in_classes = || {
            let (class, tenant) = self.next_queue()?;
            self.classes[class].queues[tenant].front().map(|ticket| ticket.id)
        };
        self.returned.front().copied().or_else(in_classes)
    }

    /// Takes out who is next.
    pub(super) fn pop(&mut self) -> Option<SequenceId> {
        if let Some(id) = self.returned.pop_front() {
            return Some(id);
        }
        let (class, tenant) = self.next_queue()?;
        let tenant = tenant.clone();
        let queue = self.classes[class].queues.get_mut(&tenant)?;
        let id = queue.pop_front()?.id;
        for other in self.classes.iter_mut().filter(|other| !other.queues.is_empty()) {
            other.n_passed += 1;
        }
        self.classes[class].n_passed = 0;
        self.tidy(class, &tenant);
        Some(id)
    }

    /// Takes out one that waits no longer; it need not be there.
    pub(super) fn remove(&mut self, id: SequenceId) {
        self.returned.retain(|waiting| *waiting != id);
        let holds = |queue: &VecDeque<Ticket>| queue.iter().position(|ticket| ticket.id == id);
        for class in 0..N_CLASSES {
            let found = self.classes[class]
                .queues
                .iter_mut()
                .find_map(|(tenant, queue)| Some((tenant, holds(queue)?, queue)));
            if let Some((tenant, place, queue)) = found {
                queue.remove(place);
                let tenant = tenant.clone();
                return self.tidy(class, &tenant);
            }
        }
    }

    /// A tenant was served so many tokens.
    pub(super) fn charge(&mut self, tenant: &Arc<str>, n_input: usize, n_output: usize) {
        let cost = n_input as u64 * INPUT_WEIGHT + n_output as u64 * OUTPUT_WEIGHT;
        match self.counters.get_mut(tenant) {
            Some(counter) => *counter += cost,
            None => {
                let least = self.least();
                self.counters.insert(tenant.clone(), least + cost);
            }
        }
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.returned.is_empty() && self.classes.iter().all(|class| class.queues.is_empty())
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.returned.len() + self.queues().map(|(_, queue)| queue.len()).sum::<usize>()
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = SequenceId> {
        let tickets = self.queues().flat_map(|(_, queue)| queue.iter().map(|ticket| ticket.id));
        self.returned.iter().copied().chain(tickets)
    }

    fn queues(&self) -> impl Iterator<Item = (&Arc<str>, &VecDeque<Ticket>)> {
        self.classes.iter().flat_map(|class| &class.queues)
    }

    fn waits(&self, tenant: &Arc<str>) -> bool {
        self.classes.iter().any(|class| class.queues.contains_key(tenant))
    }

    /// Class and tenant that are next.
    fn next_queue(&self) -> Option<(usize, &Arc<str>)> {
        let may_be_next = |tenant: &Arc<str>| self.passed_over.as_ref() != Some(tenant);
        let waiting = || (0..N_CLASSES).filter(|class| self.classes[*class].queues.keys().any(may_be_next));
        let n_passed = |class: &usize| self.classes[*class].n_passed;
        let due = waiting().filter(|class| n_passed(class) >= self.promote_after).max_by_key(n_passed);
        let class = due.or_else(|| waiting().next())?;
        let served = |(tenant, queue): &(&Arc<str>, &VecDeque<Ticket>)| {
            (self.counters[*tenant], queue.front().map(|ticket| ticket.number))
        };
        let queues = self.classes[class].queues.iter().filter(|(tenant, _)| may_be_next(tenant));
        let (tenant, _) = queues.min_by_key(served)?;
        Some((class, tenant))
    }

    /// The least counter of those that wait. It never falls.
    fn least(&self) -> u64 {
        let of_last = || self.last_to_leave.as_ref().map_or(0, |tenant| self.counters[tenant]);
        self.queues().map(|(tenant, _)| self.counters[tenant]).min().unwrap_or_else(of_last)
    }

    /// After something was taken out of a queue.
    fn tidy(&mut self, class: usize, tenant: &Arc<str>) {
        let queues = &mut self.classes[class].queues;
        if queues.get(tenant).is_some_and(VecDeque::is_empty) {
            queues.remove(tenant);
        }
        if queues.is_empty() {
            self.classes[class].n_passed = 0;
        }
        if !self.waits(tenant) {
            self.last_to_leave = Some(tenant.clone());
        }
    }

    /// Drops counters of tenants that do not wait: first those that would be lifted anyway, then the least.
    fn forget_idle(&mut self) {
        if self.counters.len() < 2 * MAX_IDLE_TENANTS {
            return;
        }
        let least = self.least();
        let is_kept = |tenant: &Arc<str>| self.waits(tenant) || self.last_to_leave.as_ref() == Some(tenant);
        let mut idle: Vec<(u64, Arc<str>)> = self
            .counters
            .iter()
            .filter(|(tenant, _)| !is_kept(tenant))
            .map(|(tenant, counter)| (*counter, tenant.clone()))
            .collect();
        idle.sort_unstable_by(|one, other| other.cmp(one));
        let n_kept = idle.iter().take(MAX_IDLE_TENANTS).take_while(|(counter, _)| *counter > least).count();
        for (_, tenant) in idle.drain(n_kept..) {
            self.counters.remove(&tenant);
        }
    }
}

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod tests;
