//! CPU or GPU: what was asked for, what there is, what was taken.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use anyhow::Context as _;
use clap::Args;
use paceline_model::{Cpu, Device};

/// Flags about devices.
#[derive(Args, Clone, PartialEq, Debug)]
pub struct DeviceOptions {
    /// What to compute with: auto, cpu or cuda:N; auto takes a GPU when one answers
    #[arg(long, env = "PACELINE_DEVICE", value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// Share of the free GPU memory that weights and KV cache may take
    #[arg(long, env = "PACELINE_GPU_MEMORY", value_name = "SHARE", default_value_t = GpuMemory(0.9))]
    pub gpu_memory: GpuMemory,
    /// NCCL, which sums over GPUs: libnccl.so.2 or its folder [default: where the dynamic linker looks]
    #[arg(long, env = "PACELINE_NCCL_LIB", value_name = "PATH")]
    pub nccl_lib: Option<PathBuf>,
}

/// A device as it is named on the command line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceChoice {
    /// The best there is.
    Auto,
    /// The cores of this machine.
    Cpu,
    /// The GPU with this number, as the driver counts.
    Cuda(usize),
}

/// A share of the free GPU memory, above 0 and at most 1.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GpuMemory(pub f64);

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let gpu = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, gpu) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(number)) => Ok(Self::Cuda(number)),
            _ => Err("a device is auto, cpu or cuda:N, such as cuda:0".into()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Cpu => formatter.write_str("cpu"),
            Self::Cuda(number) => write!(formatter, "cuda:{number}"),
        }
    }
}

impl FromStr for GpuMemory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
        share.map(Self).ok_or_else(|| "a share of memory is above 0 and at most 1, such as 0.9".into())
    }
}

impl fmt::Display for GpuMemory {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Takes a device and says which in the log.
///
/// # Errors
/// When a GPU is demanded and cannot be had.
pub fn choose(options: &DeviceOptions, cpu: Cpu) -> anyhow::Result<Arc<dyn Device>> {
    let device: Arc<dyn Device> = match options.device {
        DeviceChoice::Cpu => Arc::new(cpu),
        DeviceChoice::Auto => match gpu(0, cpu.n_threads, options) {
            Ok(gpu) => gpu,
            Err(error) => {
                tracing::info!(reason = %error, "no GPU, so the CPU");
                Arc::new(cpu)
            }
        },
        DeviceChoice::Cuda(number) => {
            let gpu = gpu(number, cpu.n_threads, options);
            gpu.with_context(|| format!("--device {}", options.device))?
        }
    };
    tracing::info!(asked = %options.device, taken = device.name(), threads = cpu.n_threads, "device chosen");
    Ok(device)
}

/// A GPU, if this build and this machine have one.
#[cfg(feature = "cuda")]
fn gpu(number: usize, n_threads: usize, options: &DeviceOptions) -> anyhow::Result<Arc<dyn Device>> {
    let gpu = paceline_cuda::Gpu::open(number, n_threads)?.with_memory_share(options.gpu_memory.0);
    Ok(Arc::new(gpu.with_nccl(options.nccl_lib.clone())))
}

/// A GPU, if this build and this machine have one.
#[cfg(not(feature = "cuda"))]
fn gpu(_number: usize, _n_threads: usize, _options: &DeviceOptions) -> anyhow::Result<Arc<dyn Device>> {
    anyhow::bail!("this build has no GPU support: build with --features cuda")
}

#[cfg(test)]
mod tests {
    use paceline_kernels::Kernels;

    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, device) in
            [("auto", DeviceChoice::Auto), ("cpu", DeviceChoice::Cpu), ("cuda:3", DeviceChoice::Cuda(3))]
        {
            assert_eq!((text.parse(), device.to_string()), (Ok(device), text.to_owned()));
        }
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(text.parse::<DeviceChoice>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_share_of_memory_is_a_share() {
        assert_eq!("0.9".parse(), Ok(GpuMemory(0.9)));
        for text in ["0", "1.01", "-0.5", "NaN", "90%"] {
            assert!(text.parse::<GpuMemory>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_cpu_is_taken_and_a_missing_gpu_is_an_error() {
        let cpu = Cpu { kernels: Kernels::detect(), n_threads: 1 };
        let take =
            |device| choose(&DeviceOptions { device, gpu_memory: GpuMemory(0.9), nccl_lib: None }, cpu);
        assert_eq!(take(DeviceChoice::Cpu).expect("a device").name(), cpu.name());
        assert!(take(DeviceChoice::Auto).is_ok(), "there is always something");
        // No machine has so many; without GPU support there is not even one.
        let error = take(DeviceChoice::Cuda(999)).err().expect("must be refused");
        let error = format!("{error:#}");
        let reason = if cfg!(feature = "cuda") { "no GPU can be used" } else { "--features cuda" };
        assert!(error.contains("--device cuda:999") && error.contains(reason), "{error}");
    }
}
