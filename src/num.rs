//! Element types: loaded wide, computed in f32, stored with one rounding (nearest, ties to even).
use half::{bf16, f16};

/// A float that a weight, a gradient or a score can be stored in.
pub trait Element: Copy + Default + PartialEq + Send + Sync + 'static {
    /// The name that torch gives it, without `torch.`.
    const NAME: &'static str;
    /// Its value as f32 (exact for f16 and bf16; rounded once for f64).
    fn to_f32(self) -> f32;
    /// The nearest value to `x`, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Its bits, zero-extended.
    fn bits(self) -> u64;
    /// A number whose unsigned order is the order of the values: -inf lowest, then finite values with
    /// -0 equal to +0, +inf highest. NaN must be refused before.
    fn key(self) -> u32;
    /// The same for magnitudes: -x and x have one key.
    fn key_abs(self) -> u32;
    /// `key_abs` of infinity; that of NaN is above.
    const INFINITY_KEY: u32;
    /// Whether it is not a number.
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.key_abs() > Self::INFINITY_KEY
    }
}

/// Unsigned order of a signed IEEE 754 pattern of 32 bits; -0 becomes +0.
#[inline(always)]
fn order(bits: u32) -> u32 {
    let bits = if bits == 0x8000_0000 { 0 } else { bits };
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

impl Element for f32 {
    const NAME: &'static str = "float32";
    const INFINITY_KEY: u32 = f32::INFINITY.to_bits();
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
    #[inline(always)]
    fn key(self) -> u32 {
        order(self.to_bits())
    }
    #[inline(always)]
    fn key_abs(self) -> u32 {
        self.to_bits() & 0x7fff_ffff
    }
}

/// An f16 pattern as f32. Without a branch or a call, unlike the conversion of `half`, so that loops
/// become vector code.
#[inline(always)]
fn widen(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff);
    let normal = (magnitude << 13) + (112 << 23); // the exponents' biases differ by 112
    let wide = match magnitude {
        0..0x0400 => (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits(), // subnormal: so many 2^-24
        0x0400..0x7c00 => normal,
        _ => normal + (112 << 23), // infinity and NaN have the highest exponent
    };
    f32::from_bits(wide | u32::from(half & 0x8000) << 16)
}

/// The f16 pattern nearest to `x`, ties to even; also without a branch.
#[inline(always)]
fn narrow(x: f32) -> u16 {
    let magnitude = x.to_bits() & 0x7fff_ffff;
    // Adding a half aligns the last bit of an f16 subnormal with that of the sum, which rounds there.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let odd = magnitude >> 13 & 1;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let half = match magnitude {
        0..0x3880_0000 => subnormal,        // below 2^-14
        0x3880_0000..0x4780_0000 => normal, // below 65536; may round up to infinity
        0x4780_0000..=0x7f80_0000 => 0x7c00,
        _ => 0x7e00,
    };
    half as u16 | (x.to_bits() >> 16) as u16 & 0x8000
}

macro_rules! half_element {
    ($t:ty, $name:literal, $widen:expr, $narrow:expr) => {
        impl Element for $t {
            const NAME: &'static str = $name;
            const INFINITY_KEY: u32 = <$t>::INFINITY.to_bits() as u32;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $widen(self)
            }
            #[inline(always)]
            fn from_f32(x: f32) -> Self {
                $narrow(x)
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                u64::from(self.to_bits())
            }
            #[inline(always)]
            fn key(self) -> u32 {
                order(u32::from(self.to_bits()) << 16)
            }
            #[inline(always)]
            fn key_abs(self) -> u32 {
                u32::from(self.to_bits() & 0x7fff)
            }
        }
    };
}
half_element!(f16, "float16", |x: f16| widen(x.to_bits()), |x| f16::from_bits(narrow(x)));
half_element!(bf16, "bfloat16", bf16::to_f32, bf16::from_f32);

/// A position in a flat tensor: i32 below 2^31 elements, i64 from there on (what torch can store).
pub trait Position: Copy + Ord + Send + Sync + 'static {
    /// As an offset. Negative positions must be refused before.
    fn at(self) -> usize;
    /// From an offset that fits.
    fn new(at: usize) -> Self;
}
impl Position for i32 {
    #[inline(always)]
    fn at(self) -> usize {
        self as usize
    }
    #[inline(always)]
    fn new(at: usize) -> Self {
        at as i32
    }
}
impl Position for i64 {
    #[inline(always)]
    fn at(self) -> usize {
        self as usize
    }
    #[inline(always)]
    fn new(at: usize) -> Self {
        at as i64
    }
}
