//! Tables of events, and properties of random ones.

use paceline_domain::{Digest, TokenId};
use proptest::prelude::*;

use super::*;
use crate::prefix::extend_keys;

const POOL: u32 = 64;

fn facts(n_kv_blocks: u32) -> GroupFacts {
    GroupFacts { n_kv_blocks, numerics: Numerics::new(1, vec![0, 0]) }
}

/// Groups with these pools, all up.
fn router(pools: &[u32]) -> Router {
    let mut router = Router::new((0..pools.len()).map(|group| format!("group {group}")).collect());
    for (group, n_kv_blocks) in pools.iter().enumerate() {
        router.up(group, facts(*n_kv_blocks)).expect("all are alike");
    }
    router
}

/// A request of a tenant whose prompt is the first `n_prompt` tokens of a text.
fn wanted(tenant: &str, text: u32, n_prompt: usize, max_tokens: usize) -> Wanted {
    let tokens: Vec<TokenId> = (0..n_prompt as u32).map(|i| TokenId(1000 * text + i)).collect();
    let mut keys = Vec::new();
    let root = PrefixKey::root(tenant, &Digest([7; 32]));
    extend_keys(&mut keys, root, &tokens, n_prompt / BLOCK_POSITIONS);
    Wanted { keys, n_prompt, max_tokens, n_choices: 1 }
}

/// What happens, and where a request is sent.
enum Step {
    Send {
        tenant: &'static str,
        text: u32,
        n_prompt: usize,
        max_tokens: usize,
        to: Option<usize>,
    },
    End {
        group: usize,
        n_tokens: u64,
    },
    Down(usize),
    Up(usize),
    /// The request of this text, prompt and output moves.
    Move {
        text: u32,
        n_prompt: usize,
        max_tokens: usize,
        from: usize,
        to: Option<usize>,
    },
}

/// A request of a tenant without a name.
fn send(text: u32, n_prompt: usize, max_tokens: usize, to: usize) -> Step {
    Step::Send { tenant: "", text, n_prompt, max_tokens, to: Some(to) }
}

fn check(pools: &[u32], steps: &[Step]) {
    let mut router = router(pools);
    for (i, step) in steps.iter().enumerate() {
        match step {
            Step::Send { tenant, text, n_prompt, max_tokens, to } => {
                let sent = router.route(&wanted(tenant, *text, *n_prompt, *max_tokens));
                assert_eq!(sent, *to, "step {i}");
            }
            Step::End { group, n_tokens } => router.ended(*group, *n_tokens),
            Step::Move { text, n_prompt, max_tokens, from, to } => {
                let sent = router.reroute(*from, &wanted("", *text, *n_prompt, *max_tokens));
                assert_eq!(sent, *to, "step {i}");
            }
            Step::Down(group) => router.down(*group),
            Step::Up(group) => router.up(*group, facts(pools[*group])).expect("as before"),
        }
    }
}

#[test]
fn the_least_loaded_gets_what_nobody_has_and_the_first_of_equals() {
    let end = |group, n_tokens| Step::End { group, n_tokens };
    check(
        &[POOL, POOL, POOL],
        &[
            send(1, 32, 8, 0),
            send(2, 32, 7, 1),
            send(3, 32, 9, 2),
            send(4, 32, 1, 1),
            send(5, 32, 1, 0),
            end(2, 41),
            send(6, 32, 1, 2),
            end(0, 40),
            end(0, 33),
            send(7, 32, 1, 0),
        ],
    );
}

#[test]
fn the_longest_cached_prefix_wins() {
    check(
        &[POOL, POOL],
        &[
            send(1, 64, 1, 0),
            send(2, 64, 1, 1),
            // Group 1 is not fuller, but group 0 has it; longer and shorter prompts have the prefix, too.
            send(1, 80, 1, 0),
            send(2, 17, 1, 1),
            send(1, 200, 1, 0),
            // More of the same text was sent to group 0.
            send(2, 130, 1, 1),
            send(1, 400, 1, 0),
        ],
    );
}

#[test]
fn a_prefix_counts_in_whole_blocks_of_which_one_token_must_be_left() {
    for (n_prompt, to) in [(15, 1), (16, 1), (17, 0), (32, 0), (33, 0)] {
        check(&[POOL, POOL], &[send(1, 40, 1, 0), send(1, n_prompt, 1, to)]);
    }
}

#[test]
fn tenants_share_nothing() {
    let of = |tenant, to| Step::Send { tenant, text: 1, n_prompt: 64, max_tokens: 1, to: Some(to) };
    check(&[POOL, POOL], &[of("a", 0), of("b", 1), of("a", 0), of("b", 1)]);
}

