//! SmolLM2 gives the same bits on any number of ranks, by any transport, on any instruction set, with any threads,
//! in any batch. The same on small random models is in the crate of the decoder.

mod support;

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Transport;
use paceline_domain::KvType;
use paceline_kernels::Isa;
use paceline_tests::models::small_model;
use support::rig::{Link, Rig, Setup, Step, assert_same_bits, in_a_crowd, in_pieces, of_first_sequence};

/// "The lighthouse keeper counted the ships every evening, and on" and what could follow.
const SEQUENCE: [u32; 18] =
    [504, 33059, 40061, 17288, 260, 7761, 897, 9053, 28, 284, 335, 260, 1596, 1194, 282, 15339, 665, 436];

fn smollm2() -> Rig {
    Rig::new(Checkpoint::open(small_model()).expect("a checkpoint"))
}

fn run(rig: &Rig, steps: &[Step]) -> Vec<Vec<f32>> {
    of_first_sequence(steps, rig.run(steps))
}

/// One scalar thread, token by token, alone.
fn expected(rig: &Rig) -> Vec<Vec<f32>> {
    let plain = Setup {
        isa: Isa::Scalar,
        n_threads: 1,
        n_ranks: 1,
        kv_type: KvType::F16,
        quantize: None,
        n_tokens: usize::MAX,
        link: Link::Table,
    };
    run(&rig.with(plain), &in_pieces(&SEQUENCE, &[1]))
}

#[test]
fn smollm2_gives_the_same_bits_everywhere() {
    let rig = smollm2();
    let expected = expected(&rig);
    for isa in Isa::available() {
        for n_threads in [1, 2] {
            let found =
                run(&rig.with(Setup { isa, n_threads, ..rig.setup }), &in_pieces(&SEQUENCE, &[11, 7]));
            assert_same_bits(&expected, &found, &format!("{isa}, {n_threads} threads"));
        }
    }
    for n_ranks in [2, 3, 4] {
        for link in [Link::Table, Link::Real(Transport::SharedMemory), Link::Real(Transport::Tcp)] {
            let rig = rig.with(Setup { n_ranks, n_threads: 1, link, ..rig.setup });
            let found = run(&rig, &in_pieces(&SEQUENCE, &[9, 1, 1, 7]));
            assert_same_bits(&expected, &found, &format!("{n_ranks} ranks, {link:?}"));
        }
    }
    for n_sequences in [1, 2, 7, 32] {
        let found = run(&rig, &in_a_crowd(&SEQUENCE, n_sequences, rig.config.n_vocab));
        assert_same_bits(&expected, &found, &format!("{n_sequences} sequences"));
    }
}
