//! The two inner loops, for the processor at hand.
use super::lanes::{LANES, Line, Sample, multiply_add, pack, total};

/// Inner loops of one instruction set. All give the same bits.
pub(super) trait Isa: Copy {
    /// Packs one line of `LANES` features: feature f of `T::TOKENS` rows of `src`, `stride` apart,
    /// goes to `dst[f * pitch]`.
    fn transpose<T: Sample>(self, src: &[T], stride: usize, dst: &mut [Line], pitch: usize);

    /// The products of `y` with each of `x`, rows of equal length; N is at most 4, and the rest of the
    /// result has no meaning.
    fn dots<T: Sample, const N: usize>(self, y: &[Line], x: [&[Line]; N]) -> [f32; 4];
}

/// Work that is written once for every instruction set. `run`, and what it calls in its loops, must be
/// `#[inline(always)]`: only what is inlined is compiled for the wider instruction set.
pub(super) trait Work {
    /// Does it.
    fn run(self, isa: impl Isa);
}

/// Any processor.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Isa for Plain {
    #[inline(always)]
    fn transpose<T: Sample>(self, src: &[T], stride: usize, dst: &mut [Line], pitch: usize) {
        pack(src, stride, (T::TOKENS, LANES), dst, pitch);
    }

    #[inline(always)]
    fn dots<T: Sample, const N: usize>(self, y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
        let mut out = [0.0; 4];
        for (out, x) in out.iter_mut().zip(x) {
            let mut lanes = [0.0; LANES];
            for (x, y) in x.iter().zip(y) {
                multiply_add::<T>(&mut lanes, x, y);
            }
            *out = total(lanes);
        }
        out
    }
}

/// Does the work with the best instructions that this processor has.
pub(super) fn best(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    super::x86::best(work);
    #[cfg(not(target_arch = "x86_64"))]
    work.run(Plain); // the target's baseline, such as NEON, is all there is
}
