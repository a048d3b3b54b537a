//! Ranks as real processes: the same bits as one process, and a peer that is killed or stopped is named. The binary
//! has its own `main`, because it starts itself once per rank.
#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

mod support;

use paceline_collectives::{Collective, CollectiveError, Solo, Transport};
use paceline_domain::ReduceTree;
use paceline_domain::reduce_tree::fold;
use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;

const TRANSPORTS: [Transport; 2] = [Transport::SharedMemory, Transport::Tcp];
/// Leaves of three ranks, and elements: even, uneven, empty shares, more than a slot.
const CASES: [([usize; 4], usize); 6] = [
    ([0, 3, 6, 9], 576),
    ([0, 1, 2, 8], 1),
    ([0, 0, 5, 8], 4_000),
    ([0, 8, 8, 8], 33),
    ([0, 2, 3, 8], 0),
    ([0, 3, 5, 9], 150_001),
];

fn main() {
    if let Some((role, collective)) = support::join(Duration::from_secs(2)) {
        return match role.as_str() {
            "reduce" => reduce(collective),
            _ => lose_a_peer(collective),
        };
    }
    for transport in TRANSPORTS {
        processes_give_the_bits_of_one(transport);
        for victim in 0..3 {
            a_lost_process_is_named(transport, victim, Signal::KILL);
            a_lost_process_is_named(transport, victim, Signal::STOP);
        }
        println!("{transport:?}: same bits from three processes; killed and stopped ranks were named");
    }
}

fn leaf(leaf: usize, element: usize) -> f32 {
    let bits = ((leaf * 1_000_003 + element + 1) as u32).wrapping_mul(2_654_435_761);
    f32::from_bits(0x3f80_0000 | bits >> 9) * if bits & 1 == 0 { 1e-4 } else { -3e3 }
}

/// The bits of every case, digested.
fn digest(collective: &mut dyn Collective, tree: impl Fn([usize; 4]) -> ReduceTree) -> String {
    let mut hasher = blake3::Hasher::new();
    for (edges, n) in CASES {
        let tree = tree(edges);
        let subtrees = tree.subtrees(collective.rank()).iter();
        let partials: Vec<f32> = subtrees
            .flat_map(|subtree| {
                let sum = |element| {
                    fold(subtree.clone(), &mut |idx| leaf(idx, element), &mut |left, right| left + right)
                };
                (0..n).map(sum)
            })
            .collect();
        let mut out = vec![0.0; n];
        collective.all_reduce_tree(&tree, &partials, &mut out).unwrap();
        hasher.update(bytemuck::cast_slice(&out));
    }
    hasher.finalize().to_string()
}

fn reduce(mut collective: Box<dyn Collective>) {
    println!("{}", digest(collective.as_mut(), |edges| ReduceTree::new(edges.to_vec())));
    let mut parts = Vec::new();
    collective.gather(format!("rank {}", collective.rank()).as_bytes(), &mut parts).unwrap();
    let parts: Vec<String> = parts.into_iter().map(|part| String::from_utf8(part).unwrap()).collect();
    println!("{}", parts.join(", "));
}

fn processes_give_the_bits_of_one(transport: Transport) {
    let solo = digest(&mut Solo::new(), |edges| ReduceTree::new(vec![0, edges[3]]));
    let mut ranks = support::start(3, transport, "reduce");
    for (rank, process) in ranks.iter_mut().enumerate() {
        assert_eq!(process.line(), solo, "{transport:?}, rank {rank}");
        assert_eq!(process.line(), if rank == 0 { "rank 0, rank 1, rank 2" } else { "" });
    }
}

fn lose_a_peer(mut collective: Box<dyn Collective>) {
    collective.barrier().unwrap();
    println!("ready");
    support::wait_for_line();
    let error = collective.barrier().unwrap_err();
    let kind = match error {
        CollectiveError::PeerLeft { .. } => "left",
        CollectiveError::Timeout { .. } => "late",
        _ => "other",
    };
    println!("{kind} {}", error.rank().unwrap());
    // Until the parent has seen what both say, nobody leaves.
    support::wait_for_line();
}

fn a_lost_process_is_named(transport: Transport, victim: usize, signal: Signal) {
    let mut ranks = support::start(3, transport, "lose a peer");
    for process in &mut ranks {
        assert_eq!(process.line(), "ready");
    }
    kill_process(Pid::from_child(&ranks[victim].child), signal).unwrap();
    for (rank, process) in ranks.iter_mut().enumerate() {
        if rank != victim {
            process.say("go on");
        }
    }
    let mut lines = Vec::new();
    for (rank, process) in ranks.iter_mut().enumerate() {
        if rank != victim {
            lines.push(process.line());
        }
    }
    // The second may be told by the first one's leaving.
    let expected = format!("{} {victim}", if signal == Signal::KILL { "left" } else { "late" });
    assert!(lines.contains(&expected), "{transport:?}: {expected} is not in {lines:?}");
    assert!(lines.iter().all(|line| line.starts_with("left") || *line == expected), "{lines:?}");
}
