//! How elements are packed: a line holds one feature of consecutive tokens, 16 lanes of 32 bits.
use crate::num::Element;
use half::{bf16, f16};

/// Lanes of a line.
pub(super) const LANES: usize = 16;

/// One cache line: 16 tokens of f32, or 32 tokens of bf16, of one feature.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u32; LANES]);

impl Line {
    pub(super) const ZERO: Line = Line([0; LANES]);
}

/// What a lane is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// one f32
    Single,
    /// one f16, widened
    Widened,
    /// two bf16, the earlier token in the low half
    Pair,
}

/// An element type that the product takes.
pub trait Sample: Element {
    /// How it is packed.
    const FORM: Form;
    /// Tokens of a line.
    const TOKENS: usize = match Self::FORM {
        Form::Pair => 2 * LANES,
        _ => LANES,
    };
}

impl Sample for f32 {
    const FORM: Form = Form::Single;
}
impl Sample for f16 {
    const FORM: Form = Form::Widened;
}
impl Sample for bf16 {
    const FORM: Form = Form::Pair;
}

/// Lines of any shape: features `0..width` of `src`, rows `stride` apart, `tokens` of them and zeros
/// after that. Feature f goes to `dst[f * pitch]`.
#[inline(always)]
pub(super) fn pack<T: Sample>(
    src: &[T],
    stride: usize,
    (tokens, width): (usize, usize),
    dst: &mut [Line],
    pitch: usize,
) {
    let bits = |t: usize, f: usize| {
        let x = if t < tokens { src[t * stride + f] } else { T::default() };
        match T::FORM {
            Form::Pair => x.bits() as u32,
            _ => x.to_f32().to_bits(),
        }
    };
    for f in 0..width {
        for (lane, to) in dst[f * pitch].0.iter_mut().enumerate() {
            *to = match T::FORM {
                Form::Pair => bits(2 * lane, f) | bits(2 * lane + 1, f) << 16,
                _ => bits(lane, f),
            };
        }
    }
}

/// `sum + x · y`, lane by lane.
#[inline(always)]
pub(super) fn multiply_add<T: Sample>(sum: &mut [f32; LANES], x: &Line, y: &Line) {
    for ((s, x), y) in sum.iter_mut().zip(x.0).zip(y.0) {
        if T::FORM == Form::Pair {
            let (high, low) =
                (|u: u32| f32::from_bits(u & 0xffff_0000), |u: u32| f32::from_bits(u << 16));
            // Products of two bf16 are exact: this is the fused operation without its instruction.
            *s += high(x) * high(y);
            *s += low(x) * low(y);
        } else {
            *s = f32::from_bits(x).mul_add(f32::from_bits(y), *s);
        }
    }
}

/// The sum of the lanes: halves onto each other, four times.
#[inline(always)]
pub(super) fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
        half /= 2;
    }
    lanes[0]
}
