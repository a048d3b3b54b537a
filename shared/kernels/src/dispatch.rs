//! The table of function pointers of one instruction set. It holds no state and decides nothing per call.

use crate::attention::chunk::{self, AttentionKernels};
use crate::elementwise::PairKernel;
use crate::formats::{self, CodingKernel};
use crate::isa::Isa;
use crate::kv::NarrowKernel;
use crate::linear::LinearKernels;
use crate::math::exp;
use crate::rms_norm::RowKernel;
use crate::rope::RotateKernel;
use crate::{argmax, elementwise, kv, rms_norm, rope};

/// The kernels of one instruction set. All tables give the same bits.
///
/// The pointers are `unsafe fn` where they need CPU features; a table is only handed out by [`Kernels::for_isa`],
/// which checks that the CPU has them, so whoever holds a `&'static Kernels` may call them.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    pub(crate) linear: LinearKernels,
    pub(crate) exp: unsafe fn(&mut [f32]),
    pub(crate) add_into: PairKernel,
    pub(crate) silu_mul: PairKernel,
    pub(crate) max: unsafe fn(&[f32]) -> f32,
    pub(crate) rms_norm_row: RowKernel,
    pub(crate) rotate_half: RotateKernel,
    pub(crate) rotate_interleaved: RotateKernel,
    pub(crate) narrow: NarrowKernel,
    pub(crate) coding_sums: CodingKernel,
    pub(crate) attention: AttentionKernels,
}

const SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    linear: LinearKernels::for_isa(Isa::Scalar),
    exp: exp::exp_slice_scalar,
    add_into: elementwise::add_into_scalar,
    silu_mul: elementwise::silu_mul_scalar,
    max: argmax::max_scalar,
    rms_norm_row: rms_norm::rms_norm_row_scalar,
    rotate_half: rope::rotate_half_scalar,
    rotate_interleaved: rope::rotate_interleaved_scalar,
    narrow: kv::narrow_scalar,
    coding_sums: formats::coding_sums_scalar,
    attention: AttentionKernels {
        chunk_f16: chunk::chunk_scalar::<u16>,
        chunk_f32: chunk::chunk_scalar::<f32>,
        chunk_q8: chunk::chunk_scalar::<i8>,
        merge: chunk::merge_scalar,
    },
};

#[cfg(target_arch = "x86_64")]
const AVX2: Kernels = Kernels {
    isa: Isa::Avx2,
    linear: LinearKernels::for_isa(Isa::Avx2),
    exp: exp::exp_slice_avx2,
    add_into: elementwise::add_into_avx2,
    silu_mul: elementwise::silu_mul_avx2,
    max: argmax::max_avx2,
    rms_norm_row: rms_norm::rms_norm_row_avx2,
    rotate_half: rope::rotate_half_avx2,
    rotate_interleaved: rope::rotate_interleaved_avx2,
    narrow: kv::narrow_avx2,
    coding_sums: formats::coding_sums_avx2,
    attention: AttentionKernels {
        chunk_f16: chunk::chunk_avx2::<u16>,
        chunk_f32: chunk::chunk_avx2::<f32>,
        chunk_q8: chunk::chunk_avx2::<i8>,
        merge: chunk::merge_avx2,
    },
};

#[cfg(target_arch = "x86_64")]
const AVX512: Kernels = Kernels {
    isa: Isa::Avx512,
    linear: LinearKernels::for_isa(Isa::Avx512),
    exp: exp::exp_slice_avx512,
    add_into: elementwise::add_into_avx512,
    silu_mul: elementwise::silu_mul_avx512,
    max: argmax::max_avx512,
    rms_norm_row: rms_norm::rms_norm_row_avx512,
    rotate_half: rope::rotate_half_avx512,
    rotate_interleaved: rope::rotate_interleaved_avx512,
    narrow: kv::narrow_avx512,
    coding_sums: formats::coding_sums_avx512,
    attention: AttentionKernels {
        chunk_f16: chunk::chunk_avx512::<u16>,
        chunk_f32: chunk::chunk_avx512::<f32>,
        chunk_q8: chunk::chunk_avx512::<i8>,
        merge: chunk::merge_avx512,
    },
};

#[cfg(target_arch = "x86_64")]
const AVX512_VNNI: Kernels =
    Kernels { isa: Isa::Avx512Vnni, linear: LinearKernels::for_isa(Isa::Avx512Vnni), ..AVX512 };

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