#[test]
fn a_hot_prefix_overflows_into_other_groups() {
    // 32 tokens are cached, so group 0 may have up to 128 tokens more than the other; each request has 43.
    check(
        &[POOL, POOL],
        &[
            send(1, 33, 10, 0),
            send(1, 33, 10, 0),
            send(1, 33, 10, 0),
            send(1, 33, 10, 1),
            // Now both have it, and the load decides.
            send(1, 33, 10, 1),
            send(1, 33, 10, 1),
            send(1, 33, 10, 0),
        ],
    );
}

#[test]
fn a_group_that_is_down_gets_nothing_while_another_is_up() {
    check(
        &[POOL, POOL],
        &[
            send(1, 64, 1, 0),
            Step::Down(0),
            send(1, 64, 1, 1),
            send(2, 64, 400, 1),
            Step::Down(1),
            // It waits for the one that has less.
            send(3, 64, 1, 0),
            Step::Up(1),
            send(4, 64, 1, 1),
            Step::Up(0),
            // What it had cached is gone.
            send(1, 64, 1, 0),
            send(2, 64, 1, 0),
        ],
    );
}

#[test]
fn requests_of_a_group_that_is_down_move_to_one_that_is_up() {
    let away = |text, from, to| Step::Move { text, n_prompt: 64, max_tokens: 1, from, to };
    check(
        &[POOL, POOL, 4],
        &[
            send(1, 64, 1, 0),
            send(2, 64, 1, 1),
            send(1, 64, 1, 0),
            Step::Down(0),
            away(1, 0, Some(1)),
            Step::Down(1),
            // Group 2 is too small, so they wait.
            away(1, 0, None),
            away(2, 1, None),
            Step::Up(0),
            away(2, 1, Some(0)),
            away(1, 1, Some(0)),
            Step::End { group: 0, n_tokens: 3 * 65 },
            Step::Up(1),
            send(3, 200, 1, 1),
            send(4, 200, 1, 0),
        ],
    );
}

#[test]
fn what_fits_one_group_only_goes_there() {
    let never = Step::Send { tenant: "", text: 9, n_prompt: 300, max_tokens: 21, to: None };
    let steps = [
        send(1, 100, 100, 1),
        send(2, 32, 8, 0),
        send(3, 100, 100, 1),
        Step::Down(1),
        // The other one is up and too small.
        send(4, 100, 100, 1),
        never,
    ];
    check(&[4, 20], &steps);
    assert_eq!(router(&[4, 20]).largest_pool(), Some(20));
}

#[test]
fn nothing_is_known_before_a_group_was_formed() {
    let mut router = Router::new(vec!["a".into(), "b".into()]);
    assert_eq!(router.largest_pool(), None);
    assert_eq!(router.route(&wanted("", 1, 10, 10)), None);
    router.up(1, facts(9)).expect("it is the first");
    assert_eq!(router.route(&wanted("", 1, 10, 10)), Some(1));
    router.down(1);
    assert_eq!((router.largest_pool(), router.route(&wanted("", 1, 10, 10))), (Some(9), Some(1)));
}

#[test]
fn groups_that_compute_otherwise_are_refused_with_both_sides_named() {
    let with = |version, devices| GroupFacts { n_kv_blocks: 9, numerics: Numerics::new(version, devices) };
    let names = ["group 0 (http://a:1)", "group 1 (http://b:1)"].map(str::to_owned);
    let mut router = Router::new(names.to_vec());
    router.up(0, with(3, vec![0, 0])).expect("it is the first");
    // The number of ranks does not matter on CPUs.
    router.up(1, with(3, vec![0])).expect("CPUs, too");
    for (version, devices, part) in [(4, vec![0], "version 4"), (3, vec![0x2a], "the devices 0000002a")] {
        let problem = router.up(1, with(version, devices)).expect_err("other bits").to_string();
        for part in [names[0].as_str(), names[1].as_str(), "version 3 of the numerics on CPUs", part] {
            assert!(problem.contains(part), "{part} in {problem}");
        }
    }
    // A group that is down may come back with other devices only where it is alone.
    router.down(0);
    router.up(0, with(4, vec![0])).expect_err("group 1 is another");
    let mut alone = Router::new(vec!["a".into()]);
    alone.up(0, with(3, vec![1])).expect("it is the first");
    alone.up(0, with(3, vec![2])).expect("nobody differs from it");
}

