//! Whole passes of the GPU backend on the emulated device: near the CPU's logits, and the same bits whatever the batch, the
//! chunks of a prompt, the kernels chosen and whether a graph is replayed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[path = "../../model/tests/support/mod.rs"]
mod model;
mod support;

use model::models;
use model::rig::{AllLogits, Rig, Step, assert_same_bits, in_a_crowd, in_pieces, of_first_sequence, tokens};
use model::threads::Threads;
use paceline_checkpoint::Checkpoint;
use paceline_collectives::{AbortFlag, Collective};
use paceline_cuda::backend::{GpuBackend, GraphMode, LinkMode};
use paceline_cuda::kernels::attention::HEAD_DIMS;
use paceline_domain::{BlockId, ErrorKind, KvType, TokenId};
use paceline_kernels::{Kernels, Pinning, ThreadPool};
use paceline_model::link::{Group, Route};
use paceline_model::synthetic::Synthetic;
use paceline_model::{Backend, Batch, Capacity, Cpu, Decoder, Device, LoadSpec, ModelError, SplitPlan};
use support::emulated::Emulated;
use support::pretended_link::{PretendedLink, Wire};

/// The emulator as a device.
struct EmulatedGpu {
    graphs: GraphMode,
}

impl Device for EmulatedGpu {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        let pool = ThreadPool::new(2, Pinning::None);
        Ok(Box::new(GpuBackend::load(Box::new(Emulated::new()), spec, &pool, self.graphs)?))
    }
}

const EAGER: EmulatedGpu = EmulatedGpu { graphs: GraphMode::Off };
const GRAPHS: EmulatedGpu = EmulatedGpu { graphs: GraphMode::Auto };

/// A rank's end of the wire; a rank without computes on the CPU.
type End = fn(&Arc<Wire>, usize) -> Option<PretendedLink>;

/// Emulators that pretend to be linked: the device, and its end of the wire, are those of the rank.
struct Linked {
    wire: Arc<Wire>,
    end: End,
    modes: (GraphMode, LinkMode),
}

impl Linked {
    fn new(end: End) -> Self {
        Self { wire: Arc::default(), end, modes: (GraphMode::Auto, LinkMode::Auto) }
    }

    fn own_devices(wire: &Arc<Wire>, rank: usize) -> Option<PretendedLink> {
        Some(PretendedLink::new(wire, rank as u8))
    }
}

impl Device for Linked {
    fn name(&self) -> String {
        "emulated and linked".into()
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        let Some(end) = (self.end)(&self.wire, spec.rank) else {
            return Cpu { kernels: Kernels::detect(), n_threads: 1 }.load(spec);
        };
        let (pool, runtime) = (ThreadPool::new(1, Pinning::None), Emulated::new().with_link(end));
        let (graphs, links) = self.modes;
        Ok(Box::new(GpuBackend::load(Box::new(runtime), spec, &pool, graphs)?.with_links(links)))
    }
}

