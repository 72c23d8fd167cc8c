//! The inner loops with AVX2 and with AVX-512.
#![allow(unsafe_code)]
use super::isa::{Isa, Plain, Work};
use super::lanes::{Form, LANES, Line, Sample};
use std::arch::x86_64::*;

/// A processor with AVX2, FMA and F16C. Only `best` makes one, after it has looked.
#[derive(Clone, Copy)]
pub(super) struct V3(());

/// A processor with AVX-512, with its bf16 product if `BF16`. Only `best` makes one, after it has looked.
#[derive(Clone, Copy)]
pub(super) struct V4<const BF16: bool>(());

/// The instruction sets that this processor has: `V3`, `V4<false>`, `V4<true>`.
pub(super) fn found() -> (Option<V3>, Option<V4<false>>, Option<V4<true>>) {
    // The standard library asks the processor once and remembers.
    let v3 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("lzcnt");
    let v4 = v3
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let bf16 = v4 && is_x86_feature_detected!("avx512bf16");
    (v3.then_some(V3(())), v4.then_some(V4(())), bf16.then_some(V4(())))
}

/// Does the work with the best instructions that this processor has.
pub(super) fn best(work: impl Work) {
    match found() {
        (.., Some(isa)) => isa.run(work),
        (_, Some(isa), _) => isa.run(work),
        (Some(isa), ..) => isa.run(work),
        _ => work.run(Plain),
    }
}

impl V3 {
    pub(super) fn run(self, work: impl Work) {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt")]
        fn go(isa: V3, work: impl Work) {
            work.run(isa);
        }
        // SAFETY: a `V3` exists only where these features were found.
        unsafe { go(self, work) }
    }
}

impl V4<false> {
    pub(super) fn run(self, work: impl Work) {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt"
        )]
        fn go(isa: V4<false>, work: impl Work) {
            work.run(isa);
        }
        // SAFETY: a `V4` exists only where these features were found.
        unsafe { go(self, work) }
    }
}

impl V4<true> {
    pub(super) fn run(self, work: impl Work) {
        #[target_feature(
            enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,popcnt,lzcnt"
        )]
        fn go(isa: V4<true>, work: impl Work) {
            work.run(isa);
        }
        // SAFETY: a `V4<true>` exists only where these features were found.
        unsafe { go(self, work) }
    }
}

/// How many bytes ahead of a block its rows are asked for.
const AHEAD: usize = 128;

