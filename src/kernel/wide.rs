//! Loops compiled for several instruction sets, one chosen when the program runs.
//!
//! Loops are plain Rust that the compiler turns into vector code; the one thing that it does badly, a bit
//! for each comparison, is written by hand. The same source gives the same bits everywhere: no sum is
//! reordered, and `mul_add` is one rounding with or without the instruction.
#![allow(unsafe_code)]

/// Elements that share one word of bits.
pub(crate) const WORD: usize = 64;

/// A loop over its own slices. `run`, and whatever it calls in its loop, must be `#[inline(always)]`:
/// only what is inlined is compiled for the wider instruction set.
pub(crate) trait Loop {
    /// What it returns.
    type Output;
    /// The loop.
    fn run(self, isa: impl Isa) -> Self::Output;
}

/// What the compiler does not find by itself.
pub(crate) trait Isa: Copy {
    /// Bit i says whether `ranks[i] > bound`.
    fn above(self, ranks: &[u32; WORD], bound: u32) -> u64;
}

/// Any processor.
#[derive(Clone, Copy)]
struct Plain;

impl Isa for Plain {
    #[inline(always)]
    fn above(self, ranks: &[u32; WORD], bound: u32) -> u64 {
        ranks.iter().enumerate().fold(0, |bits, (j, r)| bits | u64::from(*r > bound) << j)
    }
}

/// Runs a loop on the widest vectors that this processor has.
pub(crate) fn wide<L: Loop>(work: L) -> L::Output {
    #[cfg(target_arch = "x86_64")]
    return x86::wide(work);
    #[cfg(not(target_arch = "x86_64"))]
    work.run(Plain) // the target's baseline, such as NEON, is all there is
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, Loop, Plain, WORD};
    use std::arch::x86_64::*;

    /// A processor with AVX2 and what comes with it. Only `wide` makes one, after it has looked.
    #[derive(Clone, Copy)]
    struct V3(());

    /// A processor with AVX-512 and what comes with it. Only `wide` makes one, after it has looked.
    #[derive(Clone, Copy)]
    struct V4(());

    pub(super) fn wide<L: Loop>(work: L) -> L::Output {
        // The standard library asks the processor once and remembers.
        let v3_here = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt");
        let v4_here = v3_here
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if v4_here {
            // SAFETY: every feature that `v4` enables was found.
            unsafe { v4(work) }
        } else if v3_here {
            // SAFETY: every feature that `v3` enables was found.
            unsafe { v3(work) }
        } else {
            work.run(Plain)
        }
    }

    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    fn v3<L: Loop>(work: L) -> L::Output {
        work.run(V3(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
    fn v4<L: Loop>(work: L) -> L::Output {
        work.run(V4(()))
    }

    impl Isa for V3 {
        #[inline(always)]
        fn above(self, ranks: &[u32; WORD], bound: u32) -> u64 {
            #[inline]
            #[target_feature(enable = "avx2")]
            fn go(ranks: &[u32; WORD], bound: u32) -> u64 {
                // There is only a signed comparison: the sign bits are flipped.
                let sign = _mm256_set1_epi32(i32::MIN);
                let bound = _mm256_xor_si256(_mm256_set1_epi32(bound as i32), sign);
                let mut bits = 0;
                for (i, eight) in ranks.as_chunks::<8>().0.iter().enumerate() {
                    // SAFETY: eight ranks are 32 bytes; the load needs no alignment.
                    let x = unsafe { _mm256_loadu_si256(eight.as_ptr().cast()) };
                    let above = _mm256_cmpgt_epi32(_mm256_xor_si256(x, sign), bound);
                    bits |= (_mm256_movemask_ps(_mm256_castsi256_ps(above)) as u64) << (8 * i);
                }
                bits
            }
            // SAFETY: a `V3` exists only where AVX2 does.
            unsafe { go(ranks, bound) }
        }
    }

    impl Isa for V4 {
        #[inline(always)]
        fn above(self, ranks: &[u32; WORD], bound: u32) -> u64 {
            #[inline]
            #[target_feature(enable = "avx512f")]
            fn go(ranks: &[u32; WORD], bound: u32) -> u64 {
                let bound = _mm512_set1_epi32(bound as i32);
                let mut bits = 0;
                for (i, sixteen) in ranks.as_chunks::<16>().0.iter().enumerate() {
                    // SAFETY: sixteen ranks are 64 bytes; the load needs no alignment.
                    let x = unsafe { _mm512_loadu_si512(sixteen.as_ptr().cast()) };
                    bits |= u64::from(_mm512_cmpgt_epu32_mask(x, bound)) << (16 * i);
                }
                bits
            }
            // SAFETY: a `V4` exists only where AVX-512 does.
            unsafe { go(ranks, bound) }
        }
    }
}