#[test]
fn as_much_is_remembered_as_the_pool_holds_the_end_of_a_prompt_first_forgotten() {
    let mut sent = SentPrefixes::default();
    let [first, second] = [1, 2].map(|text| wanted("", text, 64, 1).keys);
    sent.add(&first, 6);
    sent.add(&second, 6);
    assert_eq!((sent.run(&first), sent.run(&second)), (2, 4));
    sent.add(&first[..1], 6);
    sent.add(&wanted("", 3, 80, 1).keys, 6);
    assert_eq!((sent.run(&first), sent.run(&second), sent.moments.len()), (1, 0, 6));
}

#[derive(Clone, Debug)]
enum Event {
    Send {
        text: u32,
        n_prompt: usize,
        max_tokens: usize,
    },
    End(usize),
    Down(usize),
    Up(usize),
    /// A request moves, if it can.
    Move(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0u32..4, 1usize..300, 1usize..100)
            .prop_map(|(text, n_prompt, max_tokens)| Event::Send { text, n_prompt, max_tokens }),
        4 => (0usize..40).prop_map(Event::End),
        1 => (0usize..3).prop_map(Event::Down),
        1 => (0usize..3).prop_map(Event::Up),
        2 => (0usize..40).prop_map(Event::Move),
    ]
}

proptest! {
    /// Loads are those of the requests that have not ended; no request is sent to a group that is down while one is up, and
    /// none moves to one that is down;
    /// what is remembered is bounded; the excess over the least load is paid for by the prefix; the same events give the
    /// same routes.
    #[test]
    fn routes_keep_their_promises(events in prop::collection::vec(event(), 0..150)) {
        let mut routers = [router(&[POOL; 3]), router(&[POOL; 3])];
        let (mut is_up, mut live): ([bool; 3], Vec<(usize, Wanted)>) = ([true; 3], Vec::new());
        for event in events {
            match event {
                Event::Send { text, n_prompt, max_tokens } => {
                    let wanted = wanted("", text, n_prompt, max_tokens);
                    let considered: Vec<usize> =
                        (0..3).filter(|group| is_up[*group] || is_up == [false; 3]).collect();
                    let least = considered.iter().map(|group| routers[0].load(*group)).min().expect("some are considered");
                    let loads: Vec<u64> = (0..3).map(|group| routers[0].load(group)).collect();
                    let n_cached = |router: &Router, group: usize| {
                        (router.groups[group].sent.run(wanted.usable()) * BLOCK_POSITIONS) as u64
                    };
                    let cached: Vec<u64> = (0..3).map(|group| n_cached(&routers[0], group)).collect();
                    let sent = routers[0].route(&wanted).expect("it fits everywhere");
                    prop_assert_eq!(routers[1].route(&wanted), Some(sent));
                    prop_assert!(considered.contains(&sent));
                    prop_assert!(loads[sent] - least <= HIT_WEIGHT * cached[sent]);
                    // Nobody with a longer prefix, or as long a one and less load, was passed over without need.
                    for other in considered {
                        let is_fair = loads[other] - least <= HIT_WEIGHT * cached[other];
                        let is_better = (cached[other], Reverse(loads[other])) > (cached[sent], Reverse(loads[sent]));
                        prop_assert!(!(is_fair && is_better));
                    }
                    live.push((sent, wanted));
                }
                Event::End(which) if !live.is_empty() => {
                    let (group, wanted) = live.swap_remove(which % live.len());
                    routers.iter_mut().for_each(|router| router.ended(group, wanted.n_tokens()));
                }
                Event::Move(which) if !live.is_empty() => {
                    let which = which % live.len();
                    let (from, wanted) = live[which].clone();
                    if !is_up[from] {
                        let to = routers.each_mut().map(|router| router.reroute(from, &wanted));
                        prop_assert_eq!(to[0], to[1]);
                        prop_assert_eq!(to[0].is_some(), is_up.contains(&true));
                        prop_assert!(to[0].is_none_or(|to| is_up[to]));
                        live[which].0 = to[0].unwrap_or(from);
                    }
                }
                Event::End(_) | Event::Move(_) => {}
                Event::Down(group) => {
                    is_up[group] = false;
                    routers.iter_mut().for_each(|router| router.down(group));
                }
                Event::Up(group) => {
                    is_up[group] = true;
                    routers.iter_mut().for_each(|router| router.up(group, facts(POOL)).expect("all are alike"));
                }
            }
            for group in 0..3 {
                let load: u64 = live.iter().filter(|(at, _)| *at == group).map(|(_, wanted)| wanted.n_tokens()).sum();
                prop_assert_eq!(routers[0].load(group), load);
                let sent = &routers[0].groups[group].sent;
                prop_assert!(sent.moments.len() <= POOL as usize);
                prop_assert_eq!(sent.moments.len(), sent.in_order.len());
            }
        }
    }
}