/// Asks for the part of these rows that is packed soon: they are more streams than a processor follows.
#[inline(always)]
fn prefetch<T: Sample>(src: &[T], stride: usize) {
    for token in 0..T::TOKENS {
        let ahead = src.as_ptr().wrapping_add(token * stride).wrapping_byte_add(AHEAD);
        // SAFETY: a hint reads nothing, so that any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
}

/// Refuses a block that `transpose` would leave.
#[inline(always)]
fn check_block<T: Sample>(src: &[T], stride: usize, dst: &[Line], pitch: usize) {
    assert!(src.len() >= LANES && (src.len() - LANES) / (T::TOKENS - 1) >= stride);
    assert!(!dst.is_empty() && (dst.len() - 1) / (LANES - 1) >= pitch);
}

impl Isa for V3 {
    #[inline(always)]
    fn transpose<T: Sample>(self, src: &[T], stride: usize, dst: &mut [Line], pitch: usize) {
        check_block(src, stride, dst, pitch);
        prefetch(src, stride);
        // SAFETY: a `V3` exists only where AVX2 and F16C do; the block is inside of both slices.
        unsafe { transpose_v3(src, stride, dst, pitch) }
    }

    #[inline(always)]
    fn dots<T: Sample, const N: usize>(self, y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
        // SAFETY: a `V3` exists only where AVX2 and FMA do.
        unsafe { dots_v3::<T, N>(y, x) }
    }
}

impl<const BF16: bool> Isa for V4<BF16> {
    #[inline(always)]
    fn transpose<T: Sample>(self, src: &[T], stride: usize, dst: &mut [Line], pitch: usize) {
        check_block(src, stride, dst, pitch);
        prefetch(src, stride);
        // SAFETY: a `V4` exists only where AVX-512 does; the block is inside of both slices.
        unsafe { transpose_v4(src, stride, dst, pitch) }
    }

    #[inline(always)]
    fn dots<T: Sample, const N: usize>(self, y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
        if BF16 && T::FORM == Form::Pair {
            // SAFETY: a `V4<true>` exists only where AVX-512 with its bf16 product does.
            unsafe { dots_bf16::<N>(y, x) }
        } else {
            // SAFETY: a `V4` exists only where AVX-512 does.
            unsafe { dots_v4::<T, N>(y, x) }
        }
    }
}

/// # Safety
/// From `src` on there are `T::TOKENS` rows of `LANES` elements, `stride` apart; from `dst` on there
/// are `LANES` lines, `pitch` apart.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn transpose_v4<T: Sample>(src: &[T], stride: usize, dst: &mut [Line], pitch: usize) {
    let mut r = [_mm512_setzero_si512(); LANES];
    for (j, r) in r.iter_mut().enumerate() {
        // SAFETY: the caller says that the rows are there.
        *r = unsafe {
            match T::FORM {
                Form::Single => _mm512_loadu_si512(src.as_ptr().add(j * stride).cast()),
                Form::Widened => {
                    let half = _mm256_loadu_si256(src.as_ptr().add(j * stride).cast());
                    _mm512_castps_si512(_mm512_cvtph_ps(half))
                }
                Form::Pair => {
                    let early = _mm256_loadu_si256(src.as_ptr().add(2 * j * stride).cast());
                    let late = _mm256_loadu_si256(src.as_ptr().add((2 * j + 1) * stride).cast());
                    let late = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(late));
                    _mm512_or_si512(_mm512_cvtepu16_epi32(early), late)
                }
            }
        };
    }
    let mut s = r;
    for i in 0..8 {
        s[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // r[4b + c], block l: feature 4l + c of rows 4b .. 4b + 4
    for b in 0..4 {
        let (p, q) = (4 * b, 4 * b + 2);
        r[p] = _mm512_unpacklo_epi64(s[p], s[q]);
        r[p + 1] = _mm512_unpackhi_epi64(s[p], s[q]);
        r[p + 2] = _mm512_unpacklo_epi64(s[p + 1], s[q + 1]);
        r[p + 3] = _mm512_unpackhi_epi64(s[p + 1], s[q + 1]);
    }
    for c in 0..4 {
        let even = [
            _mm512_shuffle_i32x4::<0x88>(r[c], r[4 + c]),
            _mm512_shuffle_i32x4::<0x88>(r[8 + c], r[12 + c]),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0xdd>(r[c], r[4 + c]),
            _mm512_shuffle_i32x4::<0xdd>(r[8 + c], r[12 + c]),
        ];
        s[c] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        s[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        s[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        s[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    for (f, s) in s.iter().enumerate() {
        // SAFETY: the caller says that the lines are there; a `Line` is aligned to 64 bytes.
        unsafe { _mm512_store_si512(dst.as_mut_ptr().add(f * pitch).cast(), *s) };
    }
}

/// Refuses rows of unequal length; the loops after it need no other check.
#[inline(always)]
fn check_rows<const N: usize>(y: &[Line], x: &[&[Line]; N]) {
    for x in x {
        assert!(x.len() == y.len());
    }
}

#[inline(always)]
fn ps512(line: &Line) -> __m512 {
    // SAFETY: any 64 bytes are a vector of 16 f32. This is the `From` that the types lack.
    unsafe { std::mem::transmute::<Line, __m512>(*line) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn dots_v4<T: Sample, const N: usize>(y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
    let mut sums = [_mm512_setzero_ps(); 4];
    check_rows(y, &x);
    for j in 0..y.len() {
        let y = ps512(&y[j]);
        for (sum, x) in sums.iter_mut().zip(&x) {
            let x = ps512(&x[j]);
            if T::FORM == Form::Pair {
                *sum = _mm512_fmadd_ps(high512(x), high512(y), *sum);
                *sum = _mm512_fmadd_ps(low512(x), low512(y), *sum);
            } else {
                *sum = _mm512_fmadd_ps(x, y, *sum);
            }
        }
    }
    totals(sums)
}

#[inline]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl")]
fn dots_bf16<const N: usize>(y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
    // SAFETY: any 64 bytes are a vector of 32 bf16.
    let pairs = |line: &Line| unsafe { std::mem::transmute::<Line, __m512bh>(*line) };
    let mut sums = [_mm512_setzero_ps(); 4];
    check_rows(y, &x);
    for j in 0..y.len() {
        let y = pairs(&y[j]);
        for (sum, x) in sums.iter_mut().zip(&x) {
            *sum = _mm512_dpbf16_ps(*sum, pairs(&x[j]), y);
        }
    }
    totals(sums)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn high512(x: __m512) -> __m512 {
    let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn low512(x: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(x)))
}

/// The sum of the lanes of each, in the order of `lanes::total`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn totals(s: [__m512; 4]) -> [f32; 4] {
    let fold = |a, b| {
        let low = _mm512_shuffle_f32x4::<0x44>(a, b);
        _mm512_add_ps(low, _mm512_shuffle_f32x4::<0xee>(a, b)) // eight lanes of a, eight of b
    };
    let (a, b) = (fold(s[0], s[1]), fold(s[2], s[3]));
    let four =
        _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    let two = _mm512_add_ps(four, _mm512_permute_ps::<0b01_00_11_10>(four));
    let one = _mm512_add_ps(two, _mm512_permute_ps::<0b10_11_00_01>(two));
    let firsts = _mm512_castps_si512(one);
    let firsts = _mm512_permutexvar_epi32(
        _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        firsts,
    );
    let mut out = [0.0; 4];
    // SAFETY: four f32 are 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(_mm512_castsi512_ps(firsts))) };
    out
}

/// # Safety
/// As `transpose_v4`.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn transpose_v3<T: Sample>(src: &[T], stride: usize, dst: &mut [Line], pitch: usize) {
    for (row, feature) in [(0, 0), (8, 0), (0, 8), (8, 8)] {
        let mut r = [_mm256_setzero_si256(); 8];
        for (j, r) in r.iter_mut().enumerate() {
            let j = row + j;
            // SAFETY: the caller says that the rows are there.
            *r = unsafe {
                let src = src.as_ptr().add(feature);
                match T::FORM {
                    Form::Single => _mm256_loadu_si256(src.add(j * stride).cast()),
                    Form::Widened => {
                        let half = _mm_loadu_si128(src.add(j * stride).cast());
                        _mm256_castps_si256(_mm256_cvtph_ps(half))
                    }
                    Form::Pair => {
                        let early = _mm_loadu_si128(src.add(2 * j * stride).cast());
                        let late = _mm_loadu_si128(src.add((2 * j + 1) * stride).cast());
                        let late = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(late));
                        _mm256_or_si256(_mm256_cvtepu16_epi32(early), late)
                    }
                }
            };
        }
        let mut s = r;
        for i in 0..4 {
            s[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            s[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for b in 0..2 {
            let (p, q) = (4 * b, 4 * b + 2);
            r[p] = _mm256_unpacklo_epi64(s[p], s[q]);
            r[p + 1] = _mm256_unpackhi_epi64(s[p], s[q]);
            r[p + 2] = _mm256_unpacklo_epi64(s[p + 1], s[q + 1]);
            r[p + 3] = _mm256_unpackhi_epi64(s[p + 1], s[q + 1]);
        }
        for c in 0..4 {
            s[c] = _mm256_permute2x128_si256::<0x20>(r[c], r[4 + c]);
            s[4 + c] = _mm256_permute2x128_si256::<0x31>(r[c], r[4 + c]);
        }
        for (f, s) in s.iter().enumerate() {
            // SAFETY: the caller says that the lines are there; half a `Line` is aligned to 32 bytes.
            unsafe {
                let line = dst.as_mut_ptr().add((feature + f) * pitch).cast::<u32>();
                _mm256_store_si256(line.add(row).cast(), *s);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn dots_v3<T: Sample, const N: usize>(y: &[Line], x: [&[Line]; N]) -> [f32; 4] {
    // SAFETY: any 64 bytes are two vectors of 8 f32.
    let halves = |line: &Line| unsafe { std::mem::transmute::<Line, [__m256; 2]>(*line) };
    let mut sums = [[_mm256_setzero_ps(); 2]; 4];
    check_rows(y, &x);
    for j in 0..y.len() {
        let y = halves(&y[j]);
        for (sum, x) in sums.iter_mut().zip(&x) {
            let x = halves(&x[j]);
            for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
                if T::FORM == Form::Pair {
                    *sum = _mm256_fmadd_ps(high256(x), high256(y), *sum);
                    *sum = _mm256_fmadd_ps(low256(x), low256(y), *sum);
                } else {
                    *sum = _mm256_fmadd_ps(x, y, *sum);
                }
            }
        }
    }
    // The order of `lanes::total`.
    let eight = sums.map(|[low, high]| _mm256_add_ps(low, high));
    let fold = |a, b| {
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b)) // four lanes of a, four of b
    };
    let (a, b) = (fold(eight[0], eight[1]), fold(eight[2], eight[3]));
    let two = _mm256_add_ps(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let one = _mm256_add_ps(two, _mm256_permute_ps::<0b10_11_00_01>(two));
    let mut out = [0.0; 8];
    // SAFETY: eight f32 are 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), one) };
    [out[0], out[4], out[2], out[6]]
}

#[inline]
#[target_feature(enable = "avx2")]
fn high256(x: __m256) -> __m256 {
    let mask = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), mask))
}

#[inline]
#[target_feature(enable = "avx2")]
fn low256(x: __m256) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(x)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// The lines of a block and some dot products of them, as bits.
    fn bits<T: Sample>(isa: impl Isa) -> Vec<u32> {
        let stride = 19;
        let src: Vec<T> = (0..stride * T::TOKENS)
            .map(|i| T::from_f32(((i * i) as f32 * 0.37).sin() + i as f32 * 1e-4))
            .collect();
        let mut lines = vec![Line::ZERO; LANES * 3];
        isa.transpose(&src[2..], stride, &mut lines[1..], 3);
        let row = |f: usize| &lines[f..][..5];
        let mut all: Vec<u32> = lines.iter().flat_map(|line| line.0).collect();
        let mut add = |sums: &[f32]| all.extend(sums.iter().map(|x| x.to_bits()));
        add(&isa.dots::<T, 1>(row(0), [row(7)])[..1]);
        add(&isa.dots::<T, 2>(row(1), [row(7), row(30)])[..2]);
        add(&isa.dots::<T, 3>(row(2), [row(7), row(30), row(9)])[..3]);
        add(&isa.dots::<T, 4>(row(3), [row(7), row(30), row(9), row(41)]));
        all
    }

    fn all_agree<T: Sample>() {
        let want = bits::<T>(Plain);
        let (v3, v4, bf16) = found();
        assert!(v3.is_none_or(|isa| bits::<T>(isa) == want));
        assert!(v4.is_none_or(|isa| bits::<T>(isa) == want));
        assert!(bf16.is_none_or(|isa| bits::<T>(isa) == want));
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        all_agree::<f32>();
        all_agree::<bf16>();
        all_agree::<f16>();
    }
}
