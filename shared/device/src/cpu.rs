//! Threads and instruction set of the CPU. All of them give the same bits.

use std::thread;

use clap::{Args, ValueEnum};
use paceline_kernels::{Isa, Kernels};
use paceline_model::Cpu;

/// Flags about the CPU.
#[derive(Args, Clone, Debug)]
pub struct CpuOptions {
    /// Compute threads [default: all cores]
    #[arg(long, env = "PACELINE_THREADS")]
    pub threads: Option<usize>,
    /// Instruction set of the kernels; all give the same bits
    #[arg(long, env = "PACELINE_ISA", value_enum, default_value_t = IsaChoice::Auto)]
    pub isa: IsaChoice,
}

/// Names of instruction sets.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum IsaChoice {
    Auto,
    Scalar,
    Avx2,
    Avx512,
    Avx512vnni,
}

impl CpuOptions {
    /// The CPU as it is to be used.
    ///
    /// # Errors
    /// When no or too many threads, or an instruction set that this machine lacks, are asked for.
    pub fn cpu(&self) -> anyhow::Result<Cpu> {
        Ok(Cpu { kernels: Kernels::for_isa(self.isa()?), n_threads: self.n_threads()? })
    }

    fn n_threads(&self) -> anyhow::Result<usize> {
        let n_cores = thread::available_parallelism().map_or(1, |n| n.get());
        let n_threads = self.threads.unwrap_or(n_cores);
        anyhow::ensure!(
            (1..=1024).contains(&n_threads),
            "--threads is {n_threads}; it must be from 1 to 1024"
        );
        Ok(n_threads)
    }

    fn isa(&self) -> anyhow::Result<Isa> {
        let isa = match self.isa {
            IsaChoice::Auto => Isa::detect(),
            IsaChoice::Scalar => Isa::Scalar,
            IsaChoice::Avx2 => Isa::Avx2,
            IsaChoice::Avx512 => Isa::Avx512,
            IsaChoice::Avx512vnni => Isa::Avx512Vnni,
        };
        anyhow::ensure!(
            isa.is_available(),
            "--isa asks for {isa:?}, which this processor lacks; it has {:?}",
            Isa::available()
        );
        Ok(isa)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_as_many_as_asked_for_within_limits() {
        let cpu = |threads| CpuOptions { threads, isa: IsaChoice::Scalar }.cpu();
        assert_eq!(cpu(Some(3)).expect("fits").n_threads, 3);
        assert!(cpu(None).expect("fits").n_threads >= 1);
        for threads in [0, 1025] {
            let error = cpu(Some(threads)).err().expect("must be refused").to_string();
            assert!(error.contains(&format!("--threads is {threads}")), "{error}");
        }
    }
}
