//! Loops compiled for several instruction sets, one chosen when the program runs.
//!
//! Loops are plain Rust that the compiler turns into vector code; the one thing that it does badly, a bit
//! for each comparison, is written by hand. The same source gives the same bits everywhere: no sum is
//! reordered, and `mul_add` is one rounding with or without the instruction.
#![allow(unsafe_code)]

/// Elements that share one word of bits.
pub(crate) const WORD: usize = 64;
/// f32 of a line, which is a cache line.
pub(crate) const LINE: usize = 16;

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
    /// Sixteen f32, for loops that keep them in registers.
    type Line: Copy;
    /// Whether registers hold some thirty lines, instead of eight at most.
    fn large(self) -> bool;
    /// From memory.
    fn load(self, x: &[f32; LINE]) -> Self::Line;
    /// To memory.
    fn store(self, x: Self::Line, to: &mut [f32; LINE]);
    /// The same number sixteen times.
    fn splat(self, x: f32) -> Self::Line;
    /// `a * b + c` with one rounding.
    fn multiply_add(self, a: Self::Line, b: Self::Line, c: Self::Line) -> Self::Line;
    /// Magnitudes.
    fn abs(self, x: Self::Line) -> Self::Line;
    /// Bit i says whether `ranks[i] > bound`.
    fn above(self, ranks: &[u32; WORD], bound: u32) -> u64;
}

/// Any processor.
#[derive(Clone, Copy)]
struct Plain;

impl Isa for Plain {
    #[inline(always)]
    fn large(self) -> bool {
        false
    }

