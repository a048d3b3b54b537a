//! Tests of who is next: tables, and properties over random arrivals.

use proptest::prelude::*;

use super::*;

const PROMOTE_AFTER: u32 = 3;

fn waiting() -> Waiting {
    Waiting::new(PROMOTE_AFTER)
}

/// Everybody that waits, in the order of places; each costs its tenant nothing.
fn order(waiting: &mut Waiting) -> Vec<u64> {
    std::iter::from_fn(|| waiting.pop()).map(|id| id.0).collect()
}

fn tenant(name: &str) -> Arc<str> {
    name.into()
}

#[test]
fn one_tenant_is_served_in_order_and_who_had_a_place_first() {
    let (mut waiting, a) = (waiting(), tenant("a"));
    (1..=3).for_each(|id| waiting.push(SequenceId(id), &a, Priority::Normal));
    waiting.push_front(SequenceId(8));
    waiting.push_front(SequenceId(9));
    assert_eq!((waiting.len(), waiting.front()), (5, Some(SequenceId(9))));
    waiting.remove(SequenceId(2));
    waiting.remove(SequenceId(77));
    assert_eq!(order(&mut waiting), [9, 8, 1, 3]);
    assert_eq!((waiting.len(), waiting.front()), (0, None));
}

#[test]
fn the_tenant_that_was_served_least_is_next() {
    let (mut waiting, a, b) = (waiting(), tenant("a"), tenant("b"));
    (1..=3).for_each(|id| waiting.push(SequenceId(id), &a, Priority::Normal));
    (4..=6).for_each(|id| waiting.push(SequenceId(id), &b, Priority::Normal));
    // (place, tenant, tokens read, tokens generated)
    let served = [(1, &a, 10, 0), (4, &b, 1, 2), (5, &b, 0, 3), (2, &a, 5, 0), (6, &b, 0, 0)];
    for (id, tenant, n_input, n_output) in served {
        assert_eq!(waiting.pop(), Some(SequenceId(id)));
        waiting.charge(tenant, n_input, n_output);
    }
}

#[test]
fn absence_saves_nothing_up_and_forgives_nothing() {
    let (mut waiting, a, b, c) = (waiting(), tenant("a"), tenant("b"), tenant("c"));
    waiting.push(SequenceId(1), &a, Priority::Normal);
    assert_eq!(waiting.pop(), Some(SequenceId(1)));
    waiting.charge(&a, 0, 500);
    // Nobody waits: the last one's counter stands for all, so the order is that of arrival.
    waiting.push(SequenceId(2), &a, Priority::Normal);
    waiting.push(SequenceId(3), &b, Priority::Normal);
    waiting.charge(&b, 50, 0);
    waiting.push(SequenceId(4), &c, Priority::Normal);
    assert_eq!(waiting.pop(), Some(SequenceId(2)));
    assert_eq!(waiting.pop(), Some(SequenceId(4)));
    waiting.charge(&c, 99, 0);
    waiting.push(SequenceId(5), &c, Priority::Normal);
    assert_eq!(order(&mut waiting), [3, 5], "it comes back with what it was served");
}

#[test]
fn urgent_ones_go_first_but_not_for_ever() {
    let (mut waiting, a, b) = (waiting(), tenant("a"), tenant("b"));
    (1..=2).for_each(|id| waiting.push(SequenceId(id), &a, Priority::Low));
    (3..=4).for_each(|id| waiting.push(SequenceId(id), &a, Priority::Normal));
    (10..=18).for_each(|id| waiting.push(SequenceId(id), &b, Priority::High));
    assert_eq!(order(&mut waiting), [10, 11, 12, 1, 3, 13, 14, 2, 4, 15, 16, 17, 18]);
}

#[test]
fn counters_of_many_idle_tenants_are_forgotten() {
    let mut waiting = waiting();
    for i in 0..10 * MAX_IDLE_TENANTS as u64 {
        let tenant = tenant(&i.to_string());
        waiting.push(SequenceId(i), &tenant, Priority::Normal);
        waiting.pop();
        waiting.charge(&tenant, 1 + i as usize % 7, 0);
    }
    assert!(waiting.counters.len() <= 2 * MAX_IDLE_TENANTS, "{}", waiting.counters.len());
}

