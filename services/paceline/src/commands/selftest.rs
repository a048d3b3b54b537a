//! `paceline selftest`: what a GPU must show before it serves. The checks themselves are those of `paceline-cuda`.

use std::{num::NonZeroUsize, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use paceline_cuda::{
    Gpu,
    backend::GraphMode,
    selftest::{self, Check, Devices, Extent, Outcome},
};
use paceline_shard::device::DeviceChoice;
use serde_json::json;

use crate::answer::write_stdout;

/// Checks a GPU: logits against the CPU's, the same bits in every batch, captured passes, several ranks
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  paceline selftest --device cuda:0
  compute-sanitizer --error-exitcode 9 paceline selftest --device cuda:0 --quick

Models are small, random and made in memory. Exit code 1 when a check fails; one that was skipped says what it lacks.")]
pub struct SelftestArgs {
    /// The GPU: cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda:0")]
    device: DeviceChoice,
    /// NCCL: libnccl.so.2 or its folder [default: where the dynamic linker looks]
    #[arg(long, env = "PACELINE_NCCL_LIB", value_name = "PATH")]
    nccl_lib: Option<PathBuf>,
    /// A few types and short prompts, for sanitizers
    #[arg(long)]
    quick: bool,
    /// Write JSON, one object a check
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When there is no such GPU or a check fails.
pub fn selftest(args: &SelftestArgs) -> anyhow::Result<()> {
    let DeviceChoice::Cuda(number) = args.device else {
        bail!("--device {}: the self-test is for GPUs, such as cuda:0", args.device);
    };
    let n_threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let gpu = Gpu::open(number, n_threads).with_context(|| format!("--device {}", args.device))?;
    let gpu = gpu.with_nccl(args.nccl_lib.clone());
    let eager = gpu.clone().with_graphs(GraphMode::Off);
    let extent = if args.quick { Extent::Quick } else { Extent::Full };
    let mut problem = None;
    let mut report = |check: &Check| {
        // What cannot be written now is an error at the end.
        let written = write_stdout(&if args.json { as_json(check) } else { as_text(check) });
        problem = problem.take().or(written.err());
    };
    let mut checks = selftest::run(&Devices { graphs: &gpu, eager: &eager }, extent, &mut report);
    checks.extend(selftest::nccl::run(&gpu, &mut report));
    if let Some(problem) = problem {
        return Err(problem);
    }
    let n_failed = checks.iter().filter(|check| matches!(check.outcome, Outcome::Failed(_))).count();
    anyhow::ensure!(n_failed == 0, "{n_failed} of {} checks failed", checks.len());
    Ok(())
}

fn as_text(check: &Check) -> String {
    let (verdict, text) = match &check.outcome {
        Outcome::Passed(found) => ("ok", found),
        Outcome::Failed(wrong) => ("FAILED", wrong),
        Outcome::Skipped(reason) => ("skipped", reason),
    };
    format!("{verdict:<7} {:<44} {:>7.2} s  {text}\n", check.name, check.duration.as_secs_f64())
}

fn as_json(check: &Check) -> String {
    // A check that was skipped is neither.
    let (ok, text) = match &check.outcome {
        Outcome::Passed(found) => (Some(true), found),
        Outcome::Failed(wrong) => (Some(false), wrong),
        Outcome::Skipped(reason) => (None, reason),
    };
    let object =
        json!({ "check": check.name, "ok": ok, "seconds": check.duration.as_secs_f64(), "found": text });
    format!("{object}\n")
}
