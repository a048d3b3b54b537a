//! Every transport against the solo group: the same bits for any tree, and the right error for any failure. Ranks
//! are threads here; `processes.rs` has real processes.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use paceline_collectives::{
    AbortFlag, BindSpec, Collective, CollectiveError, Endpoint, GroupSpec, Solo, Transport, connect,
};
use paceline_domain::reduce_tree::fold;
use paceline_domain::{Epoch, ReduceTree};
use proptest::prelude::*;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const TRANSPORTS: [Transport; 2] = [Transport::SharedMemory, Transport::Tcp];

type Joined = Result<Box<dyn Collective>, CollectiveError>;

/// Runs `act` as every rank of a group, each on a thread of its own, and returns what they return.
fn group<T: Send>(
    transport: Transport,
    n_ranks: usize,
    change: impl Fn(&mut GroupSpec) + Sync,
    act: impl Fn(usize, Joined) -> T + Sync,
) -> Vec<T> {
    let endpoints: Vec<Endpoint> =
        (0..n_ranks).map(|_| Endpoint::bind(&BindSpec::default()).unwrap()).collect();
    let peers: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address().clone()).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = endpoints
            .into_iter()
            .enumerate()
            .map(|(rank, endpoint)| {
                let mut spec = GroupSpec {
                    rank,
                    epoch: Epoch(3),
                    peers: peers.clone(),
                    secret: [9; 32],
                    transport,
                    connect_deadline: LONG,
                    deadline: LONG,
                    abort: AbortFlag::new(),
                };
                let (change, act) = (&change, &act);
                scope.spawn(move || {
                    change(&mut spec);
                    act(rank, connect(endpoint, &spec))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// One all-reduce: who owns which leaves, and how many elements.
#[derive(Clone, Debug)]
struct Case {
    edges: Vec<usize>,
    n: usize,
    seed: u64,
}

impl Case {
    fn n_leaves(&self) -> usize {
        *self.edges.last().unwrap()
    }

    /// Some number of any size for each leaf and element.
    fn leaf(&self, leaf: usize, element: usize) -> f32 {
        let mut bits = self.seed ^ ((leaf as u64) << 40) ^ element as u64;
        bits = (bits ^ (bits >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let fraction = (bits >> 40) as f32 / 16_777_216.0 - 0.5;
        fraction * [1e-3, 1.0, 1e4, 1e20][(bits & 3) as usize]
    }

    /// What a rank with these edges brings.
    fn partials(&self, tree: &ReduceTree, rank: usize) -> Vec<f32> {
        let subtree_sum = |subtree: &std::ops::Range<usize>, element| {
            fold(subtree.clone(), &mut |leaf| self.leaf(leaf, element), &mut |left, right| left + right)
        };
        let subtrees = tree.subtrees(rank).iter();
        subtrees.flat_map(|subtree| (0..self.n).map(move |element| subtree_sum(subtree, element))).collect()
    }

    fn reduce(
        &self,
        tree: &ReduceTree,
        collective: &mut dyn Collective,
    ) -> Result<Vec<u32>, CollectiveError> {
        let mut out = vec![f32::NAN; self.n];
        let partials = self.partials(tree, collective.rank());
        collective.all_reduce_tree(tree, &partials, &mut out)?;
        Ok(out.into_iter().map(f32::to_bits).collect())
    }

    fn solo(&self) -> Vec<u32> {
        self.reduce(&ReduceTree::new(vec![0, self.n_leaves()]), &mut Solo::new()).unwrap()
    }
}

fn cases(n_ranks: usize) -> impl Strategy<Value = Vec<Case>> {
    let n = prop_oneof![
        3 => 0usize..100,
        2 => 500usize..5_000,
        // More than a slot or a frame holds.
        1 => 60_000usize..200_000,
    ];
    let edges = (1usize..14, prop::collection::vec(0usize..14, n_ranks - 1));
    let case = (edges, n, any::<u64>()).prop_map(|((n_leaves, cuts), n, seed)| {
        let mut edges: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n_leaves)).collect();
        edges.extend([0, n_leaves]);
        edges.sort_unstable();
        Case { edges, n, seed }
    });
    prop::collection::vec(case, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_transport_gives_the_bits_of_one_process(
        cases in (2usize..5).prop_flat_map(cases),
        transport in prop::sample::select(TRANSPORTS.to_vec()),
    ) {
        let n_ranks = cases[0].edges.len() - 1;
        let reduced = group(transport, n_ranks, |_| {}, |_, joined| {
            let mut collective = joined.unwrap();
            let reduce = |case: &Case| {
                case.reduce(&ReduceTree::new(case.edges.clone()), collective.as_mut()).unwrap()
            };
            cases.iter().map(reduce).collect::<Vec<_>>()
        });
        let solo: Vec<_> = cases.iter().map(Case::solo).collect();
        for (rank, bits) in reduced.into_iter().enumerate() {
            prop_assert!(bits == solo, "rank {rank} differs");
        }
    }

    #[test]
    fn rank_0_gathers_what_each_rank_brings(
        lengths in prop::collection::vec(prop_oneof![0usize..50, Just(256 << 10), 200_000usize..700_000], 2..5),
        transport in prop::sample::select(TRANSPORTS.to_vec()),
    ) {
        let share = |rank: usize, round: usize| -> Vec<u8> {
            let n = lengths[(rank + round) % lengths.len()];
            (0..n).map(|i| (i * 13 + rank * 7 + round + i / 251) as u8).collect()
        };
        let gathered = group(transport, lengths.len(), |_| {}, |rank, joined| {
            let mut collective = joined.unwrap();
            let mut parts = vec![vec![1, 2, 3]; 9];
            (0..3)
                .map(|round| {
                    collective.gather(&share(rank, round), &mut parts).unwrap();
                    collective.barrier().unwrap();
                    parts.clone()
                })
                .collect::<Vec<_>>()
        });
        for round in 0..3 {
            let expected: Vec<_> = (0..lengths.len()).map(|rank| share(rank, round)).collect();
            prop_assert!(gathered[0][round] == expected);
            prop_assert!(gathered[1..].iter().all(|rounds| rounds[round].is_empty()));
        }
    }
}

fn one_barrier(joined: Joined) -> Result<(), CollectiveError> {
    joined?.barrier()
}

#[test]
fn many_operations_of_all_kinds_in_a_row() {
    let case = Case { edges: vec![0, 2, 5, 9], n: 576, seed: 1 };
    for transport in TRANSPORTS {
        let rounds = group(
            transport,
            3,
            |_| {},
            |rank, joined| {
                let mut collective = joined.unwrap();
                let tree = ReduceTree::new(case.edges.clone());
                let mut parts = Vec::new();
                let mut bits = Vec::new();
                for round in 0..200u32 {
                    bits = case.reduce(&tree, collective.as_mut()).unwrap();
                    collective.gather(&[rank as u8; 7][..round as usize % 8], &mut parts).unwrap();
                }
                collective.barrier().unwrap();
                (bits, collective.take_stats(), collective.take_stats())
            },
        );
        for (rank, (bits, stats, later)) in rounds.into_iter().enumerate() {
            assert!(bits == case.solo(), "{transport:?} rank {rank}");
            let n_bytes = 200 * case.partials(&ReduceTree::new(case.edges.clone()), rank).len() as u64 * 4;
            assert!(stats.bytes_sent >= n_bytes, "{stats:?}");
            assert_eq!(later, Default::default());
        }
    }
}

#[test]
fn every_rank_receives_the_bytes_of_the_first() {
    let sent: Vec<u8> = (0..=255).rev().chain([0, 255, 1]).collect();
    let mut alone = sent.clone();
    Solo::new().broadcast_from_first(&mut alone).unwrap();
    assert_eq!(alone, sent);
    for transport in TRANSPORTS {
        for n_ranks in 2..5 {
            let received = group(
                transport,
                n_ranks,
                |_| {},
                |rank, joined| {
                    let mut bytes = if rank == 0 { sent.clone() } else { vec![rank as u8; sent.len()] };
                    joined.unwrap().broadcast_from_first(&mut bytes).unwrap();
                    bytes
                },
            );
            assert!(received.iter().all(|bytes| *bytes == sent), "{transport:?} {n_ranks}");
        }
    }
}

#[test]
fn a_rank_that_leaves_is_named() {
    for transport in TRANSPORTS {
        for leaver in 0..3 {
            let results = group(
                transport,
                3,
                |_| {},
                |rank, joined| {
                    let mut collective = joined.unwrap();
                    collective.barrier().unwrap();
                    if rank == leaver {
                        return None;
                    }
                    let error = collective.barrier().unwrap_err();
                    assert!(matches!(collective.barrier(), Err(CollectiveError::Poisoned)));
                    Some(error)
                },
            );
            let errors: Vec<CollectiveError> = results.into_iter().flatten().collect();
            let is_left = |error: &CollectiveError| matches!(error, CollectiveError::PeerLeft { .. });
            assert!(errors.len() == 2 && errors.iter().all(is_left), "{transport:?}: {errors:?}");
            // The second may be told by the first one's leaving.
            assert!(errors.iter().any(|error| error.rank() == Some(leaver)), "{transport:?}: {errors:?}");
        }
    }
}

#[test]
fn a_late_rank_is_named_when_the_deadline_is_over() {
    for transport in TRANSPORTS {
        let done = std::sync::Barrier::new(2);
        let results = group(
            transport,
            2,
            |spec| spec.deadline = Duration::from_millis(50),
            |rank, joined| {
                let mut collective = joined.unwrap();
                let result = if rank == 0 { collective.barrier() } else { Ok(()) };
                done.wait();
                result
            },
        );
        let error = results.into_iter().next().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Timeout { rank: 1, .. }), "{transport:?}: {error}");
    }
}

#[test]
fn the_abort_flag_frees_a_waiting_rank() {
    for transport in TRANSPORTS {
        let (abort, done) = (AbortFlag::new(), std::sync::Barrier::new(2));
        let results = group(
            transport,
            2,
            |spec| spec.abort = abort.clone(),
            |rank, joined| {
                let mut collective = joined.unwrap();
                let result = if rank == 0 {
                    collective.barrier()
                } else {
                    abort.abort();
                    Ok(())
                };
                done.wait();
                result
            },
        );
        let error = results.into_iter().next().unwrap().unwrap_err();
        assert!(matches!(error, CollectiveError::Aborted { rank: 1, .. }), "{transport:?}: {error}");
    }
}

#[test]
fn the_abort_flag_frees_a_rank_that_waits_for_others_to_join() {
    for transport in TRANSPORTS {
        let endpoints = [0, 1].map(|_| Endpoint::bind(&BindSpec::default()).unwrap());
        let peers: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address().clone()).collect();
        // Both kinds of waiting: for a connection, and for the answer of somebody who only listens.
        for (rank, endpoint) in endpoints.into_iter().enumerate().rev() {
            let abort = AbortFlag::new();
            let spec = GroupSpec {
                rank,
                epoch: Epoch(1),
                peers: peers.clone(),
                secret: [1; 32],
                transport,
                connect_deadline: LONG,
                deadline: LONG,
                abort: abort.clone(),
            };
            let error = std::thread::scope(|scope| {
                let waiting = scope.spawn(|| connect(endpoint, &spec).map(|_| ()).unwrap_err());
                abort.abort();
                waiting.join().unwrap()
            });
            assert!(matches!(error, CollectiveError::Aborted { .. }), "{transport:?} rank {rank}: {error}");
        }
    }
}

#[test]
fn a_rank_of_another_epoch_or_secret_stays_outside_and_the_others_are_not_disturbed() {
    for transport in TRANSPORTS {
        for is_epoch in [true, false] {
            let change = |spec: &mut GroupSpec| {
                spec.connect_deadline = Duration::from_millis(300);
                if spec.rank == 1 && is_epoch {
                    spec.epoch = Epoch(2);
                } else if spec.rank == 1 {
                    spec.secret = [8; 32];
                }
            };
            let results = group(transport, 2, change, |_, joined| one_barrier(joined));
            let [inside, outside] = <[_; 2]>::try_from(results).unwrap().map(Result::unwrap_err);
            assert!(matches!(inside, CollectiveError::Timeout { rank: 1, .. }), "{transport:?}: {inside}");
            let is_named = match outside {
                CollectiveError::Epoch { rank: 0, theirs: Epoch(3), ours: Epoch(2) } => is_epoch,
                CollectiveError::Secret { rank: 0 } => !is_epoch,
                _ => false,
            };
            assert!(is_named, "{transport:?}: {outside}");
        }
    }
}

#[test]
fn a_stranger_on_the_port_does_not_keep_the_group_from_forming() {
    let results = group(
        Transport::Tcp,
        2,
        |spec| {
            if spec.rank == 1 {
                let tcp = spec.peers[0].to_string().rsplit_once('/').unwrap().1.to_owned();
                let mut stranger = std::net::TcpStream::connect(tcp).unwrap();
                std::io::Write::write_all(&mut stranger, &[b'x'; 4096]).unwrap();
            }
        },
        |_, joined| one_barrier(joined),
    );
    assert!(results.into_iter().all(|result| result.is_ok()));
}

#[test]
fn different_operations_are_found_out() {
    for transport in TRANSPORTS {
        let results = group(
            transport,
            2,
            |_| {},
            |rank, joined| {
                let mut collective = joined.unwrap();
                let tree = ReduceTree::new(vec![0, 1, 2]);
                let n = 10 + rank;
                collective.all_reduce_tree(&tree, &vec![1.0; n], &mut vec![0.0; n])
            },
        );
        let named = results.into_iter().enumerate().filter(|(rank, result)| {
            matches!(result, Err(CollectiveError::Mismatch { rank: peer, .. }) if *peer == 1 - rank)
        });
        // The slower one may only see that the other has left.
        assert!(named.count() >= 1, "{transport:?}");
    }
}

#[test]
fn a_group_that_cannot_be_is_an_error() {
    let endpoint = Endpoint::bind(&BindSpec::default()).unwrap();
    let elsewhere = "paceline1/00000000000000000000000000000000/00000000000000000000000000000000/host:1";
    let spec = GroupSpec {
        rank: 0,
        epoch: Epoch(1),
        peers: vec![endpoint.address().clone(), elsewhere.parse().unwrap()],
        secret: [0; 32],
        transport: Transport::SharedMemory,
        connect_deadline: LONG,
        deadline: LONG,
        abort: AbortFlag::new(),
    };
    let error = connect(endpoint, &spec).map(|_| ()).unwrap_err();
    assert!(matches!(error, CollectiveError::Group(_)), "{error}");
    let other = Endpoint::bind(&BindSpec::default()).unwrap();
    let error = connect(other, &spec).map(|_| ()).unwrap_err();
    assert!(matches!(error, CollectiveError::Group(_)), "{error}");
}

#[test]
fn a_group_of_one_is_solo() {
    let results = group(
        Transport::Auto,
        1,
        |_| {},
        |_, joined| {
            let mut collective = joined.unwrap();
            let mut parts = Vec::new();
            collective.gather(b"alone", &mut parts).unwrap();
            collective.barrier().unwrap();
            (collective.n_ranks(), parts)
        },
    );
    assert_eq!(results, [(1, vec![b"alone".to_vec()])]);
}