#[derive(Clone, Debug)]
enum Event {
    Push { tenant: usize, priority: Priority },
    Return,
    Pop { n_input: usize, n_output: usize },
    Remove { which: usize },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let priority = prop_oneof![Just(Priority::High), Just(Priority::Normal), Just(Priority::Low)];
    let event = prop_oneof![
        8 => (0usize..4, priority).prop_map(|(tenant, priority)| Event::Push { tenant, priority }),
        1 => Just(Event::Return),
        6 => (0usize..50, 0usize..50).prop_map(|(n_input, n_output)| Event::Pop { n_input, n_output }),
        1 => (0usize..30).prop_map(|which| Event::Remove { which }),
    ];
    prop::collection::vec(event, 0..300)
}

proptest! {
    /// Nobody is lost or placed twice, a tenant's sequences of a class keep their order, and no class is passed over
    /// more often than the bound and once for each other class that is due as well.
    #[test]
    fn nobody_is_lost_and_no_class_starves(events in events()) {
        let tenants: Vec<Arc<str>> = ["a", "b", "c", "d"].map(Arc::from).to_vec();
        let mut waiting = waiting();
        // (id, tenant, priority) in order of arrival
        let mut queue: Vec<(SequenceId, usize, Priority)> = Vec::new();
        let mut returned: Vec<SequenceId> = Vec::new();
        let mut n_passed = [0; N_CLASSES];
        for (id, event) in (0..).map(SequenceId).zip(events) {
            match event {
                Event::Push { tenant, priority } => {
                    waiting.push(id, &tenants[tenant], priority);
                    queue.push((id, tenant, priority));
                }
                Event::Return => {
                    waiting.push_front(id);
                    returned.push(id);
                }
                Event::Pop { n_input, n_output } => {
                    let front = waiting.front();
                    prop_assert_eq!(waiting.pop(), front);
                    if let Some(wanted) = returned.pop() {
                        prop_assert_eq!(front, Some(wanted));
                    } else if let Some(front) = front {
                        let place = queue.iter().position(|(id, ..)| *id == front).expect("it waits");
                        let (_, tenant, priority) = queue.remove(place);
                        let is_before = |(_, other, class): &(SequenceId, usize, Priority)| (*other, *class) == (tenant, priority);
                        prop_assert!(!queue[..place].iter().any(is_before));
                        waiting.charge(&tenants[tenant], n_input, n_output);
                        n_passed.iter_mut().for_each(|n| *n += 1);
                        n_passed[priority as usize] = 0;
                    } else {
                        prop_assert!(queue.is_empty());
                    }
                }
                Event::Remove { which } => {
                    if let Some((id, ..)) = queue.get(which).copied() {
                        waiting.remove(id);
                        queue.remove(which);
                    }
                }
            }
            for class in [Priority::High, Priority::Normal, Priority::Low] {
                if !queue.iter().any(|(_, _, priority)| *priority == class) {
                    n_passed[class as usize] = 0;
                }
            }
            prop_assert!(n_passed.iter().all(|n| *n < PROMOTE_AFTER + N_CLASSES as u32), "{:?}", n_passed);
            let mut listed: Vec<_> = waiting.iter().collect();
            let mut expected: Vec<_> = queue.iter().map(|(id, ..)| *id).chain(returned.iter().copied()).collect();
            listed.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(waiting.len(), listed.len());
            prop_assert_eq!(listed, expected);
        }
    }

    /// Between two tenants that always wait, what one was served is never ahead of the other by more than the dearest
    /// sequence.
    #[test]
    fn two_backlogged_tenants_are_served_alike(
        costs in prop::collection::vec((0usize..100, 0usize..100), 1..200),
        n_before in 0usize..100,
    ) {
        let (mut waiting, tenants) = (waiting(), [tenant("a"), tenant("b")]);
        waiting.charge(&tenants[0], n_before, 0);
        for id in 0..2 * costs.len() as u64 {
            waiting.push(SequenceId(id), &tenants[id as usize % 2], Priority::Normal);
        }
        // The other one comes later and is lifted.
        let mut served = [n_before as u64; 2];
        for (n_input, n_output) in costs {
            let who = waiting.pop().expect("both have plenty").0 as usize % 2;
            waiting.charge(&tenants[who], n_input, n_output);
            served[who] += n_input as u64 * INPUT_WEIGHT + n_output as u64 * OUTPUT_WEIGHT;
            let dearest = 100 * (INPUT_WEIGHT + OUTPUT_WEIGHT);
            prop_assert!(served[0].abs_diff(served[1]) <= dearest, "{:?}", served);
        }
    }
}