    type Line = [f32; LINE];
    #[inline(always)]
    fn load(self, x: &[f32; LINE]) -> [f32; LINE] {
        *x
    }
    #[inline(always)]
    fn store(self, x: [f32; LINE], to: &mut [f32; LINE]) {
        *to = x;
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; LINE] {
        [x; LINE]
    }
    #[inline(always)]
    fn multiply_add(self, a: [f32; LINE], b: [f32; LINE], mut c: [f32; LINE]) -> [f32; LINE] {
        for ((a, b), c) in a.into_iter().zip(b).zip(&mut c) {
            *c = a.mul_add(b, *c);
        }
        c
    }
    #[inline(always)]
    fn abs(self, x: [f32; LINE]) -> [f32; LINE] {
        x.map(f32::abs)
    }

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

/// Asks for memory that will be read soon; does nothing where there is no such instruction.
#[inline(always)]
pub(crate) fn soon<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in x.chunks((64 / size_of::<T>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, which reads nothing: no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Whether a level may be used; tests forbid some.
#[cfg(all(target_arch = "x86_64", not(test)))]
fn allowed(_level: u8) -> bool {
    true
}
#[cfg(test)]
fn allowed(level: u8) -> bool {
    level <= tests::LEVEL.load(std::sync::atomic::Ordering::Relaxed)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Isa, LINE, Loop, Plain, WORD};
    use std::arch::x86_64::*;

    /// A processor with AVX2 and what comes with it. Only `wide` makes one, after it has looked.
    #[derive(Clone, Copy)]
    struct V3(());

    /// A processor with AVX-512 and what comes with it. Only `wide` makes one, after it has looked.
    #[derive(Clone, Copy)]
    struct V4(());

    pub(super) fn wide<L: Loop>(work: L) -> L::Output {
        // The standard library asks the processor once and remembers.
        let v3_here = super::allowed(3)
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt");
        let v4_here = v3_here
            && super::allowed(4)
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
        fn large(self) -> bool {
            false
        }

        type Line = [__m256; 2];
        #[inline(always)]
        fn load(self, x: &[f32; LINE]) -> [__m256; 2] {
            let x = x.as_ptr();
            // SAFETY: a `V3` exists only where AVX2 does; both halves are inside of the line.
            unsafe { [_mm256_loadu_ps(x), _mm256_loadu_ps(x.add(8))] }
        }
        #[inline(always)]
        fn store(self, x: [__m256; 2], to: &mut [f32; LINE]) {
            let to = to.as_mut_ptr();
            // SAFETY: as in `load`.
            unsafe {
                _mm256_storeu_ps(to, x[0]);
                _mm256_storeu_ps(to.add(8), x[1]);
            }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> [__m256; 2] {
            // SAFETY: a `V3` exists only where AVX2 does.
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn multiply_add(self, a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: a `V3` exists only where FMA does.
            unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
        }
        #[inline(always)]
        fn abs(self, x: [__m256; 2]) -> [__m256; 2] {
            // SAFETY: a `V3` exists only where AVX2 does.
            x.map(|x| unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) })
        }

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
        fn large(self) -> bool {
            true
        }

        type Line = __m512;
        #[inline(always)]
        fn load(self, x: &[f32; LINE]) -> __m512 {
            // SAFETY: a `V4` exists only where AVX-512 does; a line is 64 bytes.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, x: __m512, to: &mut [f32; LINE]) {
            // SAFETY: as in `load`.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: a `V4` exists only where AVX-512 does.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn multiply_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn abs(self, x: __m512) -> __m512 {
            // SAFETY: as in `splat`.
            unsafe { _mm512_abs_ps(x) }
        }

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

#[cfg(test)]
mod tests {
    use crate::kernel::adamw::{self, AdamW, Clock, Closed};
    use crate::kernel::gather::{gather, scatter};
    use crate::kernel::lion::{self, Lion};
    use crate::kernel::outer::{Samples, accumulate_outer};
    use crate::kernel::reduce::{Map, accumulate};
    use crate::kernel::rng::uniform;
    use crate::kernel::select::{Order, threshold, topk, topk_rows};
    use crate::kernel::sgd::{self, Sgd};
    use crate::num::Element;
    use crate::view::Positions;
    use half::{bf16, f16};
    use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

    /// The highest level that may be used.
    pub(super) static LEVEL: AtomicU8 = AtomicU8::new(4);

    fn select<T: Element>(x: &[f32]) -> Vec<Positions> {
        let x: Vec<T> = x.iter().map(|x| T::from_f32(x - 0.5)).collect();
        let parts = [("a", &x[..70_001]), ("b", &x[70_001..])];
        let mut all = Vec::new();
        for (order, absolute) in [(Order::Largest, true), (Order::Smallest, false)] {
            for k in [1, 1234, 50_000] {
                all.extend(topk(2, &parts, k, order, absolute).unwrap());
            }
            all.extend(threshold(2, &parts, 0.3, order, absolute).unwrap());
            all.push(topk_rows(2, "a", &x, 1503, 100, order, absolute).unwrap());
        }
        all
    }

    fn step<T: Element>(x: &[f32]) -> Vec<u64> {
        let n = 20_003;
        let (mut value, mut m, mut v) = (x[..n].to_vec(), x[1..=n].to_vec(), x[2..n + 2].to_vec());
        let mut weight: Vec<T> = x.iter().map(|x| T::from_f32(*x)).collect();
        let index: Vec<i32> = (0..n as i32).map(|i| 5 * i + i % 3).collect();
        let (lr, weight_decay, maximize) = (1e-2, 0.1, false);
        let (beta1, beta2) = (0.9, 0.99);
        let c = AdamW { lr, beta1, beta2, eps: 1e-8, weight_decay, maximize, scale: 1.5 };
        let open: Vec<u8> = (0..n).map(|i| u8::from(i % 5 < 3)).collect();
        let mut ages: Vec<i32> = (0..n as i32).map(|i| i % 9).collect();
        let closed = [None, Some(Closed::Updated { decay: true }), Some(Closed::Frozen)];
        for closed in closed.into_iter().chain([Some(Closed::Reset)]) {
            let gate = closed.map(|closed| (&open[..], closed));
            let (to, g) = (Some(("w", &mut weight[..], &index[..])), &x[3..n + 3]);
            adamw::step(2, &c, Clock::Shared(3), gate, &mut value, g, &mut m, &mut v, to).unwrap();
            let (to, clock) = (Some(("w", &mut weight[..], &index[..])), Clock::Each(&mut ages));
            adamw::step(2, &c, clock, gate, &mut value, g, &mut m, &mut v, to).unwrap();
        }
        let c = Lion { lr, beta1, beta2, weight_decay, maximize };
        let to = Some(("w", &mut weight[..], &index[..]));
        lion::step(2, &c, &mut value, &x[5..n + 5], &mut m, to).unwrap();
        let c = Sgd { lr, momentum: 0.9, dampening: 0.1, weight_decay, nesterov: true, maximize };
        let to = Some(("w", &mut weight[..], &index[..]));
        sgd::step(2, &c, false, &mut value, &x[4..n + 4], Some(&mut m), to).unwrap();
        accumulate(2, &mut v, &weight[..n], Map::Square, 0.7).unwrap();
        gather(2, "w", &weight, &index, &mut m, true).unwrap();
        scatter(2, "w", &mut weight, &index, &m).unwrap();
        let wide = [value, m, v].concat();
        wide.iter().map(|x| x.bits()).chain(weight.iter().map(|x| x.bits())).collect()
    }

    fn outer(x: &[f32]) -> Vec<u32> {
        let (samples, tokens, rows, columns) = (5, 7, 23, 81);
        let (left, right) = (&x[..35 * rows], &x[35 * rows..][..35 * columns]);
        let factors = Samples { left, right, samples, tokens, rows, columns };
        let mut total = x[..rows * columns].to_vec();
        for map in [Map::Id, Map::Abs, Map::Square] {
            accumulate_outer(2, &mut total, &factors, map).unwrap();
        }
        total.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let run = |level| {
            LEVEL.store(level, Relaxed);
            let mut x = vec![0.0; 1503 * 100];
            uniform(2, 1, 2, &mut x);
            let selected = [select::<f32>(&x), select::<f16>(&x), select::<bf16>(&x)];
            x.iter_mut().for_each(|x| *x -= 0.5);
            let outer = outer(&x);
            x.iter_mut().for_each(|x| *x += 0.5);
            (selected, outer, [step::<f32>(&x), step::<f16>(&x), step::<bf16>(&x)])
        };
        let best = run(4);
        assert!(best == run(3), "AVX2");
        assert!(best == run(2), "the baseline");
    }
}