fn rig(synthetic: &Synthetic) -> Rig {
    Rig::new(Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint"))
}

fn gpu(rig: &Rig, device: &EmulatedGpu, steps: &[Step]) -> Vec<Vec<f32>> {
    of_first_sequence(steps, rig.run_on(device, steps))
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn least_cosine(expected: &AllLogits, found: &AllLogits) -> f64 {
    let rows = expected.iter().flatten().zip(found.iter().flatten());
    rows.map(|(expected, found)| cosine(expected, found)).fold(1.0, f64::min)
}

/// Between GPUs. Activations are bfloat16: three digits, and rows of small models are short.
const LEAST_COSINE: f64 = 0.9997;
/// Between a GPU and a CPU, where activations are 8-bit codes but for the head of small models.
const LEAST_COSINE_OF_CPU: f64 = 0.996;

#[test]
fn all_models_are_near_the_cpu() {
    for (name, synthetic) in models::all() {
        let rig = rig(&synthetic);
        if !HEAD_DIMS.contains(&rig.config.head_dim) {
            continue;
        }
        let steps = in_pieces(&tokens(3, 40, rig.config.n_vocab), &[33, 1]);
        let least = least_cosine(&rig.run(&steps), &rig.run_on(&GRAPHS, &steps));
        assert!(least > LEAST_COSINE_OF_CPU, "{name}: cosine {least}");
    }
}

#[test]
fn chunks_batches_and_graphs_do_not_change_a_bit() {
    let models = [models::llama_wide(), models::mistral(), models::qwen2_f16()];
    for synthetic in models {
        let rig = rig(&synthetic);
        let own = tokens(5, 30, rig.config.n_vocab);
        let one_by_one = gpu(&rig, &EAGER, &in_pieces(&own, &[1]));
        for pieces in [&[30][..], &[7, 1, 13], &[20, 1]] {
            for device in [&EAGER, &GRAPHS] {
                assert_same_bits(&one_by_one, &gpu(&rig, device, &in_pieces(&own, pieces)), "pieces");
            }
        }
        assert_same_bits(&one_by_one, &gpu(&rig, &GRAPHS, &in_pieces(&own, &[1])), "graphs");
        let crowd = in_a_crowd(&own, 5, rig.config.n_vocab);
        assert_same_bits(&one_by_one, &gpu(&rig, &GRAPHS, &crowd), "a crowd with graphs");
        assert_same_bits(&one_by_one, &gpu(&rig, &EAGER, &crowd), "a crowd");
    }
}

#[test]
fn ranks_agree_with_one_rank() {
    let rig = rig(&models::llama_wide());
    let steps = in_pieces(&tokens(8, 24, rig.config.n_vocab), &[17, 1]);
    let alone = rig.run_on(&EAGER, &steps);
    for n_ranks in [2, 3] {
        let group = rig.with(model::rig::Setup { n_ranks, ..rig.setup });
        let least = least_cosine(&alone, &group.run_on(&GRAPHS, &steps));
        assert!(least > LEAST_COSINE, "{n_ranks} ranks: cosine {least}");
    }
}

#[test]
fn a_group_of_cpu_and_gpu_is_near_one_cpu() {
    let rig = rig(&models::llama_wide());
    let steps = in_pieces(&tokens(9, 24, rig.config.n_vocab), &[17, 1]);
    let expected = rig.run(&steps);
    let pair = rig.with(model::rig::Setup { n_ranks: 2, ..rig.setup });
    let cpu = Cpu { kernels: Kernels::for_isa(rig.setup.isa), n_threads: rig.setup.n_threads };
    for devices in [[&cpu as &dyn Device, &GRAPHS], [&GRAPHS, &cpu]] {
        let least = least_cosine(&expected, &pair.run_on_each(&devices, &steps));
        let names = devices.map(Device::name);
        assert!(least > LEAST_COSINE_OF_CPU, "{names:?}: cosine {least}");
    }
}

#[test]
fn linked_ranks_have_the_bits_of_ranks_through_the_host() {
    for synthetic in [models::llama_wide(), models::qwen2_f16()] {
        let rig = rig(&synthetic);
        let steps = in_pieces(&tokens(8, 22, rig.config.n_vocab), &[15, 1]);
        for n_ranks in [2, 3] {
            let group = rig.with(model::rig::Setup { n_ranks, ..rig.setup });
            let expected = group.run_on(&EAGER, &steps).concat();
            let linked = Linked::new(Linked::own_devices);
            let what = format!("{n_ranks} ranks");
            assert_same_bits(&expected, &group.run_on(&linked, &steps).concat(), &what);
            // Two in each layer: the prompt, the first token, and once more into a graph that repeats them.
            let n = 2 * rig.config.n_layers * n_ranks;
            assert_eq!(linked.wire.n_gathers(), (3 * n, n));
            let eager =
                Linked { modes: (GraphMode::Off, LinkMode::Auto), ..Linked::new(Linked::own_devices) };
            assert_same_bits(&expected, &group.run_on(&eager, &steps).concat(), &what);
            assert_eq!(eager.wire.n_gathers(), (steps.len() * n, 0));
        }
    }
}

#[test]
fn a_rank_alone_is_linked_on_demand() {
    let rig = rig(&models::llama_wide());
    let steps = in_pieces(&tokens(8, 12, rig.config.n_vocab), &[5, 1]);
    let expected = rig.run_on(&EAGER, &steps).concat();
    for (mode, n) in [(LinkMode::Auto, 0), (LinkMode::Always, 2 * rig.config.n_layers)] {
        let linked = Linked { modes: (GraphMode::Auto, mode), ..Linked::new(Linked::own_devices) };
        assert_same_bits(&expected, &rig.run_on(&linked, &steps).concat(), "alone");
        assert_eq!(linked.wire.n_gathers(), (3 * n, n));
    }
}

#[test]
fn ranks_that_cannot_be_linked_go_through_the_host() {
    let rig = rig(&models::llama_wide());
    let rig = rig.with(model::rig::Setup { n_ranks: 2, ..rig.setup });
    let steps = in_pieces(&tokens(8, 12, rig.config.n_vocab), &[7, 1]);
    let expected = rig.run_on(&EAGER, &steps);
    let ends: [(&str, End); 2] = [
        ("one device", |wire, _| Some(PretendedLink::new(wire, 4))),
        ("one finds out late", |wire, rank| {
            let end = PretendedLink::new(wire, rank as u8);
            Some(if rank == 1 { end.broken() } else { end })
        }),
    ];
    for (what, end) in ends {
        let linked = Linked::new(end);
        assert_same_bits(&expected.concat(), &rig.run_on(&linked, &steps).concat(), what);
        assert_eq!(linked.wire.n_gathers(), (0, 0), "{what}");
    }
    // The CPU rounds otherwise.
    for cpu in [0, 1] {
        let linked = Linked::new(match cpu {
            0 => |wire, rank| (rank != 0).then(|| PretendedLink::new(wire, 1)),
            _ => |wire, rank| (rank != 1).then(|| PretendedLink::new(wire, 1)),
        });
        let least = least_cosine(&expected, &rig.run_on(&linked, &steps));
        assert!(least > LEAST_COSINE && linked.wire.n_gathers() == (0, 0), "a CPU as rank {cpu}: {least}");
    }
}

#[test]
fn a_head_for_fewer_tokens_gives_the_same_logits() {
    let rig = rig(&models::llama_wide());
    let steps = in_pieces(&tokens(5, 12, rig.config.n_vocab), &[9, 1]);
    for n_ranks in [1, 2] {
        let whole = rig.with(model::rig::Setup { n_ranks, ..rig.setup });
        let few = rig.with(model::rig::Setup { n_tokens: 100, ..whole.setup });
        let expected: Vec<Vec<f32>> =
            gpu(&whole, &EAGER, &steps).iter().map(|row| row[..100].to_vec()).collect();
        assert_same_bits(&expected, &gpu(&few, &GRAPHS, &steps), &format!("{n_ranks} ranks"));
    }
}

#[test]
fn a_peer_that_is_lost_is_an_error_in_time() {
    let rig = rig(&models::llama_wide());
    let plan = SplitPlan::new(&rig.config, 2).expect("a plan");
    let linked = Linked::new(Linked::own_devices);
    let capacity = Capacity { kv_type: KvType::F16, n_kv_blocks: 1, max_rows: 1, max_output_rows: 1 };
    let (checkpoint, config) = (&rig.checkpoint, &rig.config);
    let join = |collective: &mut Threads, deadline: Duration| {
        let rank = collective.rank();
        let spec =
            LoadSpec { checkpoint, config, plan: &plan, rank, quantize: None, capacity, progress: &|_| () };
        let mut decoder = Decoder::load(&spec, &linked).expect("loads");
        let abort = AbortFlag::new();
        let route = decoder.join(&mut Group { collective, connect_deadline: deadline, deadline, abort });
        assert!(matches!(route, Ok(Route::Direct(_))), "{route:?}");
        decoder
    };
    let mut group = Threads::group(2);
    let (mut second, mut first) = (group.pop().expect("two"), group.pop().expect("two"));
    std::thread::scope(|scope| {
        scope.spawn(|| drop(join(&mut second, Duration::from_secs(60))));
        let mut decoder = join(&mut first, Duration::from_millis(100));
        let batch = Batch {
            tokens: &[TokenId(1)],
            positions: &[0],
            sequence_of_row: &[0],
            block_tables: &[&[BlockId(0)]],
            output_rows: &[0],
            copies: &[],
        };
        let error = decoder.forward(&batch, &mut first).err().expect("nobody is there");
        assert!(error.to_string().contains("was not done within 100ms"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
    });
}

#[test]
fn the_self_test_passes() {
    let devices = paceline_cuda::selftest::Devices { graphs: &GRAPHS, eager: &EAGER };
    let checks = paceline_cuda::selftest::run(&devices, paceline_cuda::selftest::Extent::Quick, &mut |_| ());
    assert!(checks.len() > 6);
    for check in checks {
        let passed = matches!(check.outcome, paceline_cuda::selftest::Outcome::Passed(_));
        assert!(passed, "{}: {:?}", check.name, check.outcome);
    }
}

/// Counts the graphs its passes replay.
struct Counted(Arc<AtomicU64>);

impl Device for Counted {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn load(&self, spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        let (pool, device) = (ThreadPool::new(2, Pinning::None), Emulated::new().counting_replays(&self.0));
        Ok(Box::new(GpuBackend::load(Box::new(device), spec, &pool, GraphMode::Auto)?))
    }
}

#[test]
fn decode_passes_are_captured_when_their_shape_comes_again() {
    let rig = rig(&models::qwen2_f16());
    let n_replays = Arc::new(AtomicU64::new(0));
    // A prompt, then eight tokens: the first of them is launched one by one, the others are replayed.
    let steps = in_pieces(&tokens(5, 28, rig.config.n_vocab), &[20, 1]);
    rig.run_on(&Counted(Arc::clone(&n_replays)), &steps);
    assert_eq!(n_replays.load(Ordering::Relaxed), 7);
}
