//! The table of function pointers of one instruction set. It holds no state and decides nothing per call.

use crate::isa::Isa;
use crate::linear::LinearKernels;

/// The kernels of one instruction set. All tables give the same bits.
///
/// The pointers are `unsafe fn` where they need CPU features; a table is only handed out by [`Kernels::for_isa`],
/// which checks that the CPU has them, so whoever holds a `&'static Kernels` may call them.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    pub(crate) linear: LinearKernels,
}

const SCALAR: Kernels = Kernels { isa: Isa::Scalar, linear: LinearKernels::for_isa(Isa::Scalar) };

#[cfg(target_arch = "x86_64")]
const AVX2: Kernels = Kernels { isa: Isa::Avx2, linear: LinearKernels::for_isa(Isa::Avx2) };

#[cfg(target_arch = "x86_64")]
const AVX512: Kernels = Kernels { isa: Isa::Avx512, linear: LinearKernels::for_isa(Isa::Avx512) };

#[cfg(target_arch = "x86_64")]
const AVX512_VNNI: Kernels =
    Kernels { isa: Isa::Avx512Vnni, linear: LinearKernels::for_isa(Isa::Avx512Vnni) };

impl Kernels {
    /// The table of an instruction set.
    ///
    /// # Panics
    /// When this CPU lacks it.
    pub fn for_isa(isa: Isa) -> &'static Kernels {
        assert!(isa.is_available(), "this CPU has no {isa}");
        match isa {
            Isa::Scalar => &SCALAR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &AVX512_VNNI,
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("invariant: only the scalar table exists here"),
        }
    }

    /// The table of the best instruction set of this CPU.
    pub fn detect() -> &'static Kernels {
        Self::for_isa(Isa::detect())
    }

    /// The instruction set of this table.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_available_isa_has_its_own_table() {
        for isa in Isa::available() {
            assert_eq!(Kernels::for_isa(isa).isa(), isa);
        }
        assert_eq!(Kernels::detect().isa(), Isa::detect());
    }
}
